"""DebuggerService, once, for both ports: queries by the analyzer, generation by the worker, live data by the hub."""

import contextlib
import math
from collections.abc import AsyncGenerator, Callable
from importlib.metadata import version
from typing import Any

import grpc
import structlog

from moe_debugger.errors import FleetError, InvalidInputError
from moe_debugger.query.parser import MAX_TEXT
from moe_debugger.v1 import collector_pb2, collector_pb2_grpc, gateway_pb2_grpc
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.wire.ids import check_id, new_id
from moe_gateway.analyzer_client import AnalyzerClient
from moe_gateway.components import ComponentMonitor
from moe_gateway.errors import BusyError, upstream_error
from moe_gateway.permissions import LOCAL_USER
from moe_gateway.push_door import PushDoor
from moe_gateway.settings import GatewaySettings
from moe_gateway.watch import WatchService

__all__ = ["DebuggerService", "WorkerClient"]

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_RESOLUTIONS_S = (1, 10, 60)
_DEFAULT_POINTS, _MAX_POINTS = 300, 10_000
_DEFAULT_SERIES_POINTS, _MAX_SERIES_POINTS, _MAX_SERIES_NAMES = 1000, 10_000, 64
_DEFAULT_RESULTS, _MAX_RESULTS = 100, 1000
_MAX_TEMPERATURE = 100.0
# Each costs an analyzer at most some seconds of one core.
_MAX_CONCURRENT_QUERIES = 8
_MAX_NAME_CHARS = 128


class WorkerClient:
    """The worker's stub, the credential for it, and its address for messages."""

    def __init__(self, target: str, token: str, channel: grpc.aio.Channel) -> None:
        self.target = target
        self.stub: collector_pb2_grpc.WorkerServiceAsyncStub = collector_pb2_grpc.WorkerServiceStub(channel)
        self.metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {token}"),) if token else ()


class DebuggerService(gateway_pb2_grpc.DebuggerServiceServicer):
    """The public API. Errors are raised; the error interceptor turns them into statuses.

    Args:
        worker: None in a fleet without a worker.
        probe_worker_now: called after a call to the worker failed, so that its health is known at once.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        analyzer: AnalyzerClient,
        watches: WatchService,
        monitor: ComponentMonitor,
        worker: WorkerClient | None,
        push_door: PushDoor,
        probe_worker_now: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._analyzer = analyzer
        self._watches = watches
        self._monitor = monitor
        self._worker = worker
        self._push_door = push_door
        self._probe_worker_now = probe_worker_now
        self._num_generations = 0
        self._num_queries = 0

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """Return limits and the health of the fleet's parts."""
        return pb.GetServerInfoResponse(
            version=version("moe-debugger"),
            components=self._monitor.components(),
            max_prompt_bytes=self._settings.max_prompt_bytes,
            max_watch_hz=self._settings.max_watch_hz,
            has_worker=self._worker is not None,
        )

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """Return all sessions."""
        return pb.ListSessionsResponse(sessions=await self._analyzer.list_sessions(context.time_remaining()))

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """Return a session's snapshot."""
        session_id = check_id(request.session_id, "session_id")
        snapshot, _ = await self._analyzer.get_snapshot(session_id, context.time_remaining())
        return pb.GetSessionResponse(snapshot=snapshot)

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        """Return a session's roll-ups."""
        session_id = check_id(request.session_id, "session_id")
        if request.resolution_s not in _RESOLUTIONS_S:
            raise InvalidInputError(f"resolution_s is {request.resolution_s}; expected 1, 10 or 60")
        max_points = _bounded("max_points", request.max_points, _DEFAULT_POINTS, _MAX_POINTS)
        points = await self._analyzer.get_history(
            session_id, request.resolution_s, max_points, context.time_remaining()
        )
        return pb.GetHistoryResponse(points=points)

    async def GetSeries(self, request: pb.GetSeriesRequest, context: Context) -> pb.GetSeriesResponse:
        """Return a session's training series."""
        session_id = check_id(request.session_id, "session_id")
        if len(request.names) > _MAX_SERIES_NAMES:
            raise InvalidInputError(f"names has {len(request.names)} entries; expected at most {_MAX_SERIES_NAMES}")
        max_points = _bounded("max_points", request.max_points, _DEFAULT_SERIES_POINTS, _MAX_SERIES_POINTS)
        series, num_not_kept = await self._analyzer.get_series(
            session_id, list(request.names), max_points, context.time_remaining()
        )
        return pb.GetSeriesResponse(series=series, num_points_not_kept=num_not_kept)

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        """Return a session's newest requests."""
        session_id = check_id(request.session_id, "session_id")
        max_results = _bounded("max_results", request.max_results, _DEFAULT_RESULTS, _MAX_RESULTS)
        requests = await self._analyzer.list_requests(session_id, max_results, context.time_remaining())
        return pb.ListRequestsResponse(requests=requests)

    async def GetRequestRoutes(
        self, request: pb.GetRequestRoutesRequest, context: Context
    ) -> pb.GetRequestRoutesResponse:
        """Return the kept decisions of one request."""
        session_id = check_id(request.session_id, "session_id")
        request_id = check_id(request.request_id, "request_id")
        routes = await self._analyzer.get_request_routes(session_id, request_id, context.time_remaining())
        return pb.GetRequestRoutesResponse(routes=routes)

    async def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        """Return what a query finds in a session."""
        session_id = check_id(request.session_id, "session_id")
        if len(request.text) > MAX_TEXT:
            raise InvalidInputError(f"the query has {len(request.text):,} characters; at most {MAX_TEXT:,} are read")
        if self._num_queries >= _MAX_CONCURRENT_QUERIES:
            raise BusyError(f"{self._num_queries} queries are running, the most allowed; ask again when one has ended")
        self._num_queries += 1
        try:
            result = await self._analyzer.query(session_id, request.text, context.time_remaining())
        finally:
            self._num_queries -= 1
        return pb.QueryResponse(result=result)

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        """Close a session."""
        session_id = check_id(request.session_id, "session_id")
        session = await self._analyzer.close_session(session_id, context.time_remaining())
        log.info("session_closed", session_id=session_id)
        return pb.CloseSessionResponse(session=session)

    async def AcknowledgeFinding(
        self, request: pb.AcknowledgeFindingRequest, context: Context
    ) -> pb.AcknowledgeFindingResponse:
        """Acknowledge a finding, or take that back."""
        finding = await self._analyzer.acknowledge_finding(
            check_id(request.session_id, "session_id"),
            request.rule_id,
            undo=request.undo,
            actor=LOCAL_USER,
            remaining_s=context.time_remaining(),
        )
        return pb.AcknowledgeFindingResponse(finding=finding)

    async def SilenceFinding(self, request: pb.SilenceFindingRequest, context: Context) -> pb.SilenceFindingResponse:
        """Silence a finding for a time, or no more."""
        finding = await self._analyzer.silence_finding(
            check_id(request.session_id, "session_id"),
            request.rule_id,
            request.duration_s,
            actor=LOCAL_USER,
            remaining_s=context.time_remaining(),
        )
        return pb.SilenceFindingResponse(finding=finding)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncGenerator[pb.WatchResponse, None]:
        """Stream a session's live state, the list of sessions and the health of the fleet's parts."""
        if not math.isfinite(request.max_hz) or request.max_hz < 0:
            raise InvalidInputError(f"max_hz is {request.max_hz}; expected a number of frames a second, 0 = default")
        async with contextlib.aclosing(self._watches.watch(request)) as events:
            async for event in events:
                yield event

    async def Generate(
        self, request: pb.DebuggerServiceGenerateRequest, context: Context
    ) -> AsyncGenerator[pb.DebuggerServiceGenerateResponse, None]:
        """Generate through the worker, while its routing is captured."""
        if self._worker is None:
            raise FleetError("this fleet has no worker, so nothing can be generated; start it with one")
        upstream = self._checked(request.request)
        if self._num_generations >= self._settings.max_concurrent_generations:
            raise BusyError(
                f"{self._num_generations} generations are running, the most allowed; try again when one has ended, or "
                "raise MOE_GATEWAY_MAX_CONCURRENT_GENERATIONS"
            )
        self._num_generations += 1
        num_tokens = 0
        try:
            async with contextlib.aclosing(self._from_worker(self._worker, upstream, context)) as responses:
                async for response in responses:
                    num_tokens += response.WhichOneof("event") == "token"
                    yield pb.DebuggerServiceGenerateResponse(response=response)
        except grpc.aio.AioRpcError as error:
            self._probe_worker_now()
            log.info("generation_failed", request_id=upstream.request_id, num_tokens=num_tokens, code=error.code().name)
            if num_tokens:
                what_happened = f"the generation ended after {num_tokens} tokens, and what was captured stays"
            elif self._monitor.is_starting("worker"):
                what_happened = "it is still starting, which takes up to a minute"
            else:
                what_happened = "nothing was generated"
            advice = f"{what_happened}; send the prompt again when the fleet shows the worker as ready"
            raise upstream_error(error, f"the worker at {self._worker.target}", advice) from error
        finally:
            self._num_generations -= 1

    async def OpenSource(self, request: pb.OpenSourceRequest, context: Context) -> pb.OpenSourceResponse:
        """Open a source that routes are pushed into."""
        return await self._push_door.open(request, context.time_remaining())

    async def PublishRoutes(self, request: pb.PublishRoutesRequest, context: Context) -> pb.PublishRoutesResponse:
        """Take routes of some tokens of one request."""
        return await self._push_door.publish(request)

    async def CloseSource(self, request: pb.CloseSourceRequest, context: Context) -> pb.CloseSourceResponse:
        """Close a source that was opened here."""
        return await self._push_door.close(request)

    async def StartRecording(self, request: pb.StartRecordingRequest, context: Context) -> pb.StartRecordingResponse:
        """Record a session from now on."""
        session_id = check_id(request.session_id, "session_id")
        if len(request.name) > _MAX_NAME_CHARS or not request.name.isprintable():
            raise InvalidInputError(
                f"name {request.name[:64]!r} is not valid; expected at most {_MAX_NAME_CHARS} printable characters"
            )
        recording, was_running = await self._analyzer.start_recording(
            session_id, request.name, request.max_bytes, context.time_remaining()
        )
        return pb.StartRecordingResponse(recording=recording, was_running=was_running)

    async def StopRecording(self, request: pb.StopRecordingRequest, context: Context) -> pb.StopRecordingResponse:
        """Stop a recording, named by itself or by its session."""
        if bool(request.recording_id) == bool(request.session_id):
            raise InvalidInputError("give either recording_id or session_id")
        for name in ("recording_id", "session_id"):
            if value := getattr(request, name):
                check_id(value, name)
        recording = await self._analyzer.stop_recording(
            request.recording_id, request.session_id, context.time_remaining()
        )
        return pb.StopRecordingResponse(recording=recording)

    async def ListRecordings(self, request: pb.ListRecordingsRequest, context: Context) -> pb.ListRecordingsResponse:
        """Return the recordings of a session, or of all."""
        if request.session_id:
            check_id(request.session_id, "session_id")
        recordings = await self._analyzer.list_recordings(request.session_id, context.time_remaining())
        return pb.ListRecordingsResponse(recordings=recordings)

    async def DownloadRecording(
        self, request: pb.DownloadRecordingRequest, context: Context
    ) -> AsyncGenerator[pb.DownloadRecordingResponse, None]:
        """Stream the files of a recording that has ended."""
        recording_id = check_id(request.recording_id, "recording_id")
        chunks = self._analyzer.download_recording(recording_id, context.time_remaining())
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield pb.DownloadRecordingResponse(
                    path=chunk.path, offset=chunk.offset, data=chunk.data, total_bytes=chunk.total_bytes
                )

    async def _from_worker(
        self, worker: WorkerClient, request: collector_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[collector_pb2.GenerateResponse, None]:
        remaining_s: float | None = context.time_remaining()
        limit_s = self._settings.generate_timeout_s
        timeout_s = limit_s if remaining_s is None else min(limit_s, remaining_s)
        call = worker.stub.Generate(request, timeout=timeout_s, metadata=worker.metadata)
        try:
            async for response in call:
                yield response
        finally:
            # A client that leaves ends this generator; the worker must stop computing for it.
            call.cancel()

    def _checked(self, request: collector_pb2.GenerateRequest) -> collector_pb2.GenerateRequest:
        num_bytes = len(request.prompt.encode())
        if not request.prompt:
            raise InvalidInputError("the prompt is empty; give at least one character")
        if num_bytes > self._settings.max_prompt_bytes:
            raise InvalidInputError(
                f"the prompt has {num_bytes} bytes, at most {self._settings.max_prompt_bytes} are accepted "
                "(MOE_GATEWAY_MAX_PROMPT_BYTES)"
            )
        if not 0 <= request.temperature <= _MAX_TEMPERATURE:
            raise InvalidInputError(
                f"temperature is {request.temperature}; expected 0 (greedy) to {_MAX_TEMPERATURE:g}"
            )
        upstream = collector_pb2.GenerateRequest()
        upstream.CopyFrom(request)
        upstream.request_id = check_id(request.request_id, "request_id") if request.request_id else new_id()
        return upstream


def _bounded(name: str, value: int, default: int, largest: int) -> int:
    if value > largest:
        raise InvalidInputError(f"{name} is {value}; expected at most {largest}, 0 = {default}")
    return value or default
