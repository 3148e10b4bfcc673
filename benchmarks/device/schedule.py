"""Parts, each a process with a limit of its own: one that fails or hangs does not stop the next.

After each change `tell` hears the outcomes so far, so that whoever kills this finds them on disk.
It imports nothing but Python's library: a torch that does not import is a part's failure, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

# Between asking a process to end and killing it.
GRACE = 3.0
# Less is left than any part needs to begin.
LEAST = 2.0
# A part may also use what the parts before it left over, up to so many times its limit.
STRETCH = 2.0
POLL = 0.05


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        limit: seconds.
        beside: the parts after it run meanwhile, until one needs it.
        needs: names of parts that must have ended well.
        essential: without it no other part runs.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    beside: bool = False
    needs: tuple[str, ...] = ()
    essential: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a part stands: "waiting", "running", "ok", "failed", "timed out", "skipped", "cut off".

    Attributes:
        status: the process's; None without one.
        why: of a part that was skipped.
    """

    part: Part
    state: str = "waiting"
    status: int | None = None
    seconds: float = 0.0
    allowed: float = 0.0
    why: str = ""

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")


Tell = Callable[[Sequence[Outcome]], None]


@dataclass
class _Running:
    outcome: Outcome
    process: subprocess.Popen[bytes]
    started: float

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self.started > self.outcome.allowed


class StoppedError(Exception):
    """Somebody asked this process to end."""


def run_parts(
    parts: Sequence[Part], logs: Path, budget: float, tell: Tell, cwd: Path
) -> list[Outcome]:
    """Run them in order; each leaves its output in `logs`/NAME.log.

    Args:
        budget: seconds for all of them.
        tell: called at every change.
    Raises:
        StoppedError: SIGTERM, SIGINT or SIGHUP came; the parts were ended and `tell` was told.
    """
    outcomes = [Outcome(part) for part in parts]
    beside: list[_Running] = []
    end, spent = time.monotonic() + budget, 0.0
    begun = time.monotonic()
    current: _Running | None = None
    try:
        with _signals_raise():
            for outcome in outcomes:
                part = outcome.part
                _await_needs(outcome, outcomes, beside, tell)
                spare = max(0.0, spent - (time.monotonic() - begun))
                spent += 0.0 if part.beside else part.limit
                left = end - time.monotonic()
                outcome.allowed = min(left, part.limit + min(spare, (STRETCH - 1) * part.limit))
                if outcome.why or left < LEAST:
                    outcome.state = "skipped"
                    outcome.why = outcome.why or "no time was left"
                    tell(outcomes)
                    continue
                current = _start(outcome, logs, cwd)
                tell(outcomes)
                if part.beside:
                    beside.append(current)
                    current = None
                    continue
                _finish(current)
                current = None
                tell(outcomes)
                if part.essential and outcome.state != "ok":
                    _skip_rest(outcomes, f"{part.name} {outcome.state}")
                    break
            for running in beside:
                _finish(running)
            tell(outcomes)
    except StoppedError:
        for running in [*beside, *([current] if current else [])]:
            if running.outcome.state == "running":
                _end(running)
                running.outcome.state = "cut off"
        _skip_rest(outcomes, "the run was cut off")
        tell(outcomes)
        raise
    return outcomes


def _await_needs(
    outcome: Outcome, outcomes: Sequence[Outcome], beside: Sequence[_Running], tell: Tell
) -> None:
    for needed in (other for other in outcomes if other.part.name in outcome.part.needs):
        for running in beside:
            if running.outcome is needed and not needed.ended:
                _finish(running)
                tell(outcomes)
        if needed.state != "ok":
            outcome.why = f"it needs {needed.part.name}, which {_did(needed.state)}"


def _did(state: str) -> str:
    return state if state in ("failed", "timed out") else f"was {state}"


def _skip_rest(outcomes: Sequence[Outcome], why: str) -> None:
    for outcome in outcomes:
        if outcome.state == "waiting":
            outcome.state, outcome.why = "skipped", why


def _start(outcome: Outcome, logs: Path, cwd: Path) -> _Running:
    outcome.state = "running"
    with (logs / f"{outcome.part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            outcome.part.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **outcome.part.environment},
            # Its own processes end with it.
            start_new_session=True,
        )
    return _Running(outcome, process, time.monotonic())


def _finish(running: _Running) -> None:
    """Wait for its end, or end it when its time is over."""
    outcome = running.outcome
    if outcome.ended:
        return
    while running.process.poll() is None and not running.overdue:
        time.sleep(POLL)
    timed_out = running.process.poll() is None
    _end(running)
    outcome.status = running.process.returncode
    outcome.seconds = time.monotonic() - running.started
    if timed_out:
        outcome.state = "timed out"
    else:
        outcome.state = "ok" if outcome.status == 0 else "failed"


def _end(running: _Running) -> None:
    """End the process and those that it started."""
    if running.process.poll() is None:
        _kill(running, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            running.process.wait(GRACE)
    # What a process that ended has left behind, too.
    _kill(running, signal.SIGKILL)
    running.process.wait()
    running.outcome.status = running.process.returncode
    running.outcome.seconds = time.monotonic() - running.started


def _kill(running: _Running, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(running.process.pid, number)


@contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
