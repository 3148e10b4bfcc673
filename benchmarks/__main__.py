"""`python -m benchmarks COMMAND`: one subcommand per experiment.

Exit status: 0 done, 1 a check failed, 2 a bad option or bad data (one line on standard error), 130
interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from benchmarks.convergence.command import add_convergence, add_demo
from benchmarks.coverage.command import add_coverage
from benchmarks.epoch.command import add_epoch
from benchmarks.harness.errors import InputError
from benchmarks.host.command import add_host
from benchmarks.kernels.command import add_kernels
from benchmarks.models.command import add_models
from benchmarks.readme import add_readme
from benchmarks.roofline.command import add_roofline
from benchmarks.scaling.command import add_scaling
from benchmarks.stability.command import add_stability
from benchmarks.time_to_loss.command import add_time_to_loss
from benchmarks.workloads.gate import GateError

COMMANDS = (
    add_convergence,
    add_demo,
    add_epoch,
    add_time_to_loss,
    add_scaling,
    add_host,
    add_stability,
    add_coverage,
    add_models,
    add_kernels,
    add_roofline,
    add_readme,
)


class Parser(argparse.ArgumentParser):
    """Reports a bad option in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name and return the exit status."""
    parser = Parser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
