"""The process tree of this worker: found, waited for, and killed where asking did not help."""

import contextlib
import ctypes
import os
import signal
import sys
import time

__all__ = ["adopt_orphans", "children_of", "descendants", "kill_descendants"]

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of all its orphaned descendants, so that none can be lost (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children_of() -> dict[int, list[int]]:
    """Return the children of each process of this machine, without zombies; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    if not os.path.isdir("/proc/self"):
        return children
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
                # The command is in parentheses and may hold anything, parentheses too.
                state, parent = file.read().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(name))
    return children


def descendants(pid: int | None = None) -> list[int]:
    """Return the living descendants of `pid` (default: this process), parents first."""
    children = children_of()
    found: list[int] = []
    pending = list(children.get(os.getpid() if pid is None else pid, ()))
    while pending:
        found += pending
        pending = [child for parent in pending for child in children.get(parent, ())]
    return found


def kill_descendants(grace_s: float) -> int:
    """Wait up to `grace_s` for all descendants to end, then kill the rest; return how many had to be killed."""
    deadline = time.monotonic() + grace_s
    while descendants() and time.monotonic() < deadline:
        _reap()
        time.sleep(0.02)
    killed: set[int] = set()
    # Again until none is left: one that was killed may have been about to fork.
    for _ in range(100):
        remaining = descendants()
        if not remaining:
            break
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        _reap()
        time.sleep(0.02)
    _reap()
    return len(killed)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
