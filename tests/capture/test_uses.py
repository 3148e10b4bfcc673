"""Weights that a module uses without calling their own: rows, directions and gradients."""

import copy
import pickle

import pytest
import torch
from nets import assert_equal, assert_same_state, gradients, snapshot
from tolerances import PRODUCT, SAME_STEPS, SOLVE, assert_near
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gls_fused import GLS, attach
from gls_fused.capture import uses
from gls_fused.capture.modules import WATCH_KEY
from gls_fused.preconditioner import MOST_MISSES

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.01}
# The direction itself is averaged.
BARE = {
    "lr": 0.5,
    "normalize": "none",
    "momentum": 0.5,
    "weight_decay": 0.0,
    "max_change": None,
    "curvature": "dense",
    "curvature_every": 1,
    "damping": 0.3,
    "power": 1,
    "beta": 0.9,
}


class Attention(nn.Module):
    """nn.MultiheadAttention, called by `call`."""

    def __init__(self, call, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, **options)
        self.call = call

    def forward(self, inputs):
        return self.call(self.attend, inputs)


def attend_to_itself(attend, x):
    return attend(x, x, x, need_weights=False)[0]


def attend_with_weights(attend, x):
    outputs, weights = attend(x, x, x)
    return outputs * (1 + weights.square().sum())


def attend_with_padding(attend, x):
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[1, 3:] = True
    return attend(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def attend_across(attend, x):
    memory = x[:, 2:] * 2
    return attend(x[:, :2], memory, memory)[0]


def attend_to_three(attend, x):
    return attend(x[:, :2], x[:, 2:] * 2, x[:, 2:] + 1)[0]


def attend_to_other_sizes(attend, x):
    return attend(x, x[..., :6], x[..., :4])[0]


def attend_without_batch(attend, x):
    return attend(x[0], x[0], x[0])[0]


class Decoder(nn.TransformerDecoderLayer):
    def forward(self, inputs):
        return super().forward(inputs[:, :3], inputs[:, 2:] * 2)


class Products(nn.Module):
    """All products that are seen, and a part of a weight."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(6, 4)
        self.parts, self.bare = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, inputs):
        x = (self.left.weight @ inputs.transpose(1, 2)).transpose(1, 2)
        x = torch.tanh(x + self.left.bias)
        x = torch.tanh(x @ self.right.weight.t() + self.right.bias)
        weights, biases = self.parts.weight.split([2, 4]), self.parts.bias.split([2, 4])
        parts = [F.linear(x, w, bias=b) for w, b in zip(weights, biases, strict=True)]
        return F.linear(torch.cat(parts, -1), weight=self.bare.weight, bias=parts[0].mean() + 1)


def use(layer, inputs):
    return F.linear(inputs, layer.weight, layer.bias)


class Hidden(nn.Module):
    """Nothing in its code tells that a weight is used."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(use(self.inner, inputs)))


def make_swin(block):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    return getattr(swin, block)(8, 2, [2, 2], [1, 1])


def make_eva():
    eva = pytest.importorskip("timm.models.eva")
    return eva.EvaAttention(8, 2, qkv_bias=True, norm_layer=nn.LayerNorm)


def make_beit():
    beit = pytest.importorskip("timm.models.beit")
    return beit.Attention(8, 2, qkv_bias=True)


def make_mamba():
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1)
    return mamba.MambaMixer(config, layer_idx=0)


MODELS = {
    "self-attention": lambda: Attention(attend_to_itself, batch_first=True),
    "with weights": lambda: Attention(attend_with_weights, add_bias_kv=True),
    "without bias": lambda: Attention(attend_to_itself, bias=False, add_zero_attn=True),
    "with padding": lambda: Attention(attend_with_padding, batch_first=True),
    "without batch": lambda: Attention(attend_without_batch),
    "cross-attention": lambda: Attention(attend_across, batch_first=True),
    "three inputs": lambda: Attention(attend_to_three, batch_first=True),
    "other sizes": lambda: Attention(attend_to_other_sizes, kdim=6, vdim=4),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "decoder layer": lambda: Decoder(8, 2, 16, dropout=0.0, batch_first=True),
    "products": Products,
    "hidden": Hidden,
    "swin": lambda: make_swin("SwinTransformerBlock"),
    "swin v2": lambda: make_swin("SwinTransformerBlockV2"),
    "beit": make_beit,
    "eva": make_eva,
    "mamba": make_mamba,
}


# Layers whose bias is added by itself: the backward that sees the product does not see it.
APART = {("products", "left"), ("products", "right"), ("swin v2", "attn.qkv"), ("mamba", "dt_proj")}


# Importing it takes ten seconds.
NAMES = [
    pytest.param(n, marks=pytest.mark.slow) if n == "mamba" else n for n in MODELS if n != "hidden"
]


def make_model(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def inputs_of(name, seed):
    shape = (2, 4, 4, 8) if "swin" in name else (4, 5, 8)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def loss_of(model, name, seed):
    outputs = model(inputs_of(name, seed))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return (outputs - targets).square().mean()


def train(model, optimizer, name, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, name, seed).backward()
        optimizer.step()
    return snapshot(model)


class Sigma:
    """A'A / n as it runs, and P; from docs/method.md alone."""

    def __init__(self):
        self.sigma = None

    def add(self, a):
        new, n = a.T @ a / len(a), len(a)
        if self.sigma is None:
            self.sigma, self.samples = new, n
        else:
            self.sigma = 0.9 * self.sigma + 0.1 * new
            self.samples = 1 / (0.9**2 / self.samples + 0.1**2 / n)

    def inverse(self):
        d = len(self.sigma)
        damping = 0.3 * self.sigma.trace() / min(d, self.samples)
        return torch.linalg.inv(self.sigma + damping * torch.eye(d, dtype=self.sigma.dtype))


def record_rows(model, name, seed, monkeypatch):
    """The rows of every weight, by its name, from F.linear as a plain model calls it."""
    names = {param: key for key, param in model.named_parameters()}
    found = {}

    def write(weight, inputs):
        owner = weight if weight in names else weight._base
        if owner in names:
            rows = inputs.detach().reshape(-1, inputs.shape[-1])
            found.setdefault(names[owner], []).append(rows)

    linear, matmul = F.linear, torch.Tensor.__matmul__

    def record_linear(input, weight, bias=None):  # noqa: A002
        write(weight, input)
        return linear(input, weight, bias)

    def record_matmul(left, right):
        if left in names:
            write(left, right.transpose(-2, -1))
        elif right._base in names:
            write(right.t(), left)
        return matmul(left, right)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", record_linear)
        patch.setattr(torch.Tensor, "__matmul__", record_matmul)
        loss = loss_of(model, name, seed)
    model.zero_grad()
    loss.backward()
    return {key: torch.cat(rows) for key, rows in found.items()}


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("name", NAMES)
def test_directions_are_those_of_the_rows(name, site, monkeypatch):
    model, plain = make_model(name), make_model(name)
    optimizer = GLS(model, site=site, **BARE)
    keys = {param: key for key, param in model.named_parameters()}
    theirs, averages = dict(plain.named_parameters()), {}
    # A mixer also has a convolution whose weight its kernels use, where no rows are seen.
    layers = [p for p in optimizer._preconditioner.layers if "Conv" not in p.kind]
    sigmas = {layer: Sigma() for layer in layers}
    for step in range(3):
        plain.load_state_dict(model.state_dict())
        rows = record_rows(plain, name, step, monkeypatch)
        optimizer.zero_grad()
        loss_of(model, name, step).backward()
        left = {param: param.grad.clone() for param in keys if param.grad is not None}
        optimizer.step()
        for layer in layers:
            a, sigma = rows[keys[layer.weight]], sigmas[layer]
            if layer.ones:
                a = torch.cat([a, a.new_ones(len(a), 1)], 1)
            if step == 0:
                sigma.add(a)
            p = sigma.inverse()
            d0 = [
                theirs[keys[param]].grad.flatten(1)
                if param.ndim > 1
                else theirs[keys[param]].grad[:, None]
                for param in layer.params
            ]
            sizes = [x.shape[1] for x in d0]
            d = (torch.cat(d0, 1) @ p).split(sizes, 1)
            if site == "backward" and step > 0 and (name, layer.name) in APART:
                # P for the weight alone.
                d = d0[0] @ p[:-1, :-1], d0[1]
            for param, sought in zip(layer.params, d, strict=True):
                sought = sought.reshape(param.shape)
                averages[param] = 0.5 * averages.get(param, 0) + 0.5 * sought
                found = optimizer.state[param]["exp_avg"]
                assert_near(found, averages[param], SOLVE[param.dtype])
                if site == "backward" and step > 0:
                    assert_near(left[param], sought, SOLVE[param.dtype])
            if step > 0:
                sigma.add(a)
            assert_near(optimizer.state[layer.weight]["gram"], sigma.sigma, SOLVE[a.dtype])
    assert not any(layer.idle for layer in layers)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_the_plain_models(name):
    model, plain = make_model(name), make_model(name)
    optimizer = GLS(model, site="step", **OPTIONS)
    for step in range(4):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        optimizer.zero_grad()
        losses = [loss_of(net, name, step) for net in (model, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        optimizer.step()


@pytest.mark.parametrize("name", ["self-attention", "cross-attention", "other sizes", "beit"])
def test_sites_agree(name):
    found = []
    for site in ("step", "backward", "auto"):
        model = make_model(name)
        optimizer = GLS(model, site=site, **OPTIONS)
        for step in range(5):
            optimizer.zero_grad()
            for part in range(2):
                loss_of(model, name, 2 * step + part).backward()
            optimizer.step()
            assert ("site backward" in optimizer.report()) == (site == "backward")
        found.append(torch.cat([p.flatten() for p in snapshot(model)]))
    # As one: the key's bias changes no output, and Adam's update scales its rounding up.
    for other in found[1:]:
        assert_near(other, found[0], SAME_STEPS)


def test_auto_keeps_the_gradient_of_a_weight_that_another_module_uses():
    model = nn.Sequential(Hidden(), nn.Linear(3, 8)).double()
    optimizer = GLS(model, **OPTIONS)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs_of("", 0)[0]).square().mean().backward()
        optimizer.step()
    lines = optimizer.report().splitlines()
    assert "0.inner: GLS (Linear 9 -> 8, 5 rows" in lines[0]
    assert "site step" in lines[0]
    assert "site backward" in lines[2]


# ---- who runs under the mode ---------------------------------------------------------------------


def test_a_weight_is_found_where_no_code_tells_of_it():
    model = make_model("hidden")
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, "hidden", [0])
    assert "inner: GLS (Linear 9 -> 8, no rows yet" in optimizer.report()
    train(model, optimizer, "hidden", [1])
    assert "inner: GLS (Linear 9 -> 8, 20 rows" in optimizer.report()


@pytest.mark.parametrize("name", ["hidden", "encoder layer", "decoder layer", "products"])
def test_resumes_bit_for_bit(name):
    """A fresh optimizer knows from the state whose weights are used."""
    model, other = make_model(name), make_model(name)
    optimizer, resumed = GLS(model, **OPTIONS), GLS(other, **OPTIONS)
    train(model, optimizer, name, range(5))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for net, stepper in ((model, optimizer), (other, resumed)):
        train(net, stepper, name, range(5, 9))
    assert_equal(snapshot(other), snapshot(model))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


class Reader(nn.Module):
    """Its code reads a weight, and calls the module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.inner(inputs.to(self.inner.weight.dtype))


def watched(model):
    """The modules whose forward may run under the mode."""
    return [name for name, module in model.named_modules() if WATCH_KEY in vars(module)]


def test_modules_that_call_their_own_are_left_alone():
    model = nn.Sequential(Reader(), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)).double()
    optimizer = GLS(model, **OPTIONS)
    assert watched(model) == ["0", "1.self_attn"]
    for _ in range(2):
        model(inputs_of("", 0)).square().mean().backward()
        optimizer.step()
    assert watched(model) == ["1.self_attn"]
    assert type(model[0]) is Reader
    optimizer.detach()
    assert not watched(model)
    assert type(model[1].self_attn) is nn.MultiheadAttention


def test_no_mode_in_steps_that_ask_for_nothing(monkeypatch):
    model = make_model("self-attention")
    optimizer = GLS(model, **{**OPTIONS, "curvature_every": 3})
    train(model, optimizer, "self-attention", [0])
    monkeypatch.setattr(uses.Observer, "__init__", lambda *_: pytest.fail("a mode is made"))
    train(model, optimizer, "self-attention", [1, 2])
    with torch.no_grad():
        model(inputs_of("self-attention", 3))
    with pytest.raises(pytest.fail.Exception):
        model(inputs_of("self-attention", 3))


def test_fast_path_in_evaluation_is_untouched(monkeypatch):
    model = make_model("encoder layer")
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, "encoder layer", [0, 1])
    attend = model.self_attn.eval()
    x = inputs_of("", 0)
    with torch.no_grad():
        expected, found = copy.deepcopy(model).eval()(x), model.eval()(x)
        assert torch.equal(expected, found)
        calls = []
        fast = torch._native_multi_head_attention
        record = lambda *a, **k: calls.append(1) or fast(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch, "_native_multi_head_attention", record)
        attend(x, x, x)
    assert calls


# ---- what users do -------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """The module is checkpointed, or checkpoints what uses its weight."""

    def __init__(self, inner, how, inside=False):
        super().__init__()
        self.inner, self.how, self.inside = inner, how, inside
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs):
        reentrant = self.how == "reentrant"
        if self.how is None:
            hidden = self.use(self.inner(inputs))
        elif self.inside:
            hidden = checkpoint(self.use, self.inner(inputs), use_reentrant=reentrant)
        else:
            hidden = self.use(checkpoint(self.inner, inputs, use_reentrant=reentrant))
        return hidden

    def use(self, hidden):
        return torch.tanh(F.linear(hidden, self.linear.weight, self.linear.bias))


@pytest.mark.parametrize("how", ["saved", "reentrant"])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("name", ["self-attention", "cross-attention", "beit"])
def test_rows_count_once_under_checkpointing(name, site, how):
    found = []
    for each in (None, how):
        torch.manual_seed(0)
        model = Recomputed(MODELS[name](), each).double()
        optimizer = GLS(model, site=site, **OPTIONS)
        for seed in range(4):
            optimizer.zero_grad()
            inputs = inputs_of(name, seed).requires_grad_()
            model(inputs).sub(1).square().mean().backward()
            optimizer.step()
        found.append(snapshot(model))
        assert "no rows yet" not in optimizer.report()
    for p, q in zip(*found, strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("how", ["saved", "reentrant"])
def test_a_use_that_is_checkpointed_inside_its_module_is_not_seen(how):
    torch.manual_seed(0)
    model = Recomputed(nn.Linear(8, 8), how, inside=True).double()
    optimizer = GLS(model, **OPTIONS)
    for seed in range(MOST_MISSES):
        optimizer.zero_grad()
        model(inputs_of("", seed)).square().mean().backward()
        optimizer.step()
    assert "inner: GLS (Linear 9 -> 8, 20 rows" in optimizer.report()
    assert "linear: Adam (its module is not called" in optimizer.report()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", ["encoder layer", "products", "hidden"])
def test_copies_of_the_model_are_plain_and_copies_of_both_go_on(name, clone):
    model = make_model(name)
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, name, range(3))
    plain = clone(model)
    assert not watched(plain)
    assert [type(each) for each in plain.modules()] == [each.__class__ for each in model.modules()]
    assert torch.equal(plain(inputs_of(name, 3)), model(inputs_of(name, 3)))
    other, twin = clone((model, optimizer))
    assert watched(other) == watched(model) != []
    assert_equal(train(other, twin, name, range(3, 7)), train(model, optimizer, name, range(3, 7)))


@pytest.mark.parametrize("name", ["encoder layer", "products", "hidden"])
def test_another_optimizer_takes_over(name):
    model, twin = make_model(name), make_model(name)
    first = GLS(model, **OPTIONS)
    train(model, first, name, range(2))
    second = GLS(model, **OPTIONS)
    with pytest.raises(RuntimeError, match="no longer captured"):
        first.step()
    model.load_state_dict(twin.state_dict())
    found = train(model, second, name, range(4))
    assert_equal(found, train(twin, GLS(twin, **OPTIONS), name, range(4)))
    second.detach()
    assert not watched(model)
    assert [type(each) for each in model.modules()] == [each.__class__ for each in model.modules()]


def test_others_parameters_show_no_rows():
    model = make_model("self-attention")
    optimizer = GLS(model, **OPTIONS)
    params = dict(model.named_parameters())
    others = {key: param.detach().clone().requires_grad_() for key, param in params.items()}
    torch.func.functional_call(model, others, inputs_of("", 0)).sum().backward()
    assert "no rows yet" in optimizer.report()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_scripted():
    model = make_model("encoder layer").eval()
    optimizer = GLS(model, **OPTIONS)
    scripted, x = torch.jit.script(model), inputs_of("", 0)
    assert "self_attn.in_proj: GLS" in optimizer.report()
    assert_near(scripted(x), model(x), PRODUCT[torch.float64])


@pytest.mark.parametrize("strict", [False, True])
def test_exported_in_the_middle_of_training_it_is_the_plain_model(strict):
    model = make_model("encoder layer")
    optimizer = GLS(model, **OPTIONS)
    x = inputs_of("", 0)
    for step in range(2):
        found, expected = (
            torch.export.export(each, (x,), strict=strict) for each in (model, copy.deepcopy(model))
        )
        assert found.graph_signature == expected.graph_signature, step
        nodes = [[str(node.target) for node in each.graph.nodes] for each in (found, expected)]
        assert nodes[0] == nodes[1], step
        train(model, optimizer, "encoder layer", [step])


def test_attach_leaves_directions():
    found = []
    for site in ("step", "attach"):
        model = make_model("cross-attention")
        options = {"rank": 4, "curvature_every": 2}
        if site == "attach":
            stepper = torch.optim.SGD(model.parameters(), lr=0.1)
            attach(model, stepper, **options)
        else:
            stepper = GLS(
                model, lr=0.1, normalize="none", momentum=0.0, max_change=None, weight_decay=0.0,
                **options,
            )  # fmt: skip
        found.append(train(model, stepper, "cross-attention", range(4)))
    for p, q in zip(*found, strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("name", ["self-attention", "products", "beit"])
def test_autocast(name, site):
    model, plain = (make_model(name).float() for _ in range(2))
    optimizer = GLS(model, site=site, curvature="dense", **OPTIONS)
    for step in range(3):
        plain.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        plain.zero_grad()
        losses = []
        for net in (model, plain):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(net(inputs_of(name, step).float()).float().square().mean())
            losses[-1].backward()
        assert torch.equal(*losses)
        if site == "step":
            assert_equal(gradients(model), gradients(plain))
        optimizer.step()
        if step == 0 and name == "beit":
            # The rows are those of the op.
            rows = inputs_of(name, 0).bfloat16().double().flatten(0, 1)
            gram = optimizer.state[model.qkv.weight]["gram"]
            assert_near(gram, rows.T @ rows / len(rows), PRODUCT[torch.float32])
    assert "no rows yet" not in optimizer.report()
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="torch 2.11 traces no Tensor.unflatten where a layer's weight is watched",
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("site", "parts"),
    [
        ("backward", ["cross-attention"]),
        ("step", ["with padding"]),
        pytest.param("step", ["self-attention", "products"], marks=pytest.mark.slow),
        pytest.param("backward", ["self-attention", "other sizes"], marks=pytest.mark.slow),
    ],
)
def test_compiled_in_whole_graphs(site, parts):
    torch._dynamo.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(MODELS[part]() for part in parts)).double()
        optimizer = GLS(model, site=site, **{**OPTIONS, "curvature_every": 3})
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        found += [train(model, optimizer, "", range(5)), optimizer.report()]
    for p, q in zip(found[2], found[0], strict=True):
        assert_near(p, q, SAME_STEPS)
    assert found[1] == found[3]
    # As for modules that are called: one at step 0, one that gathers, one that does not.
    assert counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()


class Vectors(nn.Module):
    """All products of a weight with one vector; or the same with all of them at once."""

    def __init__(self, *, apart):
        super().__init__()
        self.outer, self.inner = nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.apart = apart

    def forward(self, inputs):
        outer, inner = self.outer.weight, self.inner.weight
        if not self.apart:
            return F.linear(torch.tanh(F.linear(inputs, outer)), inner)
        hidden = [outer @ inputs[0], outer.mv(inputs[1]), torch.mv(outer, inputs[2])]
        first, second, third = map(torch.tanh, hidden)
        return torch.stack([torch.matmul(inner, first), inner.matmul(second), inner @ third])


@pytest.mark.parametrize("site", ["step", "backward"])
def test_vectors_are_rows(site):
    found = []
    for apart in (True, False):
        torch.manual_seed(0)
        model = Vectors(apart=apart).double()
        optimizer = GLS(model, site=site, **BARE)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        found.append(snapshot(model))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, SAME_STEPS)
