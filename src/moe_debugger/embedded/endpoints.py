"""Where the parts of a running fleet answer: `<data>/endpoints.json` and the line of `up --json`."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moe_debugger.embedded.lock import read_lock
from moe_debugger.errors import FleetError

__all__ = ["ENDPOINTS_FILE", "Endpoints", "read_endpoints", "write_endpoints", "write_private"]

ENDPOINTS_FILE = "endpoints.json"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """A fleet's addresses. The NATS and Redis URLs carry passwords, so they have no repr.

    Attributes:
        page: URL of the web page.
        grpc: `host:port` of the gateway's native gRPC.
        nats: URL for sources (`MoEDebugger(model, fleet=...)`).
        redis: URL of Valkey or Redis.
        worker: `host:port` of the worker's gRPC; None where the fleet runs without one.
    """

    page: str
    grpc: str
    nats: str = field(repr=False)
    redis: str = field(repr=False)
    worker: str | None = None

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def write_endpoints(data_dir: Path, endpoints: Endpoints) -> None:
    """Write the fleet's addresses for the other commands."""
    write_private(data_dir / ENDPOINTS_FILE, endpoints.to_json() + "\n")


def read_endpoints(data_dir: Path | str) -> Endpoints:
    """Return the addresses of the fleet that runs on `data_dir`.

    Raises:
        FleetError: no fleet runs there.
    """
    folder = Path(data_dir).expanduser().absolute()
    start_hint = "start one with `moe-debugger up`, or name its folder with --data"
    if read_lock(folder) is None:
        raise FleetError(f"no fleet is running on {folder}: {start_hint}")
    try:
        values = json.loads((folder / ENDPOINTS_FILE).read_text(encoding="utf-8"))
        return Endpoints(**values)
    except FileNotFoundError:
        raise FleetError(f"the fleet on {folder} is still starting: try again in a moment") from None
    except (OSError, ValueError, TypeError) as error:
        raise FleetError(f"{folder / ENDPOINTS_FILE} cannot be read ({error}): {start_hint}") from error
