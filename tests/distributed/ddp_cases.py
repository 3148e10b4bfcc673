"""Cases under DistributedDataParallel; see launch.py."""

import copy
import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from nets import loss_of, make_batch, make_net
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
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gls_fused import GLS, attach

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def fours():
    return [4] * dist.get_world_size()


def check_equals_one_process(kind, split, options, **wrapper):
    expected, sizes = make_net(kind), split()
    train_on_all(expected, GLS(expected, **options, process_group=alone()), kind, sum(sizes))
    model = make_net(kind)
    optimizer = GLS(model, **options)
    train_on_part(DistributedDataParallel(model, **wrapper), optimizer, kind, sizes)
    assert_same_weights(model, expected)
    assert_one_preconditioner(optimizer.state.values())
    for p in model.parameters():
        assert_same_bits(p.detach())


for kind, site in itertools.product(("mlp", "cnn"), ("step", "backward")):
    for split in (fours, uneven):
        CASES[f"{kind}_{site}_{split.__name__}"] = lambda kind=kind, split=split, site=site: (
            check_equals_one_process(kind, split, {**OPTIONS, "site": site})
        )
for kind in ("grouped", "transposed"):
    CASES[kind] = lambda kind=kind: check_equals_one_process(kind, uneven, OPTIONS)
for normalize in ("row", "factored", "adam", "sgd", "none"):
    CASES[f"normalize_{normalize}"] = lambda normalize=normalize: check_equals_one_process(
        "mlp", uneven, {**OPTIONS, "normalize": normalize}
    )


for site in ("step", "backward"):
    CASES[f"experts_{site}"] = lambda site=site: check_equals_one_process(
        "experts", uneven, {**OPTIONS, "site": site}
    )


@case
def dense_curvature():
    check_equals_one_process("mlp", uneven, {**OPTIONS, "curvature": "dense"})


@case
def gradient_as_bucket_view():
    options = {**OPTIONS, "site": "backward"}
    check_equals_one_process("mlp", fours, options, gradient_as_bucket_view=True)


@case
def static_graph():
    check_equals_one_process("mlp", fours, {**OPTIONS, "site": "backward"}, static_graph=True)


@case
def no_sync_accumulation():
    sizes = [6] * dist.get_world_size()
    for site in ("step", "backward"):
        options = {**OPTIONS, "site": site}
        expected = make_net("mlp")
        train_on_all(expected, GLS(expected, **options, process_group=alone()), "mlp", sum(sizes))
        model = make_net("mlp")
        optimizer = GLS(model, **options)
        wrapped = DistributedDataParallel(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            mine = part_of(make_batch("mlp", sum(sizes), step), sizes)
            for micro, last in ((slice(0, 2), False), (slice(2, 6), True)):
                batch = tuple(x[micro] for x in mine)
                with nullcontext() if last else wrapped.no_sync():
                    (loss_of(wrapped, batch) * len(batch[0]) / 6).backward()
            optimizer.step()
        assert_same_weights(model, expected)
        assert_one_preconditioner(optimizer.state.values())


@case
def layer_unused_on_a_rank():
    """And, in some of the steps, on all ranks."""
    for site in ("step", "backward"):
        options = {**OPTIONS, "site": site}
        world, rank = dist.get_world_size(), dist.get_rank()
        expected, model = make_net("mlp"), make_net("mlp")
        reference = GLS(expected, **options, process_group=alone())
        optimizer = GLS(model, **options)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for step in range(STEPS):
            batch = make_batch("mlp", 8, step)
            parts = zip(*(x.split(even(8)) for x in batch), strict=True)
            # Not in one that gathers, which a single process makes up for.
            skips = [step in (0, 4) or r > 0 for r in range(world)]
            reference.zero_grad()
            for part, skip in zip(parts, skips, strict=True):
                (loss_of(expected, part, skip=skip) / world).backward()
            reference.step()
            optimizer.zero_grad()
            loss_of(wrapped, part_of(batch, even(8)), skip=skips[rank]).backward()
            optimizer.step()
        assert_same_weights(model, expected)
        assert "basis" in optimizer.state[model.second.weight]
        assert_one_preconditioner(optimizer.state.values())


@case
def attached_optimizer():
    expected, model = make_net("cnn"), make_net("cnn")
    options = {"rank": 4, "curvature_every": 3}
    reference = torch.optim.Adam(expected.parameters(), lr=0.01)
    attach(expected, reference, **options, process_group=alone())
    train_on_all(expected, reference, "cnn", sum(uneven()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    wrapped = DistributedDataParallel(model)
    handle = attach(wrapped, optimizer, **options)
    train_on_part(wrapped, optimizer, "cnn", uneven())
    assert_same_weights(model, expected)
    assert_one_preconditioner(handle.state_dict()["layers"].values())


@case
def wrapped_or_not_is_one_model():
    model = make_net("mlp")
    wrapped = DistributedDataParallel(make_net("mlp"))
    one, other = GLS(model, **OPTIONS), GLS(wrapped, **OPTIONS)
    assert other.report() == one.report()
    train_on_part(wrapped, other, "mlp", even(8), range(4))
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    model.load_state_dict(wrapped.module.state_dict())
    # A fresh wrapper, as the order in which more than two ranks add depends on its buckets.
    train_on_part(DistributedDataParallel(wrapped.module), other, "mlp", even(8), range(4, 8))
    train_on_part(DistributedDataParallel(model), one, "mlp", even(8), range(4, 8))
    for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p, q)


@case
def auto_keeps_the_gradient_of_several_ranks():
    """However few the rows: p.grad is an average, which no rank can check."""
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    sizes = [1] * (dist.get_world_size() - 1) + [2]
    train_on_part(DistributedDataParallel(model), optimizer, "mlp", sizes, range(2))
    assert optimizer.report().count("site step") == 4
    alone_model = make_net("mlp")
    single = GLS(alone_model, **OPTIONS, process_group=alone())
    train_on_all(alone_model, single, "mlp", 2, range(2))
    assert "site backward" in single.report()


@case
def commit_is_one_all_reduce_of_the_sums():
    model = make_net("cnn")
    optimizer = GLS(
        [{"params": [model.stem, model.first]}, {"params": [model.second, model.head]}], **OPTIONS
    )
    wrapped = DistributedDataParallel(model)
    layers = (model.stem, model.first, model.second, model.head)
    rows = [layer.weight[0].numel() + 1 for layer in layers]
    small_sums = sum(2 + 4 * 4 + 4 * d for d in rows)
    for step in range(7):
        optimizer.zero_grad()
        loss_of(wrapped, part_of(make_batch("cnn", 8, step), even(8))).backward()
        with Traffic() as traffic:
            optimizer.step()
        # And of a layer without statistics, on how many ranks it was called.
        sums = small_sums + (len(layers) if step == 0 else 0)
        assert traffic.reduced == ([] if step % 3 else [sums]), traffic.reduced
        # Before their first common step the ranks compare what they are about to do.
        assert bool(traffic.others) == (step == 0), traffic.others


@case
def attach_communicates_once_a_commit():
    model = make_net("mlp")
    handle = attach(model, rank=4, curvature_every=3)
    wrapped = DistributedDataParallel(model)
    for step in range(5):
        model.zero_grad()
        loss_of(wrapped, part_of(make_batch("mlp", 8, step), even(8))).backward()
        with Traffic() as traffic:
            handle.pre_step()
            handle.commit()
        assert len(traffic.reduced) == (step % 3 == 0), traffic.reduced


@case
def group_of_one_does_not_communicate():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS, process_group=alone())
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, make_batch("mlp", 8, step)).backward()
        with Traffic() as traffic:
            optimizer.step()
        assert not traffic.reduced
        assert not traffic.others


@case
def frozen_layers_take_no_part():
    model = make_net("mlp")
    model.stem.requires_grad_(False)
    model.first.requires_grad_(False)
    optimizer = GLS(model, **OPTIONS)
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, part_of(make_batch("mlp", 8, 0), even(8))).backward()
    with Traffic() as traffic:
        optimizer.step()
    assert traffic.reduced == [2 * (2 + 4 * 4 + 4 * 9 + 1)]


@case
def disagreement_is_an_error_on_all_ranks():
    rank = dist.get_rank()
    other = {"damping": 0.25} if rank else {}
    optimizer = GLS(make_net("mlp"), **{**OPTIONS, **other})
    with pytest.raises(RuntimeError, match=r"ranks must agree: .*'damping': 0\.25"):
        optimizer.step()
    model = nn.Linear(4, 3 + rank)
    with pytest.raises(RuntimeError, match=r"Linear 5 -> 3.*Linear 5 -> 4"):
        attach(model).commit()


@case
def state_loaded_on_one_rank_only_is_an_error():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    train_on_part(DistributedDataParallel(model), optimizer, "mlp", even(8), range(3))
    state = optimizer.state_dict()
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    if dist.get_rank() == 0:
        optimizer.load_state_dict(state)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"'step': 3.*'step': 0"):
        train_on_part(DistributedDataParallel(model), optimizer, "mlp", even(8), range(1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Switched(nn.Module):
    """The weights of the head are used whether or not it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, inputs, calls):
        hidden = torch.tanh(self.first(inputs))
        if calls:
            return self.head(hidden)
        # A product with the parameter itself would be seen.
        return nn.functional.linear(hidden, self.head.weight * 1, self.head.bias)


def check_idle_layer_starts(model, steps, step_of):
    """It is called on one rank, in a step in which others do not gather, and on all later on.

    Returns:
        What each step sent.
    """
    sent, last = [], dist.get_rank() == dist.get_world_size() - 1
    wrapped = DistributedDataParallel(model)
    for step in range(steps):
        calls = step >= 7 or (step == 4 and last)
        wrapped.zero_grad()
        inputs, targets = part_of(make_batch("mlp", 8, step), even(8))
        (wrapped(inputs, calls) - targets).square().mean().backward()
        with Traffic() as traffic:
            step_of()
        sent.append(traffic.reduced)
    return sent


@case
def idle_layer_starts_on_all_ranks():
    model = Switched()
    optimizer = GLS(model, **OPTIONS)
    sent = check_idle_layer_starts(model, 10, optimizer.step)
    first, head = (2 + 4 * 4 + 4 * d for d in (7, 9))
    # Idle after three steps; it has one number in step 3, and in step 6, and starts in step 7.
    assert sent[:3] == [[first + 1 + head + 1], [head + 1], [head + 1]], sent
    assert sent[3:] == [[first + 1], [], [], [first + 1], [head + 1], [], [first + head]], sent
    assert optimizer.state[model.head.weight]["rows"] == 8
    assert_one_preconditioner(optimizer.state.values())
    for p in model.parameters():
        assert_same_bits(p.detach())


class Penalised(nn.Module):
    """The branch has a gradient whether or not it is called; its rows are zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 5), nn.Linear(6, 5)
        self.branch = nn.Linear(6, 5, bias=False)

    def forward(self, x, calls):
        y = self.head(x) + self.first(x)
        if calls:
            y = y + self.branch(torch.zeros_like(x))
        return y.square().mean() + self.branch.weight.square().mean()


@case
def ranks_count_alike_which_layers_show_no_rows():
    """Rows that count for nothing, of one rank: the others count the step as it does."""
    for when in (0, 2):
        model = Penalised()
        wrapped = DistributedDataParallel(model)
        members = [*model.first.parameters(), *model.branch.parameters()]
        optimizer = GLS(members, model=wrapped, rank=4)
        for step in range(6):
            if step == 5:
                # What the ranks are about to do is compared anew.
                optimizer.add_param_group({"params": list(model.head.parameters())})
            optimizer.zero_grad()
            wrapped(torch.randn(8, 6), step == when and dist.get_rank() == 0).backward()
            optimizer.step()
            branch = optimizer._preconditioner.layers[1]
            counts = torch.tensor([branch.misses, branch.idle is not None])
            assert_same_bits(counts)
        assert "branch: Adam (its " in optimizer.report()


@case
def directions_of_one_output_are_laid_out_as_ddp_expects():
    """It warns of other strides, which is an error here."""
    for options in ({"curvature": "dense"}, {"backend": "reference"}):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        wrapped = DistributedDataParallel(model)
        optimizer = GLS(wrapped, site="backward", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                optimizer.zero_grad()
                wrapped(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
                optimizer.step()
        assert [p.grad.stride() for p in model[2].parameters()] == [(8, 1), (1,)]


@case
def idle_layer_starts_on_all_ranks_under_attach():
    model = Switched()
    optimizer = torch.optim.Adam(model.parameters())
    handle = attach(model, optimizer, **{k: OPTIONS[k] for k in ("rank", "curvature_every")})
    sent = check_idle_layer_starts(model, 10, optimizer.step)
    first, head = (2 + 4 * 4 + 4 * d for d in (7, 9))
    assert sent[3:] == [[first + 1], [], [], [first + 1], [head + 1], [], [first + head]], sent
    assert handle.state_dict()["layers"]["head"]["rows"] == 8
    assert_one_preconditioner(handle.state_dict()["layers"].values())
