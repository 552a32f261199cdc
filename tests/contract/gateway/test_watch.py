"""Watch over a real NATS: exact under duplicates, reordering and loss; paced, conflated, resumed, through outages."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import nats
import numpy as np
import pytest
from contract.gateway.callers import Caller, CallError
from contract.gateway.conftest import Bench
from contract.gateway.doubles import NUM_EXPERTS, NUM_LAYERS, AnalyzerDouble, serving
from nats.aio.client import Client
from pydantic import SecretStr
from servers import NatsServer, ValkeyServer, aeventually

from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.wire.ids import new_id
from moe_debugger.wire.subjects import live_subject

Connect = Callable[[str], Caller]


class Viewer:
    """Reads a Watch stream as a page does, and keeps what a page would show."""

    def __init__(self, caller: Caller, request: pb.WatchRequest) -> None:
        self.counts: np.ndarray[Any, Any] | None = None
        self.sequence = 0
        self.num_frames = 0
        self.num_snapshots = 0
        self.num_conflated = 0
        self.sequences: list[int] = []
        self.components: dict[str, pb.ComponentHealth] = {}
        self.sessions: list[str] = []
        self.first: pb.WatchResponse | None = None
        self.error: CallError | AssertionError | None = None
        self._task = asyncio.create_task(self._run(caller.stream("Watch", request)))

    async def _run(self, stream: Any) -> None:
        try:
            async with contextlib.aclosing(stream) as events:
                async for event in events:
                    self._read(event)
        except (CallError, AssertionError) as error:
            self.error = error

    def _read(self, event: pb.WatchResponse) -> None:
        self.first = self.first or event
        match event.WhichOneof("event"):
            case "snapshot":
                snapshot = event.snapshot.snapshot
                self.num_snapshots += 1
                self.sequence = snapshot.sequence
                if all(layer.expert_counts for layer in snapshot.layers):
                    rows = [np.frombuffer(layer.expert_counts, "<u8") for layer in snapshot.layers]
                    self.counts = np.array(rows)
            case "frame":
                self.num_frames += 1
                self.num_conflated += event.frame.num_conflated
                self.sequence = event.frame.sequence
                self.counts = np.frombuffer(event.frame.expert_counts, "<u8").reshape(NUM_LAYERS, NUM_EXPERTS)
            case "components":
                self.components = {component.name: component for component in event.components.components}
            case "sessions":
                self.sessions = [session.session_id for session in event.sessions.sessions]
        self.sequences.append(self.sequence)

    def shows(self, analyzer: AnalyzerDouble, session_id: str) -> bool:
        return (
            self.counts is not None
            and np.array_equal(self.counts, analyzer.counts[session_id])
            and self.sequence == sum(analyzer.flushes[session_id].values())
        )

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@pytest.fixture
async def watch(bench: Bench, connect: Connect) -> AsyncIterator[Callable[..., Viewer]]:
    viewers: list[Viewer] = []

    def start(transport: str = "web-binary", **fields: Any) -> Viewer:
        request = pb.WatchRequest(**{"session_id": bench.session_id, "max_hz": 30, **fields})
        viewers.append(Viewer(connect(transport), request))
        return viewers[-1]

    yield start
    await asyncio.gather(*(viewer.close() for viewer in viewers))


@pytest.fixture
async def publisher(nats_server: NatsServer) -> AsyncIterator[Client]:
    client = await nats.connect(nats_server.url)
    yield client
    await client.close()


def _random_counts(rng: "np.random.Generator") -> "np.ndarray[Any, Any]":
    return rng.integers(0, 100, (NUM_LAYERS, NUM_EXPERTS)).astype("<u4")


@pytest.mark.parametrize("transport", ["native", "web-text", "connectrpc"])
async def test_counts_are_exact_although_deltas_are_lost_repeated_and_reordered(
    bench: Bench, watch: Callable[..., Viewer], publisher: Client, transport: str
) -> None:
    viewer = watch(transport)
    await aeventually(lambda: viewer.counts is not None and bench.gateway.link.is_up)
    rng = np.random.default_rng(7)
    subject = live_subject("default", bench.session_id)
    held: list[bytes] = []
    for number in range(300):
        data = bench.analyzer.flush(bench.session_id, int(rng.integers(0, 3)), _random_counts(rng))
        fate = rng.random()
        if fate < 0.02:
            continue
        if fate < 0.05:
            held.append(data)
            continue
        await publisher.publish(subject, data)
        if fate < 0.10:
            await publisher.publish(subject, data)
        if held and fate > 0.9:
            await publisher.publish(subject, held.pop())
        if number % 30 == 0:
            await publisher.flush()
    await publisher.flush()
    await aeventually(lambda: viewer.shows(bench.analyzer, bench.session_id))
    assert viewer.sequences == sorted(viewer.sequences)


async def test_clean_deltas_come_as_frames_and_conflated_ones_are_counted(
    bench: Bench, watch: Callable[..., Viewer], publisher: Client
) -> None:
    fast, slow = watch(max_hz=30), watch(max_hz=1)
    await aeventually(lambda: fast.counts is not None and slow.counts is not None and bench.gateway.link.is_up)
    assert bench.gateway.watches.num_hubs == 1
    rng = np.random.default_rng(1)
    began = time.monotonic()
    for _ in range(60):
        data = bench.analyzer.flush(bench.session_id, 0, _random_counts(rng))
        await publisher.publish(live_subject("default", bench.session_id), data)
        await publisher.flush()
        # Data arrives over time here, as it does from an analyzer.
        await asyncio.sleep(0.02)
    await aeventually(lambda: all(v.shows(bench.analyzer, bench.session_id) for v in (fast, slow)))
    duration_s = time.monotonic() - began
    assert fast.num_frames > slow.num_frames
    assert fast.num_frames <= 30 * duration_s + 2
    assert slow.num_frames <= duration_s + 2
    assert fast.num_conflated > 0
    # One hub asks for snapshots, however many watch: at most 2 a second.
    assert bench.analyzer.num_snapshots <= 2 * duration_s + 4


async def test_changed_overview_brings_a_snapshot(
    bench: Bench, watch: Callable[..., Viewer], publisher: Client
) -> None:
    viewer = watch()
    await aeventually(lambda: viewer.counts is not None and bench.gateway.link.is_up)
    before = viewer.num_snapshots
    zero = np.zeros((NUM_LAYERS, NUM_EXPERTS), "<u4")
    data = bench.analyzer.flush(bench.session_id, 1, zero, overview_changed=True)
    began = time.monotonic()
    await publisher.publish(live_subject("default", bench.session_id), data)
    await aeventually(lambda: viewer.num_snapshots > before)
    assert time.monotonic() - began < 1.5


async def test_resume_at_the_same_sequence_sends_no_counts_again(
    bench: Bench, watch: Callable[..., Viewer], publisher: Client
) -> None:
    rng = np.random.default_rng(2)
    bench.analyzer.flush(bench.session_id, 0, _random_counts(rng))
    viewer = watch(resume_after_sequence=1)
    await aeventually(lambda: viewer.num_snapshots >= 1)
    assert viewer.first is not None
    assert viewer.first.snapshot.snapshot.sequence == 1
    assert all(layer.expert_counts == b"" for layer in viewer.first.snapshot.snapshot.layers)
    other = watch(resume_after_sequence=99)
    await aeventually(lambda: other.shows(bench.analyzer, bench.session_id))


async def test_new_sessions_are_pushed(bench: Bench, watch: Callable[..., Viewer]) -> None:
    viewer = watch(session_id="")
    await aeventually(lambda: viewer.sessions == [bench.session_id])
    added = new_id()
    bench.analyzer.add_session(added, "second")
    await aeventually(lambda: viewer.sessions == [bench.session_id, added])
    assert viewer.num_snapshots == viewer.num_frames == 0


async def test_stalled_reader_costs_nothing_and_gets_the_newest_state(
    bench: Bench, publisher: Client, connect: Connect
) -> None:
    stream = connect("native").stream("Watch", pb.WatchRequest(session_id=bench.session_id, max_hz=30))
    assert (await anext(stream)).HasField("snapshot")
    await aeventually(lambda: bench.gateway.link.is_up)
    rng = np.random.default_rng(3)
    for _ in range(500):
        data = bench.analyzer.flush(bench.session_id, 0, _random_counts(rng))
        await publisher.publish(live_subject("default", bench.session_id), data)
    await publisher.flush()
    viewer_counts: list[Any] = []
    async with contextlib.aclosing(stream) as events, asyncio.timeout(20):
        async for event in events:
            if event.HasField("frame"):
                viewer_counts.append(np.frombuffer(event.frame.expert_counts, "<u8").reshape(NUM_LAYERS, NUM_EXPERTS))
            elif event.HasField("snapshot"):
                layers = event.snapshot.snapshot.layers
                viewer_counts.append(np.array([np.frombuffer(layer.expert_counts, "<u8") for layer in layers]))
            if viewer_counts and np.array_equal(viewer_counts[-1], bench.analyzer.counts[bench.session_id]):
                break
    assert len(viewer_counts) < 100


async def test_too_many_watches_are_refused(bench: Bench, connect: Connect) -> None:
    bench.gateway.watches._max_watches = 1
    first = connect("web-binary").stream("Watch", pb.WatchRequest())
    await anext(first)
    with pytest.raises(CallError) as caught:
        async for _ in connect("web-binary").stream("Watch", pb.WatchRequest()):
            pass
    assert (caught.value.code, caught.value.reasons) == (8, ["BUSY"])
    await first.aclose()
    await aeventually(lambda: bench.gateway.watches.num_watches == 0, 5)


class TestOutages:
    """One part at a time goes away while somebody watches."""

    @pytest.fixture
    def nats_server(self) -> Any:
        # Not the shared one: this one is killed.
        with NatsServer() as server:
            yield server

    async def test_nats_is_killed_and_comes_back(
        self, bench: Bench, watch: Callable[..., Viewer], nats_server: NatsServer
    ) -> None:
        viewer = watch()
        ready, down = pb.COMPONENT_STATE_READY, pb.COMPONENT_STATE_DOWN
        await aeventually(lambda: viewer.components["nats"].state == ready and viewer.counts is not None)
        nats_server.kill()
        await aeventually(lambda: viewer.components["nats"].state == down)
        assert "polled once a second" in viewer.components["nats"].detail
        # Counted while no delta can be published: the poll brings it.
        rng = np.random.default_rng(4)
        bench.analyzer.flush(bench.session_id, 0, _random_counts(rng))
        await aeventually(lambda: viewer.shows(bench.analyzer, bench.session_id))
        await asyncio.to_thread(nats_server.start)
        await aeventually(lambda: viewer.components["nats"].state == ready)
        publisher = await nats.connect(nats_server.url)
        num_frames = viewer.num_frames
        data = bench.analyzer.flush(bench.session_id, 0, _random_counts(rng))
        await publisher.publish(live_subject("default", bench.session_id), data)
        await publisher.flush()
        await aeventually(lambda: viewer.shows(bench.analyzer, bench.session_id))
        assert viewer.num_frames > num_frames
        assert viewer.error is None
        await publisher.close()

    @pytest.fixture
    def valkey_server(self) -> Any:
        with ValkeyServer() as server:
            yield server

    @pytest.fixture
    def overrides(self, valkey_server: ValkeyServer) -> dict[str, Any]:
        return {"redis_url": SecretStr(valkey_server.url)}

    async def test_redis_is_killed_and_comes_back(
        self, bench: Bench, watch: Callable[..., Viewer], valkey_server: ValkeyServer
    ) -> None:
        viewer = watch(session_id="")
        await aeventually(lambda: viewer.components["redis"].state == pb.COMPONENT_STATE_READY)
        valkey_server.kill()
        await aeventually(lambda: viewer.components["redis"].state == pb.COMPONENT_STATE_DOWN)
        assert "until it is back" in viewer.components["redis"].detail
        assert valkey_server.password not in viewer.components["redis"].detail
        await asyncio.to_thread(valkey_server.start)
        await aeventually(lambda: viewer.components["redis"].state == pb.COMPONENT_STATE_READY)
        assert viewer.error is None

    async def test_stream_starts_before_the_analyzer_and_survives_its_restart(
        self, bench: Bench, connect: Connect, watch: Callable[..., Viewer], nats_server: NatsServer
    ) -> None:
        await bench.stop_analyzer()
        with pytest.raises(CallError) as caught:
            await connect("web-binary").unary("GetSession", pb.GetSessionRequest(session_id=bench.session_id))
        assert (caught.value.code, caught.value.reasons) == (14, ["FLEET_PART_DOWN"])
        assert f"127.0.0.1:{bench.analyzer_port}" in caught.value.message

        viewer = watch()
        await aeventually(lambda: "analyzer" in viewer.components)
        assert viewer.counts is None
        rng = np.random.default_rng(5)
        for _ in range(2):
            async with serving(bench.analyzer, bench.analyzer_port):
                bench.analyzer.flush(bench.session_id, 0, _random_counts(rng))
                await aeventually(lambda: viewer.shows(bench.analyzer, bench.session_id))
                await aeventually(lambda: viewer.components["analyzer"].state == pb.COMPONENT_STATE_READY)
            await aeventually(lambda: viewer.components["analyzer"].state == pb.COMPONENT_STATE_DOWN)
        assert viewer.error is None
