"""torch.compile: the same steps as eager, in whole graphs, of which there are few."""

import copy
import functools
import gc
import itertools
import pickle
import re
import weakref

import pytest
import torch
from nets import CONVOLUTIONS, KINDS, gradients, loss_of, make_batch, make_net, snapshot
from tolerances import PRODUCT, SAME_STEPS, assert_near, relative_error
from torch import nn
from torch._dynamo.utils import counters

from gls_fused import GLS, attach
from gls_fused.capture.layer import OWNED

# One at step 0, one for steps that gather rows, one for those that do not.
GRAPHS = 3
OPTIONS = {"rank": 4, "curvature_every": 3}


# Dynamo's own, of a result of one graph that enters another.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(kind, dtype, step, n=5):
    return tuple(x.to(dtype) for x in make_batch(kind, n, step))


def one_backward(net, optimizer, step, batch):
    loss_of(net, batch(step)).backward()


def backward_of_two_calls(net, optimizer, step, batch):
    """And rows forgotten between forward and backward."""
    loss = loss_of(net, batch(step)) + loss_of(net, batch(step + 50))
    optimizer.zero_grad()
    loss.backward()


def micro_batches(net, optimizer, step, batch):
    """Of which the last runs outside the graph."""
    one_backward(net, optimizer, step, batch)
    one_backward(net, optimizer, step + 50, batch)
    one_backward(getattr(net, "_orig_mod", net), optimizer, step + 100, batch)


def batches_of_many_sizes(net, optimizer, step, batch):
    loss_of(net, batch(step, n=5 + step * 7 % 30)).backward()


def backward_under_autocast(net, optimizer, step, batch, dtype):
    inputs, targets = batch(step)
    with torch.autocast("cpu", dtype):
        (net(inputs) - targets).square().mean().backward()


def train(net, optimizer, kind, *, dtype=torch.float64, feed=one_backward, steps=20):
    for step in range(steps):
        optimizer.zero_grad()
        feed(net, optimizer, step, lambda seed, n=5: batch_of(kind, dtype, seed, n))
        optimizer.step()


def assert_trains_as_eager(
    kind, tolerance, compiler="aot_eager", *, recompute=None, dtype=torch.float64,
    feed=one_backward, graphs=GRAPHS, **options,
):  # fmt: skip
    eager, model = (make_net(kind, recompute=recompute).to(dtype) for _ in range(2))
    start = snapshot(eager)
    expected, optimizer = (GLS(net, **OPTIONS, **options) for net in (eager, model))
    train(eager, expected, kind, dtype=dtype, feed=feed)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    train(compiled, optimizer, kind, dtype=dtype, feed=feed)
    for p, q, before in zip(model.parameters(), eager.parameters(), start, strict=True):
        assert_near(p, q, tolerance)
        assert relative_error(before, q) > tolerance
    # It has the rows of every layer; p.grad keeps the gradient where a graph has left it there.
    reports = [re.sub(r"site \w+", "", run.report()) for run in (optimizer, expected)]
    assert reports[0] == reports[1]
    assert "no rows yet" not in reports[0]
    assert not counters["graph_break"]
    assert GRAPHS <= counters["stats"]["unique_graphs"] <= graphs


def crossed(names, others, *quick):
    """All pairs; a graph takes a second, so that all but those named are slow."""
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow)
        for pair in itertools.product(names, others)
    ]


SITES = [("subspace", "step"), ("subspace", "backward"), ("dense", "step"), ("dense", "backward")]


@pytest.mark.parametrize(
    ("kind", "options"),
    crossed(
        [*KINDS, "turned"],
        SITES,
        ("mlp", SITES[1]),
        ("mlp", SITES[2]),
        ("cnn", SITES[0]),
        ("cnn", SITES[3]),
        ("turned", SITES[1]),
    ),
)
def test_steps_are_those_of_eager(kind, options):
    curvature, site = options
    assert_trains_as_eager(kind, SAME_STEPS, curvature=curvature, site=site)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=() if k in ("grouped", "transposed") else pytest.mark.slow)
        for k in CONVOLUTIONS
    ],
)
def test_other_convolutions(kind):
    assert_trains_as_eager(kind, SAME_STEPS, site="backward")


def wide_net(kind):
    """So few rows that "auto" takes the backward site."""
    torch.manual_seed(0)
    if kind == "mlp":
        layers = nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    else:
        convs = nn.Conv2d(2, 64, 3), nn.Tanh(), nn.Conv2d(64, 512, 3)
        layers = *convs, nn.Tanh(), nn.Flatten(), nn.Linear(2048, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_after_some_steps(kind):
    """A graph leaves the gradient in p.grad where eager leaves the direction."""
    models = [wide_net(kind) for _ in range(2)]
    for model in models:
        optimizer = GLS(model, curvature_every=4, lr=0.01)
        run = model
        for step in range(9):
            if step == 2 and model is models[0]:
                assert "site backward" in optimizer.report()
                run = torch.compile(model, fullgraph=True, backend="aot_eager")
            optimizer.zero_grad()
            loss_of(run, batch_of(kind, torch.float64, step)).backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend(backend, kind):
    assert_trains_as_eager(kind, SAME_STEPS, backend=backend)


@pytest.mark.parametrize(
    ("kind", "feed"),
    crossed(
        KINDS,
        (backward_of_two_calls, micro_batches),
        ("mlp", backward_of_two_calls),
        ("cnn", micro_batches),
    ),
)
def test_rows_of_several_calls_add_up(kind, feed):
    assert_trains_as_eager(kind, SAME_STEPS, feed=feed)


@pytest.mark.parametrize(
    ("kind", "recompute"),
    crossed(KINDS, ("reentrant", "saved"), ("mlp", "reentrant"), ("mlp", "saved")),
)
def test_rows_count_once_under_checkpointing(kind, recompute):
    assert_trains_as_eager(kind, SAME_STEPS, recompute=recompute)


def test_batches_of_many_sizes():
    """Each graph once for the first size, and once for all others."""
    assert_trains_as_eager("mlp", SAME_STEPS, feed=batches_of_many_sizes, graphs=2 * GRAPHS)


@pytest.mark.parametrize(
    ("kind", "how"),
    crossed(
        KINDS,
        [*itertools.product(("auto", "reference"), (torch.bfloat16, torch.float16))],
        ("mlp", ("reference", torch.bfloat16)),
        ("mlp", ("auto", torch.float16)),
        ("cnn", ("auto", torch.bfloat16)),
    ),
    ids=str,
)
def test_autocast(kind, how):
    """The same casts; the statistics stay in float32."""
    backend, low = how
    feed = functools.partial(backward_under_autocast, dtype=low)
    # One site for both, as A P is rounded to 16 bits and D0 P is not; outside of a graph that of a
    # convolution's backward is formed in float32.
    site = "backward" if kind == "mlp" else "step"
    options = {"dtype": torch.float32, "feed": feed, "backend": backend, "site": site}
    assert_trains_as_eager(kind, PRODUCT[torch.float32], **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind, dtype):
    assert_trains_as_eager(kind, PRODUCT[dtype], "inductor", dtype=dtype)


@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="torch 2.11's graphs give a thawed weight no gradient"
)
def test_thawed_layer_shows_its_rows_at_once():
    found = []
    for compiles in (False, True):
        model = make_net("mlp")
        first = next(module for module in model.modules() if isinstance(module, nn.Linear))
        first.requires_grad_(False)
        optimizer = GLS(model, lr=0.01, site="step", **OPTIONS)
        net = torch.compile(model, backend="aot_eager") if compiles else model
        for step in range(6):
            if step == 2:
                first.requires_grad_(True)
            optimizer.zero_grad()
            loss_of(net, make_batch("mlp", 9, step)).backward()
            optimizer.step()
            if step == 2:
                assert optimizer.state[first.weight]["rows"] == 9
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert_near(found[1], found[0], SAME_STEPS)


def test_parts_that_were_compiled_before():
    """Regional compilation: what torch.compile makes of a module has no truth value."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    parts = copy.deepcopy(plain)
    for place in (0, 2):
        parts[place] = torch.compile(parts[place], backend="aot_eager")
    found = []
    for model in (plain, parts):
        optimizer = GLS(model, site="step", **OPTIONS)
        assert "share covered: 100.0%" in optimizer.report()
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(9, 8, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(inputs) - 1).square().mean().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert_near(found[1], found[0], SAME_STEPS)


def test_layers_of_one_shape_share_their_graphs():
    """Of more layers than Dynamo allows graphs for one function."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    optimizer = GLS(model, **OPTIONS)
    for layer in model:
        layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(8):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # The first layer's inputs need no gradient.
    assert counters["stats"]["unique_graphs"] <= 2 * GRAPHS
    assert "no rows yet" not in optimizer.report()


def gls(model):
    return GLS(model, **OPTIONS)


def sgd_on_directions(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    attach(model, optimizer, **OPTIONS)
    return optimizer


@pytest.mark.parametrize("compiled", ["step", "loop"])
@pytest.mark.parametrize("make", [gls, sgd_on_directions])
def test_step_in_a_compiled_region(make, compiled):
    """It runs as it is: the graphs around it stay as many as without it."""
    models = [make_net("mlp") for _ in range(2)]
    optimizers = [make(model) for model in models]

    def loop_of(model, optimizer, step):
        def loop(batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            step()
            return loss

        return loop

    steps = [optimizer.step for optimizer in optimizers]
    if compiled == "step":
        steps[1] = torch.compile(steps[1], backend="aot_eager")
    loops = list(map(loop_of, models, optimizers, steps))
    if compiled == "loop":
        loops[1] = torch.compile(loops[1], backend="aot_eager")
    for step in range(12):
        expected, found = (loop(make_batch("mlp", 5, step)) for loop in loops)
        assert_near(found, expected, SAME_STEPS)
    for p, q in zip(*map(snapshot, models), strict=True):
        assert_near(q, p, SAME_STEPS)
    # torch's own SGD is traced, at its first step and at others.
    own = 0 if make is gls else 2
    assert counters["stats"]["unique_graphs"] <= own + (GRAPHS if compiled == "loop" else 0)


def test_detached_model_gives_the_true_gradient():
    model, plain = make_net("mlp"), make_net("mlp")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = GLS(model, site="backward", **OPTIONS)
    train(compiled, optimizer, "mlp", steps=2)
    optimizer.detach()
    optimizer.zero_grad()
    plain.load_state_dict(model.state_dict())
    for net in (compiled, plain):
        loss_of(net, make_batch("mlp", 5, 9)).backward()
    for p, q in zip(gradients(model), gradients(plain), strict=True):
        assert_near(p, q, SAME_STEPS)


def test_evaluation_leaves_no_rows():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(make_batch("mlp", 7, 1)[0])
    compiled(make_batch("mlp", 7, 1)[0])
    one_backward(compiled, optimizer, 0, lambda seed: make_batch("mlp", 5, seed))
    optimizer.step()
    assert optimizer.state[model.stem.weight]["rows"] == 5


def test_rows_count_when_gradients_are_left_on_the_parameters():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.autograd.grad(loss_of(compiled, make_batch("mlp", 7, 1)), list(model.parameters()))
    loss_of(compiled, make_batch("mlp", 5, 0)).backward()
    optimizer.step()
    assert optimizer.state[model.stem.weight]["rows"] == 5


def drop(net, batch, set_to_none):
    for seed in range(2):
        loss_of(net, tuple(50 * x for x in batch(90 + seed))).backward()
        getattr(net, "_orig_mod", net).zero_grad(set_to_none)


def drop_between_passes(net, optimizer, step, batch, set_to_none):
    one_backward(net, optimizer, step, batch)
    drop(net, batch, set_to_none)
    one_backward(net, optimizer, step, batch)
    one_backward(net, optimizer, step + 50, batch)


def drop_rows_of_both_kinds(net, optimizer, step, batch, set_to_none):
    """In and out of a graph, and a gradient that stays and is scaled."""
    plain = getattr(net, "_orig_mod", net)
    one_backward(net, optimizer, step, batch)
    drop(plain, batch, set_to_none)
    one_backward(net, optimizer, step, batch)
    for p in plain.parameters():
        p.grad = p.grad / 3
    one_backward(plain, optimizer, step + 50, batch)
    one_backward(net, optimizer, step + 100, batch)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("feed", [drop_between_passes, drop_rows_of_both_kinds])
def test_rows_of_a_dropped_gradient_are_forgotten(feed, set_to_none):
    feed = functools.partial(feed, set_to_none=set_to_none)
    assert_trains_as_eager("mlp", SAME_STEPS, feed=feed)


def test_dropped_rows_of_an_attached_optimizer():
    traces = []
    for drops in (False, True):
        model = make_net("mlp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
        handle = attach(model, optimizer, rank=4, curvature_every=1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for step in range(4):
            if drops:
                drop(compiled, lambda seed: make_batch("mlp", 5, seed), True)
            loss_of(compiled, make_batch("mlp", 5, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = handle.state_dict()["layers"].values()
        traces.append(torch.stack([state["trace"] for state in layers]))
    assert_near(*traces, SAME_STEPS)


def test_optimizer_of_a_compiled_model_is_freed_without_the_cycle_collector():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_of(compiled, make_batch("mlp", 5, 0)).backward()
    # Its graph lives on, and with it what the sums of its rows would go to.
    loss = loss_of(compiled, make_batch("mlp", 5, 1))
    layer = weakref.ref(optimizer._preconditioner.layers[0])
    gc.disable()
    try:
        del optimizer
        assert layer() is None
    finally:
        gc.enable()
    loss.backward()


@pytest.mark.parametrize(
    "graphs",
    [
        "eager",
        pytest.param(
            "aot_eager",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.11", reason="torch 2.9 breaks this graph inside of vmap"
            ),
        ),
    ],
)
def test_vmap_in_a_graph(graphs):
    """It shows no rows, and the report says so; where P is to apply in the backward, torch does."""
    model, twin = make_net("mlp"), make_net("mlp")
    optimizer = GLS(model, **OPTIONS, site="step")
    mapped = torch.compile(torch.func.vmap(model), backend=graphs)
    inputs, _ = make_batch("mlp", 5, 0)
    mapped(inputs[:, None]).square().sum().backward()
    torch.func.vmap(twin)(inputs[:, None]).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(p.grad, q.grad, SAME_STEPS)
    for _ in range(3):
        optimizer.step()
        mapped(inputs[:, None]).square().sum().backward()
    assert "stem: Adam (torch.func transforms its module in a compiled graph)" in optimizer.report()
    optimizer.detach()
    if graphs == "eager":
        optimizer = GLS(model, **OPTIONS, site="backward")
        train(model, optimizer, "mlp", steps=2)
        with pytest.raises(RuntimeError, match=r"atching rule .*gls_fused::traced_linear"):
            torch.compile(torch.func.vmap(model), backend=graphs)(inputs[:, None])


def test_functional_gradient_in_a_graph_is_the_true_one():
    model, plain = make_net("mlp"), make_net("mlp")
    optimizer = GLS(model, site="backward", **OPTIONS)
    train(model, optimizer, "mlp", steps=2)
    plain.load_state_dict(model.state_dict())
    batch = make_batch("mlp", 5, 3)

    def gradient_of(net):
        def loss(params):
            return (torch.func.functional_call(net, params, batch[0]) - batch[1]).square().mean()

        return torch.func.grad(loss)

    params = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.compile(gradient_of(model), backend="aot_eager")(params)
    for name, wanted in gradient_of(plain)(params).items():
        assert_near(found[name], wanted, SAME_STEPS)
    before = snapshot(model)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(snapshot(model), before, strict=True))


def other_weight(model):
    return {"weight": torch.full_like(model[0].weight, 0.1).requires_grad_()}


def other_bias(model):
    return {"bias": torch.full_like(model[0].bias, 0.1).requires_grad_()}


FOREIGN = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (6, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh()), (3, 2, 5, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Tanh()), (3, 2, 5)),
}


def begin(make, site, compiles):
    """A model with its optimizer, and what it is called by."""
    torch.manual_seed(0)
    model = make().double()
    optimizer = GLS(model, site=site, rank=3, curvature_every=1)
    return model, optimizer, torch.compile(model, backend="aot_eager") if compiles else model


def inputs_of(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("how", ["replaced", "functional_call"])
@pytest.mark.parametrize("change", [other_weight, other_bias])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_parameters_of_others_in_a_graph_keep_their_gradient(kind, site, change, how):
    """In a step of the captured ones, whose rows theirs are not."""
    make, shape = FOREIGN[kind]
    found = []
    for compiles in (True, False):
        model, optimizer, call = begin(make, site, compiles)
        for seed in range(3):
            optimizer.zero_grad()
            inputs = inputs_of(shape, seed)
            call(inputs).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        others = change(model)
        given = {f"0.{name}": tensor for name, tensor in others.items()}
        if how == "replaced":
            for name, tensor in others.items():
                others[name] = nn.Parameter(tensor.detach())
                setattr(model[0], name, others[name])
            given = {}

        def loss(given=given, model=model, inputs=inputs):
            return torch.func.functional_call(model, given, (inputs,)).square().sum()

        (torch.compile(loss, backend="aot_eager") if compiles else loss)().backward()
        plain = make().double()
        plain.load_state_dict(own, strict=True)
        for name, tensor in others.items():
            getattr(plain[0], name).data.copy_(tensor.detach())
        plain(inputs).square().sum().backward()
        for name, tensor in others.items():
            assert_near(tensor.grad, getattr(plain[0], name).grad, SAME_STEPS)
        optimizer.step()
        traces = [state["trace"] for state in optimizer.state.values() if "trace" in state]
        found.append([*snapshot(model), *traces])
    for compiled, eager in zip(*found, strict=True):
        assert_near(compiled, eager, SAME_STEPS)


def by_another_optimizer(make, model):
    return GLS(make().double(), rank=3)._membership.model


def of_a_pickle(make, model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 0)], ids=["own first", "other first"])
@pytest.mark.parametrize("twin", [by_another_optimizer, of_a_pickle])
@pytest.mark.parametrize("site", ["step", "backward"])
def test_parameters_of_a_twin_are_others(site, twin, order):
    """Which are captured too, or were when they were saved; so with an optimizer built anew."""
    make, shape = FOREIGN["linear"]
    found = []
    for compiles in (True, False):
        model, earlier, _ = begin(make, site, compiles=False)
        optimizer = GLS(model, site=site, rank=3, curvature_every=1)
        del earlier
        gc.collect()
        other = twin(make, model)

        def loss(params, inputs, model=model):
            return torch.func.functional_call(model, params, (inputs,)).square().sum()

        call = torch.compile(loss, backend="aot_eager") if compiles else loss
        whose = [dict(each.named_parameters()) for each in (model, other)]
        results = []
        for seed, who in enumerate((0, *order)):
            optimizer.zero_grad()
            (call if seed else loss)(whose[who], inputs_of(shape, seed)).backward()
            results += [p.grad.clone() for p in whose[who].values()]
            optimizer.step()
            states = optimizer.state.values()
            results += [state["trace"].clone() for state in states if "trace" in state]
        found.append(results)
    for compiled, eager in zip(*found, strict=True):
        assert_near(compiled, eager, SAME_STEPS)


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 0)], ids=["own first", "other first"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_own_parameter_is_put_back(kind, site, name, order):
    """A graph that was traced without the layer is not taken again then."""
    make, shape = FOREIGN[kind]
    found = []
    for compiles in (True, False):
        model, optimizer, call = begin(make, site, compiles)
        own, layer = getattr(model[0], name), optimizer._preconditioner.layers[0]
        results = []
        for seed, other in enumerate((0, *order)):
            optimizer.zero_grad()
            now = nn.Parameter(torch.full_like(own, 0.1)) if other else own
            setattr(model[0], name, now)
            inputs = inputs_of(shape, seed)
            # P is there for all but the first, which is eager.
            (call if seed else model)(inputs).square().sum().backward()
            results.append(now.grad.clone())
            optimizer.step()
            results.append(optimizer.state[layer.weight]["trace"].clone())
        found.append(results)
        optimizer.detach()
        assert not any(OWNED in vars(p) for p in model.parameters())
    for compiled, eager in zip(*found, strict=True):
        assert_near(compiled, eager, SAME_STEPS)
