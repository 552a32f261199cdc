"""Child processes that end with their parent, and whose logs stay small.

Start them from the main thread: the kernel sends PR_SET_PDEATHSIG when the *thread* that spawned them ends.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ChildProcess", "last_lines", "trim_log"]

_MAX_LOG_BYTES = 8 << 20
_LAUNCHER = Path(__file__).with_name("_launch.py")
_POLL_S = 0.02


class ChildProcess:
    """A running program in its own session, its output appended to a log file."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], log_path: Path, cwd: Path) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Append mode: the file can be cut while the child writes to it.
        handle = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            os.close(handle)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask the program to stop; it ends its own children."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the program and its process group at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end and say whether it came; a signal handler may end the wait by an exception."""
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def last_lines(path: Path, num_lines: int = 15) -> list[str]:
    """Return the end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except OSError:
        return []


def trim_log(path: Path, max_bytes: int = _MAX_LOG_BYTES) -> None:
    """Keep a log that has grown too long as `<name>.1`, and begin it anew, while its writer goes on."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > max_bytes:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            path.with_name(path.name + ".1").chmod(0o600)
            os.truncate(path, 0)
