"""The RPC edge: AnalyzerService and grpc health on one loopback port."""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import nats.errors
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from moe_analyzer.errors import NotFoundError
from moe_analyzer.lifecycle import SessionDirectory
from moe_analyzer.queries import Queries
from moe_analyzer.recording_rpcs import RecordingRpcs
from moe_debugger.errors import (
    DependencyMissingError,
    FleetError,
    InvalidInputError,
    SessionClosedError,
    WireFormatError,
)
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import analyzer_pb2_grpc as rpc

__all__ = ["AnalyzerServer", "AnalyzerService"]

_log = structlog.get_logger()

SERVICE_NAME = "moe_debugger.v1.AnalyzerService"
# A snapshot of 64 layers with 256 experts is 300 KB; request routes may be some MB.
_MAX_MESSAGE_BYTES = 64 << 20


class AnalyzerService(RecordingRpcs):
    """Answers the gateway. The tenant and the actor come from the gateway, never from its client.

    Args:
        tell: called with tenant and session id after people changed something, so that those who watch look again.
    """

    def __init__(
        self, queries: Queries, directory: SessionDirectory, tell: Callable[[str, str], Awaitable[None]] | None = None
    ) -> None:
        self._queries = queries
        self._directory = directory
        self._tell = tell

    async def ListSessions(
        self, request: pb.AnalyzerServiceListSessionsRequest, context: Any
    ) -> pb.AnalyzerServiceListSessionsResponse:
        """Return the tenant's sessions, newest first."""
        return pb.AnalyzerServiceListSessionsResponse(sessions=await self._queries.list_sessions(request.tenant))

    async def GetSnapshot(
        self, request: pb.AnalyzerServiceGetSnapshotRequest, context: Any
    ) -> pb.AnalyzerServiceGetSnapshotResponse:
        """Return one session's whole picture."""
        snapshot, flushes = await self._queries.snapshot(request.tenant, request.session_id)
        return pb.AnalyzerServiceGetSnapshotResponse(snapshot=snapshot, partition_flushes=flushes)

    async def GetHistory(
        self, request: pb.AnalyzerServiceGetHistoryRequest, context: Any
    ) -> pb.AnalyzerServiceGetHistoryResponse:
        """Return roll-ups, oldest first."""
        points = await self._queries.history(
            request.tenant, request.session_id, request.resolution_s, request.max_points
        )
        return pb.AnalyzerServiceGetHistoryResponse(points=points)

    async def GetSeries(
        self, request: pb.AnalyzerServiceGetSeriesRequest, context: Any
    ) -> pb.AnalyzerServiceGetSeriesResponse:
        """Return training series."""
        series, num_not_kept = await self._queries.series(
            request.tenant, request.session_id, list(request.names), request.max_points
        )
        return pb.AnalyzerServiceGetSeriesResponse(series=series, num_points_not_kept=num_not_kept)

    async def ListRequests(
        self, request: pb.AnalyzerServiceListRequestsRequest, context: Any
    ) -> pb.AnalyzerServiceListRequestsResponse:
        """Return the newest requests."""
        requests = await self._queries.list_requests(request.tenant, request.session_id, request.max_results)
        return pb.AnalyzerServiceListRequestsResponse(requests=requests)

    async def GetRequestRoutes(
        self, request: pb.AnalyzerServiceGetRequestRoutesRequest, context: Any
    ) -> pb.AnalyzerServiceGetRequestRoutesResponse:
        """Return one request's kept decisions."""
        routes = await self._queries.request_routes(request.tenant, request.session_id, request.request_id)
        return pb.AnalyzerServiceGetRequestRoutesResponse(routes=routes)

    async def Query(self, request: pb.AnalyzerServiceQueryRequest, context: Any) -> pb.AnalyzerServiceQueryResponse:
        """Return what a query finds in a session."""
        result = await self._queries.query(request.tenant, request.session_id, request.text)
        return pb.AnalyzerServiceQueryResponse(result=result)

    async def CloseSession(
        self, request: pb.AnalyzerServiceCloseSessionRequest, context: Any
    ) -> pb.AnalyzerServiceCloseSessionResponse:
        """Close a session; closing a closed one changes nothing."""
        await self._queries.session(request.tenant, request.session_id)  # refuses what is not this tenant's
        await self._directory.close_now(request.session_id, "closed by request")
        session = await self._queries.session(request.tenant, request.session_id)
        return pb.AnalyzerServiceCloseSessionResponse(session=session)

    async def AcknowledgeFinding(
        self, request: pb.AnalyzerServiceAcknowledgeFindingRequest, context: Any
    ) -> pb.AnalyzerServiceAcknowledgeFindingResponse:
        """Acknowledge a finding, or take that back."""
        finding = await self._queries.acknowledge_finding(
            request.tenant, request.session_id, request.rule_id, actor=request.actor, undo=request.undo
        )
        await self._say_changed(request.tenant, request.session_id)
        return pb.AnalyzerServiceAcknowledgeFindingResponse(finding=finding)

    async def SilenceFinding(
        self, request: pb.AnalyzerServiceSilenceFindingRequest, context: Any
    ) -> pb.AnalyzerServiceSilenceFindingResponse:
        """Silence a finding for a time, or no more."""
        finding = await self._queries.silence_finding(
            request.tenant, request.session_id, request.rule_id, actor=request.actor, duration_s=request.duration_s
        )
        await self._say_changed(request.tenant, request.session_id)
        return pb.AnalyzerServiceSilenceFindingResponse(finding=finding)

    async def _say_changed(self, tenant: str, session_id: str) -> None:
        if self._tell is not None:
            with contextlib.suppress(nats.errors.Error):  # they look again by themselves, a little later
                await self._tell(tenant, session_id)


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps our errors to status codes, once; no traceback leaves the process."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(f"/{SERVICE_NAME}/"):
            return handler
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_stream is not None:
            stream: Any = handler.unary_stream

            async def guarded_stream(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
                try:
                    async for response in stream(request, context):
                        yield response
                except _ANSWERED as error:
                    await _abort(context, method, error)

            return grpc.unary_stream_rpc_method_handler(guarded_stream, *codecs)
        if handler.unary_unary is None:
            return handler
        inner: Any = handler.unary_unary

        async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            try:
                return await inner(request, context)
            except _ANSWERED as error:
                return await _abort(context, method, error)

        return grpc.unary_unary_rpc_method_handler(guarded, *codecs)


# What `_abort` has an answer to.
_ANSWERED = (
    InvalidInputError,
    NotFoundError,
    SessionClosedError,
    DependencyMissingError,
    RedisError,
    SQLAlchemyError,
    nats.errors.Error,
    OSError,
    TimeoutError,
    WireFormatError,
    FleetError,
)


async def _abort(context: "grpc.aio.ServicerContext[Any, Any]", method: str, error: Exception) -> None:
    match error:
        case InvalidInputError():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case NotFoundError():
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        case SessionClosedError() | DependencyMissingError():
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        case WireFormatError() | FleetError():
            _log.error("query_failed", method=method, error=str(error))
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
        case _:
            _log.warning("query_unavailable", method=method, error=str(error))
            what = "NATS" if isinstance(error, nats.errors.Error) else "Redis"
            what = "the catalogue" if isinstance(error, SQLAlchemyError) else what
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{what} does not answer the analyzer; try again")


class AnalyzerServer:
    """The gRPC server of one replica."""

    def __init__(self, service: AnalyzerService, host: str, port: int) -> None:
        self._server = grpc.aio.server(
            interceptors=[_ErrorInterceptor()],
            options=[("grpc.max_send_message_length", _MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
        )
        rpc.add_AnalyzerServiceServicer_to_server(service, self._server)
        # The package defines `aio` at run time, out of a type checker's sight.
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise FleetError(f"cannot listen on {address}: {error}; choose another MOE_ANALYZER_PORT") from error

    async def start(self) -> None:
        """Begin to answer; health says NOT_SERVING until `set_ready`."""
        await self.set_ready(is_ready=False)
        await self._server.start()

    async def set_ready(self, *, is_ready: bool) -> None:
        """Set what health says."""
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Let calls end within `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
