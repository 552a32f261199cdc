"""The recordings' part of AnalyzerService."""

from collections.abc import AsyncIterator
from typing import Any

from moe_analyzer.recordings import Recordings
from moe_debugger.errors import FleetError
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import analyzer_pb2_grpc as rpc

__all__ = ["RecordingRpcs"]


class RecordingRpcs(rpc.AnalyzerServiceServicer):
    """Answers the gateway about recordings; a base of `AnalyzerService`.

    Attributes:
        recordings: None where this analyzer keeps none.
    """

    recordings: Recordings | None = None

    @property
    def _recordings(self) -> Recordings:
        if self.recordings is None:
            raise FleetError("this analyzer keeps no recordings")
        return self.recordings

    async def StartRecording(
        self, request: pb.AnalyzerServiceStartRecordingRequest, context: Any
    ) -> pb.AnalyzerServiceStartRecordingResponse:
        """Record a session from now on."""
        recording, was_running = await self._recordings.start(
            request.tenant, request.session_id, request.name, request.max_bytes
        )
        return pb.AnalyzerServiceStartRecordingResponse(recording=recording, was_running=was_running)

    async def StopRecording(
        self, request: pb.AnalyzerServiceStopRecordingRequest, context: Any
    ) -> pb.AnalyzerServiceStopRecordingResponse:
        """Stop a recording; one that has ended stays as it is."""
        recording = await self._recordings.stop(request.tenant, request.recording_id, request.session_id)
        return pb.AnalyzerServiceStopRecordingResponse(recording=recording)

    async def ListRecordings(
        self, request: pb.AnalyzerServiceListRecordingsRequest, context: Any
    ) -> pb.AnalyzerServiceListRecordingsResponse:
        """Return recordings, newest first."""
        recordings = await self._recordings.list(request.tenant, request.session_id)
        return pb.AnalyzerServiceListRecordingsResponse(recordings=recordings)

    async def DownloadRecording(
        self, request: pb.AnalyzerServiceDownloadRecordingRequest, context: Any
    ) -> AsyncIterator[pb.AnalyzerServiceDownloadRecordingResponse]:
        """Stream the files of a recording that has ended."""
        async for chunk in self._recordings.download(request.tenant, request.recording_id):
            yield pb.AnalyzerServiceDownloadRecordingResponse(
                path=chunk.path, offset=chunk.offset, data=chunk.data, total_bytes=chunk.total_bytes
            )
