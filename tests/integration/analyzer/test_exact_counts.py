"""Counts equal an independent ledger, per layer x expert and per request, whatever happens on the way."""

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analyzer_process import Analyzer
from routing_ledger import LedgerSource, connect, open_session, publish
from servers import NatsServer, ValkeyServer, aeventually

from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import control_pb2 as control
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.subjects import DEAD_LETTER_STREAM, live_subject


@pytest.fixture
async def client(nats: NatsServer) -> AsyncIterator[Any]:
    client = await connect(nats.url)
    yield client
    await client.close()


def snapshot(analyzer: Analyzer, session_id: str) -> session_pb2.SessionSnapshot:
    request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)
    return analyzer.stub.GetSnapshot(request, timeout=5).snapshot


def counts(view: session_pb2.SessionSnapshot) -> dict[int, list[int]]:
    return {x.description.layer_index: np.frombuffer(x.expert_counts, "<u8").tolist() for x in view.layers}


async def until_counted(
    analyzer: Analyzer, *sources: LedgerSource, deadline_s: float = 40
) -> session_pb2.SessionSnapshot:
    """Wait until all decisions are counted; then everything must be equal at once."""
    total = sum(source.num_decisions for source in sources)
    seen = 0

    def is_complete() -> bool:
        nonlocal seen
        seen = snapshot(analyzer, sources[0].session_id).account.num_counted
        assert seen <= total, f"counted {seen} of {total}"
        return seen == total

    try:
        await aeventually(is_complete, deadline_s, interval_s=0.1)
    except AssertionError as error:
        raise AssertionError(f"{error}: {seen} of {total}\n{analyzer.log[-4000:]}") from None
    view = snapshot(analyzer, sources[0].session_id)
    expected = {
        layer: np.sum([source.expected_counts()[layer] for source in sources], axis=0).tolist()
        for layer in range(sources[0].layers)
    }
    assert counts(view) == expected
    assert sum(layer.num_padding_tokens for layer in view.layers) == sum(source.num_padding for source in sources)
    assert view.account.num_missing_messages == 0
    assert view.account.num_lost_stream_messages == 0
    return view


def assert_requests_equal(analyzer: Analyzer, source: LedgerSource) -> None:
    listed = analyzer.stub.ListRequests(
        pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=source.session_id), timeout=5
    ).requests
    assert {one.request_id: one.num_tokens for one in listed} == dict(source.request_tokens)
    for one in listed:
        assert one.num_prefill_tokens + one.num_decode_tokens == one.num_tokens
        routes = analyzer.stub.GetRequestRoutes(
            pb.AnalyzerServiceGetRequestRoutesRequest(
                tenant="default", session_id=source.session_id, request_id=one.request_id
            ),
            timeout=5,
        ).routes
        assert np.frombuffer(routes.position, "<u4").tolist() == list(range(one.num_tokens))
        for layer in routes.layers:
            load = [source.request_load[one.request_id, layer.layer_index, e] for e in range(source.experts)]
            assert np.frombuffer(layer.expert_counts, "<u8").tolist() == load
            ids = np.frombuffer(layer.expert_ids, "<u2").reshape(-1, source.top_k).tolist()
            assert ids == [source.routes[one.request_id, p][layer.layer_index] for p in range(one.num_tokens)]


async def test_counts_requests_and_routes_equal_the_ledger(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    session_id = await open_session(client, "exact")
    assert await open_session(client, "exact") == session_id
    live: list[control.LiveDelta] = []

    async def hear(message: Any) -> None:
        live.append(control.LiveDelta.FromString(message.data))

    await client.subscribe(live_subject("default", session_id), cb=hear)
    sources = [LedgerSource(session_id, seed=seed) for seed in range(3)]
    for number, source in enumerate(sources):
        await publish(js, source.manifest())
        for _ in range(20):
            await publish(js, source.batch([f"r{number}-a", f"r{number}-b", f"r{number}-c"], tokens=30))
        await publish(js, source.status())
    view = await until_counted(analyzer, *sources)
    assert len(view.sources) == 3
    assert view.session.num_live_sources == 3
    assert view.session.state == session_pb2.SESSION_STATE_OPEN
    assert view.account.num_produced == view.account.num_counted
    assert view.account.num_in_flight == 0
    assert view.last_step == 20
    assert view.layers[0].recent_num_tokens == view.layers[0].num_tokens
    assert view.layers[0].mean_router_entropy == pytest.approx(1.25)

    requests = analyzer.stub.ListRequests(
        pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=session_id), timeout=5
    ).requests
    assert len(requests) == 9
    for source in sources:
        for name, tokens in source.request_tokens.items():
            assert {one.request_id: one.num_tokens for one in requests}[name] == tokens

    await aeventually(
        lambda: sum(sum(one.num_tokens for one in d.layers) for d in live) == 3 * view.layers[0].num_tokens
    )
    summed = np.zeros((3, 8), np.int64)
    for delta in live:
        for layer in delta.layers:
            summed[layer.layer_index] += np.frombuffer(layer.expert_counts, "<u4")
    assert {layer: summed[layer].tolist() for layer in range(3)} == counts(view)
    history = analyzer.stub.GetHistory(
        pb.AnalyzerServiceGetHistoryRequest(tenant="default", session_id=session_id, resolution_s=10), timeout=5
    ).points
    assert sum(point.num_tokens for point in history) == view.layers[0].num_tokens


async def test_duplicates_and_reordering_change_nothing(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "chaos"))
    messages = [source.manifest(), *(source.batch() for _ in range(30))]
    sent = messages * 3
    random.Random(7).shuffle(sent)
    for number, (subject, payload, _) in enumerate(sent):
        # A new id each time: what the broker's duplicate window would drop reaches the analyzer.
        await publish(js, (subject, payload, f"copy-{number}"))
    await until_counted(analyzer, source)
    request_ids = {
        one.request_id
        for one in analyzer.stub.ListRequests(
            pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=source.session_id), timeout=5
        ).requests
    }
    assert request_ids == set(source.request_tokens)
    assert_requests_equal(analyzer, source)


async def test_analyzer_killed_mid_stream_counts_exactly_after_restart(analyzer: Analyzer, client: Any) -> None:
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "kill"))
    await publish(js, source.manifest())
    for round_number in range(2):
        for _ in range(15):
            await publish(js, source.batch())
        await aeventually(lambda: snapshot(analyzer, source.session_id).account.num_counted > 0)
        analyzer.kill()
        for _ in range(10):
            await publish(js, source.batch([f"after-{round_number}"]))
        analyzer.start()
    await until_counted(analyzer, source)
    assert_requests_equal(analyzer, source)


async def test_valkey_restarted_empty_is_rebuilt_from_the_stream(
    analyzer: Analyzer, client: Any, valkey: ValkeyServer
) -> None:
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "empty"))
    await publish(js, source.manifest())
    for _ in range(20):
        await publish(js, source.batch())
    before = await until_counted(analyzer, source)
    valkey.kill()
    for _ in range(10):
        await publish(js, source.batch())
    valkey.start()
    after = await until_counted(analyzer, source)
    assert after.sequence > before.sequence
    assert_requests_equal(analyzer, source)


async def test_nats_killed_and_restarted_loses_and_doubles_nothing(
    analyzer: Analyzer, client: Any, nats: NatsServer
) -> None:
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "broker"))
    await publish(js, source.manifest())
    for _ in range(3):
        for _ in range(10):
            await publish(js, source.batch())
        nats.restart()
    for _ in range(10):
        await publish(js, source.batch())
    await until_counted(analyzer, source)
    assert_requests_equal(analyzer, source)
    assert await open_session(client, "broker") == source.session_id


async def test_a_stream_made_anew_is_read_from_its_start(analyzer: Analyzer, client: Any, nats: NatsServer) -> None:
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "anew"))
    await publish(js, source.manifest())
    for _ in range(10):
        await publish(js, source.batch())
    await until_counted(analyzer, source)
    nats.kill()
    nats.wipe()
    nats.start()
    for _ in range(10):
        await publish(js, source.batch())
    await until_counted(analyzer, source)


async def test_two_replicas_share_the_partitions_and_one_may_die(
    analyzer: Analyzer, client: Any, nats: NatsServer, valkey: ValkeyServer, folder: Path
) -> None:
    second = Analyzer(nats, valkey, folder).start()
    try:
        js = client.jetstream()
        session_id = await open_session(client, "shared")
        sources = [LedgerSource(session_id, seed=seed) for seed in range(6)]
        for source in sources:
            await publish(js, source.manifest())
        for number in range(30):
            for source in sources:
                await publish(js, source.batch([source.source_id], tokens=6))
            if number == 15:
                analyzer.kill()
        await until_counted(second, *sources)
        analyzer.start()
        for source in sources:
            await publish(js, source.batch([source.source_id], tokens=6))
        await until_counted(second, *sources)
        await until_counted(analyzer, *sources)
        assert second.stop() == 0
        for source in sources:
            await publish(js, source.batch([source.source_id], tokens=6))
        await until_counted(analyzer, *sources)
    finally:
        second.close()


async def test_poison_and_newer_formats_go_to_the_dead_letters_with_their_reason(
    analyzer: Analyzer, client: Any
) -> None:
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "poison"))
    await publish(js, source.manifest())
    await publish(js, source.batch())
    await publish(js, (source.subject, b"\xff\xff no protobuf", "poison-1"))
    subject, payload, _ = source.status()
    newer = routing.SourceMessage.FromString(payload)
    newer.format_version.major = 2
    await publish(js, (subject, newer.SerializeToString(), "poison-2"))
    decisions, load = source.num_decisions, source.load.copy()
    subject, payload, _ = source.batch()
    damaged = routing.SourceMessage.FromString(payload)
    damaged.batch.crc32 ^= 1
    source.num_decisions, source.load = decisions, load
    await publish(js, (subject, damaged.SerializeToString(), "poison-3"))
    await publish(js, source.batch())

    async def letters() -> list[routing.DeadLetter]:
        state = (await js.stream_info(DEAD_LETTER_STREAM)).state
        found = [await js.get_msg(DEAD_LETTER_STREAM, seq=state.first_seq + one) for one in range(state.messages)]
        letters = [routing.DeadLetter.FromString(one.data) for one in found]
        mine = [letter for letter in letters if letter.subject.endswith(source.source_id)]
        return mine if len(mine) >= 3 else []

    found: Any = await aeventually(letters)
    reasons = [letter.reason for letter in found]
    assert len(reasons) == 3
    assert any("not a SourceMessage" in reason for reason in reasons)
    assert any("format version 2.0" in reason and "upgrade" in reason for reason in reasons)
    assert any("checksum" in reason for reason in reasons)
    assert all(letter.subject.endswith(source.source_id) and letter.payload for letter in found)
    await aeventually(lambda: snapshot(analyzer, source.session_id).account.num_counted == source.num_decisions)
    view = snapshot(analyzer, source.session_id)
    assert counts(view) == source.expected_counts()
    assert view.account.num_dead_lettered == 3
