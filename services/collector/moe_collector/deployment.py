"""The worker's own Ray cluster, and Ray Serve on it with one replica of `Worker` behind a gRPC ingress.

All calls of a `RayServe` must come from one thread, and that thread must outlive the cluster: Ray starts its processes
with PR_SET_PDEATHSIG, which fires when the *thread* that started them ends.
"""

import contextlib
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import structlog

from moe_debugger.errors import FleetError

from .ingress import INGRESS_HOST_VARIABLE, INGRESS_TOKEN_VARIABLE
from .settings import CollectorSettings

__all__ = ["APPLICATION", "OBJECT_STORE_BYTES", "RayServe"]

APPLICATION = "moe-worker"
# Ray's own minimum (OBJECT_STORE_MINIMUM_MEMORY_BYTES). Where /dev/shm has less room, Ray puts it into its temp folder.
OBJECT_STORE_BYTES = 75 * 1024 * 1024
_GRACEFUL_SHUTDOWN_S = 2.0

_log = structlog.get_logger(__name__)


class RayServe:
    """Starts and stops the cluster; see the module's note on threads.

    Args:
        settings: with `ingress_port` and `fleet_token` set.
        temp_dir: a private folder for the cluster's files; its owner removes it.
    """

    def __init__(self, settings: CollectorSettings, temp_dir: Path) -> None:
        self._settings = settings
        self._owns_cluster = not settings.ray_address
        self._temp_dir = temp_dir
        self._handle: Any = None

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

        # Set to INFO by the import; and its lines are no JSON.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
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
                logging_config=quiet,
            )
            # Only an application with a route is found by the gRPC proxy. HTTP is refused, see `guard_proxy`.
            self._handle = serve.run(self._application(ray, serve), name=APPLICATION, route_prefix="/")
        except Exception as error:
            raise FleetError(f"Ray Serve could not start the worker: {_last_line(str(error))}") from error

    def is_cluster_alive(self) -> bool:
        """Return whether the processes that Ray started for us still run."""
        if not self._owns_cluster:
            return True
        import ray

        worker: Any = ray._private.worker  # pyright: ignore
        node = worker._global_node
        return node is not None and bool(node.remaining_processes_alive())

    def drain(self, grace_s: float, timeout_s: float) -> None:
        """Ask the replica to end its requests and to say goodbye; a replica that does not answer is no error."""
        if self._handle is None or not self.is_cluster_alive():
            return
        try:
            self._handle.drain.remote(grace_s).result(timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises here, the stop goes on
            _log.warning("drain_failed", error=repr(error)[:300])

    def stop(self) -> None:
        """Stop the cluster, or leave one that was joined."""
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # it may be dead already, which is what is wanted
            if not self._owns_cluster:
                serve.delete(APPLICATION)
            ray.shutdown()

    def _prepare_environment(self) -> None:
        settings = self._settings
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
            # Without it Ray takes 127.0.0.1 for a mistake, and listens on the machine's address and on 0.0.0.0.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Two fleets stand side by side: their ports must not be fixed ones.
            "DASHBOARD_METRIC_PORT": "0",
            "AUTOSCALER_METRIC_PORT": "0",
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
        _amend_ray_parameters()
        ray.init(
            num_cpus=2,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            # Below ours, which is private: Ray makes its own folder open to everyone.
            _temp_dir=str(self._temp_dir / "r"),
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


def _amend_ray_parameters() -> None:
    """Set what `ray.init` has no option for, though `ray start` has.

    The per-node agent gets a free port instead of 52365: where that is taken, by a second fleet say, the whole cluster
    fails to start. The autoscaler's monitor and the log monitor have nothing to do here and are left out.
    """
    from ray._private import parameter

    params = parameter.RayParams
    if not getattr(params.__init__, "_moe_amended", False):
        original = params.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            amended = {"dashboard_agent_listen_port": 0, "no_monitor": True, "include_log_monitor": False}
            original(self, *args, **(kwargs | amended))

        init._moe_amended = True  # type: ignore[attr-defined]
        params.__init__ = init


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason was given")[:1000]
