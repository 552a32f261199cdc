"""A source on a real NATS: gap-free sequences, nothing lost over a kill, drops counted, the model never blocked."""

import asyncio
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from nats.aio.client import Client
from servers import eventually, free_port
from source_broker import Broker
from tiny_moe import build

from moe_debugger import FleetError, MoEDebugger
from moe_debugger.publish import Publisher, SourceDescription
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns, decode_batch
from moe_debugger.wire.ids import new_id

NUM_EXPERTS = 8


def _description(level: int = pb.CAPTURE_LEVEL_ROUTES, num_layers: int = 2) -> SourceDescription:
    layers = [pb.LayerDescription(layer_index=i, num_experts=NUM_EXPERTS, top_k=2) for i in range(num_layers)]
    return SourceDescription("test", "tiny", "mixtral", layers, level=level)


def _columns(num_tokens: int, *, forward: int = 0, request: str | None = None) -> RoutingColumns:
    random = np.random.default_rng(forward)
    ids = random.permuted(np.tile(np.arange(NUM_EXPERTS), (num_tokens, 1)), axis=1)[:, :2].astype(np.int32)
    return RoutingColumns(
        step=np.full(num_tokens, forward, np.uint64),
        forward_index=np.full(num_tokens, forward, np.uint64),
        request_ids=[request or new_id()],
        request_index=np.zeros(num_tokens, np.uint32),
        position=np.arange(num_tokens, dtype=np.uint32),
        phase=np.full(num_tokens, pb.PHASE_DECODE, np.uint8),
        is_padding=np.arange(num_tokens) % 5 == 4,
        layers=[
            LayerColumns(
                i, NUM_EXPERTS, ids, np.ones((num_tokens, 2), np.float32), probability_sum=np.ones(NUM_EXPERTS)
            )
            for i in range(2)
        ],
    )


def _check_sequences(messages: Sequence[tuple[dict[str, str], pb.SourceMessage]]) -> list[pb.SourceMessage]:
    """Every sequence once, gap-free from the manifest; message ids are source and sequence."""
    for headers, message in messages:
        assert headers["Nats-Msg-Id"] == f"{message.source_id}-{message.sequence}"
    ordered = sorted((message for _, message in messages), key=lambda message: message.sequence)
    assert [message.sequence for message in ordered] == list(range(1, len(ordered) + 1))
    assert ordered[0].WhichOneof("payload") == "manifest"
    return ordered


def _decisions(messages: Sequence[pb.SourceMessage]) -> int:
    experts = {layer.layer_index: layer.num_experts for layer in messages[0].manifest.layers}
    return sum(
        decode_batch(message.batch, experts).num_decisions
        for message in messages
        if message.WhichOneof("payload") == "batch"
    )


def test_a_source_begins_with_its_manifest_and_ends_with_its_goodbye(broker: Broker) -> None:
    publisher = Publisher(broker.server.url, _description())
    publisher.start()
    assert publisher.wait_for_session(15) == broker.session_id
    for forward in range(20):
        assert publisher.submit(_columns(3, forward=forward))
    publisher.set_series({"loss": 1.5})
    assert publisher.flush(15)
    assert publisher.stop(10, closes_session=True, reason="done")
    messages = _check_sequences(broker.messages())
    manifest, goodbye = messages[0].manifest, messages[-1].goodbye
    assert (manifest.session_id, manifest.source_id) == (broker.session_id, publisher.source_id)
    assert messages[-1].WhichOneof("payload") == "goodbye"
    assert (goodbye.closes_session, goodbye.reason) == (True, "done")
    assert _decisions(messages) == goodbye.counters.num_produced == goodbye.counters.num_published == 20 * 3 * 2
    assert goodbye.counters.num_in_flight == 0
    batches = [message for message in messages if message.WhichOneof("payload") == "batch"]
    assert len(batches) < 20, "forwards that come together share a message"


def test_large_forwards_are_split_below_the_message_limit(broker: Broker) -> None:
    publisher = Publisher(broker.server.url, _description())
    publisher.start()
    publisher.wait_for_session(15)
    whole = _columns(40_000)
    publisher.submit(whole)
    assert publisher.flush(20)
    publisher.stop(10)
    stored = broker.messages()
    messages = _check_sequences(stored)
    assert max(message.ByteSize() for message in messages) <= 512 * 1024
    parts = [
        decode_batch(m.batch, {0: NUM_EXPERTS, 1: NUM_EXPERTS}) for m in messages if m.WhichOneof("payload") == "batch"
    ]
    assert np.array_equal(np.concatenate([part.layers[1].expert_ids for part in parts]), whole.layers[1].expert_ids)
    sums = sum(part.layers[0].probability_sum for part in parts if part.layers[0].probability_sum is not None)
    np.testing.assert_allclose(sums, np.ones(NUM_EXPERTS))


def test_counts_level_sends_sums_of_valid_tokens_only(broker: Broker) -> None:
    publisher = Publisher(broker.server.url, _description(pb.CAPTURE_LEVEL_COUNTS))
    publisher.start()
    publisher.wait_for_session(15)
    items = [_columns(10, forward=forward) for forward in range(5)]
    for item in items:
        publisher.submit(item)
    assert publisher.flush(15)
    publisher.stop(10)
    messages = _check_sequences(broker.messages())
    assert not any(message.WhichOneof("payload") == "batch" for message in messages)
    counts = np.zeros(NUM_EXPERTS, np.uint64)
    for message in messages:
        if message.WhichOneof("payload") == "counts":
            counts += np.frombuffer(message.counts.layers[0].expert_counts, "<u8")
    expected = sum(
        np.bincount(item.layers[0].expert_ids[~item.is_padding].reshape(-1), minlength=NUM_EXPERTS) for item in items
    )
    assert np.array_equal(counts, expected)
    assert messages[-1].goodbye.counters.num_published == 5 * 8 * 2


def test_nothing_is_lost_or_doubled_over_a_kill_and_restart_of_nats(broker: Broker) -> None:
    publisher = Publisher(broker.server.url, _description())
    publisher.start()
    publisher.wait_for_session(15)
    for forward in range(40):
        publisher.submit(_columns(50, forward=forward))
        if forward == 10:
            eventually(lambda: publisher.statistics().num_published > 0)
            broker.server.kill()
            eventually(lambda: not broker.server.is_running)
        if forward == 30:
            assert publisher.statistics().num_in_flight >= 20 * 100
            broker.server.start()
    assert publisher.flush(30)
    assert publisher.stop(10)
    messages = _check_sequences(eventually(broker.messages))  # type: ignore[arg-type]
    assert _decisions(messages) == 40 * 50 * 2
    statistics = publisher.statistics()
    assert (statistics.num_published, statistics.num_dropped, statistics.num_in_flight) == (4000, {}, 0)


def test_a_full_buffer_drops_whole_batches_and_counts_them(broker: Broker) -> None:
    publisher = Publisher(broker.server.url, _description(), buffer_bytes=64 * 1024)
    publisher.start()
    publisher.wait_for_session(15)
    broker.server.kill()
    for forward in range(100):
        started = time.perf_counter()
        publisher.submit(_columns(100, forward=forward))
        assert time.perf_counter() - started < 1, "submit never waits for the broker"
    statistics = publisher.statistics()
    assert statistics.num_dropped["buffer_full"] > 0
    assert statistics.buffer_peak_bytes <= 64 * 1024
    broker.server.start()
    assert publisher.flush(30)
    publisher.stop(10)
    messages = _check_sequences(eventually(broker.messages))  # type: ignore[arg-type]
    counters = messages[-1].goodbye.counters
    dropped = {entry.reason: entry.num_decisions for entry in counters.dropped}
    assert counters.num_produced == 100 * 200
    assert _decisions(messages) + dropped[pb.DROP_REASON_BUFFER_FULL] == counters.num_produced


def test_stop_is_bounded_when_nats_is_gone_and_the_rest_is_counted(broker: Broker) -> None:
    publisher = Publisher(broker.server.url, _description())
    publisher.start()
    publisher.wait_for_session(15)
    broker.server.kill()
    publisher.submit(_columns(10))
    started = time.monotonic()
    assert not publisher.stop(1.0)
    assert time.monotonic() - started < 4
    statistics = publisher.statistics()
    assert (statistics.num_dropped, statistics.num_in_flight) == ({"closed": 20}, 0)
    assert not publisher.submit(_columns(1)), "a stopped publisher takes nothing"


def test_a_source_waits_for_an_analyzer_that_comes_later(nats_server: Any) -> None:
    publisher = Publisher(nats_server.url, _description())
    publisher.start()
    publisher.submit(_columns(4))
    with pytest.raises(FleetError, match="no analyzer") as error:
        publisher.wait_for_session(1)
    assert nats_server.password not in str(error.value)
    broker = Broker(nats_server)
    broker.start()
    try:
        assert publisher.wait_for_session(15) == broker.session_id
        assert publisher.flush(15)
        assert publisher.stop(10)
        assert _decisions(_check_sequences(broker.messages())) == 8
    finally:
        broker.stop()


def test_a_refusal_is_said_with_its_reason(broker: Broker) -> None:
    broker.refuse = "the name is taken by another model; choose another"
    model = build("mixtral")
    debugger = MoEDebugger(model, fleet=broker.server.url, session_name="taken")
    with pytest.raises(FleetError, match="refused the session: the name is taken") as error:
        debugger.start_session()
    assert broker.server.password not in str(error.value)
    debugger.close()


def test_no_task_is_left_where_closing_the_connection_takes_too_long(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_ends(client: Client) -> None:
        assert client._transport is not None
        client._status = Client.CLOSED  # else it would connect again
        client._transport.close()  # type: ignore[no-untyped-call]
        await asyncio.sleep(60)

    monkeypatch.setattr(Client, "close", never_ends)
    publisher = Publisher(broker.server.url, _description())
    publisher.start()
    publisher.wait_for_session(15)
    publisher.submit(_columns(3))
    publisher.stop(10)
    assert publisher._loop.is_closed()
    assert not asyncio.all_tasks(publisher._loop)


def test_a_stop_in_the_middle_of_connecting_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # It accepts and says nothing, as a server does that is stuck.
        publisher = Publisher(f"nats://127.0.0.1:{listener.getsockname()[1]}", _description())
        publisher.start()
        connection, _ = listener.accept()
        with connection:
            publisher.stop(0.1)
            connection.settimeout(10)
            assert connection.recv(1) == b"", "the publisher's end is closed"
    assert publisher._loop.is_closed()
    assert not asyncio.all_tasks(publisher._loop)


def test_a_publisher_that_was_never_started_frees_its_loop() -> None:
    publisher = Publisher("nats://127.0.0.1:4222", _description())
    assert not publisher.stop()
    assert publisher._loop.is_closed()


def test_an_unreachable_fleet_is_named_without_its_password() -> None:
    debugger = MoEDebugger(build("mixtral"), fleet=f"nats://moe:secret@127.0.0.1:{free_port()}")
    with pytest.raises(FleetError, match=r"nats://127\.0\.0\.1:\d+ within 0\.5 s \(no connection") as error:
        debugger.start_session(wait_s=0.5)
    assert "secret" not in str(error.value)
    assert "secret" not in repr(debugger)
    debugger.close()


def test_the_debugger_streams_what_it_counts_itself(broker: Broker) -> None:
    model = build("mixtral")
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 90, (2, 6))
    with MoEDebugger(model, fleet=broker.server.url, session_name="notebook", level="routes+tokens") as debugger:
        session = debugger.session
        assert session is not None
        assert session.session_id == broker.session_id
        debugger.step(7, loss=0.25)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert session.flush(20)
        stats = debugger.get_routing_stats()
        statistics = session.publisher_statistics()
        assert statistics is not None
        eventually(lambda: any(m.status.series.get("loss") == 0.25 for _, m in broker.messages()))
    messages = _check_sequences(broker.messages())
    assert broker.opened[0].name == "notebook"
    experts = {layer.layer_index: layer.num_experts for layer in messages[0].manifest.layers}
    for layer in stats.layers:
        counts = np.zeros(8, np.int64)
        for message in messages:
            if message.WhichOneof("payload") != "batch":
                continue
            columns = decode_batch(message.batch, experts)
            assert columns.token_id is not None
            assert set(columns.step.tolist()) == {7}
            valid = ~columns.is_padding
            counts += np.bincount(columns.layers[layer.info.layer_index].expert_ids[valid].reshape(-1), minlength=8)
        assert np.array_equal(counts, layer.expert_counts)
        assert layer.num_tokens == 2 * (6 + 5 - 1)
    goodbye = messages[-1].goodbye
    assert goodbye.closes_session
    assert goodbye.counters.num_published == goodbye.counters.num_produced


def test_sampling_is_by_whole_requests_and_enforced_before_the_wire(broker: Broker) -> None:
    model = build("mixtral")
    names = [new_id() for _ in range(12)]
    ids = torch.randint(3, 90, (12, 6))
    with (
        torch.no_grad(),
        MoEDebugger(model, fleet=broker.server.url, sampling_rate=0.5) as debugger,
    ):
        with debugger.requests(names):
            model(ids)
            model(ids)
        session = debugger.session
        assert session is not None
        assert session.flush(20)
        kept = set(session.decisions().request_ids)
    messages = _check_sequences(broker.messages())
    on_wire = {name for m in messages if m.WhichOneof("payload") == "batch" for name in m.batch.request_ids}
    assert on_wire == kept
    assert 0 < len(kept) < 12
    counters = messages[-1].goodbye.counters
    assert {entry.reason: entry.num_decisions for entry in counters.dropped} == {
        pb.DROP_REASON_SAMPLED_OUT: (12 - len(kept)) * 2 * 6 * 3
    }
    assert counters.num_published == len(kept) * 2 * 6 * 3
