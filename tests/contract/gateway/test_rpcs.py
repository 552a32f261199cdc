"""Every RPC of DebuggerService over every transport: answers, errors with details, deadlines, cancellation, limits."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from contract.gateway.callers import TRANSPORTS, Caller, CallError
from contract.gateway.conftest import Bench
from contract.gateway.doubles import NOT_FOUND_TEXT
from servers import aeventually

from moe_debugger.v1 import collector_pb2, session_pb2
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.wire.ids import ID_PATTERN, new_id

Connect = Callable[[str], Caller]
pytestmark = pytest.mark.parametrize("transport", TRANSPORTS)


def _generate(prompt: str = "hello", **fields: Any) -> pb.DebuggerServiceGenerateRequest:
    request = collector_pb2.GenerateRequest(prompt=prompt, **{"max_new_tokens": 3, **fields})
    return pb.DebuggerServiceGenerateRequest(request=request)


async def test_unary_rpcs_answer_with_the_analyzers_data(bench: Bench, connect: Connect, transport: str) -> None:
    caller, session_id = connect(transport), bench.session_id
    sessions = await caller.unary("ListSessions", pb.ListSessionsRequest())
    assert [session.session_id for session in sessions.sessions] == [session_id]
    snapshot = await caller.unary("GetSession", pb.GetSessionRequest(session_id=session_id))
    assert snapshot.snapshot == bench.analyzer.snapshot(session_id)
    history = await caller.unary(
        "GetHistory", pb.GetHistoryRequest(session_id=session_id, resolution_s=10, max_points=7)
    )
    assert [(point.duration_s, point.num_tokens) for point in history.points] == [(10, 7)]
    series = await caller.unary("GetSeries", pb.GetSeriesRequest(session_id=session_id, names=["loss", "lr"]))
    assert [(one.name, one.num_values) for one in series.series] == [("loss", 1000), ("lr", 1000)]
    assert series.num_points_not_kept == 3
    requests = await caller.unary("ListRequests", pb.ListRequestsRequest(session_id=session_id))
    assert requests.requests[0].num_tokens == 100
    request_id = new_id()
    routes = await caller.unary(
        "GetRequestRoutes", pb.GetRequestRoutesRequest(session_id=session_id, request_id=request_id)
    )
    assert routes.routes.summary.request_id == request_id
    closed = await caller.unary("CloseSession", pb.CloseSessionRequest(session_id=session_id))
    assert closed.session.state == session_pb2.SESSION_STATE_CLOSED
    # The tenant is the gateway's own, whatever a client sends.
    assert bench.analyzer.tenants == {"default"}


async def test_findings_are_acknowledged_and_silenced(bench: Bench, connect: Connect, transport: str) -> None:
    caller = connect(transport)
    place: dict[str, Any] = {"session_id": bench.session_id, "rule_id": "hot.l1"}
    bench.analyzer.findings["hot.l1"] = session_pb2.Finding(rule_id="hot.l1")
    marked = await caller.unary("AcknowledgeFinding", pb.AcknowledgeFindingRequest(**place))
    assert marked.finding.acknowledged_at_unix_ns == 7
    silenced = await caller.unary("SilenceFinding", pb.SilenceFindingRequest(**place, duration_s=3600))
    assert (silenced.finding.silenced_until_unix_ns, silenced.finding.acknowledged_at_unix_ns) == (3600, 7)
    undone = await caller.unary("AcknowledgeFinding", pb.AcknowledgeFindingRequest(**place, undo=True))
    assert undone.finding.acknowledged_at_unix_ns == 0
    lifted = await caller.unary("SilenceFinding", pb.SilenceFindingRequest(**place))
    assert lifted.finding == session_pb2.Finding(rule_id="hot.l1")
    # Tenant and actor are the gateway's own, whatever a client sends.
    assert (bench.analyzer.tenants, bench.analyzer.actors) == ({"default"}, {"local user"})
    for method in ("AcknowledgeFinding", "SilenceFinding"):
        request_class = getattr(pb, f"{method}Request")
        with pytest.raises(CallError) as caught:
            await caller.unary(method, request_class(session_id=bench.session_id, rule_id="gone"))
        assert (caught.value.code, caught.value.reasons) == (5, ["NOT_FOUND"])
        assert "no finding 'gone'" in caught.value.message
        with pytest.raises(CallError) as caught:
            await caller.unary(method, request_class(session_id="../etc", rule_id="hot.l1"))
        assert (caught.value.code, caught.value.reasons) == (3, ["INVALID_INPUT"])


async def test_server_info_names_every_component_with_its_health(
    bench: Bench, connect: Connect, transport: str
) -> None:
    caller = connect(transport)

    async def all_ready() -> bool:
        info = await caller.unary("GetServerInfo", pb.GetServerInfoRequest())
        assert (info.max_prompt_bytes, info.max_watch_hz, info.has_worker) == (4096, 30, True)
        health = {component.name: component.state for component in info.components}
        return health == dict.fromkeys(("nats", "analyzer", "worker"), pb.COMPONENT_STATE_READY)

    await aeventually(all_ready, 10)


async def test_generate_streams_what_the_worker_makes(bench: Bench, connect: Connect, transport: str) -> None:
    bench.worker.gate.clear()
    kinds = []
    async with contextlib.aclosing(connect(transport).stream("Generate", _generate("grüße"))) as stream:
        async for response in stream:
            kinds.append(response.response.WhichOneof("event"))
            if kinds == ["started"]:
                # It came while the worker still waits, so the stream is incremental.
                assert ID_PATTERN.match(response.response.started.request_id)
                bench.worker.gate.set()
    assert kinds == ["started", "token", "token", "token", "finished"]
    assert bench.worker.prompts == ["grüße"]


async def test_watch_begins_with_a_snapshot(bench: Bench, connect: Connect, transport: str) -> None:
    async with contextlib.aclosing(
        connect(transport).stream("Watch", pb.WatchRequest(session_id=bench.session_id))
    ) as stream:
        seen = []
        async for response in stream:
            seen.append(response.WhichOneof("event"))
            if len(set(seen)) == 3:
                break
    assert seen[0] == "snapshot"
    assert set(seen) == {"snapshot", "components", "sessions"}
    await aeventually(lambda: bench.gateway.watches.num_watches == 0, 5)
    assert bench.gateway.watches.num_hubs == 0


async def test_unknown_session_is_not_found_with_details(bench: Bench, connect: Connect, transport: str) -> None:
    caller = connect(transport)
    with pytest.raises(CallError) as caught:
        await caller.unary("GetSession", pb.GetSessionRequest(session_id=new_id()))
    assert (caught.value.code, caught.value.message, caught.value.reasons) == (5, NOT_FOUND_TEXT, ["NOT_FOUND"])
    with pytest.raises(CallError) as caught:
        async for _ in caller.stream("Watch", pb.WatchRequest(session_id=new_id())):
            pass
    assert caught.value.code == 5


@pytest.mark.parametrize(
    ("method", "request_message", "text"),
    [
        ("GetSession", pb.GetSessionRequest(session_id="a.>"), "session_id 'a.>' is not an id"),
        ("GetHistory", pb.GetHistoryRequest(session_id=new_id(), resolution_s=7), "resolution_s is 7"),
        ("ListRequests", pb.ListRequestsRequest(session_id=new_id(), max_results=10**6), "max_results is 1000000"),
        ("GetSeries", pb.GetSeriesRequest(session_id=new_id(), max_points=10**6), "max_points is 1000000"),
        ("GetSeries", pb.GetSeriesRequest(session_id=new_id(), names=["x"] * 65), "names has 65 entries"),
        ("GetRequestRoutes", pb.GetRequestRoutesRequest(session_id=new_id(), request_id="?"), "request_id '?'"),
    ],
)
async def test_bad_input_is_an_invalid_argument_that_names_it(
    bench: Bench, connect: Connect, transport: str, method: str, request_message: Any, text: str
) -> None:
    with pytest.raises(CallError) as caught:
        await connect(transport).unary(method, request_message)
    assert caught.value.code == 3
    assert text in caught.value.message
    assert caught.value.reasons == ["INVALID_INPUT"]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (_generate(""), "the prompt is empty"),
        (_generate("ä" * 2049), "the prompt has 4098 bytes, at most 4096"),
        (_generate(temperature=float("nan")), "temperature is nan"),
        (_generate(request_id="UPPER"), "request_id 'UPPER'"),
    ],
)
async def test_generate_refuses_bad_input(
    bench: Bench, connect: Connect, transport: str, bad: pb.DebuggerServiceGenerateRequest, text: str
) -> None:
    with pytest.raises(CallError) as caught:
        async for _ in connect(transport).stream("Generate", bad):
            pass
    assert caught.value.code == 3
    assert text in caught.value.message
    assert bench.worker.prompts == []


async def test_too_many_generations_are_refused_and_free_again_later(
    bench: Bench, connect: Connect, transport: str
) -> None:
    caller = connect(transport)
    bench.worker.gate.clear()

    async def consume() -> int:
        return len([response async for response in caller.stream("Generate", _generate())])

    running = [asyncio.create_task(consume()) for _ in range(3)]
    await aeventually(lambda: bench.worker.num_running == 3, 10)
    with pytest.raises(CallError) as caught:
        await consume()
    assert (caught.value.code, caught.value.reasons) == (8, ["BUSY"])
    bench.worker.gate.set()
    assert await asyncio.gather(*running) == [5, 5, 5]
    assert await consume() == 5


async def test_deadline_ends_the_call_and_its_upstream(bench: Bench, connect: Connect, transport: str) -> None:
    caller = connect(transport)
    bench.analyzer.is_slow = True
    began = time.monotonic()
    with pytest.raises(CallError) as caught:
        await caller.unary("GetSession", pb.GetSessionRequest(session_id=bench.session_id), timeout_s=0.3)
    assert caught.value.code == 4
    assert time.monotonic() - began < 3
    await aeventually(lambda: bench.analyzer.num_cancelled >= 1, 5)


async def test_client_that_leaves_cancels_the_worker(bench: Bench, connect: Connect, transport: str) -> None:
    bench.worker.gate.clear()
    stream = connect(transport).stream("Generate", _generate())
    first = await anext(stream)
    assert first.response.HasField("started")
    await stream.aclose()
    await aeventually(lambda: bench.worker.num_cancelled == 1 and bench.worker.num_running == 0, 5)


async def test_worker_that_dies_midway_ends_the_stream_with_advice(
    bench: Bench, connect: Connect, transport: str
) -> None:
    bench.worker.gate.clear()
    stream = connect(transport).stream("Generate", _generate())
    await anext(stream)
    await bench.stop_worker()
    with pytest.raises(CallError) as caught:
        await anext(stream)
    assert (caught.value.code, caught.value.reasons) == (14, ["FLEET_PART_DOWN"])
    assert f"127.0.0.1:{bench.worker_port}" in caught.value.message
    assert "send the prompt again" in caught.value.message
    with pytest.raises(CallError) as caught:
        async for _ in connect(transport).stream("Generate", _generate()):
            pass
    assert caught.value.code == 14
    assert "nothing was generated" in caught.value.message or "still starting" in caught.value.message


async def test_what_the_analyzer_lacks_is_passed_on(bench: Bench, connect: Connect, transport: str) -> None:
    bench.analyzer.unavailable = "Redis does not answer the analyzer; try again"
    with pytest.raises(CallError) as caught:
        await connect(transport).unary("ListSessions", pb.ListSessionsRequest())
    assert (caught.value.code, caught.value.reasons) == (14, ["FLEET_PART_DOWN"])
    assert bench.analyzer.unavailable in caught.value.message


async def test_fault_in_a_handler_leaks_nothing(
    bench: Bench, connect: Connect, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> list[Any]:
        raise RuntimeError("secret-canary /etc/passwd")

    monkeypatch.setattr(bench.gateway.monitor, "components", explode)
    with pytest.raises(CallError) as caught:
        await connect(transport).unary("GetServerInfo", pb.GetServerInfoRequest())
    assert (caught.value.code, caught.value.reasons) == (13, ["INTERNAL"])
    assert "canary" not in str(caught.value)
    assert "error_id" in caught.value.message
