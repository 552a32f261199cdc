"""The process above the worker: whatever becomes of the worker, none of its processes and files outlive it.

Ray's processes end with the worker that started them, but two of its agents take up to a minute for it, and nobody
removes the files. So `python -m moe_collector` is this small process, the worker is its child, and orphaned descendants
become its children. Where it is killed itself, the worker gets SIGTERM and cleans up.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from ._processes import adopt_orphans, kill_descendants

__all__ = ["TEMP_DIR_VARIABLE", "run_guarded"]

TEMP_DIR_VARIABLE = "MOE_WORKER_TEMP_DIR"
_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec nothing may take a lock.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def run_guarded(command: list[str], temp_dir: Path) -> int:
    """Run the worker to its end, remove what it left, and return its exit code (128 + n where signal n ended it)."""
    adopt_orphans()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    # Blocked until there is a child to pass them on to, so that none is lost in between.
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    parent = os.getpid()
    child = subprocess.Popen(
        command,
        env=os.environ | {TEMP_DIR_VARIABLE: str(temp_dir)},
        # Its own group: a Ctrl-C in a terminal reaches it once, through us.
        process_group=0,
        preexec_fn=lambda: _end_with(parent),
    )
    for number in numbers:
        signal.signal(number, lambda number, _: child.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    code = child.wait()
    kill_descendants(0)
    shutil.rmtree(temp_dir, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _end_with(parent: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)
