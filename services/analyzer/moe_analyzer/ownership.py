"""Who consumes which partition: rendezvous hashing over the live replicas, and a lease with a fencing epoch for each.

The hash says who should own a partition, the lease who does. The epoch comes from Redis's clock, so that it rises even
where Redis was emptied, and every write names it (see `store`): a replica that lost its lease without noticing can
write nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from redis.asyncio import Redis

from moe_debugger.wire.subjects import LAYOUT_VERSION, redis_prefix

__all__ = ["Lease", "Ownership", "lease_key", "rendezvous_owner"]

_MEMBERS_KEY = f"moe:{LAYOUT_VERSION}:members"

_HEARTBEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""

# Taken where it is free, or our own. The epoch is microseconds of Redis's clock, above every earlier one.
_ACQUIRE = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then return false end
local time = redis.call('TIME')
local epoch = string.format('%d%06d', time[1], time[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'epoch', epoch)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return epoch
"""

_RENEW = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

_RELEASE = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then return 0 end
return redis.call('DEL', KEYS[1])
"""


def rendezvous_owner(key: str, members: Iterable[str]) -> str | None:
    """Return the member that owns `key`: when one joins or leaves, only its own share moves."""
    return max(members, key=lambda member: blake2b(f"{key}|{member}".encode(), digest_size=8).digest(), default=None)


def lease_key(partition: int) -> str:
    """Return the Redis key of a partition's lease."""
    return redis_prefix(partition) + "lease"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a partition, until someone else takes it."""

    partition: int
    owner: str
    epoch: str


class Ownership:
    """This replica's membership and leases.

    Args:
        redis: a client with `decode_responses` off.
        replica_id: new at every start, so that a restarted replica is another one.
        lease_s: how long a silent replica keeps what it has.
    """

    def __init__(self, redis: Redis, replica_id: str, lease_s: float) -> None:
        self.replica_id = replica_id
        self.members: list[str] = []
        self._redis = redis
        self._lease_ms = int(lease_s * 1000)
        self._heartbeat = redis.register_script(_HEARTBEAT)
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)

    async def beat(self) -> list[str]:
        """Say that this replica lives; return all that do."""
        members = await self._heartbeat(keys=[_MEMBERS_KEY], args=[self.replica_id, self._lease_ms])
        self.members = [member.decode() for member in members]
        return self.members

    def owns(self, key: str) -> bool:
        """Return whether `key` is this replica's, by the members that were last seen."""
        return rendezvous_owner(key, self.members or [self.replica_id]) == self.replica_id

    async def acquire(self, partition: int) -> Lease | None:
        """Take the lease of a partition; None while another replica holds it."""
        epoch = await self._acquire(keys=[lease_key(partition)], args=[self.replica_id, self._lease_ms])
        return None if epoch is None else Lease(partition, self.replica_id, epoch.decode())

    async def renew(self, lease: Lease) -> bool:
        """Prolong a lease; False where it is lost."""
        args: list[str | int] = [lease.owner, lease.epoch, self._lease_ms]
        return bool(await self._renew(keys=[lease_key(lease.partition)], args=args))

    async def release(self, lease: Lease) -> None:
        """Give a lease back, so that its next owner need not wait."""
        await self._release(keys=[lease_key(lease.partition)], args=[lease.owner, lease.epoch])

    async def leave(self) -> None:
        """Leave the members."""
        await self._redis.zrem(_MEMBERS_KEY, self.replica_id)
