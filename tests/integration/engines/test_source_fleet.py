"""A source on a real NATS: the wire of the library, an engine that never waits, every decision accounted for."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
from servers import NatsServer, eventually, free_port
from source_broker import Broker
from unit.engines.conftest import EXPERTS, LAYERS, TOP_K, Truth

import moe_debugger
from moe_debugger import FleetError, InvalidInputError, Source
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns, decode_batch


@pytest.fixture
def broker() -> Iterator[Broker]:
    with NatsServer() as server:
        broker = Broker(server)
        broker.start()
        yield broker
        broker.stop()


def open_source(broker: Broker, **arguments: object) -> Source:
    values: dict[str, object] = {
        "num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "fleet": broker.server.url, "wait_s": 20,
        **arguments,
    }  # fmt: skip
    return moe_debugger.open_source(**values)  # type: ignore[arg-type]


def messages(broker: Broker) -> list[pb.SourceMessage]:
    found = sorted((message for _, message in broker.messages()), key=lambda message: message.sequence)
    assert [message.sequence for message in found] == list(range(1, len(found) + 1))
    return found


def load(found: list[pb.SourceMessage]) -> list[list[int]]:
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for message in found:
        if message.WhichOneof("payload") == "batch":
            for layer in decode_batch(message.batch, dict.fromkeys(range(LAYERS), EXPERTS)).layers:
                np.add.at(counts[layer.layer_index], layer.expert_ids[layer.expert_ids >= 0], 1)
        elif message.WhichOneof("payload") == "counts":
            for sums in message.counts.layers:
                counts[sums.layer_index] += np.frombuffer(sums.expert_counts, "<u8").astype(np.int64)
    return [[int(number) for number in row] for row in counts]


@pytest.mark.parametrize("level", ["counts", "routes", "routes+tokens"])
def test_routes_go_out_at_the_sources_level(broker: Broker, level: str) -> None:
    truth = Truth()
    with open_source(broker, level=level, session_name="engines", model_name="big", keeps_local=True) as source:
        assert source.session_id == broker.session_id
        for _ in range(5):
            source.publish_routes(
                None,
                truth.routes(7, not_routed=2),
                range(7),
                num_prompt_tokens=4,
                num_cached_tokens=2,
                token_ids=range(7),
            )
        assert source.flush(20)
        # Beside the stream, because keeps_local was asked for.
        assert [layer.expert_counts.tolist() for layer in source.get_routing_stats().layers] == truth.expected()
    found = messages(broker)
    assert (found[0].manifest.model_name, found[0].manifest.kind) == ("big", "engine")
    assert load(found) == truth.expected()
    goodbye = found[-1].goodbye
    assert goodbye.counters.num_produced == goodbye.counters.num_published == 5 * 5 * LAYERS
    kinds = {message.WhichOneof("payload") for message in found}
    assert ("counts" in kinds, "batch" in kinds) == (level == "counts", level != "counts")
    batches = [message.batch for message in found if message.WhichOneof("payload") == "batch"]
    assert all(bool(batch.token_id) == (level == "routes+tokens") for batch in batches)
    statuses = [message.status for message in found if message.WhichOneof("payload") == "status"]
    assert statuses[-1].series["not_routed_tokens"] == 10
    assert statuses[-1].is_healthy


def test_what_was_refused_shows_in_the_fleet(broker: Broker) -> None:
    with open_source(broker) as source:
        with pytest.raises(InvalidInputError):
            source.publish_routes(None, np.zeros((4, LAYERS, TOP_K), int), range(4))
        with pytest.raises(InvalidInputError, match="keeps none in this process"):
            source.decisions()
    found = messages(broker)
    status = [message.status for message in found if message.WhichOneof("payload") == "status"][-1]
    assert not status.is_healthy
    assert "refused" in status.problems[0]
    assert [(one.reason, one.num_decisions) for one in found[-1].goodbye.counters.dropped] == [
        (pb.DROP_REASON_CAPTURE_ERROR, 4 * LAYERS)
    ]


def test_sums_of_a_recording_go_out_as_counts(broker: Broker) -> None:
    with open_source(broker) as source:
        sums = [
            LayerCountColumns(
                layer_index=layer, num_experts=EXPERTS, num_identity_experts=0, num_tokens=8, num_padding=0,
                expert_counts=np.ones(EXPERTS, np.uint64),
            )
            for layer in range(LAYERS)
        ]  # fmt: skip
        assert source.publish_counts(CountsColumns(0, 0, 0, 0, sums))
    found = messages(broker)
    assert load(found) == [[1] * EXPERTS] * LAYERS
    assert found[-1].goodbye.counters.num_published == 8 * LAYERS


def test_an_engine_never_waits_for_a_broker_that_is_away(broker: Broker) -> None:
    truth, source = Truth(), open_source(broker, buffer_bytes=100_000)
    first = truth.routes(50)
    source.publish_routes(None, first, range(50))
    assert source.flush(20)
    broker.server.kill()
    taken = lost = 0
    began = time.monotonic()
    for seed in range(60):
        ids = Truth(seed=seed).routes(50)
        published = source.publish_routes(None, ids, range(50))
        if published.is_taken:
            taken += 1
            for (_, layer, _), expert in np.ndenumerate(ids):
                truth.load[layer, int(expert)] += 1
        else:
            lost += 1
    assert time.monotonic() - began < 10
    assert taken
    assert lost
    assert source.account().num_dropped == {"buffer_full": lost * 50 * LAYERS}
    broker.server.start()
    assert source.flush(30)
    source.close(timeout_s=10)
    found = eventually(lambda: messages(broker), 20)
    assert isinstance(found, list)
    assert load(found) == truth.expected()
    counters = found[-1].goodbye.counters
    assert counters.num_produced == 61 * 50 * LAYERS == counters.num_published + lost * 50 * LAYERS


def test_what_only_this_process_does_not_keep_still_reaches_the_fleet(broker: Broker) -> None:
    truth = Truth()
    with open_source(broker, keeps_local=True) as source:
        assert source._local is not None
        source._local._buffer_bytes = 0
        published = source.publish_routes(None, truth.routes(4), range(4))
        assert not published.is_taken
        assert source.account().num_dropped == {"local_buffer_full": 4 * LAYERS}
    assert load(messages(broker)) == truth.expected()


def test_a_fleet_that_is_not_there_is_said_and_nothing_stays() -> None:
    url = f"nats://moe:secret@127.0.0.1:{free_port()}"
    with pytest.raises(FleetError, match="no session from the fleet") as caught:
        moe_debugger.open_source(num_layers=1, num_experts=4, top_k=1, fleet=url, wait_s=0.5)
    assert "secret" not in str(caught.value)
