"""Keeps the parts of the fleet running: starts, restarts with backoff, reports, stops in order.

All of it runs in the main thread; `poll` is called a few times a second.
"""

import collections
import enum
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_debugger.embedded.process import ChildProcess, last_lines, trim_log

__all__ = ["CONFIG_EXIT_CODE", "Part", "PartEvent", "PartState", "Supervisor"]

#: A service that exits so has wrong settings: trying again does not help.
CONFIG_EXIT_CODE = 2
_MAX_FAILURES = 5
_FAILURE_WINDOW_S = 60.0
_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 4.0)
# After the report a part is tried again now and then: its cause may be gone (memory, a disk that was full).
_SLOW_RETRY_S = 30.0
_TRIM_INTERVAL_S = 5.0


class PartState(enum.Enum):
    """Where a part stands."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class PartEvent:
    """Something that a person should know of."""

    part: str
    state: PartState
    text: str
    log_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """How to run one program of the fleet.

    Attributes:
        problem: asks it; returns what is wrong, empty when it is ready.
        before_start: lets go of what the program needs, e.g. its reserved port.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    problem: Callable[[], str]
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 5.0
    before_start: Callable[[], None] = field(default=lambda: None)


class _Running:
    def __init__(self, part: Part) -> None:
        self.part = part
        self.child: ChildProcess | None = None
        self.state = PartState.STARTING
        self.started_at = 0.0
        self.retry_at = 0.0
        self.was_ready = False
        self.last_problem = ""
        self.last_exit_code: int | None = None
        self.failures: collections.deque[float] = collections.deque(maxlen=_MAX_FAILURES)


class Supervisor:
    """Runs parts; the order in which they are added is the order of their start.

    Args:
        cwd: folder in which they run.
        on_event: told of every change.
    """

    def __init__(self, cwd: Path, on_event: Callable[[PartEvent], None]) -> None:
        self._cwd = cwd
        self._on_event = on_event
        self._running: dict[str, _Running] = {}
        #: While the fleet starts, a part that is given up ends the start.
        self.is_starting = True
        self._trimmed_at = 0.0
        # One report for each part that was given up, until it is ready again.
        self._failures: list[PartEvent] = []

    def start(self, part: Part) -> None:
        """Start a part; `poll` says when it is ready."""
        running = _Running(part)
        self._running[part.name] = running
        self._spawn(running)

    def state(self, name: str) -> PartState:
        """Return where a part stands."""
        return self._running[name].state

    def pids(self) -> dict[str, int]:
        """Return the process id of each part that runs."""
        return {name: r.child.pid for name, r in self._running.items() if r.child is not None}

    def are_ready(self, names: Sequence[str]) -> bool:
        """Say whether all of these parts answer."""
        return all(self._running[name].state is PartState.READY for name in names)

    def failure(self, names: Sequence[str]) -> PartEvent | None:
        """Return the report of the first of these parts that was given up, if any."""
        return next((event for event in self._failures if event.part in names), None)

    def poll(self) -> None:
        """Look after every part once."""
        now = time.monotonic()
        for running in self._running.values():
            if running.child is not None and running.child.exit_code is not None:
                self._on_exit(running, running.child.exit_code, now)
            elif running.child is None and now >= running.retry_at and running.state is not PartState.STOPPED:
                self._spawn(running)
            elif running.state is PartState.STARTING:
                self._ask(running, now)
        if now - self._trimmed_at > _TRIM_INTERVAL_S:
            self._trimmed_at = now
            for running in self._running.values():
                trim_log(running.part.log_path)

    def stop(self, order: Sequence[str], is_hurried: threading.Event) -> None:
        """Stop the parts one after another; what does not end in time, or when hurried, is killed."""
        for name in order:
            running = self._running.get(name)
            if running is None:
                continue
            running.state = PartState.STOPPED
            child, running.child = running.child, None
            if child is None:
                continue
            self._on_event(PartEvent(name, PartState.STOPPED, "stopping"))
            child.terminate()
            deadline = time.monotonic() + running.part.stop_timeout_s
            while not child.wait(0.1):
                if is_hurried.is_set() or time.monotonic() > deadline:
                    child.kill()
                    child.wait(5.0)
                    break

    def _spawn(self, running: _Running) -> None:
        part = running.part
        part.before_start()
        running.child = ChildProcess(part.argv, env=part.env, log_path=part.log_path, cwd=self._cwd)
        running.state = PartState.STARTING
        running.started_at = time.monotonic()
        running.last_problem = ""

    def _ask(self, running: _Running, now: float) -> None:
        running.last_problem = running.part.problem()
        if not running.last_problem:
            running.state = PartState.READY
            text = f"ready again after {len(running.failures)} restart(s)" if running.was_ready else "ready"
            running.was_ready = True
            self._failures = [event for event in self._failures if event.part != running.part.name]
            self._on_event(PartEvent(running.part.name, PartState.READY, text))
        elif now - running.started_at > running.part.start_timeout_s and running.child is not None:
            running.child.kill()
            running.child.wait(5.0)
            self._on_exit(running, None, now)

    def _on_exit(self, running: _Running, exit_code: int | None, now: float) -> None:
        running.child = None
        running.last_exit_code = exit_code
        running.failures.append(now)
        cause = _cause(exit_code, running)
        name = running.part.name
        is_fast = len(running.failures) == _MAX_FAILURES and now - running.failures[0] < _FAILURE_WINDOW_S
        is_hopeless = exit_code == CONFIG_EXIT_CODE and not running.was_ready
        is_first = self.failure([name]) is None
        if is_fast or is_hopeless or not is_first:
            running.state = PartState.FAILED
            running.retry_at = now + _SLOW_RETRY_S
            if is_first:
                lines = tuple(last_lines(running.part.log_path))
                how_often = "" if is_hopeless else f", {_MAX_FAILURES} times within a minute"
                text = f"{cause}{how_often}. Its log is {running.part.log_path}"
                if not self.is_starting:
                    text += f". The other parts go on; this one is tried again every {_SLOW_RETRY_S:.0f} s"
                event = PartEvent(name, PartState.FAILED, text, lines)
                self._failures.append(event)
                self._on_event(event)
            return
        num_recent = sum(now - failure < _FAILURE_WINDOW_S for failure in running.failures)
        delay = _BACKOFF_S[min(num_recent, len(_BACKOFF_S)) - 1]
        running.state = PartState.WAITING
        running.retry_at = now + delay
        self._on_event(PartEvent(name, PartState.WAITING, f"{cause}; restarting it in {delay:g} s"))


def _cause(exit_code: int | None, running: _Running) -> str:
    if exit_code is None:
        return f"was not ready within {running.part.start_timeout_s:.0f} s ({running.last_problem})"
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}"
