"""`moe-debugger doctor`: what is installed, what runs, what is missing and how to get it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from moe_debugger.cli._output import PlainConsole
from moe_debugger.cli.up import DEFAULT_DATA_DIR
from moe_debugger.embedded import health
from moe_debugger.embedded.endpoints import read_endpoints
from moe_debugger.embedded.lock import read_lock
from moe_debugger.embedded.ports import is_port_free
from moe_debugger.embedded.servers import NATS_SYNC_INTERVAL, ServerBinary, find_nats_server, find_valkey_server
from moe_debugger.errors import FleetError

__all__ = ["Check", "doctor", "run_checks"]

State = Literal["ok", "note", "missing"]

_MIN_PYTHON = (3, 11)
_MIN_SHM_BYTES = 64 << 20
_PORTS = {"page": 8080, "gRPC": 50051, "worker": 50061}
# Extra -> the modules that its part of the fleet needs, by the name of the distribution.
_EXTRAS = {
    "collector": ("torch", "transformers", "safetensors"),
    "sql": ("SQLAlchemy", "alembic", "aiosqlite"),
    "analyzer": ("redis", "grpcio-health-checking"),
    "gateway": ("uvicorn", "httptools", "grpcio-status"),
    "ray": ("ray",),
}
_MARKS = {"ok": "[green]ok     [/]", "note": "[yellow]note   [/]", "missing": "[red]missing[/]"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `missing` hinders `up`, `note` does not."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def doctor(
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="The fleet's folder.")] = DEFAULT_DATA_DIR,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Say what is installed, which servers and ports there are, what is missing and how to get it.

    The exit code is 0 where `moe-debugger up` can run (or runs), else 1.

    Examples:

    \b
      moe-debugger doctor
      moe-debugger doctor --json | jq '.checks[] | select(.state == "missing")'
    """
    checks = run_checks(data)
    can_run = all(check.state != "missing" for check in checks)
    if json_output:
        typer.echo(json.dumps({"can_run": can_run, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        console = PlainConsole(highlight=False, soft_wrap=True)
        for check in checks:
            console.print(f"{_MARKS[check.state]}  {escape(f'{check.name:<12}')} {escape(check.detail)}")
            if check.remedy:
                console.print(f"{'':<9}{'':<12} -> {escape(check.remedy)}")
        verdict = "can run" if can_run else "cannot run: see what is missing"
        console.print(f"\n`moe-debugger up` {verdict}.")
    raise typer.Exit(0 if can_run else 1)


def run_checks(data_dir: Path) -> list[Check]:
    """Look at everything; takes a few seconds."""
    checks = [_python(), *_extras(), *_detectors(), *_servers(), _page(), _node(), _chromium()]
    return [*checks, *_ports(data_dir), _shm(), _torch(), *_data(data_dir)]


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < _MIN_PYTHON:
        return Check("python", "missing", version, "install Python 3.11 or newer")
    return Check("python", "ok", f"{version} ({sys.executable})")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Check]:
    yield Check("package", "ok", f"moe-debugger {_version('moe-debugger')}")
    for extra, distributions in _EXTRAS.items():
        versions = {name: _version(name) for name in distributions}
        absent = [name for name, version in versions.items() if version is None]
        detail = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        if absent:
            remedy = f"pip install 'moe-debugger[{extra}]'"
            yield Check(f"[{extra}]", "missing", f"not installed: {', '.join(absent)}", remedy)
        else:
            yield Check(f"[{extra}]", "ok", detail)


def _detectors() -> Iterator[Check]:
    from moe_debugger.analysis.plugins import installed_detectors

    detectors, problems = installed_detectors()
    if detectors or not problems:
        names = ", ".join(f"{detector.name} {detector.version}" for detector in detectors)
        yield Check("detectors", "ok", names or "no plug-ins")
    for problem in problems:
        yield Check("detectors", "note", problem, "mend or uninstall that package; see docs/detectors.md")


def _servers() -> Iterator[Check]:
    def look(name: str, find: Callable[[], ServerBinary]) -> Check:
        try:
            return Check(name, "ok", str(find()))
        except FleetError as error:
            text, _, remedy = str(error).partition(". ")
            return Check(name, "missing", text, remedy)

    nats = look("nats", find_nats_server)
    if nats.state == "ok":
        nats = Check("nats", "ok", f"{nats.detail}; sync to disk every {NATS_SYNC_INTERVAL} (sync_interval)")
    yield nats
    yield look("valkey", find_valkey_server)


def _page() -> Check:
    spec = importlib.util.find_spec("moe_gateway")
    if spec is None or spec.origin is None:
        return Check("page", "missing", "the gateway is not installed", "pip install 'moe-debugger[gateway]'")
    index = Path(spec.origin).parent / "static" / "index.html"
    if not index.is_file():
        return Check("page", "note", "the page is not built; gRPC works without it", "run `make web`")
    return Check("page", "ok", str(index.parent))


def _program(name: str, commands: tuple[str, ...], absent: str) -> Check:
    path = next((found for found in map(shutil.which, commands) if found), None)
    if path is None:
        return Check(name, "note", absent)
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
        version = (re.findall(r"[\d.]+\d", result.stdout) or ["of unknown version"])[0]
    except (OSError, subprocess.TimeoutExpired):
        version = "does not run"
    return Check(name, "ok", f"{version} ({path})")


def _node() -> Check:
    return _program("node", ("node",), "not on PATH; only needed to build the page, which then takes it from PyPI")


def _chromium() -> Check:
    absent = "not on PATH; only the tests need it (Debian: apt-get install chromium)"
    return _program("chromium", ("chromium", "chromium-browser", "google-chrome"), absent)


def _ports(data_dir: Path) -> Iterator[Check]:
    if read_lock(data_dir.expanduser().absolute()) is not None:
        return  # our own fleet may hold them
    for name, port in _PORTS.items():
        if is_port_free(port):
            yield Check("port", "ok", f"{port} ({name}) is free")
        else:
            yield Check("port", "note", f"{port} ({name}) is taken; `up` takes another one unless told which")


def _shm() -> Check:
    path = Path("/dev/shm")  # noqa: S108 - its size is looked at, nothing is written
    if not path.is_dir():
        return Check("shm", "note", "there is none on this system; Ray uses files instead")
    usage = shutil.disk_usage(path)
    sizes = f"{path}: {usage.free / (1 << 20):,.0f} MiB free of {usage.total / (1 << 20):,.0f} MiB"
    if usage.free < _MIN_SHM_BYTES:
        return Check("shm", "note", sizes, "Ray wants 64 MiB: docker run --shm-size=256m, or free some")
    return Check("shm", "ok", sizes)


def _torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("device", "note", "unknown: torch is not installed")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Check("device", "ok", f"cuda: {names}")
    return Check("device", "ok", f"cpu ({os.cpu_count()} cores); CUDA is not available to torch {torch.__version__}")


def _data(data_dir: Path) -> Iterator[Check]:
    folder = data_dir.expanduser().absolute()
    if not folder.exists():
        parent = next(path for path in folder.parents if path.exists())
        if not os.access(parent, os.W_OK):
            yield Check("data", "missing", f"{folder} cannot be made", "name another folder with --data")
            return
        yield Check("data", "ok", f"{folder} will be made by `up`")
        return
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Check(
            "data", "missing", f"{folder} is not a folder that can be written", "name another folder with --data"
        )
        return
    holder = read_lock(folder)
    if holder is None:
        yield Check("data", "ok", f"{folder}; no fleet is running on it")
        return
    yield Check("data", "ok", str(folder))
    yield Check("fleet", "ok", f"running, pid {holder.pid}, page {holder.page or '(starting)'}")
    try:
        endpoints = read_endpoints(folder)
    except FleetError as error:
        yield Check("fleet", "note", str(error))
        return
    problems = {
        "page": health.page_problem(endpoints.page),
        "grpc": health.grpc_problem(endpoints.grpc),
        "nats": health.nats_problem(endpoints.nats),
        "redis": health.redis_problem(endpoints.redis),
        "worker": health.worker_problem(endpoints.worker) if endpoints.worker else "",
    }
    for name, problem in problems.items():
        if name == "worker" and endpoints.worker is None:
            yield Check("  worker", "ok", "the fleet runs without one")
        elif problem:
            yield Check(f"  {name}", "note", problem, f"see {folder / 'logs'}; `up` restarts what has ended")
        else:
            yield Check(f"  {name}", "ok", "answers")
