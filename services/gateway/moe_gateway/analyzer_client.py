"""Calls to the analyzers: deadlines, the tenant of the settings, and errors that say what happens next."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import analyzer_pb2_grpc, query_pb2, session_pb2
from moe_gateway.errors import UpstreamError, upstream_error

__all__ = ["CHANNEL_OPTIONS", "AnalyzerClient"]

_MAX_RESPONSE_BYTES = 64 << 20
_STOP_RECORDING_S = 20.0
# A proxy in the environment must not see loopback calls; reconnects within about a second.
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
)
_SERVICE = "moe_debugger.v1.AnalyzerService"
# An analyzer that has just come back is reached by the next attempt, before a person reads an error. All calls can be
# repeated but one: started twice, a recording would say that it was running before.
_RETRIES = {
    "methodConfig": [
        {"name": [{"service": _SERVICE, "method": "StartRecording"}]},
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
    ]
}


class AnalyzerClient:
    """The queries that the gateway asks, for one tenant.

    Every method raises `FleetError` while no analyzer answers, `NotFoundError` for an unknown session or request.
    """

    def __init__(self, target: str, tenant: str, timeout_s: float) -> None:
        self.target = target
        self.channel = grpc.aio.insecure_channel(
            target, options=(*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(_RETRIES)))
        )
        self._stub: analyzer_pb2_grpc.AnalyzerServiceAsyncStub = analyzer_pb2_grpc.AnalyzerServiceStub(self.channel)
        self._tenant = tenant
        self._timeout_s = timeout_s

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    async def list_sessions(self, remaining_s: float | None = None) -> list[session_pb2.Session]:
        """Return all sessions of the tenant."""
        request = pb.AnalyzerServiceListSessionsRequest(tenant=self._tenant)
        return list((await self._call(self._stub.ListSessions, request, remaining_s)).sessions)

    async def get_snapshot(
        self, session_id: str, remaining_s: float | None = None
    ) -> tuple[session_pb2.SessionSnapshot, dict[int, int]]:
        """Return a session's snapshot and the flush number of each of its partitions."""
        request = pb.AnalyzerServiceGetSnapshotRequest(tenant=self._tenant, session_id=session_id)
        response = await self._call(self._stub.GetSnapshot, request, remaining_s)
        return response.snapshot, dict(response.partition_flushes)

    async def get_history(
        self, session_id: str, resolution_s: int, max_points: int, remaining_s: float | None = None
    ) -> list[session_pb2.RollUp]:
        """Return a session's roll-ups."""
        request = pb.AnalyzerServiceGetHistoryRequest(
            tenant=self._tenant, session_id=session_id, resolution_s=resolution_s, max_points=max_points
        )
        return list((await self._call(self._stub.GetHistory, request, remaining_s)).points)

    async def get_series(
        self, session_id: str, names: Sequence[str], max_points: int, remaining_s: float | None = None
    ) -> tuple[list[session_pb2.Series], int]:
        """Return a session's training series, and how many of their points are not kept."""
        request = pb.AnalyzerServiceGetSeriesRequest(
            tenant=self._tenant, session_id=session_id, names=names, max_points=max_points
        )
        response: pb.AnalyzerServiceGetSeriesResponse
        response = await self._call(self._stub.GetSeries, request, remaining_s)
        return list(response.series), response.num_points_not_kept

    async def list_requests(
        self, session_id: str, max_results: int, remaining_s: float | None = None
    ) -> list[session_pb2.RequestSummary]:
        """Return a session's newest requests."""
        request = pb.AnalyzerServiceListRequestsRequest(
            tenant=self._tenant, session_id=session_id, max_results=max_results
        )
        return list((await self._call(self._stub.ListRequests, request, remaining_s)).requests)

    async def get_request_routes(
        self, session_id: str, request_id: str, remaining_s: float | None = None
    ) -> session_pb2.RequestRoutes:
        """Return the kept decisions of one request."""
        request = pb.AnalyzerServiceGetRequestRoutesRequest(
            tenant=self._tenant, session_id=session_id, request_id=request_id
        )
        response: pb.AnalyzerServiceGetRequestRoutesResponse
        response = await self._call(self._stub.GetRequestRoutes, request, remaining_s)
        return response.routes

    async def query(self, session_id: str, text: str, remaining_s: float | None = None) -> query_pb2.QueryResult:
        """Return what a query finds in a session."""
        request = pb.AnalyzerServiceQueryRequest(tenant=self._tenant, session_id=session_id, text=text)
        response: pb.AnalyzerServiceQueryResponse
        response = await self._call(self._stub.Query, request, remaining_s)
        return response.result

    async def close_session(self, session_id: str, remaining_s: float | None = None) -> session_pb2.Session:
        """Close a session and return it."""
        request = pb.AnalyzerServiceCloseSessionRequest(tenant=self._tenant, session_id=session_id)
        response: pb.AnalyzerServiceCloseSessionResponse
        response = await self._call(self._stub.CloseSession, request, remaining_s)
        return response.session

    async def acknowledge_finding(
        self, session_id: str, rule_id: str, *, undo: bool, actor: str, remaining_s: float | None = None
    ) -> session_pb2.Finding:
        """Acknowledge a finding for this episode, or take that back, and return the finding."""
        request = pb.AnalyzerServiceAcknowledgeFindingRequest(
            tenant=self._tenant, session_id=session_id, rule_id=rule_id, undo=undo, actor=actor
        )
        response: pb.AnalyzerServiceAcknowledgeFindingResponse
        response = await self._call(self._stub.AcknowledgeFinding, request, remaining_s)
        return response.finding

    async def silence_finding(
        self, session_id: str, rule_id: str, duration_s: int, *, actor: str, remaining_s: float | None = None
    ) -> session_pb2.Finding:
        """Silence a finding for `duration_s` seconds from now (0 = no more), and return it."""
        request = pb.AnalyzerServiceSilenceFindingRequest(
            tenant=self._tenant, session_id=session_id, rule_id=rule_id, duration_s=duration_s, actor=actor
        )
        response: pb.AnalyzerServiceSilenceFindingResponse
        response = await self._call(self._stub.SilenceFinding, request, remaining_s)
        return response.finding

    async def start_recording(
        self, session_id: str, name: str, max_bytes: int, remaining_s: float | None = None
    ) -> tuple[session_pb2.Recording, bool]:
        """Record a session from now on; return its recording, and whether it was running."""
        request = pb.AnalyzerServiceStartRecordingRequest(
            tenant=self._tenant, session_id=session_id, name=name, max_bytes=max_bytes
        )
        response: pb.AnalyzerServiceStartRecordingResponse
        response = await self._call(self._stub.StartRecording, request, remaining_s)
        return response.recording, response.was_running

    async def stop_recording(
        self, recording_id: str, session_id: str, remaining_s: float | None = None
    ) -> session_pb2.Recording:
        """Stop a recording and return it."""
        request = pb.AnalyzerServiceStopRecordingRequest(
            tenant=self._tenant, recording_id=recording_id, session_id=session_id
        )
        # It waits for the disk.
        response: pb.AnalyzerServiceStopRecordingResponse
        response = await self._call(self._stub.StopRecording, request, remaining_s, _STOP_RECORDING_S)
        return response.recording

    async def list_recordings(self, session_id: str, remaining_s: float | None = None) -> list[session_pb2.Recording]:
        """Return the tenant's recordings, newest first; of one session where one is given."""
        request = pb.AnalyzerServiceListRecordingsRequest(tenant=self._tenant, session_id=session_id)
        response: pb.AnalyzerServiceListRecordingsResponse
        response = await self._call(self._stub.ListRecordings, request, remaining_s)
        return list(response.recordings)

    async def download_recording(
        self, recording_id: str, remaining_s: float | None = None
    ) -> AsyncGenerator[pb.AnalyzerServiceDownloadRecordingResponse, None]:
        """Yield the files of a recording in chunks."""
        request = pb.AnalyzerServiceDownloadRecordingRequest(tenant=self._tenant, recording_id=recording_id)
        call = self._stub.DownloadRecording(request, timeout=remaining_s)
        try:
            async for chunk in call:
                yield chunk
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        request: Any,
        remaining_s: float | None,
        limit_s: float | None = None,
    ) -> Any:
        limit_s = self._timeout_s if limit_s is None else limit_s
        timeout_s = limit_s if remaining_s is None else min(limit_s, remaining_s)
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s == remaining_s:
                # The caller's own deadline ended it, here a moment before its own call.
                raise UpstreamError(error.code(), f"the deadline of {timeout_s:.1f} s is over") from error
            raise self._error(error) from error

    def _error(self, error: grpc.aio.AioRpcError) -> Exception:
        advice = "captured data is kept in the stream and is counted once it is back; try again in a moment"
        return upstream_error(error, f"the analyzer at {self.target}", advice)
