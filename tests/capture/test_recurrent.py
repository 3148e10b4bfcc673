"""nn.RNN, nn.LSTM, nn.GRU and their cells: the rows of every weight, written out step by step."""

import copy
import pickle

import pytest
import torch
from nets import assert_equal, assert_same_state, gradients, snapshot
from tolerances import SAME_STEPS, SOLVE, assert_near, relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from gls_fused import GLS, attach
from gls_fused.capture import recurrent
from gls_fused.preconditioner import MOST_MISSES

INPUTS, HIDDEN, STEPS, BATCH = 3, 4, 4, 4
OPTIONS = {"rank": 3, "curvature_every": 2, "lr": 0.01}
# Dense and of power 1, so that P can be written down; D itself is averaged.
BARE = {
    "lr": 1e-4,
    "normalize": "none",
    "momentum": 0.5,
    "max_change": None,
    "curvature": "dense",
    "curvature_every": 1,
    "damping": 0.3,
    "power": 1,
}
DEEP = {"num_layers": 2, "bidirectional": True}


class Net(nn.Module):
    """A recurrent module and a head on its outputs and last states.

    Args:
        lengths: of the sequences, which are then packed.
        given: whether it gets its first states.
        how: how it is checkpointed.
    """

    def __init__(self, module, lengths=None, given=False, how=None, unbatched=False):
        super().__init__()
        self.inner, self.lengths, self.given, self.how = module, lengths, given, how
        self.unbatched = unbatched
        self.head = nn.LazyLinear(2)

    def states(self):
        """The first ones, [layers, batch, h], learned by nobody."""
        rnn = self.inner
        count = rnn.num_layers * (1 + rnn.bidirectional)
        generator = torch.Generator().manual_seed(7)
        sizes = [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 1 + (rnn.mode == "LSTM")]
        shape = (count, BATCH)
        found = [torch.randn(*shape, n, generator=generator, dtype=torch.float64) for n in sizes]
        found = found if self.given else [torch.zeros_like(x) for x in found]
        return tuple(found) if len(found) > 1 else found[0]

    def forward(self, x):
        """Of x [steps, batch, k]."""
        rnn = self.inner
        if isinstance(rnn, nn.RNNCellBase):
            return self.head(self.take_steps(x))
        states = self.states() if self.given else None
        if self.lengths is not None:
            x = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        elif rnn.batch_first:
            x = x.transpose(0, 1)
        elif self.unbatched:
            x = x[:, 0]

        def call(x):
            outputs, last = rnn(x, states)
            return outputs, last[0] if isinstance(last, tuple) else last

        if self.how is None:
            outputs, last = call(x)
        else:
            outputs, last = checkpoint(call, x, use_reentrant=self.how == "reentrant")
        if self.lengths is not None:
            outputs = pad_packed_sequence(outputs)[0]
        return self.head(outputs).sum() + last.square().sum()

    def take_steps(self, x):
        state, found = None, []
        for inputs in x:
            state = self.inner(inputs, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found)


LENGTHS = torch.tensor([2, 4, 1, 4])
MODELS = {
    "lstm": lambda: Net(nn.LSTM(INPUTS, HIDDEN)),
    "gru": lambda: Net(nn.GRU(INPUTS, HIDDEN), given=True),
    "tanh": lambda: Net(nn.RNN(INPUTS, HIDDEN, bias=False, num_layers=3)),
    "relu": lambda: Net(nn.RNN(INPUTS, HIDDEN, nonlinearity="relu"), unbatched=True),
    "deep lstm": lambda: Net(nn.LSTM(INPUTS, HIDDEN, batch_first=True, **DEEP), given=True),
    "deep gru": lambda: Net(nn.GRU(INPUTS, HIDDEN, **DEEP)),
    "projections": lambda: Net(nn.LSTM(INPUTS, HIDDEN, proj_size=2, **DEEP), given=True),
    "packed lstm": lambda: Net(nn.LSTM(INPUTS, HIDDEN, **DEEP), LENGTHS, given=True),
    "packed gru": lambda: Net(nn.GRU(INPUTS, HIDDEN), LENGTHS),
    "packed tanh": lambda: Net(nn.RNN(INPUTS, HIDDEN, **DEEP), LENGTHS, given=True),
    "lstm cell": lambda: Net(nn.LSTMCell(INPUTS, HIDDEN)),
    "gru cell": lambda: Net(nn.GRUCell(INPUTS, HIDDEN)),
    "cell": lambda: Net(nn.RNNCell(INPUTS, HIDDEN)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    # Torch's, of a kernel that is not used.
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
]


def make_model(name, **options):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    model(inputs_of(0))
    for key, value in options.items():
        setattr(model, key, value)
    return model


def inputs_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, BATCH, INPUTS, generator=generator, dtype=torch.float64)


def loss_of(model, seed):
    return (model(inputs_of(seed)) - 1).square().mean()


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
    return snapshot(model)


# ---- one sequence at a time, from torch's documentation ------------------------------------------


def take_step(rnn, params, x, h, c):
    """The next states of one sequence, from the equations."""
    part_x, part_h = params["ih"] @ x, params["hh"] @ h
    if rnn.bias:
        part_x, part_h = part_x + params["bias_ih"], part_h + params["bias_hh"]
    kind = type(rnn).__name__.removesuffix("Cell")
    if kind == "LSTM":
        i, f, g, o = (part_x + part_h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (params["hr"] @ h if "hr" in params else h), c
    if kind == "GRU":
        (rx, zx, nx), (rh, zh, nh) = part_x.chunk(3), part_h.chunk(3)
        z = (zx + zh).sigmoid()
        return (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh() + z * h, None
    return getattr(part_x + part_h, rnn.nonlinearity)() if c is None else None, None


def rows_of(model, x):
    """The outputs, and the rows of every weight by its name."""
    rnn, found = model.inner, {}
    cell = isinstance(rnn, nn.RNNCellBase)
    layers, directions = (1, 1) if cell else (rnn.num_layers, 1 + rnn.bidirectional)
    lengths = [STEPS] * BATCH if model.lengths is None else model.lengths.tolist()
    if model.unbatched:
        lengths = lengths[:1]
    states = None if cell else model.states()
    sequences = [x[:length, n] for n, length in enumerate(lengths)]
    for layer in range(layers):
        outputs = [[] for _ in sequences]
        for direction in range(directions):
            suffix = "" if cell else f"_l{layer}" + "_reverse" * direction
            names = {key: f"weight_{key}{suffix}" for key in ("ih", "hh", "hr")}
            names |= {key: f"{key}{suffix}" for key in ("bias_ih", "bias_hh")}
            params = {key: getattr(rnn, n) for key, n in names.items() if hasattr(rnn, n)}
            for n, sequence in enumerate(sequences):
                h, c = torch.zeros(2, HIDDEN, dtype=x.dtype)
                if isinstance(states, tuple):
                    h, c = (s[layer * directions + direction, n] for s in states)
                elif states is not None:
                    h = states[layer * directions + direction, n]
                if "RNN" in type(rnn).__name__:
                    c = None
                steps, taken = range(len(sequence)), {}
                for t in reversed(steps) if direction else steps:
                    found.setdefault(names["ih"], []).append(sequence[t].detach())
                    found.setdefault(names["hh"], []).append(h.detach())
                    h, c = take_step(rnn, params, sequence[t], h, c)
                    taken[t] = h
                outputs[n].append(torch.stack([taken[t] for t in steps]))
        sequences = [torch.cat(parts, -1) for parts in outputs]
    return sequences, {key: torch.stack(rows) for key, rows in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_written_out_it_computes_the_same(name):
    """So that the rows are those of the module."""
    model = make_model(name)
    x = inputs_of(1)
    found = []
    if "cell" in name:
        found = model.take_steps(x).unbind(1)
    else:
        handle = model.inner.register_forward_hook(lambda *args: found.append(args[2][0]))
        model(x)
        handle.remove()
        (found,) = found
        if model.lengths is not None:
            found, lengths = pad_packed_sequence(found)
            found = [found[:length, n] for n, length in enumerate(lengths)]
        elif model.unbatched:
            found = [found]
        else:
            found = found.unbind(0 if model.inner.batch_first else 1)
    for ours, theirs in zip(rows_of(model, x)[0], found, strict=True):
        assert_near(ours, theirs, SAME_STEPS)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("name", MODELS)
def test_directions_are_those_of_the_rows(name, site):
    model, plain = make_model(name), make_model(name)
    optimizer = GLS(model, site=site, **BARE)
    layers = [each for each in optimizer._preconditioner.layers if each.name != "head"]
    assert len(layers) == sum(
        "_ih" in key or "_hh" in key for key in rows_of(model, inputs_of(0))[1]
    )
    averages, grams = {}, {}
    for seed in range(2):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        optimizer.zero_grad()
        for net in (model, plain):
            loss_of(net, seed).backward()
        left = {param: param.grad for layer in layers for param in layer.params}
        left = {param: gradient.clone() for param, gradient in left.items()}
        rows = rows_of(model, inputs_of(seed))[1]
        optimizer.step()
        for layer in layers:
            a = rows[layer.weight_key]
            if layer.ones:
                a = torch.cat([a, a.new_ones(len(a), 1)], 1)
            if seed == 0:
                grams[layer] = a.T @ a / len(a)
            gram, d = grams[layer], a.shape[1]
            damping = 0.3 * gram.trace() / min(d, len(a))
            p = torch.linalg.inv(gram + damping * torch.eye(d, dtype=a.dtype))
            theirs = [getattr(plain.inner, layer.weight_key).grad]
            if layer.ones:
                theirs.append(getattr(plain.inner, layer.bias_key).grad[:, None])
            sought = (torch.cat(theirs, 1) @ p).split([x.shape[1] for x in theirs], 1)
            for param, direction in zip(layer.params, sought, strict=True):
                direction = direction.reshape(param.shape)
                averages[param] = 0.5 * averages.get(param, 0) + 0.5 * direction
                assert_near(optimizer.state[param]["exp_avg"], averages[param], SOLVE[a.dtype])
                if site == "backward" and seed:
                    assert_near(left[param], direction, SOLVE[a.dtype])
            if seed:
                grams[layer] = 0.9 * gram + 0.1 * a.T @ a / len(a)
            assert_near(optimizer.state[layer.weight]["gram"], grams[layer], SOLVE[a.dtype])


# ---- what the module computes --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_plain_models(name, dtype):
    model, plain = make_model(name).to(dtype), make_model(name).to(dtype)
    optimizer = GLS(model, site="step", **OPTIONS)
    for seed in range(4):
        # Of the steps that gather, one with dropout.
        model.inner.dropout = plain.inner.dropout = 0.4 if seed == 2 else 0.0
        plain.load_state_dict(model.state_dict())
        found = []
        for net in (model, plain):
            net.zero_grad()
            torch.manual_seed(seed)
            x = inputs_of(seed).to(dtype).requires_grad_()
            states = net.states if "cell" not in name else None
            if states is not None:
                net.states = lambda net=net: to_dtype(Net.states(net), dtype)
            loss = net(x).square().mean()
            loss.backward()
            found.append([loss, x.grad, *gradients(net)])
        assert_equal(*found)
        optimizer.step()
    assert "no rows yet" not in optimizer.report()


def to_dtype(states, dtype):
    return tuple(x.to(dtype) for x in states) if isinstance(states, tuple) else states.to(dtype)


def run(name, train_step, site="step", **options):
    model = make_model(name, **options)
    optimizer = GLS(model, site=site, **OPTIONS)
    for seed in range(5):
        train_step(model, optimizer, seed)
    assert "no rows yet" not in optimizer.report()
    return snapshot(model)


def step_once(model, optimizer, seed):
    train(model, optimizer, [seed])


def step_accumulating(model, optimizer, seed):
    optimizer.zero_grad()
    for part in range(2):
        loss_of(model, 2 * seed + part).backward()
    optimizer.step()


def step_after_other_passes(model, optimizer, seed):
    """None of whose rows count."""
    with torch.no_grad():
        loss_of(model, 100)
    loss_of(model, 101)
    x = inputs_of(102).requires_grad_()
    torch.autograd.grad(model(x).square().mean(), x)
    train(model, optimizer, [seed])


@pytest.mark.parametrize("name", ["deep lstm", "packed gru", "gru cell"])
def test_sites_agree(name):
    found = [run(name, step_accumulating, site) for site in ("step", "backward")]
    for p, q in zip(*found, strict=True):
        assert_near(q, p, SAME_STEPS)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("name", ["deep gru", "packed lstm"])
def test_rows_count_as_their_gradients_do(name, site):
    found = run(name, step_after_other_passes, site)
    assert_equal(found, run(name, step_once, site))
    other = run(name, step_accumulating, site)
    assert max(relative_error(p, q) for p, q in zip(other, found, strict=True)) > 1e-3


@pytest.mark.parametrize("how", ["saved", "reentrant"])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("name", ["deep lstm", "gru"])
def test_rows_count_once_under_checkpointing(name, site, how):
    def step(model, optimizer, seed):
        optimizer.zero_grad()
        x = inputs_of(seed).requires_grad_()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    for p, q in zip(run(name, step, site), run(name, step, site, how=how), strict=True):
        assert_near(q, p, SAME_STEPS)


def test_inner_rows_that_one_kernel_hides(monkeypatch):
    """As cuDNN's does: the inner weights take Adam's update, and say why."""
    monkeypatch.setattr(recurrent, "shows_layers", lambda inputs: False)
    model = make_model("deep lstm")
    optimizer = GLS(model, **BARE)
    train(model, optimizer, range(MOST_MISSES))
    lines = dict(line.split(": ", 1) for line in optimizer.report().splitlines())
    for suffix in ("", "_reverse"):
        for key in (f"weight_ih_l0{suffix}", f"weight_hh_l1{suffix}"):
            assert lines[f"inner.{key}"].startswith("GLS (recurrent")
        for key in (f"weight_ih_l1{suffix}", f"weight_hh_l0{suffix}"):
            expected = "Adam (its rows are inside of one kernel for all layers)"
            assert lines[f"inner.{key}"] == expected
    rows = rows_of(model, inputs_of(9))[1]
    optimizer = GLS(model, **BARE)
    train(model, optimizer, [9])
    for key in ("weight_ih_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"):
        a = rows[key]
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        gram = optimizer.state[getattr(model.inner, key)]["gram"]
        assert_near(gram, a.T @ a / len(a), SOLVE[a.dtype])


# ---- what users do -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep lstm", "packed gru", "gru cell"])
def test_resumes_bit_for_bit(name):
    model, other = make_model(name), make_model(name)
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed = GLS(other, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(train(other, resumed, range(3, 7)), train(model, optimizer, range(3, 7)))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_model_are_plain_and_copies_of_both_go_on(clone):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(INPUTS, HIDDEN, 2)).double()
    optimizer = GLS(model, **OPTIONS)

    def take(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            model(inputs_of(seed))[0].square().sum().backward()
            optimizer.step()
        return snapshot(model)

    take(model, optimizer, range(3))
    plain = clone(model)
    assert type(plain[0]) is nn.LSTM
    assert torch.equal(plain(inputs_of(3))[0], model(inputs_of(3))[0])
    other, twin = clone((model, optimizer))
    assert_equal(take(other, twin, range(3, 7)), take(model, optimizer, range(3, 7)))
    optimizer.detach()
    assert type(model[0]) is nn.LSTM


def test_attach_leaves_directions():
    found = []
    for site in ("step", "attach"):
        model = make_model("deep lstm")
        options = {"rank": 3, "curvature_every": 2}
        if site == "attach":
            stepper = torch.optim.SGD(model.parameters(), lr=0.1)
            attach(model, stepper, **options)
        else:
            stepper = GLS(
                model, lr=0.1, normalize="none", momentum=0.0, max_change=None, **options
            )  # fmt: skip
        found.append(train(model, stepper, range(4)))
    for p, q in zip(*found, strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_it_is_left_as_it_is():
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = make_model("deep lstm")
        optimizer = GLS(model, **OPTIONS)
        if compiled:
            model.compile(backend="aot_eager")
        found += [train(model, optimizer, range(5)), optimizer.report()]
    for p, q in zip(found[2], found[0], strict=True):
        assert_near(p, q, SAME_STEPS)
    assert found[1] == found[3]
    torch._dynamo.reset()


def test_projections_and_shared_weights():
    """What is not seen, with its reason; a weight that two modules use has the rows of both."""
    report = GLS(make_model("projections")).report()
    assert "inner.weight_hr_l0: Adam (its rows, the states before the projection," in report
    torch.manual_seed(0)
    first, second = (nn.GRUCell(INPUTS, HIDDEN).double() for _ in range(2))
    for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(second, key, getattr(first, key))
    optimizer = GLS(nn.ModuleList([first, second]), **BARE)
    x = inputs_of(0)
    (first(x[0]) + second(x[1])).square().sum().backward()
    optimizer.step()
    a = torch.cat([x[:2].flatten(0, 1), torch.ones(2 * BATCH, 1, dtype=x.dtype)], 1)
    gram = optimizer.state[first.weight_ih]["gram"]
    assert_near(gram, a.T @ a / len(a), SOLVE[a.dtype])


class Tied(nn.Module):
    """A recurrent module under a head that is tied to the embedding, however it is written."""

    def __init__(self, reads):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.reads = nn.Embedding(9, HIDDEN), reads
        self.inner = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x):
        table = self.embedding.weight if self.reads else next(self.embedding.parameters())
        return self.inner(self.embedding(x))[0] @ table.t()


@pytest.mark.parametrize("site", ["step", "backward"])
def test_rows_count_once_where_the_holder_reads_weights(site):
    found = []
    for reads in (False, True):
        model = Tied(reads).double()
        optimizer = GLS(list(model.inner.parameters()), model=model, site=site, **BARE)
        for seed in range(4):
            x = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append([snapshot(model), optimizer.report(), optimizer.diagnostics()])
    assert "inner.weight_hh_l0: GLS (recurrent 5 -> 16, 24 rows" in found[0][1]
    assert_equal(found[1][0], found[0][0])
    assert found[1][1:] == found[0][1:]


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_outputs_may_be_changed_in_place(kind):
    """As far as torch lets them; the rows of the inner weight are the states as they were."""
    torch.manual_seed(0)
    rnn = kind(4, 6).double()
    models = rnn, copy.deepcopy(rnn)
    sums = []
    for model in models:
        optimizer = GLS(model, curvature_every=1)
        outputs = model(torch.ones(3, 2, 4, dtype=torch.float64))[0]
        if model is rnn:
            outputs += 1
        else:
            outputs = outputs + 1
        outputs.square().sum().backward()
        sums.append([layer.sums for layer in optimizer._preconditioner.layers])
        optimizer.step()
    assert len(sums[0]) == 2
    assert_equal(*sums)
    assert_equal(snapshot(models[0]), snapshot(models[1]))
