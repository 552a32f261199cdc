"""Starting against what does not fit, and sessions' lives."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from analyzer_process import Analyzer
from routing_ledger import LedgerSource, connect, open_session, publish
from servers import NatsServer, ValkeyServer, aeventually

from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import control_pb2 as control
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.subjects import open_session_subject


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[Any]:
    client = await connect(nats.url)
    yield client
    await client.close()


def snapshot(analyzer: Analyzer, session_id: str) -> session_pb2.SessionSnapshot:
    request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)
    return analyzer.stub.GetSnapshot(request, timeout=5).snapshot


async def test_a_stream_with_other_partitions_is_refused_and_both_are_named(
    analyzer: Analyzer, nats: NatsServer, valkey: ValkeyServer, folder: Path
) -> None:
    other = Analyzer(nats, valkey, folder, NUM_PARTITIONS=8)
    try:
        other.start(wait=False)
        assert other.wait(40) == 1
        assert "4 partitions" in other.log
        assert "8 partitions" in other.log
    finally:
        other.close()


async def test_wrong_settings_end_with_code_2(nats: NatsServer, valkey: ValkeyServer, folder: Path) -> None:
    wrong = Analyzer(nats, valkey, folder, HOST="0.0.0.0", FLUSH_INTERVAL_S="soon")
    try:
        wrong.start(wait=False)
        assert wrong.wait(40) == 2
        assert "MOE_ANALYZER_HOST" in wrong.log
        assert "MOE_ANALYZER_FLUSH_INTERVAL_S" in wrong.log
        assert nats.password not in wrong.log
    finally:
        wrong.close()


async def test_goodbye_closes_the_session_and_later_data_is_late(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    session_id = await open_session(client, "life")
    source = LedgerSource(session_id)
    for message in (source.manifest(), source.batch(), source.goodbye(closes_session=True)):
        await publish(js, message)
    counted = source.num_decisions

    def is_closed() -> bool:
        return snapshot(analyzer, session_id).session.state == session_pb2.SESSION_STATE_CLOSED

    await aeventually(is_closed)

    async def is_late() -> bool:
        # What comes within the grace time of two seconds still counts, so the first late batch tells that it is over.
        extra = LedgerSource(session_id, seed=9)
        await publish(js, extra.manifest())
        await publish(js, extra.batch(tokens=1))
        await aeventually(lambda: extra.source_id in {one.source_id for one in snapshot(analyzer, session_id).sources})
        await aeventually(lambda: _account(analyzer, session_id, extra) == (3, 3))
        return snapshot(analyzer, session_id).account.num_late > 0

    await aeventually(is_late, 20, interval_s=0.3)
    before = snapshot(analyzer, session_id)
    late = LedgerSource(session_id, seed=5)
    await publish(js, late.manifest())
    await publish(js, late.batch(tokens=20))
    await aeventually(lambda: snapshot(analyzer, session_id).account.num_late == before.account.num_late + 60)
    after = snapshot(analyzer, session_id)
    assert after.account.num_counted == before.account.num_counted >= counted
    assert [one.expert_counts for one in after.layers] == [one.expert_counts for one in before.layers]
    assert await open_session(client, "life") != session_id


def _account(analyzer: Analyzer, session_id: str, source: LedgerSource) -> tuple[int, int]:
    """Decisions sent, and those that are counted or late."""
    view = snapshot(analyzer, session_id)
    mine = next(one for one in view.sources if one.source_id == source.source_id)
    is_late = mine.num_counted == 0 and mine.last_sequence == 2
    return source.num_decisions, source.num_decisions if is_late else mine.num_counted


async def test_a_silent_session_is_stale_and_then_closed(
    nats: NatsServer, valkey: ValkeyServer, folder: Path, analyzer: Analyzer, client: Any
) -> None:
    quick = Analyzer(nats, valkey, folder, STALE_AFTER_S=0.5, CLOSE_AFTER_S=2)
    try:
        session_id = await open_session(client, "silent")
        quick.start()

        def state() -> int:
            return snapshot(quick, session_id).session.state

        await aeventually(lambda: state() == session_pb2.SESSION_STATE_STALE)
        await aeventually(lambda: state() == session_pb2.SESSION_STATE_CLOSED, 40)
        assert quick.stop() == 0
    finally:
        quick.close()


async def test_open_session_says_what_is_wrong(analyzer: Analyzer, client: Any) -> None:
    async def ask(payload: bytes) -> control.OpenSessionResponse:
        answer = await client.request(open_session_subject("default"), payload, timeout=10)
        return control.OpenSessionResponse.FromString(answer.data)

    assert "cannot be read" in (await ask(b"\xff")).error
    assert "no format_version" in (await ask(b"")).error
    named = control.OpenSessionRequest(format_version=format_version(), name="taken", model_name="a")
    assert not (await ask(named.SerializeToString())).error
    named.must_be_new = True
    assert "open already" in (await ask(named.SerializeToString())).error


async def test_queries_say_unavailable_while_valkey_is_down_and_recover(
    analyzer: Analyzer, client: Any, valkey: ValkeyServer
) -> None:
    session_id = await open_session(client, "down")
    valkey.kill()
    try:
        with pytest.raises(grpc.RpcError) as caught:
            snapshot(analyzer, session_id)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert valkey.password not in str(caught.value)
    finally:
        valkey.start()
    await aeventually(lambda: snapshot(analyzer, session_id))
