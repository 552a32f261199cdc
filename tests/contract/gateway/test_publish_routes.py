"""The push door as an RPC, over every transport: what reaches the stream, limits, refusals, retries, idleness."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.gateway.callers import TRANSPORTS, Caller, CallError, WebCaller
from contract.gateway.conftest import Bench
from servers import NatsServer, aeventually
from source_broker import Broker
from unit.engines.conftest import EXPERTS, LAYERS, TOP_K, Truth

from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.v1 import routing_pb2 as rpb
from moe_debugger.wire.codec import decode_batch
from moe_debugger.wire.ids import ID_PATTERN, new_id

Connect = Callable[[str], Caller]


@pytest.fixture
def overrides() -> dict[str, Any]:
    return {"max_sources": 2}


@pytest.fixture
def broker(nats_server: NatsServer) -> Iterator[Broker]:
    broker = Broker(nats_server)
    broker.start()
    yield broker
    broker.stop()


def _open(**fields: Any) -> pb.OpenSourceRequest:
    layers = [rpb.LayerDescription(layer_index=i, num_experts=EXPERTS, top_k=TOP_K) for i in range(LAYERS)]
    return pb.OpenSourceRequest(**{"model_name": "engine-moe", "layers": layers, **fields})


def _push(source_id: str, ids: "np.ndarray[Any, Any]", **fields: Any) -> pb.PublishRoutesRequest:
    values: dict[str, Any] = {
        "source_id": source_id,
        "num_tokens": len(ids),
        "expert_ids": ids.astype("<i2").tobytes(),
        "position": np.arange(len(ids), dtype="<u4").tobytes(),
    }
    return pb.PublishRoutesRequest(**{**values, **fields})


def _stored(broker: Broker, source_id: str) -> list[rpb.SourceMessage]:
    messages = [message for _, message in broker.messages() if message.source_id == source_id]
    return sorted(messages, key=lambda message: message.sequence)


def _load(messages: list[rpb.SourceMessage]) -> list[list[int]]:
    load = np.zeros((LAYERS, EXPERTS), int)
    for message in messages:
        if message.WhichOneof("payload") == "batch":
            for layer in decode_batch(message.batch, dict.fromkeys(range(LAYERS), EXPERTS)).layers:
                np.add.at(load[layer.layer_index], layer.expert_ids[layer.expert_ids >= 0], 1)
    return [[int(number) for number in row] for row in load]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_routes_reach_the_stream_as_a_source_of_the_session(
    bench: Bench, connect: Connect, broker: Broker, transport: str
) -> None:
    caller, truth = connect(transport), Truth()
    opened = await caller.unary("OpenSource", _open(session_name="vllm-fleet", versions={"vllm": "0.0"}))
    assert (opened.session_id, opened.max_request_bytes) == (broker.session_id, bench.settings.max_request_bytes)
    assert ID_PATTERN.match(opened.source_id)
    # The tenant is the gateway's; there is no field for it.
    assert [(request.name, request.model_name) for request in broker.opened] == [("vllm-fleet", "engine-moe")]
    ids = truth.routes(20, not_routed=4)
    weights = np.random.default_rng(0).random(ids.shape, np.float32)
    request_id = new_id()
    first = await caller.unary(
        "PublishRoutes",
        _push(
            opened.source_id,
            ids,
            request_id=request_id,
            gate_weights=weights.astype("<f4").tobytes(),
            num_prompt_tokens=15,
            num_cached_tokens=4,
        ),
    )
    assert (first.request_id, first.num_tokens, first.num_not_routed_tokens) == (request_id, 16, 4)
    assert (first.num_decisions, first.is_taken, dict(first.problems)) == (16 * LAYERS, True, {})
    minted = await caller.unary("PublishRoutes", _push(opened.source_id, truth.routes(2), phase=rpb.PHASE_DECODE))
    assert ID_PATTERN.match(minted.request_id)
    assert minted.request_id != request_id
    closed = await caller.unary("CloseSource", pb.CloseSourceRequest(source_id=opened.source_id, closes_session=True))
    assert closed.counters.num_produced == closed.counters.num_published == 18 * LAYERS
    assert not closed.counters.dropped
    messages = _stored(broker, opened.source_id)
    assert [message.sequence for message in messages] == list(range(1, len(messages) + 1))
    manifest = messages[0].manifest
    assert (manifest.kind, manifest.level, manifest.versions["vllm"]) == ("engine", rpb.CAPTURE_LEVEL_ROUTES, "0.0")
    assert [(layer.num_experts, layer.top_k) for layer in manifest.layers] == [(EXPERTS, TOP_K)] * LAYERS
    assert messages[-1].goodbye.closes_session
    assert _load(messages) == truth.expected()
    assert bench.gateway.push_door.num_sources == 0
    with pytest.raises(CallError) as caught:
        await caller.unary("PublishRoutes", _push(opened.source_id, ids))
    assert (caught.value.code, caught.value.reasons) == (5, ["NOT_FOUND"])


@pytest.mark.parametrize("transport", ["native", "web-binary"])
async def test_replicas_are_mapped_to_logical_experts(
    bench: Bench, connect: Connect, broker: Broker, transport: str
) -> None:
    caller, truth = connect(transport), Truth()
    mapping = np.stack([np.random.default_rng(layer).permutation([*range(EXPERTS), 3, 5]) for layer in range(LAYERS)])
    opened = await caller.unary("OpenSource", _open(physical_to_logical=mapping.astype("<i2").tobytes()))
    logical = truth.routes(6)
    physical = np.zeros_like(logical)
    for (token, layer, slot), expert in np.ndenumerate(logical):
        physical[token, layer, slot] = np.flatnonzero(mapping[layer] == expert)[-1]
    await caller.unary("PublishRoutes", _push(opened.source_id, physical))
    await caller.unary("CloseSource", pb.CloseSourceRequest(source_id=opened.source_id))
    assert _load(_stored(broker, opened.source_id)) == truth.expected()


@pytest.mark.parametrize("transport", ["native", "web-binary"])
async def test_bad_input_is_refused_and_nothing_is_taken(
    bench: Bench, connect: Connect, broker: Broker, transport: str
) -> None:
    caller = connect(transport)
    source_id = (await caller.unary("OpenSource", _open())).source_id
    ids = Truth().routes(3)
    out_of_range = ids.copy()
    out_of_range[1, 2, 0] = EXPERTS
    for request, text in [
        (_push(source_id, ids, num_tokens=4), "expert_ids has 36 bytes; expected 48 for the shape (4, 3, 2)"),
        (_push(source_id, ids, num_tokens=2**32 - 1), "expert_ids has 36 bytes"),
        (_push(source_id, ids, position=b"\0" * 8), "position has 8 bytes; expected 12"),
        (_push(source_id, ids, position=b"\0" * 12), "positions do not rise"),
        (_push(source_id, ids, gate_weights=b"\0" * 4), "gate_weights has 4 bytes"),
        (_push(source_id, ids, token_id=b"\0"), "token_id has 1 bytes"),
        (_push(source_id, ids, is_padding=b"\0\0"), "is_padding has 2 bytes"),
        (_push(source_id, ids, request_id="cmpl-1"), "request_id 'cmpl-1' is not an id"),
        (_push(source_id, ids, call_id="again"), "call_id 'again' is not an id"),
        (_push(source_id, ids, phase=77), "phase 77"),
        (_push(source_id, out_of_range), "expert_ids[1, 2, 0] is 16"),
        (_push(source_id, np.zeros((3, LAYERS, TOP_K))), "none of the 3 tokens has a route"),
        (_push("?", ids), "source_id '?' is not an id"),
    ]:
        with pytest.raises(CallError) as caught:
            await caller.unary("PublishRoutes", request)
        assert (caught.value.code, caught.value.reasons) == (3, ["INVALID_INPUT"]), text
        assert text in caught.value.message
    closed = await caller.unary("CloseSource", pb.CloseSourceRequest(source_id=source_id))
    assert closed.counters.num_published == 0
    # Every refused call that named the source, by the tokens whose routes came with it.
    assert [(one.reason, one.num_decisions) for one in closed.counters.dropped] == [
        (rpb.DROP_REASON_CAPTURE_ERROR, 11 * 3 * LAYERS)
    ]
    status = [one.status for one in _stored(broker, source_id) if one.WhichOneof("payload") == "status"][-1]
    assert {check.name for check in status.checks if check.status == rpb.CHECK_STATUS_FAILED} == {
        "conservation", "range", "drops",
    }  # fmt: skip
    assert _load(_stored(broker, source_id)) == [[0] * EXPERTS] * LAYERS


@pytest.mark.parametrize(
    ("request_message", "text"),
    [
        (_open(layers=[]), "0 layers are described"),
        (_open(model_name=""), "model_name is empty"),
        (_open(level=rpb.CAPTURE_LEVEL_FULL), "an engine has no logits"),
        (_open(layers=[rpb.LayerDescription(layer_index=1, num_experts=4, top_k=1)]), "layer_index 1"),
        (_open(layers=[rpb.LayerDescription(num_experts=4, top_k=5)]), "top_k is 5"),
        (_open(physical_to_logical=b"\0" * 7), "physical_to_logical has 7 bytes"),
        (_open(physical_to_logical=b"\0" * 96), "no replica of expert 1"),
        (_open(versions={str(number): "" for number in range(33)}), "versions has 33 entries"),
    ],
)
async def test_wrong_descriptions_are_refused(
    bench: Bench, connect: Connect, request_message: pb.OpenSourceRequest, text: str
) -> None:
    with pytest.raises(CallError) as caught:
        await connect("native").unary("OpenSource", request_message)
    assert (caught.value.code, caught.value.reasons) == (3, ["INVALID_INPUT"])
    assert text in caught.value.message
    assert bench.gateway.push_door.num_sources == 0


async def test_a_session_that_the_fleet_refuses_is_bad_input(bench: Bench, connect: Connect, broker: Broker) -> None:
    broker.refuse = "session 'x' is open with another model"
    with pytest.raises(CallError) as caught:
        await connect("native").unary("OpenSource", _open())
    assert caught.value.code == 3
    assert broker.refuse in caught.value.message
    assert bench.gateway.push_door.num_sources == 0


async def test_without_an_analyzer_the_source_is_not_opened(bench: Bench, connect: Connect) -> None:
    with pytest.raises(CallError) as caught:
        await connect("native").unary("OpenSource", _open(), timeout_s=20)
    assert (caught.value.code, caught.value.reasons) == (14, ["FLEET_PART_DOWN"])
    assert bench.settings.nats_url.get_secret_value() not in caught.value.message
    assert bench.gateway.push_door.num_sources == 0


@pytest.mark.parametrize("transport", ["native", "web-binary"])
async def test_messages_past_the_limit_are_refused_before_they_are_read(
    bench: Bench, connect: Connect, broker: Broker, transport: str
) -> None:
    caller = connect(transport)
    source_id = (await caller.unary("OpenSource", _open())).source_id
    ids = Truth().routes(bench.settings.max_request_bytes // (2 * LAYERS * TOP_K))
    with pytest.raises(CallError) as caught:
        await caller.unary("PublishRoutes", _push(source_id, ids))
    assert caught.value.code == 8
    # In two calls of one request it fits.
    request_id, half = new_id(), len(ids) // 2
    for start, part in ((0, ids[:half]), (half, ids[half:])):
        position = np.arange(start, start + len(part), dtype="<u4").tobytes()
        await caller.unary("PublishRoutes", _push(source_id, part, request_id=request_id, position=position))
    closed = await caller.unary("CloseSource", pb.CloseSourceRequest(source_id=source_id))
    assert closed.counters.num_published == len(ids) * LAYERS


async def test_a_compressed_message_counts_by_what_it_unpacks_to(bench: Bench, broker: Broker) -> None:
    caller = WebCaller(bench.gateway.web_port, compressed=True)
    source_id = (await caller.unary("OpenSource", _open())).source_id
    with pytest.raises(CallError) as caught:
        await caller.unary("PublishRoutes", _push(source_id, np.zeros((50_000, LAYERS, TOP_K))))
    assert (caught.value.code, caught.value.reasons) == (8, ["MESSAGE_TOO_LARGE"])


async def test_a_retry_under_the_same_call_id_is_counted_once(bench: Bench, connect: Connect, broker: Broker) -> None:
    native, web = connect("native"), connect("web-binary")
    source_id = (await native.unary("OpenSource", _open())).source_id
    truth, call_id = Truth(), new_id()
    request = _push(source_id, truth.routes(5), call_id=call_id)
    first, again, third = await asyncio.gather(
        native.unary("PublishRoutes", request),
        web.unary("PublishRoutes", request),
        native.unary("PublishRoutes", request),
    )
    assert first == again == third
    # A refused call took nothing, so its id is free for what was meant.
    refused = new_id()
    with pytest.raises(CallError):
        await native.unary("PublishRoutes", _push(source_id, np.zeros((2, LAYERS, TOP_K)), call_id=refused))
    await native.unary("PublishRoutes", _push(source_id, truth.routes(2), call_id=refused))
    await native.unary("CloseSource", pb.CloseSourceRequest(source_id=source_id))
    assert _load(_stored(broker, source_id)) == truth.expected()


async def test_too_many_sources_are_refused_and_free_again_when_one_is_closed(
    bench: Bench, connect: Connect, broker: Broker
) -> None:
    caller = connect("native")
    first = await caller.unary("OpenSource", _open())
    await caller.unary("OpenSource", _open())
    with pytest.raises(CallError) as caught:
        await caller.unary("OpenSource", _open())
    assert (caught.value.code, caught.value.reasons) == (8, ["BUSY"])
    await caller.unary("CloseSource", pb.CloseSourceRequest(source_id=first.source_id))
    await caller.unary("OpenSource", _open())


async def test_the_documented_example_runs_as_written(bench: Bench, broker: Broker) -> None:
    document = (Path(__file__).parents[3] / "docs" / "engines.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n# needs a running fleet\n(.*?)```", document, re.DOTALL)
    address = f"127.0.0.1:{bench.gateway.grpc_port}"
    code = compile(snippet.replace("127.0.0.1:50051", address), "docs/engines.md", "exec")
    names: dict[str, Any] = {}
    await asyncio.to_thread(exec, code, names)
    assert (names["published"].num_tokens, names["published"].num_not_routed_tokens) == (16, 4)
    assert _stored(broker, names["source"].source_id)[-1].goodbye.counters.num_published == 16 * 2


class TestIdle:
    @pytest.fixture
    def overrides(self) -> dict[str, Any]:
        return {"source_idle_s": 1.0}

    async def test_an_idle_source_says_goodbye_and_leaves_its_session_open(
        self, bench: Bench, connect: Connect, broker: Broker
    ) -> None:
        caller, truth = connect("native"), Truth()
        source_id = (await caller.unary("OpenSource", _open())).source_id
        await caller.unary("PublishRoutes", _push(source_id, truth.routes(3)))
        await aeventually(lambda: bench.gateway.push_door.num_sources == 0, 10)
        await aeventually(
            lambda: _stored(broker, source_id)[-1].goodbye.reason == "idle for too long", 10, interval_s=0.1
        )
        messages = _stored(broker, source_id)
        assert not messages[-1].goodbye.closes_session
        assert _load(messages) == truth.expected()
        with pytest.raises(CallError) as caught:
            await caller.unary("PublishRoutes", _push(source_id, truth.routes(1)))
        assert caught.value.code == 5
        assert "idle for more than 1 s" in caught.value.message
