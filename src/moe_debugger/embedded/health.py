"""One question to each part of the fleet: do you answer? Every probe ends within its timeout and never raises."""

import http.client
from urllib.parse import urlsplit

import grpc

from moe_debugger.embedded.servers import check_nats, check_redis
from moe_debugger.errors import MoEDebuggerError
from moe_debugger.v1 import collector_pb2, collector_pb2_grpc

__all__ = ["grpc_problem", "nats_problem", "page_problem", "redis_problem", "worker_problem"]

# grpc.health.v1.HealthCheckResponse with status SERVING: written out, so that no extra package is needed here.
_SERVING = b"\x08\x01"
# A proxy of the user's environment must never see calls to loopback.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


def nats_problem(url: str, timeout_s: float = 2.0) -> str:
    """Return what is wrong with NATS; empty where it answers."""
    try:
        check_nats(url, timeout_s=timeout_s)
    except MoEDebuggerError as error:
        return str(error)
    return ""


def redis_problem(url: str, timeout_s: float = 2.0) -> str:
    """Return what is wrong with Valkey or Redis; empty where it answers."""
    try:
        check_redis(url, timeout_s=timeout_s)
    except MoEDebuggerError as error:
        return str(error)
    return ""


def grpc_problem(target: str, timeout_s: float = 2.0) -> str:
    """Return what is wrong with a gRPC server that has the standard health service."""
    with grpc.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
        # Without serialisers a call takes and gives bytes.
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            return _words(target, error)
    return "" if answer == _SERVING else f"{target} says that it is not serving"


def worker_problem(target: str, timeout_s: float = 2.0) -> str:
    """Return what is wrong with the worker."""
    with grpc.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
        stub = collector_pb2_grpc.WorkerServiceStub(channel)
        try:
            stub.GetWorkerInfo(collector_pb2.GetWorkerInfoRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return _words(target, error)
    return ""


def page_problem(url: str, timeout_s: float = 2.0) -> str:
    """Return what is wrong with the web page's server."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"{url} does not answer: {error}"
    finally:
        connection.close()
    return "" if status == http.HTTPStatus.OK else f"{url}/healthz answers with status {status}"


def _words(target: str, error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{target}: {error.code().name}: {error.details()}"
    return f"{target}: {error}"
