"""Cases under fully_shard (FSDP2); see launch.py."""

import copy
import functools
import itertools
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import checkpoint
import pytest
import torch
import torch.distributed as dist
from nets import DIMENSIONS, loss_of, make_batch, make_net
from ranks import (
    OPTIONS,
    STEPS,
    Traffic,
    alone,
    assert_one_preconditioner,
    assert_same_bits,
    assert_same_weights,
    even,
    part_of,
    train_on_all,
    train_on_part,
    uneven,
    whole,
)
from tolerances import PRODUCT, SAME_STEPS, assert_near
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import utils
from torch.nn.utils import parametrizations

from gls_fused import GLS, attach, register
from gls_fused.distributed.factors import choose_owners
from gls_fused.distributed.sharding import chunk_of

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@functools.cache
def line_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model, mesh=None, **options):
    """Every layer and the root as fully_shard leaves them."""
    mesh = mesh or line_mesh()
    # Of Conv1D, whose own outputs are views.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


class Uneven(nn.Sequential):
    """10 outputs and 1: over 4 ranks 3, 3, 3, 1 and 1, 0, 0, 0; the norm takes Adam's update."""

    def __init__(self):
        super().__init__(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, inputs):
        return super().forward(inputs).repeat(1, 3)


class Attention(nn.Module):
    """Of two tokens a sample to others; a weight of nn.Linear that is used by itself."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 4)

    def forward(self, inputs):
        x = torch.tanh(inputs).unflatten(-1, (2, 4))
        memory = x + 1
        x = self.attend(x, memory, memory)[0]
        return nn.functional.linear(x, self.last.weight, self.last.bias).flatten(1) * 2


class Recurrent(nn.Module):
    """Two steps of a sample, by a module or by a cell."""

    def __init__(self, module):
        super().__init__()
        self.stem, self.recurrent, self.head = nn.Linear(6, 8), module, nn.Linear(10, 3)

    def forward(self, inputs):
        steps = torch.tanh(self.stem(inputs)).unflatten(-1, (2, 4)).unbind(1)
        if isinstance(self.recurrent, nn.RNNBase):
            outputs = self.recurrent(torch.stack(steps))[0].unbind()
        else:
            states = [self.recurrent(steps[0])]
            states.append(self.recurrent(steps[1], states[0]))
            outputs = [output for output, _ in states]
        return self.head(torch.cat(outputs, 1))


class Casting(nn.Module):
    """Reads a weight that another module uses, which fully_shard has apart."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.stem(inputs.to(self.stem.weight.dtype))))


RECURRENT = {
    "lstm": functools.partial(nn.LSTM, 4, 5),
    "gru": functools.partial(nn.GRU, 4, 5, num_layers=2),
    "rnn": functools.partial(nn.RNN, 4, 5, bias=False),
    "cell": functools.partial(nn.LSTMCell, 4, 5),
}
NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm of old": utils.weight_norm,
    "spectral_norm of old": utils.spectral_norm,
}


class Mask(nn.Module):
    """From the third call on it hides half of its inputs, a rank's outputs of the layer before."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        hidden = slice(0 if self.calls < 3 else 4, None)
        mask = torch.zeros_like(inputs)
        mask[:, hidden] = 1
        return inputs * mask


def make(kind):
    torch.manual_seed(0)
    if kind == "masked":
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), Mask(), nn.Linear(8, 3)
        return nn.Sequential(*layers).double()
    if kind == "casting":
        return Casting().double()
    if kind in RECURRENT:
        return Recurrent(RECURRENT[kind]()).double()
    if kind in NORMS:
        # torch's older one is deprecated.
        warnings.filterwarnings("ignore", ".*weight_norm.*", FutureWarning)
        model = make_net("mlp")
        NORMS[kind](model.first)
        NORMS[kind](model.second)
        return model
    if kind not in ("uneven", "attention", "upsampling"):
        return make_net(kind)
    if kind == "upsampling":
        layers = nn.ConvTranspose1d(2, 9, 3), nn.Tanh(), nn.ConvTranspose1d(9, 15, 3, groups=3)
        return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(150, 3)).double()
    if kind == "uneven":
        return Uneven().double()
    return nn.Sequential(nn.Linear(6, 8), Attention(), nn.Linear(8, 3)).double()


def sizes_of(kind):
    """Of the ranks' parts of a batch."""
    return uneven() if kind in (*DIMENSIONS, "upsampling") else [2 * size for size in uneven()]


def assert_same_growth(optimizer, reference):
    both = zip(optimizer.state.values(), reference.state.values(), strict=True)
    for state, expected in both:
        # In one order on all ranks, as a sharded tensor is asked of all.
        for key in ("slow_sq", "growth"):
            if key in expected:
                assert (expected["slow_sq"] > 0).any()
                assert_near(whole(state[key]), expected[key], SAME_STEPS)


def check_equals_one_process(kind, options, **policy):
    expected, model, sizes = make(kind), sharded(make(kind), **policy), sizes_of(kind)
    alike = dict.fromkeys(("uneven", "masked", "casting", *RECURRENT, *NORMS), "mlp")
    data = {**alike, "upsampling": "conv1d"}.get(kind, kind)
    reference = GLS(expected, **options, process_group=alone())
    train_on_all(expected, reference, data, sum(sizes))
    optimizer = GLS(model, **options)
    train_on_part(model, optimizer, data, sizes)
    assert_same_weights(model, expected)
    assert_same_growth(optimizer, reference)
    assert_one_preconditioner(optimizer.state.values())
    assert "no rows yet" not in optimizer.report()
    assert "Adam (its" not in optimizer.report()
    for p, state in optimizer.state.items():
        assert isinstance(state["exp_avg"], DTensor)
        assert state["exp_avg"].placements == p.placements


for kind, site in itertools.product(("mlp", "cnn", "uneven"), ("step", "backward")):
    CASES[f"{kind}_{site}"] = lambda kind=kind, site=site: check_equals_one_process(
        kind, {**OPTIONS, "site": site}
    )
CASES["attention_step"] = lambda: check_equals_one_process("attention", OPTIONS)
for site in ("step", "backward"):
    CASES[f"casting_{site}"] = lambda site=site: check_equals_one_process(
        "casting", {**OPTIONS, "site": site}
    )
CASES["grouped"] = lambda: check_equals_one_process("grouped", OPTIONS)
for kind in (*RECURRENT, *NORMS):
    CASES[kind] = lambda kind=kind: check_equals_one_process(kind, OPTIONS)
CASES["transposed"] = lambda: check_equals_one_process("upsampling", OPTIONS)
CASES["orthogonal_steps_of_partly_zero_gradients"] = lambda: check_equals_one_process(
    "masked", {**OPTIONS, "normalize": "spectral"}
)
CASES["transposed_adam"] = lambda: check_equals_one_process(
    "upsampling", {**OPTIONS, "normalize": "adam"}
)
for normalize in ("row", "factored", "spectral", "adam", "sgd", "none"):
    CASES[f"normalize_{normalize}"] = lambda normalize=normalize: check_equals_one_process(
        "uneven", {**OPTIONS, "normalize": normalize, "weight_decay": 0.1}
    )
for normalize, site in (("factored", "backward"), ("spectral", "step"), ("sgd", "step")):
    CASES[f"experts_{normalize}"] = lambda normalize=normalize, site=site: check_equals_one_process(
        "experts", {**OPTIONS, "normalize": normalize, "site": site, "weight_decay": 0.1}
    )
for kind, split in (("cnn", 1), ("mlp", 2), ("uneven", 1)):
    CASES[f"orthogonal_steps_{kind}"] = lambda kind=kind, split=split: check_equals_one_process(
        kind, {**OPTIONS, "normalize": "spectral", "split": split, "spectral_head": split == 1}
    )
for name, options in {
    "step": {"normalize": "factored", "weight_decay": 0.1, "max_change": 0.1},
    "backward": {"normalize": "row", "site": "backward"},
    "rms": {"normalize": "rms"},
    "adam": {"normalize": "adam"},
    "sgd": {"normalize": "sgd", "max_change": 0.1},
    "spectral": {"normalize": "spectral", "split": 2, "max_change": 0.1},
    "dense": {"curvature": "dense"},
}.items():
    # Weights [inputs, outputs], whose inputs are spread over the ranks.
    CASES[f"turned_{name}"] = lambda options=options: check_equals_one_process(
        "turned", {**OPTIONS, **options}
    )
for reshard in (True, False):
    CASES[f"reshard_after_forward_{reshard}"] = lambda reshard=reshard: check_equals_one_process(
        "mlp", {**OPTIONS, "site": "backward"}, reshard_after_forward=reshard
    )


@case
def dense_curvature():
    check_equals_one_process("uneven", {**OPTIONS, "curvature": "dense"})


@case
def accumulation_without_reduction():
    for site in ("step", "backward"):
        options = {**OPTIONS, "site": site}
        world = dist.get_world_size()
        expected, model = make_net("mlp"), sharded(make_net("mlp"))
        train_on_all(expected, GLS(expected, **options, process_group=alone()), "mlp", 6 * world)
        optimizer = GLS(model, **options)
        for step in range(STEPS):
            optimizer.zero_grad()
            mine = part_of(make_batch("mlp", 6 * world, step), [6] * world)
            for micro, last in ((slice(0, 2), False), (slice(2, 6), True)):
                batch = tuple(x[micro] for x in mine)
                model.set_requires_gradient_sync(last)
                (loss_of(model, batch) * len(batch[0]) / 6).backward()
            optimizer.step()
        assert_same_weights(model, expected)


def check_rows_of_dropped_gradients(passes, counted):
    """The weights are those of an optimizer that saw the counted passes alone.

    Args:
        passes: of a step; whether each is reduced, or None where `model.zero_grad()` is called.
        counted: which of the passes lead to the gradient of the step.
    """
    world = dist.get_world_size()
    for site in ("step", "backward"):
        options = {**OPTIONS, "curvature_every": 1, "site": site}
        expected, model = make_net("mlp"), sharded(make_net("mlp"))
        reference = GLS(expected, **options, process_group=alone())
        optimizer = GLS(model, **options)
        for step in range(6):
            reference.zero_grad()
            optimizer.zero_grad()
            for index, reduced in enumerate(passes):
                batch = make_batch("mlp", 4 * world, 10 * step + index)
                batch = tuple((1 + 9 * index) * x for x in batch)
                if reduced is None:
                    model.zero_grad()
                    continue
                model.set_requires_gradient_sync(reduced)
                loss_of(model, part_of(batch, fours())).backward()
                if index in counted:
                    loss_of(expected, batch).backward()
            optimizer.step()
            reference.step()
        assert_same_weights(model, expected)
        assert_one_preconditioner(optimizer.state.values())


def fours():
    return [4] * dist.get_world_size()


for name, passes, counted in (
    ("", (True, None, True, True), (2, 3)),
    ("_that_was_held_back", (False, True, None, False, True), (3, 4)),
    ("_before_one_that_is_held_back", (True, False, None, True), (1, 3)),
    ("_after_one_that_is_held_back", (False, None, True), (0, 2)),
):
    CASES[f"rows_of_a_dropped_gradient{name}"] = lambda passes=passes, counted=counted: (
        check_rows_of_dropped_gradients(passes, counted)
    )


@case
def clipped_by_norm():
    def clip(model):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert whole(norm) > 0.1

    expected, model, sizes = make_net("mlp"), sharded(make_net("mlp")), sizes_of("mlp")
    reference = GLS(expected, **OPTIONS, process_group=alone())
    for step in range(STEPS):
        reference.zero_grad()
        loss_of(expected, make_batch("mlp", sum(sizes), step)).backward()
        clip(expected)
        reference.step()
    train_on_part(model, GLS(model, **OPTIONS), "mlp", sizes, average=clip)
    assert_same_weights(model, expected)


@case
def attached_optimizer():
    check_attached("uneven")


@case
def attached_to_turned_weights():
    check_attached("turned")


def check_attached(kind):
    options = {"rank": 4, "curvature_every": 3}
    expected, model, sizes = make(kind), sharded(make(kind)), sizes_of(kind)
    reference = torch.optim.Adam(expected.parameters(), lr=0.01)
    attach(expected, reference, **options, process_group=alone())
    train_on_all(expected, reference, "mlp", sum(sizes))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, **options)
    train_on_part(model, optimizer, "mlp", sizes)
    assert_same_weights(model, expected)
    assert_one_preconditioner(handle.state_dict()["layers"].values())


def average_whole(model):
    """The gradients that fully_shard leaves alone, by hand."""
    for p in model.parameters():
        if not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


@case
def some_layers_whole_on_every_rank():
    expected, model, sizes = make_net("mlp"), make_net("mlp"), sizes_of("mlp")
    train_on_all(expected, GLS(expected, **OPTIONS, process_group=alone()), "mlp", sum(sizes))
    fully_shard(model.first, mesh=line_mesh())
    fully_shard(model.head, mesh=line_mesh())
    train_on_part(model, GLS(model, **OPTIONS), "mlp", sizes, average=average_whole)
    assert_same_weights(model, expected)


class Embedded(nn.Module):
    """Embedding, norms and an unsharded layer around a block that fully_shard covers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 6)
        self.block = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.PReLU())
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, inputs):
        known = self.embedding((inputs[:, 0] > 0).long())
        return self.head(self.norm(self.block(inputs + known)))


@case
def some_of_adams_parameters_whole_on_every_rank():
    """In one group; the slope of the block is on one rank only."""

    def make():
        torch.manual_seed(0)
        return Embedded().double()

    expected, model, sizes = make(), make(), sizes_of("mlp")
    train_on_all(expected, GLS(expected, **OPTIONS, process_group=alone()), "mlp", sum(sizes))
    fully_shard(model.block, mesh=line_mesh())
    train_on_part(model, GLS(model, **OPTIONS), "mlp", sizes, average=average_whole)
    assert isinstance(model.block[1].weight, DTensor)
    assert not isinstance(model.norm.weight, DTensor)
    assert_same_weights(model, expected)


class Tied(nn.Module):
    """3 rows of the embedding, which are the head's, over the ranks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        known = self.embedding((inputs[:, 0] > 0).long())
        return self.head(torch.tanh(self.middle(inputs + known)))


@case
def tied_head():
    for options in ({"site": "step"}, {"site": "backward", "normalize": "factored"}):
        torch.manual_seed(0)
        expected, sizes = Tied().double(), sizes_of("mlp")
        model = fully_shard(copy.deepcopy(expected), mesh=line_mesh())
        options = {**OPTIONS, **options}
        train_on_all(expected, GLS(expected, **options, process_group=alone()), "mlp", sum(sizes))
        optimizer = GLS(model, **options)
        train_on_part(model, optimizer, "mlp", sizes)
        assert "tied to embedding" in optimizer.report()
        assert_same_weights(model, expected)


@case
def adams_partial_gradients_are_added_up():
    """Of DTensors that every rank has whole, with inputs that are sharded."""
    expected = nn.LayerNorm(6, dtype=torch.float64)
    model = distribute_module(copy.deepcopy(expected), line_mesh())
    optimizers = [GLS(m.parameters(), model=m, **OPTIONS) for m in (expected, model)]
    for step in range(STEPS):
        inputs, _ = make_batch("mlp", 8, step)
        for m, optimizer in zip((expected, model), optimizers, strict=True):
            optimizer.zero_grad()
            if m is model:
                inputs = distribute_tensor(inputs, line_mesh(), [Shard(0)])
            (m(inputs) - 0.5).square().mean().backward()
        assert model.weight.grad.placements[0].is_partial()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_weights(model, expected)


@case
def whole_16_bit_weights_stay_alike():
    """Each rank draws bits for its shards, of which one has more than the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
    fully_shard(model[0], mesh=line_mesh())
    optimizer = GLS(model, **OPTIONS)
    for step in range(5):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(8, 6).bfloat16()).square().mean().backward()
        optimizer.step()
    for param in model[2].parameters():
        assert_same_bits(param.detach())


@case
def mixed_precision_policy():
    """Against the same policy in one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone_mesh = DeviceMesh.from_group(alone(), "cpu")
    sizes = sizes_of("mlp")
    for site in ("step", "backward"):
        options = {**OPTIONS, "site": site}
        expected = sharded(make_net("mlp").float(), alone_mesh, mp_policy=policy)
        model = sharded(make_net("mlp").float(), mp_policy=policy)
        train_on_all(expected, GLS(expected, **options, process_group=alone()), "mlp", sum(sizes))
        optimizer = GLS(model, **options)
        train_on_part(model, optimizer, "mlp", sizes)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert p.dtype == torch.float32
            assert_near(whole(p), whole(q), PRODUCT[torch.bfloat16])
        assert optimizer.state[model.first.weight]["basis"].dtype == torch.float32
        assert_one_preconditioner(optimizer.state.values())


@case
def communication_is_counted():
    sums = sum(2 + 4 * 4 + 4 * d for d in (7, 11))
    kinds = (
        ("rms", [2]),
        ("row", []),
        ("factored", [7 + 1 + 11 + 1]),
        ("sgd", [4]),
        ("adam", []),
        ("none", []),
    )
    for (normalize, norms), dtype in itertools.product(kinds, (torch.float64, torch.bfloat16)):
        model = sharded(make("uneven").to(dtype))
        optimizer = GLS(model, **{**OPTIONS, "normalize": normalize, "max_change": None})
        for step in range(5):
            optimizer.zero_grad()
            batch = [x.to(dtype) for x in make_batch("mlp", 8, step)]
            loss_of(model, part_of(batch, even(8))).backward()
            with Traffic() as traffic:
                optimizer.step()
            found = sums + (2 if step == 0 else 0)
            # Of growth, in steps that gather.
            means = [2] if normalize in ("row", "factored", "adam") else []
            gathered = ([], []) if step % 3 else ([found], means)
            assert traffic.reduced == gathered[0] + norms + gathered[1], traffic.reduced
            assert bool(traffic.others) == (step == 0), traffic.others
        # Where the squares are shards, their sums are of all ranks.
        assert all(math.isfinite(x) for x in optimizer.diagnostics().values())


@case
def orthogonal_steps_travel_twice():
    """A rank sends its rows of all matrices, and then the rows of those that it owns, to all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 5), nn.Linear(5, 3))
    shapes = [(9, 6), (9, 9), (5, 9)]
    ranks, rank = dist.get_world_size(), dist.get_rank()
    owners = choose_owners(shapes, ranks)
    owned = [owners.count(each) for each in range(ranks)]
    # The largest alone, where others can take the rest.
    assert max(owned) <= 2
    assert sum(owned) == 3
    mine = sum(math.prod(shapes[i]) for i, owner in enumerate(owners) if owner == rank)
    rows = sum(len(chunk_of(m, ranks, rank)) * k for m, k in shapes)
    optimizer = GLS(sharded(model), normalize="spectral", max_change=None)
    for step in range(3):
        optimizer.zero_grad()
        model(make_batch("mlp", 8, step)[0].float()).square().mean().backward()
        with Traffic() as traffic:
            optimizer.step()
        assert traffic.exchanged == [rows, mine], traffic.exchanged
        assert bool(traffic.others) == (step == 0), traffic.others


@case
def resumes_bit_for_bit_from_a_sharded_checkpoint():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    variants = (
        ("uneven", {}),
        ("uneven", {"momentum": 0.0, "site": "backward"}),
        ("uneven", {"normalize": "adam"}),
        ("uneven", {"normalize": "factored", "max_change": 0.1}),
        ("uneven", {"normalize": "spectral"}),
        ("turned", {"normalize": "factored"}),
        ("experts", {"normalize": "factored", "max_change": 0.1}),
    )
    for index, (kind, options) in enumerate(variants):
        options, place = {**OPTIONS, **options}, Path(folder[0], str(index))
        sizes = sizes_of("mlp")
        whole_run = sharded(make(kind))
        optimizer = GLS(whole_run, **options)
        train_on_part(whole_run, optimizer, "mlp", sizes, range(5))
        checkpoint.save(place, whole_run, optimizer)
        train_on_part(whole_run, optimizer, "mlp", sizes, range(5, 10))

        model = sharded(make(kind))
        optimizer = GLS(model, **options)
        checkpoint.load(place, model, optimizer)
        train_on_part(model, optimizer, "mlp", sizes, range(5, 10))
        for p, q in zip(model.parameters(), whole_run.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


@case
def resumes_bit_for_bit_from_a_whole_state():
    """Of every rank, or of the first, which the others get it from."""
    for kind, from_first in itertools.product(("uneven", "attention"), (False, True)):
        sizes, data = sizes_of("mlp"), "mlp" if kind == "uneven" else kind
        options = {**OPTIONS, "normalize": "factored"}
        how = StateDictOptions(
            full_state_dict=True, cpu_offload=from_first, broadcast_from_rank0=from_first
        )
        whole_run = sharded(make(kind))
        optimizer = GLS(whole_run, **options)
        train_on_part(whole_run, optimizer, data, sizes, range(5))
        # They share what is not sharded.
        weights, state = copy.deepcopy(get_state_dict(whole_run, optimizer, options=how))
        train_on_part(whole_run, optimizer, data, sizes, range(5, 10))

        model = sharded(make(kind))
        other = GLS(model, **options)
        # Together, a rank without weights would not take part.
        set_model_state_dict(model, weights, options=how)
        set_optimizer_state_dict(model, other, state, options=how)
        train_on_part(model, other, data, sizes, range(5, 10))
        for p, q in zip(model.parameters(), whole_run.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))


@case
def a_rank_without_rows():
    expected, model = make("casting"), sharded(make("casting"))
    reference = GLS(expected, **OPTIONS, process_group=alone())
    optimizer = GLS(model, **OPTIONS)
    sizes = [4] * (dist.get_world_size() - 1) + [0]
    for step in range(STEPS):
        inputs, _ = batch = make_batch("mlp", sum(sizes), step)
        for net, own in ((expected, inputs), (model, part_of(batch, sizes)[0])):
            net.zero_grad()
            share = len(sizes) if net is model else 1
            (net(own).square().sum() * share / len(inputs)).backward()
        reference.step()
        optimizer.step()
    assert_same_weights(model, expected)
    assert_one_preconditioner(optimizer.state.values())


class OneExpert(nn.Module):
    """A stack of a single matrix, which the first rank has."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(1, 6, 6) / 2)

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weights[0])


@case
def a_rank_without_experts():
    """It has all that the others ask it for, to log or to save."""
    register(OneExpert, "experts")
    torch.manual_seed(0)
    model = sharded(nn.Sequential(nn.Linear(6, 6), OneExpert(), nn.Linear(6, 3)))
    optimizer = GLS(model, curvature_every=2, max_change=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(make_batch("mlp", 8, step)[0].float()).square().mean().backward()
        optimizer.step()
    numbers = optimizer.diagnostics()
    assert "1.weights/held" in numbers
    assert_same_bits(torch.tensor(list(numbers.values())))
    how = StateDictOptions(full_state_dict=True)
    _, state = get_state_dict(model, optimizer, options=how)
    assert {"held", "growth"} <= state["state"]["1.weights"].keys()


@case
def parameters_exchanged_for_shards_between_two_backwards():
    """As Accelerate does, without a call of zero_grad before the first forward."""
    model = make("casting")
    optimizer = GLS(model, **OPTIONS)
    names = {param: name for name, param in model.named_parameters()}
    sharded(model)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[param]] for param in group["params"]]
    for step in range(STEPS):
        loss_of(model, part_of(make_batch("mlp", 8, step), even(8))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "stem: GLS (Linear 7 -> 8" in optimizer.report()
    assert "no rows yet" not in optimizer.report()


@case
def fully_shard_after_the_optimizer_is_an_error():
    for build in (lambda model: GLS(model).step, lambda model: attach(model).pre_step):
        model = make_net("mlp")
        step = build(model)
        sharded(model)
        loss_of(model, part_of(make_batch("mlp", 8, 0), even(8))).backward()
        with pytest.raises(RuntimeError, match=r"'stem': its weight was sharded after"):
            step()


@case
def layers_added_after_a_validation_are_found_in_their_place():
    """A forward without gradients leaves the outermost module's weights gathered."""
    for head_apart in (False, True):
        found = []
        for validates in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 20)).double()
            if head_apart:
                fully_shard(model[2], mesh=line_mesh())
            fully_shard(model, mesh=line_mesh())
            body, head = [list(part.parameters()) for part in (model[:2], model[2])]
            optimizer = GLS(body, model=model, normalize="spectral", site="step", rank=4)
            for step in range(4):
                if step == 2:
                    if validates:
                        with torch.no_grad():
                            model(torch.ones(2, 16, dtype=torch.float64))
                    optimizer.add_param_group({"params": head})
                optimizer.zero_grad()
                inputs = torch.randn(8, 16, dtype=torch.float64)
                model(inputs + dist.get_rank()).square().mean().backward()
                optimizer.step()
            found.append((optimizer.report(), [whole(p) for p in model.parameters()]))
        assert found[0][0] == found[1][0]
        rows = 8 * dist.get_world_size()
        assert f"2: GLS (Linear 33 -> 20, {rows} rows, rank 4, site step" in found[0][0]
        for p, q in zip(found[0][1], found[1][1], strict=True):
            assert torch.equal(p, q)


@case
def sharded_over_its_inputs_takes_adams_update():
    model = make_net("mlp")
    columns = model.first.weight
    place = lambda p: Shard(1) if p is columns else Shard(0)  # noqa: E731
    model = fully_shard(model, mesh=line_mesh(), shard_placement_fn=place)
    optimizer = GLS(model, **OPTIONS)
    assert "first.weight: Adam (its weight and bias are not sharded alike)" in optimizer.report()
    before = whole(model.first.weight).clone()
    train_on_part(model, optimizer, "mlp", even(8), range(2))
    assert not torch.equal(whole(model.first.weight), before)
    model = make_net("mlp", bias=False)
    place = lambda p: Shard(1) if p.shape == (8, 8) else Shard(0)  # noqa: E731
    model = fully_shard(model, mesh=line_mesh(), shard_placement_fn=place)
    assert "not sharded over its first axis alone" in GLS(model).report()


@case
def tensor_parallel_is_refused():
    model = make_net("mlp")
    parallelize_module(model, line_mesh(), {"first": ColwiseParallel(use_local_output=False)})
    optimizer = GLS(model, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"'first': .* does not cover tensor parallelism"):
        model.first(torch.ones(2, 8, dtype=torch.float64))
    optimizer.detach()


@case
def first_fsdp_is_refused():
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel .* use .*fully_shard"):
        GLS(model)


@case
def first_fsdp_after_the_optimizer_is_an_error():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(wrapped, make_batch("mlp", 4, 0)).backward()
    with pytest.raises(RuntimeError, match=r"'stem': its weight was flattened, as by Fully"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@case
def replicated_groups_of_shards():
    """The mesh of hybrid sharding; of one replica where there are two ranks."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    expected, sizes = make("uneven"), sizes_of("uneven")
    train_on_all(expected, GLS(expected, **OPTIONS, process_group=alone()), "mlp", sum(sizes))
    model = sharded(make("uneven"), mesh)
    train_on_part(model, GLS(model, **OPTIONS), "mlp", sizes)
    assert_same_weights(model, expected)
