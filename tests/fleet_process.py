"""Runs `moe-debugger up` as a user would, and finds all that belongs to it by a marker in its environment."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKER = "MOE_TEST_FLEET_MARKER"
START_TIMEOUT_S = 100.0
GONE_TIMEOUT_S = 10.0


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait for a condition, or fail naming it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


class FleetProcess:
    """One `moe-debugger up --json`."""

    def __init__(self, folder: Path, *options: str, ignore_sigint: bool = False) -> None:
        self.marker = uuid.uuid4().hex
        self.data = folder / "data"
        self.stderr_path = folder / f"stderr-{self.marker}"
        self.stdout_path = folder / f"stdout-{self.marker}"
        argv = [sys.executable, "-m", "moe_debugger.cli", "up", "--json", "--data", str(self.data), *options]
        if ignore_sigint:
            # What a shell does to its background jobs.
            argv = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *argv]
        env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_")}
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env | {MARKER: self.marker}
            )
        self.endpoints: dict[str, Any] = {}

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the line of JSON."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.stderr
            return self.stdout_path.read_text().endswith("\n")

        wait_until(is_there, timeout_s, f"the line of `up --json`: {self.stderr}")
        (line,) = self.stdout_path.read_text().splitlines()
        self.endpoints = json.loads(line)
        return self.endpoints

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)

    def children(self) -> dict[int, str]:
        """Return pid and command line of every process of this fleet, `up` and its guardian included."""
        found = {}
        wanted = f"{MARKER}={self.marker}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def pid_of(self, text: str) -> int:
        """Return the one process whose command line has `text`."""
        (pid,) = [pid for pid, command in self.children().items() if text in command]
        return pid

    def temp_dir(self) -> Path:
        return Path(json.loads((self.data / "lock").read_text())["temp_dir"])

    def listening_ports(self) -> set[int]:
        """Return the ports on which the fleet's processes listen."""
        inodes = set()
        for pid in self.children():
            with contextlib.suppress(OSError):
                for handle in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        target = os.readlink(handle)
                        if target.startswith("socket:["):
                            inodes.add(target[8:-1])
        ports = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and columns[9] in inodes:
                    ports.add(int(columns[1].rpartition(":")[2], 16))
        return ports

    def assert_nothing_is_left(self, ports: set[int], temp_dir: Path) -> None:
        """Wait until no process, port, lock or temporary folder of this fleet is left."""
        wait_until(lambda: not self.children(), GONE_TIMEOUT_S, "all processes gone")
        wait_until(lambda: not (ports & _all_listening_ports()), GONE_TIMEOUT_S, f"ports {ports} free")
        wait_until(lambda: not (self.data / "lock").exists(), GONE_TIMEOUT_S, "no lock")
        assert not (self.data / "endpoints.json").exists()
        assert not temp_dir.exists()

    def close(self) -> None:
        """End it in order, else at once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        wait_until(lambda: not self.children(), 2 * GONE_TIMEOUT_S, "all processes gone at the end")


def _all_listening_ports() -> set[int]:
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A":
                ports.add(int(columns[1].rpartition(":")[2], 16))
    return ports
