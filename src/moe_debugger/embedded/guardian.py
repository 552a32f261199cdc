"""Starts and ends the guardian, the small process that tidies up when `moe-debugger up` is killed."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_debugger.embedded import _guardian

__all__ = ["Guardian"]

_END_TIMEOUT_S = 5.0


class Guardian:
    """The guardian of one fleet.

    Args:
        fleet_id: the marker in the environment of all processes of the fleet.
        remove: files and folders that it removes after a kill.
        lock_handle: the data folder's lock, which it holds too.
    """

    def __init__(self, fleet_id: str, *, remove: Sequence[Path], lock_handle: int, env: Mapping[str, str]) -> None:
        self._fleet_id = fleet_id
        self._remove = [str(path) for path in remove]
        self._lock_handle = lock_handle
        self._env = dict(env)
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._process.pid

    def ensure(self) -> None:
        """Start it again where it ended."""
        if self._process.poll() is not None:
            self._process = self._start()

    def dismiss(self) -> None:
        """End it without any clean-up: everything was stopped in order."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(b"done")
            self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _guardian.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._env,
            # A terminal that closes, or a kill of the process group, must not reach it.
            start_new_session=True,
            pass_fds=(self._lock_handle,),
            cwd="/",
        )
        assert process.stdin is not None
        config = {"fleet_id": self._fleet_id, "remove": self._remove, "parent_pid": os.getpid()}
        process.stdin.write(json.dumps(config).encode() + b"\n")
        process.stdin.flush()
        return process
