"""The fenced flush and the leases on a real Valkey: zombies write nothing, repeats write once."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from routing_ledger import LedgerSource
from servers import ValkeyServer, aeventually

from moe_analyzer.aggregate import Limits, SessionPart, SessionWrites
from moe_analyzer.ownership import Lease, Ownership
from moe_analyzer.store import Applied, FencedError, Store, connect_redis
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.ids import new_id


@pytest.fixture
async def redis(valkey: ValkeyServer) -> AsyncIterator[Any]:
    client = connect_redis(valkey.url)
    await client.flushall()
    yield client
    await client.aclose()


def writes(source: LedgerSource, part: SessionPart) -> dict[tuple[str, str], SessionWrites]:
    for subject, payload, _ in (source.manifest(), source.batch()) if source.sequence == 0 else (source.batch(),):
        assert subject
        part.apply(pb.SourceMessage.FromString(payload), 1_000_000_000)
    return {("default", source.session_id): part.take_writes()}


async def lease_of(redis: Any, replica: str, lease_s: float = 30.0) -> Lease:
    lease = await Ownership(redis, replica, lease_s).acquire(3)
    assert lease is not None
    return lease


async def test_flush_writes_state_and_offset_together_and_a_repeat_writes_once(redis: Any) -> None:
    store, source = Store(redis), LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    lease, first = await lease_of(redis, "a"), writes(source, part)
    before, after = Applied(), Applied(7, 70, "stream@1")
    await store.flush(lease, before, after, first)
    await store.flush(lease, before, after, first)  # its answer was lost
    assert await store.load_applied(3) == after
    loaded = SessionPart(source.session_id, Limits())
    loaded.load(*await store.load_session(3, "default", source.session_id))
    assert loaded.totals == part.totals
    await store.flush(lease, after, Applied(9, 90, "stream@1"), writes(source, part))
    with pytest.raises(FencedError, match="offset"):
        await store.flush(lease, before, after, first)


async def test_flush_of_a_replica_that_lost_its_lease_writes_nothing(redis: Any) -> None:
    store, source = Store(redis), LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    old = await lease_of(redis, "a")
    await store.flush(old, Applied(), Applied(1, 10, "s"), writes(source, part))
    await Ownership(redis, "a", 30).release(old)
    new = await lease_of(redis, "b")
    assert int(new.epoch) > int(old.epoch)
    keys = {key: await redis.dump(key) for key in await redis.keys("*")}
    with pytest.raises(FencedError, match="lease"):
        await store.flush(old, Applied(1, 10, "s"), Applied(2, 20, "s"), writes(source, part))
    assert {key: await redis.dump(key) for key in await redis.keys("*")} == keys


async def test_flush_after_redis_was_emptied_is_refused(redis: Any) -> None:
    store, source = Store(redis), LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    lease = await lease_of(redis, "a")
    await store.flush(lease, Applied(), Applied(1, 10, "s"), writes(source, part))
    await redis.flushall()
    with pytest.raises(FencedError):
        await store.flush(lease, Applied(1, 10, "s"), Applied(2, 20, "s"), writes(source, part))
    again = await lease_of(redis, "a")
    assert int(again.epoch) > int(lease.epoch)
    with pytest.raises(FencedError, match="offset"):
        await store.flush(again, Applied(1, 10, "s"), Applied(2, 20, "s"), writes(source, part))
    assert (await store.load_applied(3)).is_empty


async def test_leases_have_one_owner_until_they_end(redis: Any) -> None:
    a, b = Ownership(redis, "a", 0.5), Ownership(redis, "b", 0.5)
    await a.beat()
    assert await b.beat() == ["a", "b"]
    lease = await a.acquire(1)
    assert lease is not None
    assert await b.acquire(1) is None
    assert await a.renew(lease)
    taken = await aeventually(lambda: b.acquire(1))  # a is silent
    assert isinstance(taken, Lease)
    assert not await a.renew(lease)
    await a.release(lease)
    assert await b.renew(taken)
    assert await b.beat() == ["b"]
    await b.leave()
    assert await redis.zcard("moe:1:members") == 0
