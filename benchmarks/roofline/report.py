"""The tables of the model, as JSON values and for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.harness.tables import Table
from benchmarks.roofline.choice import LAUNCH, Decision, count_launches, decide
from benchmarks.roofline.model import (
    MODELS,
    RANK,
    TARGETS,
    Cost,
    adam,
    forward_and_backward,
    gls_step,
    orthogonal_step,
    precondition,
    refresh,
    sketch,
    total,
    update,
)
from benchmarks.workloads.sizes import GATHER_EVERY

MODELLED = "A model from data-sheet figures; nothing here was measured."
TOKENS = (2048, 16384, 524288)
SHAPES = ((128, 3072, 1024), (128, 1024, 512), (8192, 768, 3072))


def operations() -> list[tuple[str, str, Cost]]:
    """(op, shape, cost) of every kernel, for some shapes."""
    found = []
    for n, k, m in SHAPES:
        count = m * (k + 1)
        found += [
            ("precondition_rows", f"[{n}, {k}]", precondition(n, k)),
            ("precondition_gradient", f"[{m}, {k}]", precondition(m, k)),
            ("sketch_rows", f"[{n}, {k}]", sketch(n, k)),
            ("refresh_subspace", f"[{k}, {RANK}]", refresh(k)),
            ("update_layers_, two passes", f"[{m}, {k}]", update(count, walks=False)),
            ("update_layers_, walked twice", f"[{m}, {k}]", update(count, walks=True)),
            ("torch's fused Adam", f"[{m}, {k}]", adam(count)),
        ]
    return found


def describe() -> dict[str, Any]:
    """The tables' numbers, as JSON values."""
    return {
        "targets": [asdict(target) for target in TARGETS],
        "operations": [
            {"op": op, "shape": shape, **asdict(cost)} for op, shape, cost in operations()
        ],
        "steps": [
            {
                "model": model.title,
                "parameters": model.parameters,
                "adam": asdict(adam(model.parameters)),
                "gls": {name: asdict(cost) for name, cost in gls_step(model).items()},
            }
            for model in MODELS
        ],
    }


def make_tables(decisions: Sequence[Decision] | None = None) -> list[Table]:
    """Data sheets, operations, whole steps, the choice of backends and orthogonal steps."""
    choice = _choice_table(decide() if decisions is None else decisions)
    return [_target_table(), _operation_table(), _step_table(), choice, _orthogonal_table()]


def _floors(cost: Cost) -> tuple[str, ...]:
    return tuple(f"{cost.floor(target) * 1e6:.2f}" for target in TARGETS)


def _cost(cost: Cost) -> tuple[str, ...]:
    return f"{cost.bytes / 1e6:.3f}", f"{cost.flops / 1e6:.1f}", f"{cost.launches:.1f}"


def _target_table() -> Table:
    rows = [
        (
            t.name,
            t.source,
            f"{t.bandwidth / 1e12:.3f}",
            f"{t.flops / 1e12:.1f}",
            f"{t.products / 1e12:.0f}",
        )
        for t in TARGETS
    ]
    header = ("GPU", "source", "TB/s", "float32 Tflop/s", "bfloat16 Tflop/s")
    return Table("Targets", MODELLED, header, tuple(rows))


def _operation_table() -> Table:
    rows = [(op, shape, *_cost(cost), *_floors(cost)) for op, shape, cost in operations()]
    note = (
        f"{MODELLED} Rank {RANK}, float32, normalize factored, momentum .9; floors in microseconds."
    )
    names = tuple(f"{target.name}, µs" for target in TARGETS)
    return Table(
        "Operations", note, ("op", "shape", "MB", "Mflop", "launches", *names), tuple(rows)
    )


def _step_table() -> Table:
    rows: list[tuple[str, ...]] = []
    for model in MODELS:
        baseline = adam(model.parameters)
        pieces = gls_step(model)
        plain = gls_step(model, momentum=False)
        lines = [("Adam (fused)", baseline)]
        lines += [(f"GLS: {name}", cost) for name, cost in pieces.items() if cost.launches]
        lines.append(("GLS", total(list(pieces.values()))))
        lines.append(("GLS, momentum 0", total(list(plain.values()))))
        for name, cost in lines:
            ratio = f"{cost.bytes / baseline.bytes:.3f}"
            rows.append((model.title, name, *_cost(cost), ratio, *_floors(cost)))
    note = (
        f"{MODELLED} Defaults, but normalize factored; statistics every {GATHER_EVERY} steps, "
        "spread over them. Floors leave launch latency out: launches stand beside them. Images of "
        "CIFAR-10's shape, batch 128; 8,192 tokens to a step of the transformer, 1,024 of them "
        "sketched, float32."
    )
    names = tuple(f"{target.name}, µs" for target in TARGETS)
    header = ("model", "step", "MB", "Mflop", "launches", "bytes to Adam's", *names)
    return Table("Steps", note, header, tuple(rows))


def _choice_table(decisions: Sequence[Decision]) -> Table:
    rows = []
    for decision in decisions:
        triton, native = count_launches(decision.op, MODELS[-1])
        rows.append(
            (
                decision.op,
                decision.backend,
                f"{decision.ratio:.2f}",
                str(triton),
                str(native),
                decision.why,
            )
        )
    modelled = all(decision.why.startswith("modelled") for decision in decisions)
    note = (
        f"{MODELLED if modelled else 'A model, where it does not say that it was measured.'} The "
        "time of an op by the C++ kernels to that by Triton's: the geometric mean over the models "
        "and GPUs above, float32 and bfloat16, all layers that it is for, statistics in float32, "
        f"{LAUNCH * 1e6:g} µs a launch. The launches are those of a 124M transformer."
    )
    header = ("op", "backend", "native / triton", "Triton's launches", "native's", "why")
    return Table("Choice of backends", note, header, tuple(rows))


def _orthogonal_table() -> Table:
    model = MODELS[-1]
    factors = [orthogonal_step(layer) for layer in model.layers]
    rows: list[tuple[str, ...]] = []
    for tokens in TOKENS:
        work = total([forward_and_backward(layer, tokens) for layer in model.layers])
        shares = []
        for target in TARGETS:
            step = sum(cost.floor(target) for cost in factors)
            rest = sum(forward_and_backward(x, tokens).floor(target) for x in model.layers)
            shares.append(f"{step / (step + rest):.2%}")
        flops = total(factors).products / work.products
        rows.append((model.title, f"{tokens:,}", f"{flops:.2%}", *shares))
    note = (
        f"{MODELLED} All layers of the transformer take orthogonal steps. The step's share of its "
        "own time and of the layers' forward and backward, by floors of each; attention, norms and "
        "the head, which would make it smaller, are left out."
    )
    names = tuple(f"{target.name}, share of time" for target in TARGETS)
    return Table(
        "Orthogonal steps", note, ("model", "tokens to a step", "flops", *names), tuple(rows)
    )
