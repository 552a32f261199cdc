"""What outlives `moe-debugger up` for a moment: after kill -9 it ends every process of the fleet and tidies up.

Standard library only: `up` runs this file by its path in an isolated interpreter. It reads one line of JSON from its
standard input, then waits for the end of that pipe, which the kernel closes however `up` ends. It holds the data
folder's lock meanwhile (an inherited descriptor), so that no new fleet starts between.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time

FLEET_VARIABLE = "MOE_DEBUGGER_FLEET"
# Children get SIGTERM from the kernel when `up` ends; what is not gone by then is killed. All is gone in 10 s.
_ORDERLY_S = 4.0
_KILL_S = 5.0
_POLL_S = 0.05


def marked_pids(fleet_id: str) -> list[int]:
    """Return the processes, but for this one, whose environment carries the fleet's marker."""
    marker = f"{FLEET_VARIABLE}={fleet_id}".encode()
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) == os.getpid():
                continue
            # Processes end while we look, and those of other users cannot be read.
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if marker in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def kill_marked(fleet_id: str, *, timeout_s: float, spare: frozenset[int] = frozenset()) -> bool:
    """Kill the fleet's processes until none is left; say whether that was reached."""
    deadline = time.monotonic() + timeout_s
    while True:
        pids = [pid for pid in marked_pids(fleet_id) if pid not in spare]
        if not pids:
            return True
        if time.monotonic() > deadline:
            return False
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def main() -> int:
    """Wait for the end of `up`, then clean up unless it did so itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    config = json.loads(sys.stdin.buffer.readline())
    if sys.stdin.buffer.read().strip() == b"done":
        return 0
    fleet_id = config["fleet_id"]
    deadline = time.monotonic() + _ORDERLY_S
    while marked_pids(fleet_id) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    is_clean = kill_marked(fleet_id, timeout_s=_KILL_S)
    for path in config["remove"]:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(path)
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
