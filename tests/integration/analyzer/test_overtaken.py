"""A partition that is slower than its sources notices what the stream discards in front of it, while it runs."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from routing_ledger import LedgerSource, connect
from servers import NatsServer, ValkeyServer, aeventually

from moe_analyzer.aggregate import Limits, SessionPart, SessionWrites
from moe_analyzer.lifecycle import SessionDirectory
from moe_analyzer.lost import num_lost
from moe_analyzer.ownership import Lease, Ownership
from moe_analyzer.partition import PartitionContext, PartitionWorker
from moe_analyzer.store import Applied, Store, connect_redis
from moe_debugger.catalogue import Catalogue, upgrade
from moe_debugger.wire.subjects import EVENT_STREAM

_STREAM_BYTES = 8 << 20
_MESSAGE = b"x" * 250_000


class HeldStore(Store):
    """A store whose writes wait."""

    def __init__(self, client: object) -> None:
        super().__init__(client)
        self.may_write = asyncio.Event()
        self.is_waiting = False

    async def flush(
        self, lease: Lease, before: Applied, after: Applied, writes: Mapping[tuple[str, str], SessionWrites]
    ) -> None:
        self.is_waiting = True
        await self.may_write.wait()
        self.is_waiting = False
        await super().flush(lease, before, after, writes)


async def test_what_the_stream_discards_in_front_of_a_slow_partition_is_noted(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"
    await upgrade(url)
    catalogue = Catalogue(url)
    with NatsServer() as nats, ValkeyServer() as valkey:
        redis, client = connect_redis(valkey.url), await connect(nats.url)
        store = HeldStore(redis)
        opened = await catalogue.open_session("default", "slow", model_name="m", model_type="mixtral")
        context = PartitionContext(
            client,
            store,
            SessionDirectory(catalogue, close_after_s=600),
            num_partitions=1,
            stream_max_bytes=_STREAM_BYTES,
            flush_interval_s=0.05,
            limits=Limits(),
        )
        await context.ensure_stream()
        lease = await Ownership(redis, "slow", 60).acquire(0)
        assert lease is not None
        worker = PartitionWorker(context, lease)
        task = asyncio.create_task(worker.run())
        source = LedgerSource(opened.session_id)
        js = client.jetstream()
        await js.publish(source.subject, _MESSAGE)
        await aeventually(lambda: store.is_waiting)
        for _ in range(99):
            await js.publish(source.subject, _MESSAGE)
        state = (await js.stream_info(EVENT_STREAM)).state
        assert state.first_seq > 50
        store.may_write.set()

        async def has_taken_all() -> bool:
            return (await store.load_applied(0)).sequence == 100

        await aeventually(has_taken_all)
        # The last look comes with the flush after the last message, or with the next one.
        await js.publish(source.subject, b"the last one")

        async def found() -> int:
            applied = await store.load_applied(0)
            return num_lost(applied.lost, opened_ns=0) if applied.sequence == 101 else 0

        upper_bound = await aeventually(found)
        part = SessionPart(opened.session_id, Limits())
        part.load(*await store.load_session(0, "default", opened.session_id))
        truth = 101 - part.head.num_dead_lettered
        assert 0 < truth <= int(str(upper_bound)) < state.first_seq
        worker.stop()
        await task
        await client.close()
        await redis.aclose()
    await catalogue.close()
