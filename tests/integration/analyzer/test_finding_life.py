"""Findings on a real Valkey and a SQLite file: the same from every replica, after restarts and an emptied Redis."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from routing_ledger import LedgerSource
from servers import ValkeyServer

from moe_analyzer.aggregate import Limits, SessionPart
from moe_analyzer.errors import NotFoundError
from moe_analyzer.findings import QUIET_SECONDS_TO_CLOSE
from moe_analyzer.ownership import Ownership
from moe_analyzer.queries import Queries
from moe_analyzer.store import Applied, Store, connect_redis
from moe_debugger.catalogue import Catalogue, upgrade
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb

SECOND = 1_000_000_000
RULE = "capture_unhealthy"


class Replica:
    """What one analyzer has to answer with, on connections of its own."""

    def __init__(self, valkey: ValkeyServer, url: str, session_id: str) -> None:
        self.redis = connect_redis(valkey.url)
        self.store, self.catalogue = Store(self.redis), Catalogue(url)
        self.queries = Queries(self.store, self.catalogue, num_partitions=1, recent_window_s=2, stale_after_s=15)
        self.session_id = session_id

    async def finding(self) -> pb.Finding:
        snapshot, _ = await self.queries.snapshot("default", self.session_id)
        (finding,) = [one for one in snapshot.findings if one.rule_id == RULE]
        return finding

    async def acknowledge(self, *, actor: str = "ada", undo: bool = False, rule_id: str = RULE) -> pb.Finding:
        return await self.queries.acknowledge_finding("default", self.session_id, rule_id, actor=actor, undo=undo)

    async def silence(self, duration_s: int, *, tenant: str = "default") -> pb.Finding:
        return await self.queries.silence_finding(tenant, self.session_id, RULE, actor="grace", duration_s=duration_s)

    async def close(self) -> None:
        await self.redis.aclose()
        await self.catalogue.close()


class Fleet:
    """One session, written second by second, and replicas that look at it."""

    def __init__(self, valkey: ValkeyServer, url: str, session_id: str, writer: Replica) -> None:
        self.valkey, self.url, self.session_id = valkey, url, session_id
        self.replicas = [writer]
        self.lease: Any = None
        self.second = 1000
        self._part = SessionPart(session_id, Limits())
        self._source = LedgerSource(session_id)
        self._applied = Applied()
        self._messages = [self._source.manifest()]

    def replica(self) -> Replica:
        self.replicas.append(Replica(self.valkey, self.url, self.session_id))
        return self.replicas[-1]

    async def write(self, problem: str = "") -> None:
        """One second of data, whose source reports a problem or none."""
        status = routing.SourceStatus(is_healthy=not problem, problems=[problem] if problem else [])
        messages = [*self._messages, self._source.batch(), self._source.message(status=status)]
        self._messages = []
        self.second += 1
        for _, payload, _ in messages:
            self._part.apply(routing.SourceMessage.FromString(payload), self.second * SECOND)
        after = Applied(self._applied.sequence + 1, self.second * SECOND, "stream")
        writes = {("default", self.session_id): self._part.take_writes()}
        await self.replicas[0].store.flush(self.lease, self._applied, after, writes)
        self._applied = after

    async def pass_by(self, replica: Replica, seconds: int, problem: str = "") -> pb.Finding:
        for _ in range(seconds - 1):
            await self.write(problem)
            await replica.finding()
        await self.write(problem)
        return await replica.finding()


@pytest.fixture
async def fleet(valkey: ValkeyServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    await upgrade(url)
    catalogue = Catalogue(url)
    session_id = (await catalogue.open_session("default", "run")).session_id
    await catalogue.close()
    fleet = Fleet(valkey, url, session_id, Replica(valkey, url, session_id))
    await fleet.replicas[0].redis.flushall()
    fleet.lease = await Ownership(fleet.replicas[0].redis, "test", 60).acquire(0)
    yield fleet
    for replica in fleet.replicas:
        await replica.close()


async def test_marks_are_the_same_from_any_replica_and_outlive_all_of_them_and_redis(fleet: Fleet) -> None:
    here, there = fleet.replica(), fleet.replica()
    opened = await fleet.pass_by(here, 3, "hooks are gone")
    assert (opened.state, opened.num_occurrences, opened.num_quiet_seconds_to_close) == (
        pb.FINDING_STATE_OPEN,
        3,
        QUIET_SECONDS_TO_CLOSE,
    )
    before = time.time_ns()
    acknowledged = await here.acknowledge()
    assert before <= acknowledged.acknowledged_at_unix_ns <= time.time_ns()
    silenced = await there.silence(3600)
    assert silenced.acknowledged_by == "ada"
    assert silenced.silenced_by == "grace"
    assert 3590 < (silenced.silenced_until_unix_ns - before) / SECOND < 3601
    assert await here.finding() == await there.finding() == silenced
    # Who came first stays.
    assert await there.acknowledge(actor="grace") == silenced
    await here.close()
    fresh = fleet.replica()
    assert await fresh.finding() == silenced
    await fresh.redis.flushall()
    rebuilt = await fleet.replica().finding()
    # Of the seconds since the finding opened nothing is left but that it is open.
    assert rebuilt.opened_at_unix_ns == silenced.opened_at_unix_ns == 1001 * SECOND
    assert (rebuilt.state, rebuilt.acknowledged_by, rebuilt.silenced_by) == (pb.FINDING_STATE_OPEN, "ada", "grace")
    assert rebuilt.acknowledged_at_unix_ns == silenced.acknowledged_at_unix_ns
    assert rebuilt.silenced_until_unix_ns == silenced.silenced_until_unix_ns
    lifted = await there.silence(0)
    assert (lifted.silenced_until_unix_ns, lifted.silenced_by, lifted.acknowledged_by) == (0, "", "ada")
    undone = await there.acknowledge(undo=True)
    assert (undone.acknowledged_at_unix_ns, undone.acknowledged_by) == (0, "")


async def test_closed_and_opened_again_the_acknowledgement_is_gone_and_the_silence_is_not(fleet: Fleet) -> None:
    replica = fleet.replica()
    await fleet.pass_by(replica, 1, "hooks are gone")
    await replica.acknowledge()
    await replica.silence(3600)
    quiet = await fleet.pass_by(replica, QUIET_SECONDS_TO_CLOSE - 1)
    assert (quiet.state, quiet.num_quiet_seconds) == (pb.FINDING_STATE_OPEN, QUIET_SECONDS_TO_CLOSE - 1)
    closed = await fleet.pass_by(fleet.replica(), 1)
    assert (closed.state, closed.closed_at_unix_ns) == (pb.FINDING_STATE_CLOSED, fleet.second * SECOND)
    assert closed.acknowledged_by == "ada"
    await replica.redis.flushall()
    assert (await replica.finding()).closed_at_unix_ns == closed.closed_at_unix_ns


async def test_an_episode_after_the_close_is_counted_and_not_acknowledged(fleet: Fleet) -> None:
    replica = fleet.replica()
    await fleet.pass_by(replica, 2, "hooks are gone")
    await replica.acknowledge()
    await replica.silence(3600)
    await fleet.pass_by(replica, QUIET_SECONDS_TO_CLOSE)
    again = await fleet.pass_by(replica, 1, "hooks are gone")
    assert (again.state, again.num_reopened, again.num_occurrences) == (pb.FINDING_STATE_OPEN, 1, 3)
    assert (again.acknowledged_at_unix_ns, again.silenced_by) == (0, "grace")
    assert again.first_seen_at_unix_ns == 1001 * SECOND
    assert (await replica.acknowledge(actor="linus")).acknowledged_by == "linus"
    await replica.redis.flushall()
    rebuilt = await replica.finding()
    assert (rebuilt.num_reopened, rebuilt.acknowledged_by) == (1, "linus")


async def test_replicas_that_look_at_once_count_each_second_once(fleet: Fleet) -> None:
    replicas = [fleet.replica() for _ in range(4)]
    for _ in range(6):
        await fleet.write("hooks are gone")
        await asyncio.gather(*(replica.finding() for replica in replicas for _ in range(3)))
    assert {(await replica.finding()).num_occurrences for replica in replicas} == {6}
    # One that had read before another wrote writes nothing: what it knows is older.
    stale = await replicas[0].store.read_findings("default", fleet.session_id)
    await fleet.pass_by(replicas[1], 1, "hooks are gone")
    assert not await replicas[0].store.replace_findings("default", fleet.session_id, stale, stale or b"")
    assert not await replicas[0].store.replace_findings("default", fleet.session_id, None, b"")
    assert (await replicas[0].finding()).num_occurrences == 7


async def test_what_cannot_be_marked_says_what_to_do(fleet: Fleet) -> None:
    replica = fleet.replica()
    with pytest.raises(NotFoundError, match="it has none"):
        await replica.acknowledge()
    await fleet.pass_by(replica, 1, "hooks are gone")
    with pytest.raises(NotFoundError, match=r"has no finding 'hot_expert\.l1'; it has capture_unhealthy;"):
        await replica.acknowledge(rule_id="hot_expert.l1")
    with pytest.raises(NotFoundError, match="does not exist"):
        await replica.silence(60, tenant="other")
    with pytest.raises(InvalidInputError, match="duration_s is 2592001; expected at most 2592000"):
        await replica.silence(30 * 24 * 3600 + 1)
    assert (await replica.silence(30 * 24 * 3600)).silenced_by == "grace"
    assert (await replica.finding()).acknowledged_at_unix_ns == 0
