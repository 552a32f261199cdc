"""What stands at the gateway's process boundary in these tests: an analyzer and a worker that are real gRPC servers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

from moe_debugger.errors import QueryError
from moe_debugger.query import FLEET_LIMITS, run_query
from moe_debugger.query.binding import Capabilities, Plan, Scope
from moe_debugger.query.messages import result_to_proto
from moe_debugger.query.rows import LayerFacts, RowBatch
from moe_debugger.query.tables import Table, expert_table
from moe_debugger.v1 import analyzer_pb2 as apb
from moe_debugger.v1 import analyzer_pb2_grpc, collector_pb2_grpc, control_pb2, session_pb2
from moe_debugger.v1 import collector_pb2 as cpb
from moe_debugger.v1 import routing_pb2 as rpb
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.ids import new_id

NUM_LAYERS, NUM_EXPERTS = 3, 4
NOT_FOUND_TEXT = "session is unknown: 100 % “ünbekannt”"


class CountsSource:
    """What queries of `AnalyzerDouble` read: [layers, experts] counts."""

    capabilities = Capabilities("a double", {"tokens": {"*": "it has counts alone"}})

    def __init__(self, counts: "np.ndarray[Any, Any]") -> None:
        self._counts = counts
        self.layers = [LayerFacts(layer, counts.shape[1], 2) for layer in range(len(counts))]

    def num_rows(self, scope: Scope) -> int:
        return 0

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        yield from ()

    def table(self, plan: Plan) -> Table:
        return expert_table(self.layers, dict(enumerate(self._counts)))

    def notes(self, plan: Plan) -> list[str]:
        return ["a double's"]


class AnalyzerDouble(analyzer_pb2_grpc.AnalyzerServiceServicer):
    """An analyzer with sessions whose counts the test knows."""

    def __init__(self) -> None:
        self.sessions: dict[str, session_pb2.Session] = {}
        self.counts: dict[str, np.ndarray[Any, np.dtype[np.uint64]]] = {}
        self.flushes: dict[str, dict[int, int]] = {}
        self.tenants: set[str] = set()
        self.recordings: list[session_pb2.Recording] = []
        self.num_snapshots = 0
        self.is_slow = False
        self.unavailable = ""
        self.num_cancelled = 0
        self.findings: dict[str, session_pb2.Finding] = {}
        self.actors: set[str] = set()

    def add_session(self, session_id: str, name: str = "demo") -> None:
        self.sessions[session_id] = session_pb2.Session(
            session_id=session_id, name=name, model_name="demo-moe", state=session_pb2.SESSION_STATE_OPEN
        )
        self.counts[session_id] = np.zeros((NUM_LAYERS, NUM_EXPERTS), "<u8")
        self.flushes[session_id] = {}

    def flush(self, session_id: str, partition: int, counts: "np.ndarray[Any, Any]", **fields: Any) -> bytes:
        """Count as an analyzer does, and return the delta that it would publish."""
        self.counts[session_id] += counts.astype("<u8")
        flush = self.flushes[session_id].get(partition, 0) + 1
        self.flushes[session_id][partition] = flush
        layers = [
            control_pb2.LayerDelta(
                layer_index=layer, num_tokens=int(row.sum()) // 2, expert_counts=row.astype("<u4").tobytes()
            )
            for layer, row in enumerate(counts)
        ]
        return control_pb2.LiveDelta(
            format_version=format_version(),
            session_id=session_id,
            partition=partition,
            flush=flush,
            layers=layers,
            **fields,
        ).SerializeToString()

    def snapshot(self, session_id: str) -> session_pb2.SessionSnapshot:
        layers = [
            session_pb2.LayerSnapshot(
                description=rpb.LayerDescription(layer_index=layer, num_experts=NUM_EXPERTS, top_k=2),
                num_tokens=int(row.sum()) // 2,
                expert_counts=row.tobytes(),
            )
            for layer, row in enumerate(self.counts[session_id])
        ]
        sequence = sum(self.flushes[session_id].values())
        return session_pb2.SessionSnapshot(
            session=self.sessions[session_id], sequence=sequence, layers=layers, findings=self.findings.values()
        )

    async def _check(self, request: Any, context: Any) -> None:
        self.tenants.add(request.tenant)
        if self.unavailable:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.unavailable)
        if self.is_slow:
            try:
                await asyncio.Event().wait()
            finally:
                self.num_cancelled += 1
        session_id = getattr(request, "session_id", None)
        if session_id is not None and session_id not in self.sessions:
            await context.abort(grpc.StatusCode.NOT_FOUND, NOT_FOUND_TEXT)

    async def ListSessions(self, request: Any, context: Any) -> apb.AnalyzerServiceListSessionsResponse:
        await self._check(request, context)
        return apb.AnalyzerServiceListSessionsResponse(sessions=self.sessions.values())

    async def GetSnapshot(self, request: Any, context: Any) -> apb.AnalyzerServiceGetSnapshotResponse:
        await self._check(request, context)
        self.num_snapshots += 1
        return apb.AnalyzerServiceGetSnapshotResponse(
            snapshot=self.snapshot(request.session_id), partition_flushes=self.flushes[request.session_id]
        )

    async def GetHistory(self, request: Any, context: Any) -> apb.AnalyzerServiceGetHistoryResponse:
        await self._check(request, context)
        points = [session_pb2.RollUp(duration_s=request.resolution_s, num_tokens=request.max_points)]
        return apb.AnalyzerServiceGetHistoryResponse(points=points)

    async def GetSeries(self, request: Any, context: Any) -> apb.AnalyzerServiceGetSeriesResponse:
        await self._check(request, context)
        series = [session_pb2.Series(name=name, num_values=request.max_points) for name in request.names]
        return apb.AnalyzerServiceGetSeriesResponse(series=series, num_points_not_kept=3)

    async def ListRequests(self, request: Any, context: Any) -> apb.AnalyzerServiceListRequestsResponse:
        await self._check(request, context)
        summary = session_pb2.RequestSummary(request_id=request.session_id, num_tokens=request.max_results)
        return apb.AnalyzerServiceListRequestsResponse(requests=[summary])

    async def GetRequestRoutes(self, request: Any, context: Any) -> apb.AnalyzerServiceGetRequestRoutesResponse:
        await self._check(request, context)
        summary = session_pb2.RequestSummary(request_id=request.request_id)
        return apb.AnalyzerServiceGetRequestRoutesResponse(routes=session_pb2.RequestRoutes(summary=summary))

    async def Query(self, request: Any, context: Any) -> apb.AnalyzerServiceQueryResponse:
        """Ask the experts of the session's counts; the language is the real one."""
        await self._check(request, context)
        source = CountsSource(self.counts[request.session_id])
        try:
            result = run_query(request.text, source, FLEET_LIMITS)
        except QueryError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        return apb.AnalyzerServiceQueryResponse(result=result_to_proto(result))

    async def StartRecording(self, request: Any, context: Any) -> apb.AnalyzerServiceStartRecordingResponse:
        await self._check(request, context)
        running = [one for one in self.recordings if one.session_id == request.session_id and not one.ended_at_unix_ns]
        if not running:
            self.recordings.insert(
                0,
                session_pb2.Recording(
                    recording_id=new_id(),
                    session_id=request.session_id,
                    name=request.name,
                    max_bytes=request.max_bytes,
                    state=session_pb2.RECORDING_STATE_RECORDING,
                    started_at_unix_ns=1,
                ),
            )
        recording = running[0] if running else self.recordings[0]
        return apb.AnalyzerServiceStartRecordingResponse(recording=recording, was_running=bool(running))

    async def StopRecording(self, request: Any, context: Any) -> apb.AnalyzerServiceStopRecordingResponse:
        self.tenants.add(request.tenant)
        for one in self.recordings:
            if request.recording_id == one.recording_id or request.session_id == one.session_id:
                one.state, one.ended_at_unix_ns = session_pb2.RECORDING_STATE_FINISHED, 2
                return apb.AnalyzerServiceStopRecordingResponse(recording=one)
        await context.abort(grpc.StatusCode.NOT_FOUND, NOT_FOUND_TEXT)
        raise AssertionError

    async def ListRecordings(self, request: Any, context: Any) -> apb.AnalyzerServiceListRecordingsResponse:
        self.tenants.add(request.tenant)
        found = [one for one in self.recordings if request.session_id in ("", one.session_id)]
        return apb.AnalyzerServiceListRecordingsResponse(recordings=found)

    async def DownloadRecording(
        self, request: Any, context: Any
    ) -> AsyncIterator[apb.AnalyzerServiceDownloadRecordingResponse]:
        self.tenants.add(request.tenant)
        if not [one for one in self.recordings if one.recording_id == request.recording_id]:
            await context.abort(grpc.StatusCode.NOT_FOUND, NOT_FOUND_TEXT)
        for place in range(3):
            yield apb.AnalyzerServiceDownloadRecordingResponse(
                path="manifest.json", offset=2 * place, data=b"ab", total_bytes=6
            )

    async def CloseSession(self, request: Any, context: Any) -> apb.AnalyzerServiceCloseSessionResponse:
        await self._check(request, context)
        self.sessions[request.session_id].state = session_pb2.SESSION_STATE_CLOSED
        return apb.AnalyzerServiceCloseSessionResponse(session=self.sessions[request.session_id])

    async def AcknowledgeFinding(self, request: Any, context: Any) -> apb.AnalyzerServiceAcknowledgeFindingResponse:
        finding = await self._finding(request, context)
        finding.acknowledged_at_unix_ns = 0 if request.undo else 7
        return apb.AnalyzerServiceAcknowledgeFindingResponse(finding=finding)

    async def SilenceFinding(self, request: Any, context: Any) -> apb.AnalyzerServiceSilenceFindingResponse:
        finding = await self._finding(request, context)
        finding.silenced_until_unix_ns = request.duration_s
        return apb.AnalyzerServiceSilenceFindingResponse(finding=finding)

    async def _finding(self, request: Any, context: Any) -> session_pb2.Finding:
        await self._check(request, context)
        self.actors.add(request.actor)
        if request.rule_id not in self.findings:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no finding {request.rule_id!r}")
        return self.findings[request.rule_id]


class WorkerDouble(collector_pb2_grpc.WorkerServiceServicer):
    """A worker that sends `max_new_tokens` tokens, each when `gate` lets it."""

    def __init__(self, token: str = "") -> None:
        self.token = token
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_running = 0
        self.num_cancelled = 0
        self.prompts: list[str] = []

    async def _check(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        if self.token and metadata.get("authorization") != f"Bearer {self.token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no fleet token")

    async def GetWorkerInfo(self, request: Any, context: Any) -> cpb.GetWorkerInfoResponse:
        await self._check(context)
        return cpb.GetWorkerInfoResponse(model_name="demo-moe")

    async def Generate(self, request: cpb.GenerateRequest, context: Any) -> AsyncIterator[cpb.GenerateResponse]:
        await self._check(context)
        self.prompts.append(request.prompt)
        self.num_running += 1
        try:
            yield cpb.GenerateResponse(started=cpb.GenerateStarted(request_id=request.request_id))
            for position in range(request.max_new_tokens):
                await self.gate.wait()
                piece = cpb.TokenPiece(token_id=position, text=b"x")
                yield cpb.GenerateResponse(token=cpb.GeneratedToken(position=position, piece=piece))
            yield cpb.GenerateResponse(finished=cpb.GenerateFinished(num_generated_tokens=request.max_new_tokens))
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1


@contextlib.asynccontextmanager
async def serving(service: AnalyzerDouble | WorkerDouble, port: int) -> AsyncIterator[grpc.aio.Server]:
    """Serve a double on a loopback port for the time of the block."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    if isinstance(service, AnalyzerDouble):
        analyzer_pb2_grpc.add_AnalyzerServiceServicer_to_server(service, server)
    else:
        collector_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)
