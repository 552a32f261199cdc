"""The recordings' RPCs over every transport."""

from collections.abc import Callable

import pytest
from contract.gateway.callers import TRANSPORTS, Caller, CallError
from contract.gateway.conftest import Bench
from contract.gateway.doubles import NOT_FOUND_TEXT

from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.ids import new_id

Connect = Callable[[str], Caller]
pytestmark = pytest.mark.parametrize("transport", TRANSPORTS)


async def test_a_recording_is_started_listed_stopped_and_fetched(
    bench: Bench, connect: Connect, transport: str
) -> None:
    caller, session_id = connect(transport), bench.session_id
    request = pb.StartRecordingRequest(session_id=session_id, name="mine", max_bytes=7)
    begun = await caller.unary("StartRecording", request)
    assert (begun.recording.name, begun.recording.max_bytes, begun.was_running) == ("mine", 7, False)
    again = await caller.unary("StartRecording", request)
    assert (again.recording.recording_id, again.was_running) == (begun.recording.recording_id, True)
    for wanted in (pb.ListRecordingsRequest(), pb.ListRecordingsRequest(session_id=session_id)):
        listed = await caller.unary("ListRecordings", wanted)
        assert [one.recording_id for one in listed.recordings] == [begun.recording.recording_id]
    elsewhere = await caller.unary("ListRecordings", pb.ListRecordingsRequest(session_id=new_id()))
    assert not elsewhere.recordings
    done = await caller.unary("StopRecording", pb.StopRecordingRequest(session_id=session_id))
    assert done.recording.state == session_pb2.RECORDING_STATE_FINISHED
    chunks = [
        chunk
        async for chunk in caller.stream(
            "DownloadRecording", pb.DownloadRecordingRequest(recording_id=begun.recording.recording_id)
        )
    ]
    assert [(one.path, one.offset, one.data, one.total_bytes) for one in chunks] == [
        ("manifest.json", place, b"ab", 6) for place in (0, 2, 4)
    ]
    assert bench.analyzer.tenants == {"default"}


async def test_wrong_requests_are_refused(bench: Bench, connect: Connect, transport: str) -> None:
    caller = connect(transport)
    for method, request, code in (
        ("StartRecording", pb.StartRecordingRequest(session_id="../x"), 3),
        ("StartRecording", pb.StartRecordingRequest(session_id=new_id()), 5),
        ("StartRecording", pb.StartRecordingRequest(session_id=bench.session_id, name="a\nb"), 3),
        ("StartRecording", pb.StartRecordingRequest(session_id=bench.session_id, name="a" * 200), 3),
        ("StopRecording", pb.StopRecordingRequest(), 3),
        ("StopRecording", pb.StopRecordingRequest(session_id=new_id(), recording_id=new_id()), 3),
        ("StopRecording", pb.StopRecordingRequest(recording_id="/etc/passwd"), 3),
        ("StopRecording", pb.StopRecordingRequest(recording_id=new_id()), 5),
        ("ListRecordings", pb.ListRecordingsRequest(session_id="x"), 3),
    ):
        with pytest.raises(CallError) as caught:
            await caller.unary(method, request)
        assert caught.value.code == code, (method, request)
    for recording_id, code in (("..", 3), (new_id(), 5)):
        with pytest.raises(CallError) as caught:
            async for _ in caller.stream("DownloadRecording", pb.DownloadRecordingRequest(recording_id=recording_id)):
                pass
        assert caught.value.code == code
    assert NOT_FOUND_TEXT in caught.value.message
