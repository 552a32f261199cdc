"""Messages that the stream discarded before they were counted are shown, as an upper bound, and outlive restarts."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from analyzer_process import Analyzer
from routing_ledger import LedgerSource, connect, open_session, publish
from servers import NatsServer, ValkeyServer, aeventually

from moe_analyzer.store import connect_redis
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.subjects import EVENT_STREAM, redis_prefix


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[NatsServer, ValkeyServer, Analyzer]]:
    with NatsServer() as nats, ValkeyServer() as valkey:
        analyzer = Analyzer(nats, valkey, tmp_path).start()
        yield nats, valkey, analyzer
        analyzer.close()


@pytest.fixture
async def client(servers: tuple[NatsServer, ValkeyServer, Analyzer]) -> AsyncIterator[Any]:
    client = await connect(servers[0].url)
    yield client
    await client.close()


def account(analyzer: Analyzer, session_id: str) -> session_pb2.Account:
    request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)
    return analyzer.stub.GetSnapshot(request, timeout=5).snapshot.account


async def send(js: Any, source: LedgerSource, number: int) -> int:
    """Publish batches and return the decisions in them."""
    before = source.num_decisions
    for _ in range(number):
        await publish(js, source.batch())
    return source.num_decisions - before


async def trim(js: Any) -> None:
    """Discard all messages but the newest, as the stream's byte budget does, at a known place."""
    last = (await js.stream_info(EVENT_STREAM)).state.last_seq
    await js.purge_stream(EVENT_STREAM, seq=last)


async def test_messages_discarded_while_no_analyzer_ran_are_shown_and_stay(
    servers: tuple[NatsServer, ValkeyServer, Analyzer], client: Any
) -> None:
    _, _, analyzer = servers
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "gap"))
    await publish(js, source.manifest())
    await send(js, source, 4)
    await aeventually(lambda: account(analyzer, source.session_id).num_counted == source.num_decisions)
    assert account(analyzer, source.session_id).num_lost_stream_messages == 0
    analyzer.kill()
    lost = await send(js, source, 6)
    await send(js, source, 1)
    await trim(js)
    analyzer.start()
    await aeventually(lambda: account(analyzer, source.session_id).num_counted == source.num_decisions - lost)
    # The source's own sequences give the exact number. Partitions that had no message and no heartbeat yet cannot know
    # that the 5 messages before the loss were none of theirs, so the bound may hold these, once.
    found = await aeventually(lambda: account(analyzer, source.session_id))
    assert isinstance(found, session_pb2.Account)
    assert found.num_missing_messages == 6
    assert 6 <= found.num_lost_stream_messages <= 11
    analyzer.kill()
    analyzer.start()
    assert account(analyzer, source.session_id).num_lost_stream_messages == found.num_lost_stream_messages
    # A session that began afterwards lost nothing.
    later = LedgerSource(await open_session(client, "later"))
    await publish(js, later.manifest())
    await send(js, later, 1)
    await aeventually(lambda: account(analyzer, later.session_id).num_counted == later.num_decisions)
    assert account(analyzer, later.session_id).num_lost_stream_messages == 0


async def test_a_rebuild_from_a_trimmed_stream_says_what_may_be_gone(
    servers: tuple[NatsServer, ValkeyServer, Analyzer], client: Any
) -> None:
    _, valkey, analyzer = servers
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "rebuild"))
    await publish(js, source.manifest())
    gone = await send(js, source, 9)
    await aeventually(lambda: account(analyzer, source.session_id).num_counted == gone)
    kept = await send(js, source, 1)
    await aeventually(lambda: account(analyzer, source.session_id).num_counted == gone + kept)
    await trim(js)
    valkey.kill()
    valkey.start()
    await aeventually(lambda: account(analyzer, source.session_id).num_counted == kept, 40)
    found = account(analyzer, source.session_id)
    assert (found.num_lost_stream_messages, found.num_missing_messages) == (10, 10)


async def test_a_partition_without_messages_does_not_lose_those_of_others(
    servers: tuple[NatsServer, ValkeyServer, Analyzer], client: Any
) -> None:
    _, valkey, analyzer = servers
    js = client.jetstream()
    source = LedgerSource(await open_session(client, "quiet"))
    await publish(js, source.manifest())
    await send(js, source, 5)
    redis = connect_redis(valkey.url)

    async def all_have_checked() -> bool:
        values = [await redis.hmget(redis_prefix(one) + "meta", "applied", "checked") for one in range(4)]
        return all(max(int(applied or 0), int(checked or 0)) >= 6 for applied, checked in values)

    # The broker's heartbeats say so, every five seconds.
    await aeventually(all_have_checked, 40)
    await redis.aclose()
    await js.purge_stream(EVENT_STREAM)
    analyzer.kill()
    analyzer.start()
    await send(js, source, 1)
    await aeventually(lambda: account(analyzer, source.session_id).num_counted == source.num_decisions)
    found = account(analyzer, source.session_id)
    assert (found.num_lost_stream_messages, found.num_missing_messages) == (0, 0)
