"""Parts are restarted with backoff, and given up after five failures in a minute, with their last log lines."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_debugger.embedded.process import ChildProcess, last_lines, trim_log
from moe_debugger.embedded.supervisor import Part, PartEvent, PartState, Supervisor

_SLEEPER = "import time\nwhile True: time.sleep(60)"


class _Bench:
    """A supervisor whose events are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[PartEvent] = []
        self.supervisor = Supervisor(folder, self.events.append)

    def part(self, name: str, code: str, *, problem: Callable[[], str] = lambda: "") -> Part:
        return Part(name, [sys.executable, "-c", code], dict(os.environ), self.folder / f"{name}.log", problem)

    def poll_until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.events
            self.supervisor.poll()
            time.sleep(0.01)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[_Bench]:
    """Return a bench; everything that it started is ended."""
    bench = _Bench(tmp_path)
    yield bench
    hurried = threading.Event()
    hurried.set()
    bench.supervisor.stop(list(bench.supervisor.pids()), hurried)


def test_a_killed_part_is_restarted_and_said_to_be_ready_again(bench: _Bench) -> None:
    bench.supervisor.start(bench.part("a", _SLEEPER))
    bench.poll_until(lambda: bench.supervisor.are_ready(["a"]))
    pid = bench.supervisor.pids()["a"]
    os.kill(pid, 9)
    bench.poll_until(lambda: bench.supervisor.pids().get("a") not in (None, pid))
    bench.poll_until(lambda: bench.supervisor.are_ready(["a"]))
    assert [event.state for event in bench.events] == [PartState.READY, PartState.WAITING, PartState.READY]
    assert "signal 9" in bench.events[1].text
    assert "ready again" in bench.events[2].text


def test_a_part_that_fails_five_times_is_given_up_with_its_log_and_the_others_go_on(bench: _Bench) -> None:
    bench.supervisor.start(bench.part("good", _SLEEPER))
    bench.supervisor.start(bench.part("bad", "import sys; sys.exit('disk is full')", problem=lambda: "no answer"))
    bench.poll_until(lambda: bench.supervisor.failure(["bad"]) is not None)
    report = bench.supervisor.failure(["bad"])
    assert report is not None
    assert "5 times within a minute" in report.text
    assert "disk is full" in report.log_lines
    assert len([event for event in bench.events if event.part == "bad"]) == 5
    assert bench.supervisor.are_ready(["good"])


def test_wrong_settings_are_reported_at_once(bench: _Bench) -> None:
    bench.supervisor.start(bench.part("a", "import sys; sys.exit(2)", problem=lambda: "no answer"))
    bench.poll_until(lambda: bench.supervisor.failure(["a"]) is not None)
    assert len(bench.events) == 1


def test_a_part_that_ignores_sigterm_is_killed_when_hurried(bench: _Bench) -> None:
    code = (
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf', flush=True)\nwhile True: time.sleep(60)"
    )
    part = bench.part("deaf", code)
    bench.supervisor.start(part)
    bench.poll_until(lambda: last_lines(part.log_path) == ["deaf"])
    pid = bench.supervisor.pids()["deaf"]
    hurried = threading.Event()
    hurried.set()
    bench.supervisor.stop(["deaf"], hurried)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from moe_debugger.embedded.process import ChildProcess\n"
        f"child = ChildProcess([sys.executable, '-c', {_SLEEPER!r}], env=dict(os.environ),"
        f" log_path=Path({str(tmp_path / 'child.log')!r}), cwd=Path('/'))\n"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = ChildProcess([sys.executable, "-c", code], env=dict(os.environ), log_path=tmp_path / "log", cwd=tmp_path)
    assert parent.wait(20.0), last_lines(tmp_path / "log")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_long_log_is_cut_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("a") as writer:
        writer.write("x" * 5000 + "\n")
        writer.flush()
        trim_log(path, max_bytes=1000)
        writer.write("after\n")
    assert path.read_text() == "after\n"
    assert (tmp_path / "a.log.1").stat().st_size == 5001
