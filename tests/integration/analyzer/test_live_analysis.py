"""A training's loads over steps reach the live findings: early warning, its status, explanations; on a real Valkey."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routing_ledger import LedgerSource
from servers import ValkeyServer

from moe_analyzer.aggregate import Limits, SessionPart
from moe_analyzer.ownership import Ownership
from moe_analyzer.queries import Queries
from moe_analyzer.store import Applied, Store, connect_redis
from moe_debugger.catalogue import Catalogue, upgrade
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns, encode_counts
from moe_debugger.wire.ids import new_id

SECOND = 1_000_000_000
EXPERTS, TOKENS = 8, 2000
EXPERT_RANKS = [0, 0, 0, 0, 1, 1, 1, 1]


class Training:
    """A session of two layers that sends sums step by step; layer 1 can lose experts."""

    def __init__(self, store: Store, queries: Queries, session_id: str, lease: Any) -> None:
        self._store, self._queries, self._lease = store, queries, lease
        self._session_id = session_id
        self._part = SessionPart(session_id, Limits())
        self._source = LedgerSource(session_id, layers=2, experts=EXPERTS)
        self._random = np.random.default_rng(5)
        self._applied = Applied()
        self.step, self.second = 0, 1000

    def _sums(self, num_idle: float) -> tuple[str, bytes, str]:
        self.step += 1
        layers = []
        for layer in range(2):
            share = np.ones(EXPERTS)
            if layer == 1 and num_idle:
                share = np.clip(EXPERTS - num_idle - np.arange(EXPERTS), 0.0, 1.0) + 1e-3
            share *= np.exp(self._random.normal(0, 0.05, EXPERTS))
            load = self._random.multinomial(2 * TOKENS, share / share.sum()).astype(np.uint64)
            layers.append(LayerCountColumns(layer, EXPERTS, 0, TOKENS, 0, load))
        counts = encode_counts(CountsColumns(self.step, self.step, routing.PHASE_TRAIN, TOKENS, layers))
        return self._source.message(counts=counts)

    async def run(self, num_steps: int, num_idle_per_step: float = 0.0) -> pb.SessionSnapshot:
        """Ten steps a second; after `num_idle_per_step` steps one more expert of layer 1 gets nothing."""
        messages = [self._source.manifest(EXPERT_RANKS)] if self.step == 0 else []
        snapshot = pb.SessionSnapshot()
        for step in range(num_steps):
            messages.append(self._sums(num_idle_per_step * (step + 1)))
            if self.step % 10:
                continue
            self.second += 1
            for _, payload, _ in messages:
                self._part.apply(routing.SourceMessage.FromString(payload), self.second * SECOND)
            messages = []
            after = Applied(self._applied.sequence + 1, self.second * SECOND, "stream")
            writes = {("default", self._session_id): self._part.take_writes()}
            await self._store.flush(self._lease, self._applied, after, writes)
            self._applied = after
            snapshot, _ = await self._queries.snapshot("default", self._session_id)
        return snapshot


@pytest.fixture
async def training(valkey: ValkeyServer, tmp_path: Path) -> AsyncIterator[Training]:
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    await upgrade(url)
    catalogue, redis = Catalogue(url), connect_redis(valkey.url)
    await redis.flushall()
    session_id = (await catalogue.open_session("default", new_id())).session_id
    lease = await Ownership(redis, "test", 60).acquire(0)
    store = Store(redis)
    queries = Queries(store, catalogue, num_partitions=1, recent_window_s=5, stale_after_s=15)
    yield Training(store, queries, session_id, lease)
    await redis.aclose()
    await catalogue.close()


def _status(snapshot: pb.SessionSnapshot) -> dict[int, int]:
    return {layer.layer_index: layer.status for layer in snapshot.early_warning}


async def test_learning_then_watching_then_warned_with_the_stated_rate(training: Training) -> None:
    learning = await training.run(60)
    assert _status(learning) == {0: pb.EARLY_WARNING_STATUS_LEARNING, 1: pb.EARLY_WARNING_STATUS_LEARNING}
    assert [one.num_points for one in learning.early_warning] == [60, 60]
    assert not learning.early_warning[0].HasField("baseline")
    assert learning.false_alarms_per_1000_windows > 0
    assert learning.false_alarm_note
    watching = await training.run(200)
    assert _status(watching) == {0: pb.EARLY_WARNING_STATUS_WATCHING, 1: pb.EARLY_WARNING_STATUS_WATCHING}
    assert watching.early_warning[1].baseline == pytest.approx(EXPERTS, rel=0.02)
    assert watching.early_warning_run_length > 0
    assert not [one for one in watching.findings if one.severity > pb.SEVERITY_INFO]
    warned = await training.run(40, num_idle_per_step=0.1)
    assert _status(warned) == {0: pb.EARLY_WARNING_STATUS_WATCHING, 1: pb.EARLY_WARNING_STATUS_WARNED}
    # The recent window has 50 steps of 300: without the loads before it nobody could have known.
    (warning,) = [one for one in warned.findings if one.kind == pb.FINDING_KIND_COLLAPSE_WARNING]
    assert (warning.layer_index, warning.state) == (1, pb.FINDING_STATE_OPEN)
    assert 240 < warning.since_step < 290
    assert warning.HasField("explanation")


async def test_the_same_data_are_analysed_once(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await training.run(20)
    calls = []
    read = training._store.read_state

    async def counted(*args: Any) -> dict[str, bytes]:
        calls.append(args)
        return await read(*args)

    monkeypatch.setattr(training._store, "read_state", counted)
    again, _ = await training._queries.snapshot("default", training._session_id)
    assert again.layers == first.layers
    assert [layer.num_rank_steps for layer in again.layers] == [20, 20]
    assert all("steps:index" not in fields for *_, fields in calls)


async def test_a_session_whose_history_is_damaged_is_shown_without_it(training: Training) -> None:
    await training.run(30)
    redis = training._store._redis
    (key,) = [key for key in await redis.keys("*:state") if await redis.hexists(key, "steps:index")]
    await redis.hdel(key, "steps:samples")
    training._queries._analyses._known.clear()
    snapshot, _ = await training._queries.snapshot("default", training._session_id)
    assert [layer.num_tokens for layer in snapshot.layers] == [30 * TOKENS] * 2
    assert not snapshot.early_warning
    assert snapshot.false_alarms_per_1000_windows > 0
