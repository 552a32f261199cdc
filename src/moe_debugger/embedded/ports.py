"""Loopback ports: the one the user gave or an error, else a preferred one, else any free one.

A reserved port stays bound until just before its server starts. A busy machine takes seconds from there until the
server has bound it, so a fleet also holds a claim on the port for as long as it lives: another fleet that starts
meanwhile takes a different one. A claim is an abstract Unix socket, which the kernel removes however its holder ends.
"""

import random
import socket
import sys
from pathlib import Path

from moe_debugger.errors import FleetError

__all__ = ["LOOPBACK", "ReservedPort", "is_port_free", "reserve_port"]

LOOPBACK = "127.0.0.1"
_FIRST_CHOSEN_PORT = 15000
_DEFAULT_EPHEMERAL_START = 32768
_NUM_TRIES = 200


def _bind(port: int) -> socket.socket | None:
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A server that was just stopped leaves connections in TIME_WAIT; they do not hinder a listener.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((LOOPBACK, port))
        # Without listen, another socket with SO_REUSEADDR could bind the same port.
        probe.listen(1)
    except OSError:
        probe.close()
        return None
    return probe


def _claim(port: int) -> socket.socket | None:
    """Claim a port among all fleets; None where another one has it."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if sys.platform == "linux":
        try:
            claim.bind(f"\0moe-debugger/port/{port}")
        except OSError:
            claim.close()
            return None
    return claim


def _reserve(port: int) -> "ReservedPort | None":
    claim = _claim(port)
    if claim is None:
        return None
    probe = _bind(port)
    if probe is None:
        claim.close()
        return None
    return ReservedPort(port, probe, claim)


def is_port_free(port: int) -> bool:
    """Say whether a server could listen on 127.0.0.1:`port` now."""
    probe = _bind(port)
    if probe is None:
        return False
    probe.close()
    return True


class ReservedPort:
    """A port of 127.0.0.1 that is ours; `release` it just before its server binds it, `close` it at the end."""

    def __init__(self, port: int, probe: socket.socket, claim: socket.socket) -> None:
        self.port = port
        self._claim = claim
        #: Says that another port than the preferred one was taken; empty where it was not.
        self.note = ""
        self._probe: socket.socket | None = probe

    @property
    def target(self) -> str:
        """Return `127.0.0.1:port`."""
        return f"{LOOPBACK}:{self.port}"

    def release(self) -> None:
        """Let a server of this fleet bind the port; harmless when repeated."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def close(self) -> None:
        """Let the port go for other fleets too; harmless when repeated."""
        self.release()
        self._claim.close()


def _ephemeral_start() -> int:
    """Return where the kernel's own choices begin: an outgoing connection may take any port from there on."""
    try:
        first = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0]
        return max(int(first), _FIRST_CHOSEN_PORT + 1000)
    except (OSError, ValueError, IndexError):
        return _DEFAULT_EPHEMERAL_START


def reserve_port(name: str, *, option: str = "", requested: int | None = None, preferred: int = 0) -> ReservedPort:
    """Reserve a port for the server `name`.

    Args:
        name: what the port is for, as the error and the note name it.
        option: the command line option that sets it.
        requested: the user's choice: this one or an error.
        preferred: the one to take where it is free.

    Raises:
        FleetError: the requested port is taken or not allowed.
    """
    if requested is not None:
        reserved = _reserve(requested)
        if reserved is None:
            raise FleetError(
                f"port {requested} ({option or name}) cannot be used on {LOOPBACK}: it is taken, or not allowed. "
                f"Give another one{f' with {option}' if option else ''}, or leave the option out for a free one."
            )
        return reserved
    if preferred:
        reserved = _reserve(preferred)
        if reserved is not None:
            return reserved
    last = _ephemeral_start() - 1
    for _ in range(_NUM_TRIES):
        port = random.randint(_FIRST_CHOSEN_PORT, last)  # noqa: S311 - spreads fleets apart, no secret
        reserved = _reserve(port)
        if reserved is not None:
            if preferred and option:
                reserved.note = f"port {preferred} is taken: {name} is on {port}"
            return reserved
    raise FleetError(f"no free port for {name} on {LOOPBACK} in {_FIRST_CHOSEN_PORT}..{last} after {_NUM_TRIES} tries")
