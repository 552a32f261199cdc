"""Recordings of live sessions by a real analyzer: what is in the files equals what the sources sent."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from analyzer_process import Analyzer
from routing_ledger import LedgerSource, connect, open_session, publish
from servers import NatsServer, ValkeyServer, aeventually, eventually

from moe_debugger import JoinedRecording, open_recording
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.ids import new_id
from moe_debugger.wire.subjects import EVENT_STREAM

RECORDING = session_pb2.RECORDING_STATE_RECORDING
FINISHED = session_pb2.RECORDING_STATE_FINISHED
INTERRUPTED = session_pb2.RECORDING_STATE_INTERRUPTED


@pytest.fixture(scope="module")
def analyzer(nats: NatsServer, valkey: ValkeyServer, folder: Path) -> Iterator[Analyzer]:
    analyzer = Analyzer(nats, valkey, folder, RECORDINGS_DIR=folder / "recordings").start()
    yield analyzer
    analyzer.close()


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[Any]:
    client = await connect(nats.url)
    yield client
    await client.close()


def start(analyzer: Analyzer, session_id: str, **fields: Any) -> pb.AnalyzerServiceStartRecordingResponse:
    request = pb.AnalyzerServiceStartRecordingRequest(tenant="default", session_id=session_id, **fields)
    return analyzer.stub.StartRecording(request, timeout=20)


def stop(analyzer: Analyzer, **fields: str) -> session_pb2.Recording:
    return analyzer.stub.StopRecording(
        pb.AnalyzerServiceStopRecordingRequest(tenant="default", **fields), timeout=30
    ).recording


def listed(analyzer: Analyzer, session_id: str = "") -> list[session_pb2.Recording]:
    request = pb.AnalyzerServiceListRecordingsRequest(tenant="default", session_id=session_id)
    return list(analyzer.stub.ListRecordings(request, timeout=10).recordings)


def _files(path: str, pattern: str) -> list[Path]:
    return list(Path(path).rglob(pattern))


def counts(recording: Any, source: LedgerSource) -> dict[int, list[int]]:
    rows = recording.decisions()
    valid = ~rows.is_padding
    return {
        layer: np.bincount(
            rows.expert_ids[valid & (rows.layer_index == layer)].reshape(-1), minlength=source.experts
        ).tolist()
        for layer in range(source.layers)
    }


async def test_what_is_stored_between_start_and_stop_is_in_the_files(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    session_id = await open_session(client, "recorded")
    early = LedgerSource(session_id, seed=1)
    await publish(js, early.manifest())
    for _ in range(5):
        await publish(js, early.batch())
    before = early.expected_counts()
    began = start(analyzer, session_id, name="mine")
    assert not began.was_running
    assert (began.recording.state, began.recording.name) == (RECORDING, "mine")
    # A source that was there before, and one that comes.
    late = LedgerSource(session_id, seed=2)
    await publish(js, late.manifest())
    for _ in range(10):
        await publish(js, early.batch())
        await publish(js, late.batch())
    await publish(js, early.status())
    done = stop(analyzer, recording_id=began.recording.recording_id)
    after = {
        layer: (np.array(early.expected_counts()[layer]) - before[layer] + late.expected_counts()[layer]).tolist()
        for layer in range(3)
    }
    for _ in range(3):
        await publish(js, early.batch())
    assert done.state == FINISHED
    assert (done.num_rows, done.num_sources, done.num_missing_messages) == (20 * 36, 2, 0)
    recording = open_recording(done.path)
    assert isinstance(recording, JoinedRecording)
    assert recording.is_whole
    assert recording.manifest.num_rows == 20 * 36
    assert counts(recording, early) == after
    by_id = {member.manifest.source_id: member for member in recording.members}
    assert counts(by_id[late.source_id], late) == late.expected_counts()
    assert np.unique(by_id[early.source_id].decisions().step).tolist() == list(range(6, 16))
    assert by_id[early.source_id].series().value.tolist() == [0.5]
    assert [one.recording_id for one in listed(analyzer, session_id)] == [done.recording_id]
    # Once ended it stays as it is.
    assert stop(analyzer, recording_id=done.recording_id) == done
    assert not [path for path in _files(done.path, "*") if path.stat().st_mode & 0o077]


async def test_asked_twice_it_is_one_recording(analyzer: Analyzer, client: Any) -> None:
    session_id = await open_session(client, "twice")
    one, two = start(analyzer, session_id), start(analyzer, session_id)
    assert (one.was_running, two.was_running) == (False, True)
    assert one.recording.recording_id == two.recording.recording_id
    assert stop(analyzer, session_id=session_id).state == FINISHED
    with pytest.raises(grpc.RpcError) as caught:
        stop(analyzer, session_id=session_id)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    three = start(analyzer, session_id)
    assert not three.was_running
    assert three.recording.recording_id != one.recording.recording_id
    stop(analyzer, session_id=session_id)
    # A session that sent nothing is a recording of nothing, and no error.
    assert len(open_recording(three.recording.path).decisions()) == 0


async def test_the_end_of_the_session_ends_its_recording(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    session_id = await open_session(client, "closes")
    source = LedgerSource(session_id)
    recording_id = start(analyzer, session_id).recording.recording_id
    await publish(js, source.manifest())
    for _ in range(4):
        await publish(js, source.batch())
    await publish(js, source.goodbye(closes_session=True))
    await aeventually(lambda: listed(analyzer, session_id)[0].state == FINISHED, 30, interval_s=0.2)
    (done,) = listed(analyzer, session_id)
    assert done.recording_id == recording_id
    assert "the session was closed" in done.detail
    assert counts(open_recording(done.path), source) == source.expected_counts()
    with pytest.raises(grpc.RpcError) as caught:
        start(analyzer, session_id)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_wrong_requests_are_refused(analyzer: Analyzer, client: Any) -> None:
    session_id = await open_session(client, "refused")
    for session, tenant, code in (
        (new_id(), "default", grpc.StatusCode.NOT_FOUND),
        (session_id, "other", grpc.StatusCode.NOT_FOUND),
        ("../../etc", "default", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            analyzer.stub.StartRecording(
                pb.AnalyzerServiceStartRecordingRequest(tenant=tenant, session_id=session), timeout=10
            )
        assert caught.value.code() == code
    recording = start(analyzer, session_id).recording
    request = pb.AnalyzerServiceDownloadRecordingRequest(tenant="default", recording_id=recording.recording_id)
    with pytest.raises(grpc.RpcError) as caught:
        list(analyzer.stub.DownloadRecording(request, timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    stop(analyzer, session_id=session_id)
    request.tenant = "other"
    with pytest.raises(grpc.RpcError) as caught:
        list(analyzer.stub.DownloadRecording(request, timeout=10))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_the_files_can_be_downloaded(analyzer: Analyzer, client: Any, tmp_path: Path) -> None:
    js = client.jetstream()
    session_id = await open_session(client, "downloaded")
    source = LedgerSource(session_id)
    start(analyzer, session_id)
    await publish(js, source.manifest())
    for _ in range(5):
        await publish(js, source.batch())
    done = stop(analyzer, session_id=session_id)
    request = pb.AnalyzerServiceDownloadRecordingRequest(tenant="default", recording_id=done.recording_id)
    received = total = 0
    for chunk in analyzer.stub.DownloadRecording(request, timeout=10):
        path = tmp_path / "copy" / chunk.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            assert file.tell() == chunk.offset
            file.write(chunk.data)
        received += len(chunk.data)
        total = chunk.total_bytes
    assert received == total
    copy = open_recording(tmp_path / "copy")
    assert copy.verify().is_whole
    assert counts(copy, source) == source.expected_counts()


async def test_a_recording_changes_no_aggregate(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    session_id = await open_session(client, "unchanged")
    source = LedgerSource(session_id)
    await publish(js, source.manifest())
    start(analyzer, session_id)
    for _ in range(20):
        await publish(js, source.batch())
    stop(analyzer, session_id=session_id)
    request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)
    await aeventually(
        lambda: analyzer.stub.GetSnapshot(request, timeout=5).snapshot.account.num_counted == source.num_decisions
    )
    view = analyzer.stub.GetSnapshot(request, timeout=5).snapshot
    assert view.account.num_missing_messages == 0
    shown = {x.description.layer_index: np.frombuffer(x.expert_counts, "<u8").tolist() for x in view.layers}
    assert shown == source.expected_counts()
    # Its consumer is gone with it.
    consumers = await js.consumers_info(EVENT_STREAM)
    filters = [one.config.filter_subject for one in consumers]
    assert not [one for one in filters if session_id in str(one)]


async def test_another_replica_can_stop_it(
    analyzer: Analyzer, nats: NatsServer, valkey: ValkeyServer, folder: Path, client: Any
) -> None:
    other = Analyzer(nats, valkey, folder, RECORDINGS_DIR=folder / "recordings-2").start()
    try:
        js = client.jetstream()
        session_id = await open_session(client, "two replicas")
        source = LedgerSource(session_id)
        await publish(js, source.manifest())
        began = start(analyzer, session_id).recording
        assert start(other, session_id).was_running
        for _ in range(6):
            await publish(js, source.batch())
        done = stop(other, session_id=session_id)
        assert (done.state, done.recording_id) == (FINISHED, began.recording_id)
        assert counts(open_recording(done.path), source) == source.expected_counts()
        request = pb.AnalyzerServiceDownloadRecordingRequest(tenant="default", recording_id=done.recording_id)
        with pytest.raises(grpc.RpcError) as caught:
            list(other.stub.DownloadRecording(request, timeout=10))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert done.path in str(caught.value.details())
    finally:
        other.close()


async def test_the_broker_may_go_away_meanwhile(tmp_path: Path, valkey: ValkeyServer) -> None:
    with NatsServer() as nats:
        analyzer = Analyzer(nats, valkey, tmp_path, RECORDINGS_DIR=tmp_path / "recordings").start()
        try:
            client = await connect(nats.url)
            session_id = await open_session(client, "outage")
            source = LedgerSource(session_id)
            await publish(client.jetstream(), source.manifest())
            start(analyzer, session_id)
            for _ in range(5):
                await publish(client.jetstream(), source.batch())
            await client.close()
            nats.kill()
            await asyncio.sleep(1)
            nats.restart()
            client = await connect(nats.url)
            for _ in range(5):
                await publish(client.jetstream(), source.batch())
            await client.close()

            def is_stopped() -> bool:
                return stop(analyzer, session_id=session_id).state == FINISHED

            await aeventually(is_stopped, 40, interval_s=0.5)
            (done,) = listed(analyzer, session_id)
            assert done.num_missing_messages == 0
            assert counts(open_recording(done.path), source) == source.expected_counts()
        finally:
            analyzer.close()


@pytest.fixture
def nats_alone() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def alone(tmp_path: Path, nats_alone: NatsServer) -> Iterator[Analyzer]:
    """An analyzer that shares its broker with no other: one that is killed must own all partitions again."""
    with ValkeyServer() as valkey:
        analyzer = Analyzer(nats_alone, valkey, tmp_path, RECORDINGS_DIR=tmp_path / "recordings").start()
        yield analyzer
        analyzer.close()


@pytest.fixture
async def client_alone(nats_alone: NatsServer) -> AsyncIterator[Any]:
    client = await connect(nats_alone.url)
    yield client
    await client.close()


async def test_after_kill_9_what_is_whole_is_readable_and_the_catalogue_says_so(
    alone: Analyzer, client_alone: Any
) -> None:
    analyzer, client = alone, client_alone
    js = client.jetstream()
    session_id = await open_session(client, "killed")
    source = LedgerSource(session_id)
    await publish(js, source.manifest())
    began = start(analyzer, session_id).recording
    sent: list[dict[int, list[int]]] = [source.expected_counts()]
    deadline = time.monotonic() + 40
    # Parts end every five seconds.
    while not _files(began.path, "rows/part-*.parquet"):
        assert time.monotonic() < deadline
        await publish(js, source.batch())
        sent.append(source.expected_counts())
        await asyncio.sleep(0.1)
    for _ in range(3):
        await publish(js, source.batch())
    analyzer.kill()
    recording = open_recording(began.path)
    assert recording.manifest.status == "recording"
    num_rows = len(recording.decisions())
    assert num_rows >= 36
    assert num_rows % 36 == 0
    assert counts(recording, source) == sent[num_rows // 36]
    assert recording.verify().is_whole
    analyzer.start()
    eventually(lambda: listed(analyzer, session_id)[0].state == INTERRUPTED, 40, interval_s=0.3)
    (row,) = listed(analyzer, session_id)
    assert (row.num_rows, row.num_sources) == (num_rows, 1)
    assert "the analyzer that wrote it ended" in row.detail
    # The session goes on, and can be recorded anew.
    again = start(analyzer, session_id)
    assert not again.was_running
    await publish(js, source.batch())
    assert stop(analyzer, session_id=session_id).num_rows == 36


async def test_an_analyzer_that_is_stopped_in_order_leaves_a_whole_recording(
    alone: Analyzer, client_alone: Any
) -> None:
    analyzer, client = alone, client_alone
    js = client.jetstream()
    session_id = await open_session(client, "stopped")
    source = LedgerSource(session_id)
    began = start(analyzer, session_id).recording
    await publish(js, source.manifest())
    for _ in range(5):
        await publish(js, source.batch())
    eventually(lambda: listed(analyzer, session_id)[0].num_rows == 5 * 36)
    assert analyzer.stop() == 0
    recording = open_recording(began.path)
    assert recording.manifest.status == "finished"
    assert counts(recording, source) == source.expected_counts()
    analyzer.start()
    (row,) = listed(analyzer, session_id)
    assert (row.state, row.num_rows) == (INTERRUPTED, 5 * 36)
    assert "was stopped" in row.detail, analyzer.log[-3000:]


def test_the_folder_is_private(analyzer: Analyzer, folder: Path) -> None:
    assert os.stat(folder / "recordings").st_mode & 0o077 == 0
