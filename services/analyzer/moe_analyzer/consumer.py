"""The consuming side of a replica: keeps one worker for each partition that this replica owns."""

import asyncio
import time

import structlog
from redis.exceptions import RedisError

from moe_analyzer.ownership import Ownership
from moe_analyzer.partition import PartitionContext, PartitionWorker
from moe_analyzer.stream import LayoutMismatchError

__all__ = ["Consumer"]

_log = structlog.get_logger()

# Fractions of a lease: how often it is renewed, and how long a worker may take to write its last flush.
_TICKS_PER_LEASE = 4
_STOP_DEADLINE_S = 3.0


class Consumer:
    """Takes and gives back partitions as replicas come and go."""

    def __init__(self, context: PartitionContext, ownership: Ownership, lease_s: float) -> None:
        self._context = context
        self._ownership = ownership
        self._tick_s = lease_s / _TICKS_PER_LEASE
        self._workers: dict[int, tuple[PartitionWorker, asyncio.Task[None]]] = {}
        self.first_pass_done = asyncio.Event()

    @property
    def owned(self) -> list[int]:
        """Partitions that this replica consumes now."""
        return sorted(self._workers)

    def connection_lost(self) -> None:
        """Let all workers begin again at their applied offsets."""
        for worker, _ in self._workers.values():
            worker.connection_lost()

    async def run(self) -> None:
        """Hold leases until cancelled.

        Raises:
            LayoutMismatchError: a worker met a stream that is not made for this program.
        """
        while True:
            began = time.monotonic()
            try:
                await self.tick()
                self.first_pass_done.set()
            except (RedisError, OSError, TimeoutError) as error:
                _log.warning("redis_unavailable", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(max(0.05, self._tick_s - (time.monotonic() - began)))

    async def tick(self) -> None:
        """One pass: members, then give back, renew and take."""
        self._reap()
        await self._ownership.beat()
        wanted = {one for one in range(self._context.num_partitions) if self._ownership.owns(f"p{one}")}
        await asyncio.gather(*(self._give_back(one) for one in self.owned if one not in wanted))
        await asyncio.gather(*(self._renew(one) for one in self.owned))
        await asyncio.gather(*(self._take(one) for one in wanted if one not in self._workers))

    def _reap(self) -> None:
        for partition, (_, task) in list(self._workers.items()):
            if not task.done():
                continue
            del self._workers[partition]
            error = None if task.cancelled() else task.exception()
            if isinstance(error, LayoutMismatchError):
                raise error
            if error is not None:
                _log.error("partition_failed", partition=partition, exc_info=error)

    async def _take(self, partition: int) -> None:
        lease = await self._ownership.acquire(partition)
        if lease is None:
            return
        worker = PartitionWorker(self._context, lease)
        self._workers[partition] = worker, asyncio.create_task(worker.run(), name=f"partition-{partition}")

    async def _renew(self, partition: int) -> None:
        worker, task = self._workers[partition]
        if await self._ownership.renew(worker.lease):
            return
        _log.warning("lease_lost", partition=partition)
        task.cancel()
        await asyncio.wait([task])
        del self._workers[partition]

    async def _give_back(self, partition: int) -> None:
        worker, task = self._workers.pop(partition)
        worker.stop()
        _, pending = await asyncio.wait([task], timeout=_STOP_DEADLINE_S)
        if pending:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            _log.warning("partition_stop_failed", partition=partition, error=str(task.exception()))
        await self._ownership.release(worker.lease)

    async def stop(self) -> None:
        """Write what is pending and give everything back."""
        try:
            await asyncio.gather(*(self._give_back(one) for one in self.owned))
            await self._ownership.leave()
        except (RedisError, OSError, TimeoutError) as error:
            _log.warning("leases_not_released", error=str(error))
