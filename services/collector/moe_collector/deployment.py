"""The worker's own Ray cluster, and Ray Serve on it with one replica of `Worker` behind a gRPC ingress.

All calls of a `RayServe` must come from one thread, and that thread must outlive the cluster: Ray starts its processes
with PR_SET_PDEATHSIG, which fires when the *thread* that started them ends.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import structlog

from moe_debugger.errors import FleetError

from .ingress import INGRESS_HOST_VARIABLE, INGRESS_TOKEN_VARIABLE
from .settings import CollectorSettings

__all__ = ["APPLICATION", "OBJECT_STORE_BYTES", "RayServe", "remove_stale_temp_dirs"]

APPLICATION = "moe-worker"
# Ray's own minimum (OBJECT_STORE_MINIMUM_MEMORY_BYTES). Where /dev/shm has less room, Ray puts it into its temp folder.
OBJECT_STORE_BYTES = 75 * 1024 * 1024
_TEMP_DIR = re.compile(r"moe-ray-(\d+)-[a-z0-9_]+\Z")
_GRACEFUL_SHUTDOWN_S = 2.0

_log = structlog.get_logger(__name__)


class RayServe:
    """Starts and stops the cluster; see the module's note on threads.

    Args:
        settings: with `ingress_port` and `fleet_token` set.
    """

    def __init__(self, settings: CollectorSettings) -> None:
        self._settings = settings
        self._owns_cluster = not settings.ray_address
        self._temp_dir: Path | None = None
        self._handle: Any = None

    @property
    def temp_dir(self) -> Path | None:
        """Folder of the cluster's files while it runs."""
        return self._temp_dir

    def start(self) -> None:
        """Start the cluster and deploy the worker; return when its replica is ready.

        Raises:
            FleetError: Ray or the replica could not start; the text says why.
        """
        if self._owns_cluster:
            self._prepare_environment()
        # Only now: Ray reads RAY_AUTH_MODE and the token's place when it is imported.
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
        from ray.serve.schema import LoggingConfig

        try:
            self._init(ray)
            quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host="127.0.0.1", port=_free_port()),
                grpc_options=gRPCOptions(
                    port=self._settings.ingress_port,
                    grpc_servicer_functions=["moe_debugger.v1.collector_pb2_grpc.add_WorkerServiceServicer_to_server"],
                    enable_reflection=False,
                ),
                global_logging_config=quiet,
            )
            self._handle = serve.run(self._application(ray, serve), name=APPLICATION, route_prefix=None)
        except Exception as error:
            raise FleetError(f"Ray Serve could not start the worker: {_last_line(str(error))}") from error

    def is_cluster_alive(self) -> bool:
        """Return whether the processes that Ray started for us still run."""
        if not self._owns_cluster:
            return True
        import ray

        node = ray._private.worker._global_node
        return node is not None and bool(node.remaining_processes_alive())

    def drain(self, grace_s: float, timeout_s: float) -> None:
        """Ask the replica to end its requests and to say goodbye; a replica that does not answer is no error."""
        if self._handle is None:
            return
        try:
            self._handle.drain.remote(grace_s).result(timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises here, the stop goes on
            _log.warning("drain_failed", error=repr(error)[:300])

    def stop(self) -> None:
        """Stop the cluster, or leave one that was joined. The temporary folder is removed by `remove_temp_dir`."""
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
            if not self._owns_cluster:
                serve.delete(APPLICATION)
            ray.shutdown()

    def remove_temp_dir(self) -> None:
        """Remove the cluster's files, once its processes have ended."""
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _prepare_environment(self) -> None:
        settings = self._settings
        remove_stale_temp_dirs()
        if settings.ray_temp_dir:
            self._temp_dir = Path(settings.ray_temp_dir)
            self._temp_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            self._temp_dir = Path(tempfile.mkdtemp(prefix=f"moe-ray-{os.getpid()}-", dir=_short_temp_root()))
        token_file = self._temp_dir / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
        for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_NAMESPACE"):
            os.environ.pop(name, None)
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            # Its exporter would open a port of its own, off loopback and without a credential.
            "RAY_enable_metrics_collection": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "moe_collector.ingress:guard_proxy",
            INGRESS_HOST_VARIABLE: "127.0.0.1",
            INGRESS_TOKEN_VARIABLE: settings.fleet_token.get_secret_value(),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }

    def _init(self, ray: Any) -> None:
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING", "configure_logging": False}
        if not self._owns_cluster:
            ray.init(address=self._settings.ray_address, **common)
            return
        ray.init(
            num_cpus=2,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(self._temp_dir),
            **common,
        )

    def _application(self, ray: Any, serve: Any) -> Any:
        from .server import Worker

        wants_gpu = self._settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        deployment = serve.deployment(
            Worker,
            name="worker",
            num_replicas=1,
            # The engine has its own queue, whose bound is told to callers; Serve's must never be the narrower one.
            max_ongoing_requests=2 * (self._settings.max_waiting + self._settings.max_batch_size) + 16,
            ray_actor_options={"num_cpus": 0.5, "num_gpus": 1 if wants_gpu else 0},
            graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_S,
            graceful_shutdown_wait_loop_s=0.05,
            health_check_period_s=2.0,
            health_check_timeout_s=10.0,
            max_constructor_retry_count=2,
        )
        return deployment.bind(self._settings)


def remove_stale_temp_dirs() -> None:
    """Remove the folders that workers of this user left when they were killed."""
    for folder in Path(_short_temp_root()).glob("moe-ray-*"):
        match = _TEMP_DIR.match(folder.name)
        with contextlib.suppress(OSError):
            if match and folder.lstat().st_uid == os.getuid() and not _is_running(int(match[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _short_temp_root() -> str:
    # A Unix socket's path ends at 107 bytes, and Ray needs 60 of them below this folder.
    root = tempfile.gettempdir()
    return root if len(os.fsencode(root)) <= 20 else "/tmp"  # noqa: S108 - the folder itself is made by mkdtemp


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason was given")[:1000]
