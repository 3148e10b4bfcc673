"""Experts in one parameter: each takes the steps that it would take as a layer of its own."""

import pickle

import pytest
import torch
from nets import (
    NORMALIZATIONS,
    Experts,
    assert_equal,
    assert_same_state,
    gradients,
    linear_of,
    loss_of,
    make_batch,
    make_net,
    snapshot,
)
from tolerances import PRODUCT, SAME_STEPS, SOLVE, assert_near, relative_error
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS, attach, reference
from gls_fused.apply.spectral import factor_share
from gls_fused.preconditioner import MOST_MISSES

STEPS, EXPERTS, WIDTH, INNER = 6, 4, 8, 4
OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}
VARIANTS = {
    "dense": {"curvature": "dense", "normalize": "factored"},
    "dense, power 1": {"curvature": "dense", "power": 1, "site": "step"},
    "momentum 0": {"momentum": 0.0, "normalize": "spectral", "spectral_head": True},
    "split": {"split": 2, "normalize": "spectral", "spectral_head": True},
    "weight decay": {"weight_decay": 0.3, "max_change": 0.05, "normalize": "row"},
    "plain step, bounded": {"normalize": "none", "max_change": 0.05, "lr": 5.0},
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "grouped_mm_fallback")


class Model(nn.Module):
    """Experts of transformers below a head, each row with two of them.

    Args:
        kind: "mixtral", "gpt-oss" (turned, with biases) or "nemotron" (without a gate).
        alone: whether every expert is two nn.Linear instead.
        chosen: the experts that rows are routed to; as many rows to each.
    """

    def __init__(self, kind, implementation="eager", *, alone=False, chosen=range(EXPERTS)):
        super().__init__()
        self.experts, self.chosen, self.alone = make_experts(kind), list(chosen), alone
        self.experts.config._experts_implementation = implementation.removesuffix("_fallback")
        self.act = nn.Linear(WIDTH, WIDTH)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.4)
        if alone:
            self.up, self.down = (
                nn.ModuleList(map(linear_of, *parts)) for parts in parts_of(self.experts)
            )
            for p in self.experts.parameters():
                p.requires_grad_(False)

    def forward(self, inputs):
        x, n, chosen = torch.tanh(self.act(inputs)), len(inputs), torch.tensor(self.chosen)
        first = chosen[torch.arange(n) % len(chosen)]
        second = chosen[(torch.arange(n) + 1) % len(chosen)]
        routes, scores = torch.stack([first, second], 1), torch.softmax(inputs[:, :2], 1)
        if not self.alone:
            return self.experts(x, routes, scores)
        outputs = torch.zeros_like(x)
        for expert in set(self.chosen):
            rows, place = torch.where(routes == expert)
            hidden = self.up[expert](x[rows])
            gate = getattr(self.experts, "_apply_gate", None)
            hidden = gate(hidden) if self.experts.has_gate else self.experts.act_fn(hidden)
            own = self.down[expert](hidden) * scores[rows, place, None]
            outputs = outputs.index_add(0, rows, own)
        return outputs


def make_experts(kind):
    small = {"hidden_size": WIDTH, "num_local_experts": EXPERTS, "intermediate_size": INNER}
    if kind == "mixtral":
        module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        return module.MixtralExperts(module.MixtralConfig(**small))
    if kind == "gpt-oss":
        module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
        return module.GptOssExperts(module.GptOssConfig(**small))
    module = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    config = module.NemotronHConfig(
        hidden_size=WIDTH, n_routed_experts=EXPERTS, moe_intermediate_size=INNER
    )
    return module.NemotronHExperts(config)


def parts_of(experts):
    """The matrices [m, k] and biases of the up and of the down projection."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    for name in (up, "down_proj"):
        weights = getattr(experts, name).detach()
        bias = getattr(experts, f"{name}_bias", None)
        weights = weights.mT if experts.is_transposed else weights
        yield weights, [None] * EXPERTS if bias is None else bias.detach()


def make_model(kind, implementation="eager", **options):
    torch.manual_seed(0)
    return Model(kind, implementation, **options).double()


def use_fallback(monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)


def batch_of(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


def train(model, optimizer, seeds):
    for seed in seeds:
        for part in range(2):
            inputs = batch_of(10 * seed + part).to(model.act.weight.dtype)
            (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model)


def matrices_of(model):
    """Of all experts, whichever model it is."""
    if model.alone:
        layers = [*model.up, *model.down]
        return [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    return [
        part
        for weights, biases in parts_of(model.experts)
        for pair in zip(weights, biases, strict=True)
        for part in pair
        if part is not None
    ]


def assert_trains_as_layers(kind, implementation="eager", dtype=torch.float64, **options):
    options = {**OPTIONS, **options}
    models = [make_model(kind, implementation, alone=alone).to(dtype) for alone in (False, True)]
    start = [p.clone() for p in matrices_of(models[0])]
    for model in models:
        optimizer = GLS([p for p in model.parameters() if p.requires_grad], model=model, **options)
        train(model, optimizer, range(STEPS))
    tolerance = SAME_STEPS if dtype == torch.float64 else SOLVE[dtype]
    for p, q, before in zip(*map(matrices_of, models), start, strict=True):
        assert_near(p, q, tolerance)
        assert relative_error(p, before) > 1e-3
    return models[0]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_normalization(backend, normalize):
    options = {"normalize": normalize, **NORMALIZATIONS[normalize]}
    kind = "gpt-oss" if normalize in ("adam", "factored") else "mixtral"
    assert_trains_as_layers(kind, backend=backend, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option(backend, variant):
    assert_trains_as_layers("gpt-oss", backend=backend, **VARIANTS[variant])


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "nemotron"])
def test_every_implementation(monkeypatch, kind, implementation, site):
    dtype = torch.float64
    if implementation == "grouped_mm":
        # torch has no kernel for float64.
        dtype = torch.float32
    elif implementation == "grouped_mm_fallback":
        use_fallback(monkeypatch)
    assert_trains_as_layers(kind, implementation, dtype, normalize="factored", site=site)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_gradients_are_the_plain_models(kind, implementation, dtype):
    """Bit for bit, in steps that gather and in others, under autocast and without."""
    model = make_model(kind, implementation).float()
    optimizer = GLS(model, rank=4, curvature_every=2, site="step")
    train(model, optimizer, range(2))
    for steps in range(2):
        if steps:
            train(model, optimizer, [9])
        found = []
        for watched in (True, False):
            if not watched:
                twin = make_model(kind, implementation).float()
                twin.load_state_dict(model.state_dict())
            each = model if watched else twin
            inputs = batch_of(5).float().requires_grad_()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = each(inputs).square().sum()
            optimizer.zero_grad()
            loss.backward()
            found.append([loss.detach(), inputs.grad, *gradients(each)])
            if watched:
                kept = found[0]
                saw = [layer.sums is not None for layer in experts_of(optimizer)]
                assert saw == [steps == 0] * 2
        assert_equal(kept, found[1])


def experts_of(optimizer):
    return [layer for layer in optimizer._preconditioner.layers if layer.stacked]


def rows_of(experts, inputs, routes):
    """The rows of the up and of the down projection, by expert."""
    found = [], []
    ups, _ = parts_of(experts)
    for expert, (weight, bias) in enumerate(zip(*ups, strict=True)):
        rows = inputs[torch.where(routes == expert)[0]]
        hidden = F.linear(rows, weight, bias)
        found[0].append(rows)
        found[1].append(experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden))
    if experts.has_bias:
        found = [[reference.append_ones(rows) for rows in each] for each in found]
    return found


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm_fallback"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_sketch_is_that_of_the_experts_own_rows(monkeypatch, kind, implementation):
    """With routes that leave an expert out, and give one expert all of its rows twice."""
    if implementation == "grouped_mm_fallback":
        use_fallback(monkeypatch)
    model = make_model(kind, implementation)
    optimizer = GLS(model, rank=3)
    inputs, routes = batch_of(0), torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0]] * 2)
    model.experts(inputs, routes, torch.rand(8, 2).double()).sum().backward()
    for layer, rows in zip(
        experts_of(optimizer), rows_of(model.experts, inputs, routes), strict=True
    ):
        basis = layer.test_matrix
        for own, sums in zip(rows, layer.sums.view(EXPERTS, -1), strict=True):
            y = own @ basis
            moments = [y.T @ y, own.T @ y]
            expected = [
                torch.tensor(len(own)),
                own.square().sum(),
                *(m.T.flatten() for m in moments),
            ]
            assert_near(
                sums, torch.cat([x.view(-1).double() for x in expected]), PRODUCT[torch.float64]
            )
        assert not layer.sums.view(EXPERTS, -1)[2].any()


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_direction_against_brute_force(kind):
    """Of each expert by its own rows; of one that has none yet, by those of all."""
    model = make_model(kind, chosen=[0, 1, 3])
    options = {"curvature": "dense", "damping": 0.3, "power": 1, "curvature_every": 1, "beta": 0.9}
    handle = attach(model, **options)
    twin = make_model(kind, chosen=[0, 1, 3])
    sigmas = {}
    for step in range(3):
        model.chosen = twin.chosen = [[0, 1, 3], [1, 3], [2, 0, 1]][step]
        inputs = batch_of(step, n=7)
        for each in (model, twin):
            each.zero_grad()
            (each(inputs) - inputs).square().mean().backward()
        handle.pre_step()
        n, chosen = len(inputs), torch.tensor(model.chosen)
        routes = torch.stack([chosen[(torch.arange(n) + i) % len(chosen)] for i in (0, 1)], 1)
        rows = rows_of(twin.experts, torch.tanh(twin.act(inputs)).detach(), routes)
        for place, by_expert in enumerate(rows):
            added = [(a.T @ a, len(a)) for a in by_expert]
            total = sum(each[0] for each in added), sum(each[1] for each in added)
            before = dict(sigmas)
            for expert, (gram, count) in enumerate(added):
                key = place, expert
                if step == 0:
                    gram, count = (gram, count) if count else total
                    sigmas[key] = before[key] = gram / count, float(count)
                elif count:
                    sigma, samples = sigmas[key]
                    sigmas[key] = (
                        0.9 * sigma + 0.1 * gram / count,
                        1 / (0.81 / samples + 0.01 / count),
                    )
                assert_direction(model, twin, place, expert, *before[key])
        handle.commit()


def assert_direction(model, twin, place, expert, sigma, samples):
    """D = D0 (Sigma + lambda I)^-1 of one matrix and its bias."""
    found = []
    for each in (model, twin):
        experts = each.experts
        name = ("gate_up_proj", "down_proj")[place]
        gradient = getattr(experts, name).grad[expert]
        gradient = gradient.T if experts.is_transposed else gradient
        if experts.has_bias:
            bias = getattr(experts, f"{name}_bias").grad[expert]
            gradient = torch.cat([gradient, bias[:, None]], dim=1)
        found.append(gradient)
    dim = len(sigma)
    damping = 0.3 * sigma.trace() / min(dim, samples)
    expected = torch.linalg.solve(sigma + damping * torch.eye(dim).double(), found[1], left=False)
    assert_near(found[0], expected, SOLVE[torch.float64])


def test_expert_without_rows_keeps_its_p():
    model = make_model("mixtral")
    optimizer = GLS(model, rank=3, curvature_every=1)
    train(model, optimizer, range(3))
    model.chosen = [0, 1]
    layer = experts_of(optimizer)[0]
    state = optimizer.state[layer.weight]
    before = {key: state[key].clone() for key in layer.curvature.names}
    train(model, optimizer, range(3, 5))
    for key, old in before.items():
        assert torch.equal(state[key][2:], old[2:]), key
        assert all(relative_error(*pair) > 1e-3 for pair in zip(state[key][:2], old, strict=False))


@pytest.mark.parametrize("options", [{}, {"curvature": "dense"}, {"normalize": "adam"}], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_resumes_bit_for_bit(kind, options):
    options = {**OPTIONS, **options}
    model = make_model(kind)
    optimizer = GLS(model, **options)
    train(model, optimizer, range(3))
    weights, saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    train(model, optimizer, range(3, STEPS))
    other = make_model(kind)
    other.load_state_dict(weights)
    resumed = GLS(other, **options)
    resumed.load_state_dict(saved)
    train(other, resumed, range(3, STEPS))
    assert_equal(snapshot(other), snapshot(model))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("normalize", ["factored", "none"])
def test_step_of_an_overflow_changes_nothing(normalize):
    """As the flag of a GradScaler says on the device, in a step that gathers."""
    model = make_model("gpt-oss")
    optimizer = GLS(model, **{**OPTIONS, "normalize": normalize})
    train(model, optimizer, range(2))
    weights, state = snapshot(model), pickle.loads(pickle.dumps(optimizer.state_dict()["state"]))
    optimizer.grad_scale, optimizer.found_inf = torch.ones(2).unbind()
    train(model, optimizer, [2])
    assert_equal(snapshot(model), weights)
    for key, old in state.items():
        found = optimizer.state_dict()["state"][key]
        for name, value in old.items():
            assert_equal([torch.as_tensor(found[name])], [torch.as_tensor(value)])
    optimizer.found_inf = torch.zeros(())
    train(model, optimizer, [2])
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert set(map(float, steps)) == {3.0}
    assert all(map(torch.any, map(torch.ne, snapshot(model), weights)))


def test_another_number_of_experts_is_refused():
    model = make_net("experts")
    optimizer = GLS(model, **OPTIONS)
    loss_of(model, make_batch("mlp", 9, 0)).backward()
    optimizer.step()
    other = make_net("experts")
    for name in ("up_proj", "down_proj"):
        setattr(other.first, name, nn.Parameter(torch.randn(3, 8, 8).double()))
    with pytest.raises(ValueError, match=r"first.up_proj.*expected exp_avg \[3, 8, 8\]"):
        GLS(other, **OPTIONS).load_state_dict(optimizer.state_dict())


def test_orthogonal_factor_counts_once_for_each_expert():
    model = make_model("mixtral")
    optimizer = GLS(model)
    stack = experts_of(optimizer)[0]
    single = next(layer for layer in optimizer._preconditioner.layers if not layer.stacked)
    assert (stack.outputs, stack.size) == (single.outputs, single.size) == (8, 8)
    assert factor_share(stack, 100, 1) == EXPERTS * factor_share(single, 100, 1)


def test_report_and_diagnostics():
    model = make_model("gpt-oss")
    optimizer = GLS(model, rank=3)
    train(model, optimizer, range(2))
    report = optimizer.report()
    assert "experts.gate_up_proj: GLS (Experts 4 x 9 -> 8, 32 rows, rank 3" in report
    assert "share covered: 100.0%" in report
    numbers = optimizer.diagnostics()
    state = optimizer.state[model.experts.down_proj]
    assert numbers["experts.down_proj/trace"] == pytest.approx(float(state["trace"].mean()))
    assert 0 < numbers["experts.down_proj/captured"] <= 1


def test_products_that_are_not_seen_are_reported():
    """Those of a kernel of its own, whose gradient comes all the same."""

    class Fused(Experts):
        def forward(self, inputs):
            return inputs + torch.einsum("nk,emk->nm", inputs, self.up_proj)

    model = Fused(8).double()
    model.down_proj.requires_grad_(False)
    optimizer = GLS([model.up_proj], model=model)
    for seed in range(MOST_MISSES + 1):
        model(batch_of(seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "up_proj: Adam (its products are of a kind that is not seen)" in (optimizer.report())


def steps_of(kind, implementation, dtype, run, **options):
    torch._dynamo.reset()
    model = make_model(kind, implementation).to(dtype)
    optimizer = GLS(model, **OPTIONS, **options)
    forward = run(model)
    for seed in range(STEPS):
        for part in range(2):
            forward(batch_of(10 * seed + part).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model), optimizer


def assert_all_near(actual, expected, dtype):
    tolerance = SAME_STEPS if dtype == torch.float64 else SOLVE[dtype]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs, tolerance)


def in_one_graph(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("kind", "implementation", "options"),
    [
        ("gpt-oss", "grouped_mm", {}),
        pytest.param("mixtral", "batched_mm", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", "grouped_mm_fallback", {}, marks=pytest.mark.slow),
        pytest.param("gpt-oss", "batched_mm", {"curvature": "dense"}, marks=pytest.mark.slow),
        pytest.param("nemotron", "grouped_mm", {"site": "step"}, marks=pytest.mark.slow),
    ],
)
def test_steps_in_a_graph_are_those_of_eager(monkeypatch, kind, implementation, options):
    if implementation == "grouped_mm_fallback":
        use_fallback(monkeypatch)
    # torch has no grouped product of float64.
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    expected, _ = steps_of(kind, implementation, dtype, lambda model: model, **options)
    steps, optimizer = steps_of(kind, implementation, dtype, in_one_graph, **options)
    assert_all_near(steps, expected, dtype)
    assert "Adam (its" not in optimizer.report()


@pytest.mark.slow
# torch's own, of inputs that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_loop_over_experts_breaks_the_graph_and_is_seen():
    expected, _ = steps_of("mixtral", "eager", torch.float64, lambda model: model)
    run = lambda model: torch.compile(model, backend="aot_eager")  # noqa: E731
    steps, optimizer = steps_of("mixtral", "eager", torch.float64, run)
    assert_all_near(steps, expected, torch.float64)
    assert "Adam (its" not in optimizer.report()


@pytest.mark.slow
def test_backward_site_in_a_graph_takes_adams_update():
    _, optimizer = steps_of("mixtral", "batched_mm", torch.float64, in_one_graph, site="backward")
    assert "experts.down_proj: Adam (its products are of a kind that is not seen)" in (
        optimizer.report()
    )
