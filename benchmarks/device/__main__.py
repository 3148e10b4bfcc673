"""Check and measure the kernels and the optimizer on a GPU; see device_check.sh.

Exit status: 0 all parts ended well, 1 one did not, 143 told to end.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.parts import BUDGET, DRY_PATIENCE, Setting, check_parts, more_parts
from benchmarks.device.report import PLOTS, write_report
from benchmarks.device.schedule import Outcome, Part, StoppedError, run_parts

ROOT = Path(__file__).parents[2]
TERMINATED = 143
# Parts by the module and the function that they are.
MEASURED = {
    "environment": ("environment", "describe"),
    "ops": ("ops", "check_ops"),
    "kernels": ("kernels", "measure_kernels"),
    "steps": ("steps", "measure_steps"),
    "graphs": ("graphs", "check_graphs"),
    "losses": ("losses", "measure_losses"),
    "memory": ("steps", "measure_memory"),
    "tiles": ("tiles", "try_tiles"),
    "profile": ("kernels", "run_once"),
}
PARTS = ("build", "plots", *MEASURED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or the one that is named, in this process."""
    options = _read(arguments)
    return _run_part(options) if options.part else _run_all(options)


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="device_check.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with sizes cut")
    parser.add_argument("--out", type=Path, default=Path("results/device"), metavar="DIR")
    parser.add_argument(
        "--parts", type=Path, metavar="DIR", help="of each part's JSON and log; default: OUT/parts"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="with CIFAR-10 or Fashion-MNIST, and texts"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: %(default)g"
    )
    parser.add_argument("--more", action="store_true", help="what device_more.sh runs")
    parser.add_argument("--part", choices=PARTS, help="this one alone")
    parser.add_argument("--result", type=Path, metavar="FILE", help="of --part")
    parser.add_argument("rest", nargs="*", metavar="-- WORD", help="for setup.py, of --part build")
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"--budget: expected a number > 0, got {options.budget:g}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such directory")
    options.parts = options.parts or options.out / "parts"
    for folder in (options.out, options.parts):
        folder.mkdir(parents=True, exist_ok=True)
    return options


def _run_all(options: argparse.Namespace) -> int:
    # A dry run is to show what fails, however slow and busy the machine is.
    budget = options.budget * (DRY_PATIENCE if options.dry_run else 1)
    script = "device_more.sh" if options.more else "device_check.sh"
    about = {
        "title": "On a GPU: the rest" if options.more else "On a GPU",
        "command": shlex.join(["bash", f"benchmarks/{script}", *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
    }
    out, parts = options.out.resolve(), options.parts.resolve()
    data = options.data.resolve() if options.data else None
    setting = Setting(parts, out, data, options.dry_run)
    shown: set[str] = set()

    def tell(outcomes: Sequence[Outcome]) -> None:
        write_report(outcomes, out, parts, about)
        for outcome in outcomes:
            if outcome.ended and outcome.part.name not in shown:
                shown.add(outcome.part.name)
                why = f" ({outcome.why})" if outcome.why else ""
                print(
                    f"{outcome.state:9} {outcome.seconds:6.1f} s  {outcome.part.title}{why}",
                    flush=True,
                )

    wanted = more_parts(setting) if options.more else check_parts(setting)
    _forget_earlier(wanted, parts, out)
    try:
        outcomes = run_parts(wanted, parts, budget, tell, ROOT)
    except StoppedError as stopped:
        print(f"{stopped}: {options.out / 'report.md'} has what was done", file=sys.stderr)
        return TERMINATED
    print(options.out / "report.md")
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


def _forget_earlier(wanted: Sequence[Part], parts: Path, out: Path) -> None:
    """No part is to stand for one of an earlier run."""
    for part in wanted:
        for ending in ("json", "log"):
            (parts / f"{part.name}.{ending}").unlink(missing_ok=True)
    for plot in PLOTS:
        (out / plot).unlink(missing_ok=True)


def _run_part(options: argparse.Namespace) -> int:
    """What imports torch is imported here, and no more of it than the part needs."""
    if options.part == "build":
        from benchmarks.device.build import build_extension

        return 0 if build_extension(options.rest, dry_run=options.dry_run) else 1
    if options.part == "plots":
        from benchmarks.device.plots import draw_plots

        draw_plots(options.parts, options.out)
        return 0
    from benchmarks.device.machine import find_machine
    from benchmarks.device.record import Record

    module, function = MEASURED[options.part]
    run = getattr(importlib.import_module(f"benchmarks.device.{module}"), function)
    machine, record = find_machine(dry_run=options.dry_run), Record(options.result)
    folders = (options.data, options.parts / "losses") if options.part == "losses" else ()
    return 0 if run(machine, record, *folders) else 1


if __name__ == "__main__":
    sys.exit(main())
