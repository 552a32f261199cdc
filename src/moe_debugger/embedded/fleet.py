"""The whole fleet on one machine: NATS, Valkey, analyzer, gateway and worker, wired together.

Read order: `Fleet.start`, `Fleet.run`, `Fleet.stop`; each part's program and settings are in `_parts`.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from moe_debugger.embedded import health
from moe_debugger.embedded._guardian import FLEET_VARIABLE, kill_marked
from moe_debugger.embedded.endpoints import ENDPOINTS_FILE, Endpoints, write_endpoints, write_private
from moe_debugger.embedded.guardian import Guardian
from moe_debugger.embedded.lock import DataLock, prepare_data_dir
from moe_debugger.embedded.ports import ReservedPort, reserve_port
from moe_debugger.embedded.servers import (
    check_nats,
    check_redis,
    find_nats_server,
    find_valkey_server,
    nats_config,
    new_password,
    valkey_config,
)
from moe_debugger.embedded.supervisor import Part, PartEvent, PartState, Supervisor
from moe_debugger.errors import FleetError
from moe_debugger.wire.ids import new_id

__all__ = ["STOP_ORDER", "Fleet", "FleetOptions"]

STOP_ORDER = ("worker", "analyzer", "gateway", "valkey", "nats")
_SECRETS_FILE = "secrets.json"
_PORTS_FILE = "ports.json"
_PREFERRED_PORTS = {"page": 8080, "grpc": 50051, "worker": 50061}
_POLL_S = 0.1
_IDLE_POLL_S = 0.25
_SWEEP_TIMEOUT_S = 5.0
# Unix socket paths end at 107 bytes; Ray adds about 65 to its folder.
_MAX_TEMP_ROOT_CHARS = 24
_WORKER_START_TIMEOUT_S = 300.0
_WORKER_STOP_TIMEOUT_S = 12.0


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What the user asked for.

    Attributes:
        service_env: settings of the services that the user chose (command line, config file), by variable.
    """

    data_dir: Path
    web_port: int | None = None
    grpc_port: int | None = None
    worker_port: int | None = None
    nats_url: str | None = field(default=None, repr=False)
    redis_url: str | None = field(default=None, repr=False)
    with_worker: bool = True
    service_env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Fleet:
    """Starts, watches and stops all parts.

    Args:
        options: what the user asked for.
        on_event: told of every change of a part.
        on_note: told what a person should know besides, e.g. another port than usual.
    """

    def __init__(
        self, options: FleetOptions, *, on_event: Callable[[PartEvent], None], on_note: Callable[[str], None]
    ) -> None:
        self.options = options
        self.fleet_id = new_id()
        self.endpoints: Endpoints | None = None
        #: Set to stop in order; set `is_hurried` too to kill.
        self.is_stopping = threading.Event()
        self.is_hurried = threading.Event()
        self._on_event = on_event
        self._on_note = on_note
        self._lock: DataLock | None = None
        self._guardian: Guardian | None = None
        self._supervisor: Supervisor | None = None
        self._temp_dir: Path | None = None
        self._reserved: list[ReservedPort] = []
        self._names: tuple[str, ...] = ()

    def start(self, on_page: Callable[[Endpoints], None]) -> bool:
        """Start everything; False where the user stopped it meanwhile.

        Args:
            on_page: called when the page and NATS answer, before the worker does.

        Raises:
            FleetError: a part cannot be started. Call `stop` in any case.
        """
        data = prepare_data_dir(self.options.data_dir)
        self._lock = DataLock.acquire(data, self.fleet_id, self._on_note)
        self._clean_up_after(self._lock)
        ports = self._reserve_ports(data)
        self._temp_dir = _new_temp_dir()
        self._lock.update(temp_dir=str(self._temp_dir))
        self._guardian = Guardian(
            self.fleet_id,
            remove=[self._temp_dir, data / ENDPOINTS_FILE, self._lock.path],
            lock_handle=self._lock.handle,
            env=self._base_env(),
        )
        self._supervisor = Supervisor(data, self._on_event)
        endpoints, parts = self._parts(data, ports)
        # A server whose URL was given is not ours to run.
        servers = [name for name in parts if name in ("nats", "valkey")]
        for name in servers:
            self._supervisor.start(parts[name])
        if not self._wait_for(servers):
            return False
        for name in ("analyzer", "gateway"):
            self._supervisor.start(parts[name])
        if not self._wait_for(("analyzer", "gateway")):
            return False
        self.endpoints = endpoints
        self._lock.update(page=endpoints.page)
        write_endpoints(data, endpoints)
        on_page(endpoints)
        if "worker" in parts:
            self._supervisor.start(parts["worker"])
        self._names = tuple(parts)
        return True

    def wait_until_ready(self) -> bool:
        """Wait until every part is ready; False where the user stopped it meanwhile.

        Raises:
            FleetError: a part was given up.
        """
        return self._wait_for(self._names)

    def are_all_ready(self) -> bool:
        """Say whether every part answers."""
        return self._supervisor is not None and self._supervisor.are_ready(self._names)

    def run(self) -> None:
        """Look after the parts until `is_stopping` is set."""
        assert self._supervisor is not None
        assert self._guardian is not None
        self._supervisor.is_starting = False
        while not self.is_stopping.wait(_IDLE_POLL_S):
            self._supervisor.poll()
            self._guardian.ensure()

    def states(self) -> dict[str, PartState]:
        """Return where each part stands."""
        if self._supervisor is None:
            return {}
        return {name: self._supervisor.state(name) for name in self._names}

    def stop(self) -> bool:
        """Stop all parts in order and leave nothing behind; False where there was nothing to stop."""
        if self._lock is None:
            return False
        if self._supervisor is not None:
            self._supervisor.stop(STOP_ORDER, self.is_hurried)
        for port in self._reserved:
            port.close()
        if self._guardian is not None:
            kill_marked(self.fleet_id, timeout_s=_SWEEP_TIMEOUT_S, spare=frozenset({os.getpid(), self._guardian.pid}))
            self._guardian.dismiss()
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
        (self._lock.path.parent / ENDPOINTS_FILE).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        return True

    def _clean_up_after(self, lock: DataLock) -> None:
        """Remove what a fleet left whose guardian was killed with it."""
        if lock.stale is None:
            return
        self._on_note(f"taking over from a fleet that ended without stopping (pid {lock.stale.pid})")
        if not kill_marked(lock.stale.fleet_id, timeout_s=_SWEEP_TIMEOUT_S):
            raise FleetError(
                f"processes of the fleet of pid {lock.stale.pid} cannot be ended: "
                f"end those with {FLEET_VARIABLE}={lock.stale.fleet_id} in their environment, then try again"
            )
        temp_dir = Path(lock.stale.temp_dir)
        if temp_dir.name.startswith(_TEMP_PREFIX):
            shutil.rmtree(temp_dir, ignore_errors=True)
        (lock.path.parent / ENDPOINTS_FILE).unlink(missing_ok=True)

    def _wait_for(self, names: Sequence[str]) -> bool:
        assert self._supervisor is not None
        while not self._supervisor.are_ready(names):
            failure = self._supervisor.failure(names)
            if failure is not None:
                raise FleetError(f"the fleet cannot start without the {failure.part}: see its last log lines above")
            if self.is_stopping.wait(_POLL_S):
                return False
            self._supervisor.poll()
        return not self.is_stopping.is_set()

    def _reserve_ports(self, data: Path) -> dict[str, ReservedPort]:
        """Choose the ports; a later `up` takes the same ones where they are free, so that sources reconnect."""
        options = self.options
        path = data / _PORTS_FILE
        try:
            before = {str(name): int(port) for name, port in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            before = {}
        wanted = {"page": (options.web_port, "--port"), "grpc": (options.grpc_port, "--grpc-port")}
        if options.with_worker:
            wanted["worker"] = (options.worker_port, "--worker-port")
            wanted["worker_ingress"] = (None, "")
        wanted["analyzer"] = (None, "")
        if options.nats_url is None:
            wanted["nats"] = (None, "")
        if options.redis_url is None:
            wanted["valkey"] = (None, "")
        ports: dict[str, ReservedPort] = {}
        for name, (requested, option) in wanted.items():
            preferred = before.get(name) or _PREFERRED_PORTS.get(name, 0)
            ports[name] = reserve_port(f"the {name}", option=option, requested=requested, preferred=preferred)
            self._reserved.append(ports[name])
            if ports[name].note:
                self._on_note(ports[name].note)
        path.write_text(json.dumps(before | {name: port.port for name, port in ports.items()}), encoding="utf-8")
        return ports

    def _base_env(self) -> dict[str, str]:
        """Return the environment of every child."""
        env = dict(os.environ)
        # Another cluster of the user's is not ours to join; MOE_COLLECTOR_RAY_ADDRESS asks for it.
        env.pop("RAY_ADDRESS", None)
        if "PYTHONPATH" in env:
            # The children run in the data folder.
            env["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in env["PYTHONPATH"].split(os.pathsep))
        no_proxy = ",".join(filter(None, (env.get("no_proxy") or env.get("NO_PROXY"), "127.0.0.1", "localhost")))
        return env | {
            FLEET_VARIABLE: self.fleet_id,
            # A title that is set over the environment's memory would hide the marker from /proc.
            "SPT_NOENV": "1",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def _parts(self, data: Path, ports: Mapping[str, ReservedPort]) -> tuple[Endpoints, dict[str, Part]]:
        """Return the fleet's addresses and programs."""
        assert self._temp_dir is not None
        secrets = _read_or_make_secrets(data)
        logs = data / "logs"
        logs.mkdir(exist_ok=True, mode=0o700)
        base = self._base_env() | {"TMPDIR": str(self._temp_dir)}
        parts: dict[str, Part] = {}

        def port_release(*names: str) -> Callable[[], None]:
            def release() -> None:
                for name in names:
                    ports[name].release()

            return release

        if self.options.nats_url is None:
            binary = find_nats_server()
            config = data / "nats.conf"
            password = secrets["nats_password"]
            nats_url = nats_config(config, port=ports["nats"].port, password=password, store_dir=data / "nats")
            argv = [str(binary.path), "-c", str(config)]
            parts["nats"] = Part(
                "nats",
                argv,
                base,
                logs / "nats.log",
                lambda: health.nats_problem(nats_url),
                20.0,
                before_start=port_release("nats"),
            )
        else:
            nats_url = self.options.nats_url
            check_nats(nats_url)
        if self.options.redis_url is None:
            binary = find_valkey_server()
            config = data / "valkey.conf"
            password = secrets["redis_password"]
            redis_url = valkey_config(config, port=ports["valkey"].port, password=password, work_dir=data)
            parts["valkey"] = Part(
                "valkey",
                [str(binary.path), str(config)],
                base,
                logs / "valkey.log",
                lambda: health.redis_problem(redis_url),
                20.0,
                before_start=port_release("valkey"),
            )
        else:
            redis_url = self.options.redis_url
            check_redis(redis_url)

        python = [sys.executable, "-P", "-m"]
        page = f"http://{ports['page'].target}"
        analyzer = ports["analyzer"].target
        wiring = {
            "MOE_ANALYZER_HOST": "127.0.0.1",
            "MOE_ANALYZER_PORT": str(ports["analyzer"].port),
            "MOE_ANALYZER_NATS_URL": nats_url,
            "MOE_ANALYZER_REDIS_URL": redis_url,
            "MOE_ANALYZER_DATABASE_URL": f"sqlite+aiosqlite:///{data / 'catalogue.sqlite'}",
            "MOE_ANALYZER_RECORDINGS_DIR": str(data / "recordings"),
        }
        parts["analyzer"] = Part(
            "analyzer",
            [*python, "moe_analyzer"],
            base | dict(self.options.service_env) | wiring,
            logs / "analyzer.log",
            lambda: health.grpc_problem(analyzer),
            before_start=port_release("analyzer"),
        )
        worker = ports["worker"].target if self.options.with_worker else None
        wiring = {
            "MOE_GATEWAY_HOST": "127.0.0.1",
            "MOE_GATEWAY_WEB_PORT": str(ports["page"].port),
            "MOE_GATEWAY_GRPC_PORT": str(ports["grpc"].port),
            "MOE_GATEWAY_ANALYZER_TARGET": analyzer,
            "MOE_GATEWAY_NATS_URL": nats_url,
            "MOE_GATEWAY_REDIS_URL": redis_url,
            "MOE_GATEWAY_WORKER_TARGET": worker or "",
            "MOE_GATEWAY_FLEET_TOKEN": secrets["fleet_token"],
        }
        grpc_target = ports["grpc"].target
        parts["gateway"] = Part(
            "gateway",
            [*python, "moe_gateway"],
            base | dict(self.options.service_env) | wiring,
            logs / "gateway.log",
            lambda: health.page_problem(page) or health.grpc_problem(grpc_target),
            before_start=port_release("page", "grpc"),
        )
        if worker is not None:
            wiring = {
                "MOE_COLLECTOR_HOST": "127.0.0.1",
                "MOE_COLLECTOR_PORT": str(ports["worker"].port),
                "MOE_COLLECTOR_INGRESS_PORT": str(ports["worker_ingress"].port),
                "MOE_COLLECTOR_NATS_URL": nats_url,
                "MOE_COLLECTOR_FLEET_TOKEN": secrets["fleet_token"],
                "MOE_COLLECTOR_RAY_TEMP_DIR": str(self._temp_dir / "ray"),
            }
            parts["worker"] = Part(
                "worker",
                [*python, "moe_collector"],
                base | dict(self.options.service_env) | wiring,
                logs / "worker.log",
                lambda: health.worker_problem(worker),
                _WORKER_START_TIMEOUT_S,
                _WORKER_STOP_TIMEOUT_S,
                before_start=port_release("worker", "worker_ingress"),
            )
        return Endpoints(page, grpc_target, nats_url, redis_url, worker), parts


_TEMP_PREFIX = "moe-"


def _new_temp_dir() -> Path:
    """Create the fleet's private folder for sockets, under a path that is short enough for them."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _MAX_TEMP_ROOT_CHARS and Path("/tmp").is_dir():  # noqa: S108 - mkdtemp makes it private
        root = Path("/tmp")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=root))


def _read_or_make_secrets(data: Path) -> dict[str, str]:
    """Return this folder's passwords; made once, readable by their owner only."""
    path = data / _SECRETS_FILE
    values: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
    names = ("nats_password", "redis_password", "fleet_token")
    if any(name not in values for name in names):
        values = {name: values.get(name) or new_password() for name in names}
        write_private(path, json.dumps(values))
    return values
