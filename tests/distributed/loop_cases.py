"""Cases of what a training loop does around a step, under either wrapper; see launch.py."""

import itertools

import torch
import torch.distributed as dist
from fsdp_cases import sharded
from nets import loss_of, make_batch, make_net
from ranks import (
    OPTIONS,
    STEPS,
    alone,
    assert_one_preconditioner,
    assert_same_bits,
    assert_same_weights,
    part_of,
    train_on_all,
    train_on_part,
    uneven,
    whole,
)
from torch.nn.parallel import DistributedDataParallel

from gls_fused import GLS

WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": sharded}
CASES = {}


def case(function):
    for name, wrap in WRAPPERS.items():
        CASES[f"{function.__name__}_{name}"] = lambda wrap=wrap: function(wrap)
    return function


def is_last_rank():
    return dist.get_rank() == dist.get_world_size() - 1


def spoil_loss(model, loss):
    """Of one rank; all get what they average."""
    (loss * torch.inf if is_last_rank() else loss).backward()


def spoil_shard(model, loss):
    """What one rank alone can see."""
    loss.backward()
    if is_last_rank():
        model.first.weight.grad.to_local().fill_(torch.inf)


def check_overflow(wrap, spoil, options):
    """All ranks leave the step out, and lower their scales alike."""
    sizes = [2 * size for size in uneven()]
    expected, model = make_net("mlp"), make_net("mlp")
    reference = GLS(expected, **options, process_group=alone())
    train_on_all(expected, reference, "mlp", sum(sizes))
    wrapped = wrap(model)
    optimizer = GLS(wrapped, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    overflows = 0
    for step, overflow in itertools.product(range(STEPS), (True, False)):
        if overflow and step not in (0, 7, 9):
            continue
        optimizer.zero_grad()
        before = [whole(p).clone() for p in model.parameters()]
        batch = part_of(make_batch("mlp", sum(sizes), step), sizes)
        weight = sizes[dist.get_rank()] * len(sizes) / sum(sizes)
        loss = scaler.scale(loss_of(wrapped, batch) * weight)
        if overflow:
            spoil(model, loss)
        else:
            loss.backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(whole(p), q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(same) == overflow
        assert (scaler.get_scale() < scale) == overflow
        overflows += overflow
        assert_same_bits(torch.tensor(scaler.get_scale()))
    assert overflows == 3
    assert_same_weights(model, expected)
    assert_one_preconditioner(optimizer.state.values())


for site in ("step", "backward"):
    for name, wrap, spoil in (
        ("ddp", DistributedDataParallel, spoil_loss),
        ("fsdp", sharded, spoil_loss),
        ("fsdp", sharded, spoil_shard),
    ):
        CASES[f"{spoil.__name__}_{site}_{name}"] = lambda w=wrap, f=spoil, site=site: (
            check_overflow(w, f, {**OPTIONS, "site": site})
        )


@case
def scheduled_tensor_lr(wrap):
    """Against numbers."""

    def decay(optimizer, args, kwargs):
        optimizer.param_groups[0]["lr"] *= 0.8

    expected, model = make_net("mlp"), make_net("mlp")
    reference = GLS(expected, **OPTIONS, process_group=alone())
    reference.register_step_post_hook(decay)
    train_on_all(expected, reference, "mlp", sum(uneven()))
    wrapped = wrap(model)
    rate = torch.tensor(OPTIONS["lr"], dtype=torch.float64)
    optimizer = GLS(wrapped, **{**OPTIONS, "lr": rate})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    train_on_part(wrapped, optimizer, "mlp", uneven())
    assert rate < OPTIONS["lr"] / 50
    assert_same_weights(model, expected)


@case
def group_added_later(wrap):
    def start(model, **options):
        return GLS([{"params": [model.stem, model.first]}], **OPTIONS, **options)

    def grow(model, optimizer):
        optimizer.add_param_group({"params": [model.second, model.head], "lr": 0.02})

    expected, model = make_net("mlp"), make_net("mlp")
    reference = start(expected, process_group=alone())
    train_on_all(expected, reference, "mlp", sum(uneven()), range(5))
    grow(expected, reference)
    train_on_all(expected, reference, "mlp", sum(uneven()), range(5, STEPS))
    wrapped = wrap(model)
    optimizer = start(model)
    train_on_part(wrapped, optimizer, "mlp", uneven(), range(5))
    grow(model, optimizer)
    train_on_part(wrapped, optimizer, "mlp", uneven(), range(5, STEPS))
    assert_same_weights(model, expected)
    assert "basis" in optimizer.state[model.second.weight]
    assert_one_preconditioner(optimizer.state.values())


def compiled_forward():
    """Of the wrapper, whose hooks dynamo lets split the graph."""
    for site in ("step", "backward"):
        options = {**OPTIONS, "site": site}
        expected, model = make_net("mlp"), make_net("mlp")
        reference = GLS(expected, **options, process_group=alone())
        train_on_all(expected, reference, "mlp", sum(uneven()))
        optimizer = GLS(model, **options)
        compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        train_on_part(compiled, optimizer, "mlp", uneven())
        assert_same_weights(model, expected)
        assert_one_preconditioner(optimizer.state.values())


CASES["compiled_forward_ddp"] = compiled_forward
