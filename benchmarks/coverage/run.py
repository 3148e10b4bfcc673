"""The coverage experiment: models are built on the meta device, and their layers looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.build import INSTALL, Build, build_model, version_of
from benchmarks.coverage.models import MODELS
from benchmarks.harness.files import write_json
from benchmarks.harness.progress import say
from benchmarks.harness.runs import describe_run, finish_run
from gls_fused.capture.find import find_layers

JSON_FILE = "coverage.json"


@dataclass(frozen=True)
class Coverage:
    """One model.

    Attributes:
        parameters: that are trained; those of a frozen model beside an adapter are not.
        adam: how many of them take Adam's update, by reason.
    """

    package: str
    model: str
    parameters: int
    adam: Mapping[str, int]

    @property
    def share(self) -> float:
        """Of the parameters, in layers that GLS covers."""
        return 1 - sum(self.adam.values()) / self.parameters


def measure_coverage(chosen: Mapping[str, Sequence[str]], out: Path) -> dict[str, Any]:
    """Look at the models of the packages that are installed.

    Args:
        chosen: names of models, by package.
    """
    results = {
        **describe_run(torch.device("cpu")),
        "packages": {package: version_of(package) for package in chosen},
        "models": [],
        # What could not be built, with its error.
        "failed": {},
    }
    for package, names in chosen.items():
        if results["packages"][package] is None:
            say(f"{package} is not installed, its {len(names)} models are left out: {INSTALL}")
            continue
        for name in names:
            try:
                found = look_at(package, name, MODELS[package][name])
            # Whatever it is, the other models are looked at.
            except Exception as error:  # noqa: BLE001
                text = " ".join(f"{type(error).__name__}: {error}".split())
                results["failed"][f"{package}/{name}"] = text
                say(f"{package}/{name}  not built: {text}")
                continue
            say(f"{package}/{name}  {found.share:.1%} of {found.parameters:,}")
            results["models"].append(asdict(found))
    finish_run(results)
    write_json(out / JSON_FILE, results)
    return results


def look_at(package: str, name: str, build: Build) -> Coverage:
    """Build one model, and ask what GLS would do with it."""
    model = build_model(package, build)
    parameters, adam = count_uncovered(model)
    return Coverage(package, name, parameters, adam)


def count_uncovered(model: nn.Module) -> tuple[int, dict[str, int]]:
    """How many parameters are trained, and how many of them take Adam's update, by reason."""
    trained = {param for param in model.parameters() if param.requires_grad}
    _, uncovered = find_layers([("", model)], trained)
    adam: Counter[str] = Counter()
    for _, param, reason in uncovered:
        adam[_without_names(reason)] += param.numel()
    return sum(param.numel() for param in trained), dict(adam.most_common())


def _without_names(reason: str) -> str:
    """A reason that is the same for all blocks of a model."""
    return re.sub(r"^shared by [^:]*:", "shared:", reason)
