"""Seconds of whole training steps of published models, GLS beside fused AdamW, within rounds.

GLS gathers statistics in one step of `curvature_every`, ten by default. Here it gathers in every
second step, so that a round has a step of either kind, and a step of ten counts as

    ordinary + (gathering - ordinary) / 10
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.build import INSTALL, build_model, version_of
from benchmarks.coverage.run import count_uncovered
from benchmarks.harness.files import write_json
from benchmarks.harness.interleave import pair_ratios, quartiles, turn
from benchmarks.harness.progress import say
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.models.cases import CASES, Case, Loss
from gls_fused import GLS
from gls_fused.apply.spectral import normalize_of
from gls_fused.capture.layer import Layer

JSON_FILE = "models.json"
# A round; GLS has two of its places.
KINDS = ("adamw", "gathering", "ordinary")
# So small that weights stay what they are, and no loss runs away.
RATE = 1e-8
SEED = 0
# Before anything is timed; GLS starts its statistics in the first, and gathers in the third.
WARM_UP = 3
GATHER_EVERY = 2


class UntimedError(Exception):
    """What a model does is not what is to be timed."""


@dataclass(frozen=True)
class ModelOptions:
    """What is timed, and how often.

    Attributes:
        batch: images or sequences; None, each model's own.
        cpu_time: whether the process's own seconds count, which others on the machine disturb less.
    """

    models: tuple[str, ...]
    rounds: int
    batch: int | None
    cpu_time: bool = False


@dataclass
class Seconds:
    """By round: of whole steps, and of their `step()` alone."""

    whole: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)


class Stepper:
    """A model and its optimizer, of which whole steps are timed."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._loss_of, self._clock = loss, clock
        self.loss = torch.zeros(())
        for _ in range(WARM_UP):
            self.run()

    @property
    def kind(self) -> str:
        """Of the step that comes."""
        if not isinstance(self.optimizer, GLS):
            return "adamw"
        (group,) = self.optimizer.param_groups
        return "ordinary" if group["step"] % group["curvature_every"] else "gathering"

    def run(self) -> tuple[float, float]:
        """Take a step; its seconds, and those of `step()` alone."""
        start = self._clock()
        self.optimizer.zero_grad()
        loss: Tensor = self._loss_of(self.model)
        loss.backward()
        before = self._clock()
        self.optimizer.step()
        end = self._clock()
        self.loss = loss.detach()
        # The other optimizer's step has the memory.
        self.optimizer.zero_grad()
        return end - start, end - before


def measure_models(options: ModelOptions, out: Path) -> dict[str, Any]:
    """Time every model; `out` is kept complete after each.

    A model that cannot be timed is among "failed", with the reason.
    """
    results = {
        **describe_run(torch.device("cpu")),
        "settings": {**asdict(options), "lr": RATE},
        "packages": {
            package: version_of(package)
            for package in dict.fromkeys(CASES[name].package for name in options.models)
        },
        "models": [],
        "failed": {},
    }
    for name in options.models:
        case = CASES[name]
        label = f"{case.package}/{name}"
        try:
            if results["packages"][case.package] is None:
                raise UntimedError(f"{case.package} is not installed: {INSTALL}")
            found = measure_model(case, options)
        # Whatever it is, the other models are timed.
        except Exception as error:  # noqa: BLE001
            results["failed"][label] = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{label}  not timed: {results['failed'][label]}")
        else:
            results["models"].append(found)
            ratio = quartiles(ratios(found))
            say(f"{label}  {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of AdamW's")
        finish_run(results)
        write_json(out / JSON_FILE, results)
        # A model refers to itself by what captures it.
        gc.collect()
    return results


def measure_model(case: Case, options: ModelOptions) -> dict[str, Any]:
    """The seconds of one model's steps, by kind and round.

    Raises:
        UntimedError: a layer that GLS covers and that trains has no P, or a loss is not finite.
    """
    torch.manual_seed(SEED)
    model = build_model(case.package, case.build, "cpu").train()
    parameters, adam = count_uncovered(model)
    covered = 1 - sum(adam.values()) / parameters
    count = case.count(options.batch)
    loss = case.loss(count)
    twin = copy.deepcopy(model)
    clock = time.process_time if options.cpu_time else time.perf_counter
    peer = Stepper(twin, loss, torch.optim.AdamW(twin.parameters(), lr=RATE, fused=True), clock)
    gls = Stepper(model, loss, GLS(model, lr=RATE, curvature_every=GATHER_EVERY), clock)
    preconditioned, orthogonal = shares(gls)
    moving = {
        mine
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True)
        if its in peer.optimizer.state
    }
    if any(moving.intersection(layer.params) for layer in without_statistics(gls)):
        raise UntimedError(f"GLS covers {covered:.1%}, and has a P for {preconditioned:.1%}")
    seconds = {kind: Seconds() for kind in KINDS}
    for index in range(options.rounds):
        for place in turn(KINDS, index):
            # GLS's steps take turns: of a round's two, either may come first.
            stepper = peer if place == "adamw" else gls
            own = seconds[stepper.kind]
            whole, update = stepper.run()
            own.whole.append(whole)
            own.update.append(update)
    losses = {"adamw": peer.loss.item(), "gls": gls.loss.item()}
    if not all(map(math.isfinite, losses.values())):
        raise UntimedError(f"losses: expected finite ones, got {losses}")
    return {
        "package": case.package,
        "model": case.name,
        "batch": count,
        "size": case.size,
        "aim": case.aim,
        "parameters": parameters,
        "covered": preconditioned,
        "orthogonal": orthogonal,
        "losses": losses,
        "seconds": {kind: asdict(own) for kind, own in seconds.items()},
    }


def without_statistics(stepper: Stepper) -> list[Layer]:
    """Of the layers that GLS covers."""
    assert isinstance(stepper.optimizer, GLS)
    return [layer for layer in stepper.optimizer._preconditioner.layers if layer.inverse is None]


def shares(stepper: Stepper) -> tuple[float, float]:
    """Of the trained parameters: in layers with a P, and in those that take orthogonal steps."""
    optimizer = stepper.optimizer
    assert isinstance(optimizer, GLS)
    (group,) = optimizer.param_groups
    trained = {param for param in stepper.model.parameters() if param.requires_grad}
    having, orthogonal = set(), set()
    for layer in optimizer._preconditioner.layers:
        if layer.inverse is not None:
            having.update(layer.params)
            if normalize_of(layer, optimizer.state[layer.weight], group) == "spectral":
                orthogonal.update(layer.params)
    total = sum(param.numel() for param in trained)
    preconditioned, spectral = (
        sum(param.numel() for param in trained & found) / total for found in (having, orthogonal)
    )
    return preconditioned, spectral


def mean_of_ten(ordinary: Sequence[float], gathering: Sequence[float]) -> list[float]:
    """Seconds of a step where one in ten gathers, by round."""
    return [few + (many - few) / 10 for few, many in zip(ordinary, gathering, strict=True)]


def ratios(model: Mapping[str, Any]) -> list[float]:
    """GLS's seconds over AdamW's of the same round."""
    seconds = {kind: own["whole"] for kind, own in model["seconds"].items()}
    mine = mean_of_ten(seconds["ordinary"], seconds["gathering"])
    return pair_ratios(mine, seconds["adamw"])
