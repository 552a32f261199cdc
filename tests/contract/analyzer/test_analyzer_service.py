"""Every RPC of AnalyzerService over a loopback grpc.aio server, on a real Valkey and a real SQLite file."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from routing_ledger import LedgerSource
from servers import ValkeyServer

from moe_analyzer.aggregate import Limits, SessionPart
from moe_analyzer.findings import TrackedFindings
from moe_analyzer.lifecycle import SessionDirectory
from moe_analyzer.ownership import Ownership
from moe_analyzer.queries import Queries
from moe_analyzer.server import AnalyzerServer, AnalyzerService
from moe_analyzer.store import Applied, Store, connect_redis
from moe_debugger.catalogue import Catalogue, upgrade
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import analyzer_pb2_grpc as rpc
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.ids import new_id

SECOND = 1_000_000_000


@dataclass
class Service:
    stub: Any
    channel: Any
    session_id: str
    sources: list[LedgerSource]
    catalogue: Catalogue
    store: Store
    told: list[tuple[str, str]]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A session whose two sources lie in two partitions, three seconds of data."""
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    await upgrade(url)
    catalogue = Catalogue(url)
    with ValkeyServer() as valkey:
        redis = connect_redis(valkey.url)
        store = Store(redis)
        session_id = (await catalogue.open_session("default", "run", model_name="m", model_type="mixtral")).session_id
        sources = [LedgerSource(session_id, seed=seed) for seed in range(2)]
        for partition, source in enumerate(sources):
            lease = await Ownership(redis, "test", 60).acquire(partition)
            assert lease is not None
            part = SessionPart(session_id, Limits())
            messages = [source.manifest(), *(source.batch([f"q{partition}"]) for _ in range(3)), source.status()]
            for second, (_, payload, _) in enumerate(messages):
                part.apply(routing.SourceMessage.FromString(payload), (1000 + second) * SECOND)
            await store.flush(lease, Applied(), Applied(5, 1, "s"), {("default", session_id): part.take_writes()})
        queries = Queries(store, catalogue, num_partitions=4, recent_window_s=2, stale_after_s=15)
        told: list[tuple[str, str]] = []

        async def tell(tenant: str, session_id: str) -> None:
            told.append((tenant, session_id))

        directory = SessionDirectory(catalogue, close_after_s=600)
        server = AnalyzerServer(AnalyzerService(queries, directory, tell=tell), "127.0.0.1", 0)
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        yield Service(rpc.AnalyzerServiceStub(channel), channel, session_id, sources, catalogue, store, told)
        await channel.close()
        await server.stop()
        await redis.aclose()
    await catalogue.close()


async def test_list_sessions(service: Service) -> None:
    other = await service.catalogue.open_session("other", "theirs")
    response = await service.stub.ListSessions(pb.AnalyzerServiceListSessionsRequest(tenant="default"))
    (session,) = response.sessions
    assert (session.session_id, session.name, session.model_type) == (service.session_id, "run", "mixtral")
    assert session.state == session_pb2.SESSION_STATE_OPEN
    assert (session.num_sources, session.num_live_sources) == (2, 0)
    theirs = await service.stub.ListSessions(pb.AnalyzerServiceListSessionsRequest(tenant="other"))
    assert [one.session_id for one in theirs.sessions] == [other.session_id]


async def test_get_snapshot(service: Service) -> None:
    response = await service.stub.GetSnapshot(
        pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=service.session_id)
    )
    view = response.snapshot
    assert sorted(response.partition_flushes) == [0, 1]
    assert view.sequence == sum(response.partition_flushes.values())
    for layer in view.layers:
        index = layer.description.layer_index
        expected = sum(np.array(source.expected_counts()[index]) for source in service.sources)
        counts = np.frombuffer(layer.expert_counts, "<u8")
        recent = np.frombuffer(layer.recent_expert_counts, "<u8")
        assert counts.tolist() == np.asarray(expected).tolist()
        # The window of two seconds holds the last two of three batches.
        assert 0 < layer.recent_num_tokens < layer.num_tokens
        assert recent.sum() == 2 * layer.recent_num_tokens
        share = recent[recent > 0] / recent.sum()
        assert layer.load_entropy == pytest.approx(-(share * np.log(share)).sum())
        assert layer.effective_experts == pytest.approx(np.exp(layer.load_entropy))
        assert layer.hottest_expert == recent.argmax()
        assert layer.hottest_load_ratio == pytest.approx(recent.max() / recent.mean())
        assert layer.description.module_name == f"l{index}"
    assert [one.source_id for one in view.sources] == sorted(one.source_id for one in service.sources)
    assert all(one.series["loss"] == 0.5 and one.is_healthy for one in view.sources)
    decisions = sum(one.num_decisions for one in service.sources)
    assert view.account.num_produced == view.account.num_counted == decisions
    assert (view.first_step, view.last_step) == (1, 3)


async def test_get_history(service: Service) -> None:
    for resolution, starts in ((1, [1001, 1002, 1003]), (10, [1000]), (60, [960])):
        response = await service.stub.GetHistory(
            pb.AnalyzerServiceGetHistoryRequest(
                tenant="default", session_id=service.session_id, resolution_s=resolution
            )
        )
        assert [one.start_unix_ns // SECOND for one in response.points] == starts
        assert all(len(np.frombuffer(one.load_entropy, "<f4")) == 3 for one in response.points)
        # Nats, as in a snapshot: even routing over 8 experts is near ln 8 = 2.08 and not near 1.
        for one in response.points:
            entropy = np.frombuffer(one.load_entropy, "<f4")
            assert np.frombuffer(one.effective_experts, "<f4") == pytest.approx(np.exp(entropy), rel=1e-5)
            assert all(1 < value <= np.log(8) + 1e-6 for value in entropy)
    last = await service.stub.GetHistory(
        pb.AnalyzerServiceGetHistoryRequest(
            tenant="default", session_id=service.session_id, resolution_s=1, max_points=1
        )
    )
    assert [one.start_unix_ns // SECOND for one in last.points] == [1003]


async def test_list_requests_and_their_routes(service: Service) -> None:
    listed = await service.stub.ListRequests(
        pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=service.session_id)
    )
    assert {one.request_id: one.num_tokens for one in listed.requests} == {
        f"q{number}": source.request_tokens[f"q{number}"] for number, source in enumerate(service.sources)
    }
    limited = await service.stub.ListRequests(
        pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=service.session_id, max_results=1)
    )
    assert len(limited.requests) == 1
    source = service.sources[1]
    response = await service.stub.GetRequestRoutes(
        pb.AnalyzerServiceGetRequestRoutesRequest(tenant="default", session_id=service.session_id, request_id="q1")
    )
    routes = response.routes
    n = source.request_tokens["q1"]
    assert (routes.num_tokens, routes.num_rows_not_kept, routes.summary.has_routes) == (n, 0, True)
    assert np.frombuffer(routes.position, "<u4").tolist() == list(range(n))
    assert len(routes.phase) == n
    assert len(routes.token_id) == 4 * n
    for layer in routes.layers:
        ids = np.frombuffer(layer.expert_ids, "<u2").reshape(n, layer.top_k)
        assert ids.tolist() == [source.routes["q1", position][layer.layer_index] for position in range(n)]
        assert np.bincount(ids.ravel(), minlength=8).tolist() == np.frombuffer(layer.expert_counts, "<u8").tolist()
        assert set(np.frombuffer(layer.gate_weights, "<f2").tolist()) == {0.5}


async def test_get_series(service: Service) -> None:
    place: dict[str, Any] = {"tenant": "default", "session_id": service.session_id}
    response = await service.stub.GetSeries(pb.AnalyzerServiceGetSeriesRequest(**place))
    # One series a source: what ranks report is never summed.
    assert [one.source_id for one in response.series] == sorted(one.source_id for one in service.sources)
    for one in response.series:
        assert (one.name, one.num_values, one.HasField("layer_index")) == ("loss", 1, False)
        assert np.frombuffer(one.step, "<u8").tolist() == [3]
        assert np.frombuffer(one.value, "<f8").tolist() == [0.5]
    assert response.num_points_not_kept == 0
    other = await service.stub.GetSeries(pb.AnalyzerServiceGetSeriesRequest(**place, names=["lr"]))
    assert not other.series


async def test_close_session(service: Service) -> None:
    request = pb.AnalyzerServiceCloseSessionRequest(tenant="default", session_id=service.session_id)
    first = (await service.stub.CloseSession(request)).session
    again = (await service.stub.CloseSession(request)).session
    assert first.state == session_pb2.SESSION_STATE_CLOSED
    assert first.closed_at_unix_ns == again.closed_at_unix_ns > 0


async def test_acknowledge_and_silence_a_finding(service: Service) -> None:
    place: dict[str, Any] = {"tenant": "default", "session_id": service.session_id}
    found = session_pb2.Finding(rule_id="a.l1", state=session_pb2.FINDING_STATE_OPEN, opened_at_unix_ns=SECOND)
    tracked = TrackedFindings({"a.l1": found}, 5000 * SECOND)
    assert await service.store.replace_findings("default", service.session_id, None, tracked.encode())
    which: dict[str, Any] = {**place, "rule_id": "a.l1", "actor": "ada"}
    acknowledge = pb.AnalyzerServiceAcknowledgeFindingRequest(**which)
    acknowledged = (await service.stub.AcknowledgeFinding(acknowledge)).finding
    assert (acknowledged.rule_id, acknowledged.acknowledged_by) == ("a.l1", "ada")
    silence = pb.AnalyzerServiceSilenceFindingRequest(**which, duration_s=60)
    silenced = (await service.stub.SilenceFinding(silence)).finding
    assert (silenced.silenced_by, silenced.acknowledged_by) == ("ada", "ada")
    snapshot = (await service.stub.GetSnapshot(pb.AnalyzerServiceGetSnapshotRequest(**place))).snapshot
    assert list(snapshot.findings) == [silenced]
    lifted = (await service.stub.SilenceFinding(pb.AnalyzerServiceSilenceFindingRequest(**which))).finding
    assert not lifted.silenced_until_unix_ns
    undone = pb.AnalyzerServiceAcknowledgeFindingRequest(**which, undo=True)
    assert (await service.stub.AcknowledgeFinding(undone)).finding == found
    assert service.told == [("default", service.session_id)] * 4
    too_long = pb.AnalyzerServiceSilenceFindingRequest(**which, duration_s=2**32 - 1)
    with pytest.raises(grpc.aio.AioRpcError, match="at most 2592000") as caught:
        await service.stub.SilenceFinding(too_long)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    unknown = pb.AnalyzerServiceAcknowledgeFindingRequest(**place, rule_id="b")
    with pytest.raises(grpc.aio.AioRpcError, match=r"no finding 'b'; it has a\.l1;") as caught:
        await service.stub.AcknowledgeFinding(unknown)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert len(service.told) == 4


def _requests(tenant: str, session_id: str) -> dict[str, Any]:
    place: dict[str, Any] = {"tenant": tenant, "session_id": session_id}
    return {
        "GetSnapshot": pb.AnalyzerServiceGetSnapshotRequest(**place),
        "GetHistory": pb.AnalyzerServiceGetHistoryRequest(**place, resolution_s=1),
        "GetSeries": pb.AnalyzerServiceGetSeriesRequest(**place),
        "ListRequests": pb.AnalyzerServiceListRequestsRequest(**place),
        "GetRequestRoutes": pb.AnalyzerServiceGetRequestRoutesRequest(**place, request_id="q0"),
        "CloseSession": pb.AnalyzerServiceCloseSessionRequest(**place),
        "AcknowledgeFinding": pb.AnalyzerServiceAcknowledgeFindingRequest(**place, rule_id="x"),
        "SilenceFinding": pb.AnalyzerServiceSilenceFindingRequest(**place, rule_id="x", duration_s=60),
    }


async def test_errors_have_codes_and_say_what_is_wrong(service: Service) -> None:
    async def code(method: str, request: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(service.stub, method)(request)
        assert caught.value.details()
        return caught.value.code()

    for method, request in _requests("default", new_id()).items():
        assert await code(method, request) == grpc.StatusCode.NOT_FOUND, method
    for method, request in _requests("other", service.session_id).items():
        assert await code(method, request) == grpc.StatusCode.NOT_FOUND, method
    for method, request in _requests("default", "../etc").items():
        assert await code(method, request) == grpc.StatusCode.INVALID_ARGUMENT, method
    for method, request in _requests("NOT A TENANT", service.session_id).items():
        assert await code(method, request) == grpc.StatusCode.INVALID_ARGUMENT, method
    assert await code("ListSessions", pb.AnalyzerServiceListSessionsRequest()) == grpc.StatusCode.INVALID_ARGUMENT
    place: dict[str, Any] = {"tenant": "default", "session_id": service.session_id}
    history = pb.AnalyzerServiceGetHistoryRequest(**place, resolution_s=5)
    assert await code("GetHistory", history) == grpc.StatusCode.INVALID_ARGUMENT
    for request_id, expected in (
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("x" * 200, grpc.StatusCode.INVALID_ARGUMENT),
        ("none", grpc.StatusCode.NOT_FOUND),
    ):
        routes = pb.AnalyzerServiceGetRequestRoutesRequest(**place, request_id=request_id)
        assert await code("GetRequestRoutes", routes) == expected


async def test_health_is_not_serving_until_the_replica_is_ready(service: Service) -> None:
    health: Any = health_pb2_grpc.HealthStub(service.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
