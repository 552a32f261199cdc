"""The live state in Redis: absolute blobs, written together with the offset in one fenced call.

Keys of a partition (one slot of a Redis Cluster, see `wire.subjects.redis_prefix`):

    <p>lease                          hash: owner, epoch
    <p>meta                           hash: applied (stream sequence), applied_ns, stream (its identity), checked (no
                                      message of this partition between applied and here), lost (see `lost`)
    <p>sessions                       hash: "<tenant>:<session>" -> summary
    <p><tenant>:<session>:state       hash: head, r<resolution>:<start>, wait:<source>:<sequence>, series:index,
                                      series:<kind>:<chunk>
    <p><tenant>:<session>:sources     hash: source id -> its account
    <p><tenant>:<session>:requests    hash: request id -> summary
    <p><tenant>:<session>:rows        hash: "<request>:counts", "<request>:<chunk>"
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from moe_analyzer.aggregate import SessionWrites
from moe_analyzer.lost import LostRange, decode_lost, encode_lost
from moe_analyzer.ownership import Lease, lease_key
from moe_debugger.errors import FleetError
from moe_debugger.wire.ids import check_id, check_tenant
from moe_debugger.wire.subjects import LAYOUT_VERSION, redis_prefix

__all__ = ["Applied", "FencedError", "Store", "connect_redis", "session_key"]

# A call that takes longer than this is given up; the caller's own backoff decides what then.
_SOCKET_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 2.0

# KEYS: lease, meta, sessions, then the hashes to write.
# ARGV: owner, epoch, expected meta (JSON: applied, stream), new applied, new applied_ns, new stream,
#       name of this write, new checked, new lost,
#       number of summaries, (field, value)*, then for each hash: number of sets, (field, value)*, number of
#       deletes, field*.
# Returns 1 = written, 2 = this very write was there already (its answer was lost), 0 = the lease is another's,
# -1 = the state is not what the caller began with.
_FLUSH = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then return 0 end
local meta = redis.call('HMGET', KEYS[2], 'applied', 'stream')
local applied, stream = meta[1] or '', meta[2] or ''
if applied == ARGV[5] and stream == ARGV[7] and redis.call('HGET', KEYS[2], 'write') == ARGV[8] then return 2 end
if applied ~= ARGV[3] or stream ~= ARGV[4] then return -1 end
local at = 11
local function set(key)
  local count = tonumber(ARGV[at]); at = at + 1
  for i = 1, count do
    redis.call('HSET', key, ARGV[at], ARGV[at + 1]); at = at + 2
  end
end
set(KEYS[3])
for k = 4, #KEYS do
  set(KEYS[k])
  local count = tonumber(ARGV[at]); at = at + 1
  for i = 1, count do
    redis.call('HDEL', KEYS[k], ARGV[at]); at = at + 1
  end
end
redis.call('HSET', KEYS[2], 'applied', ARGV[5], 'applied_ns', ARGV[6], 'stream', ARGV[7], 'write', ARGV[8],
  'checked', ARGV[9], 'lost', ARGV[10])
return 1
"""

# KEYS: the findings. ARGV: what was read ('' = nothing), what to write. Returns 1 = written, 0 = another was first.
_REPLACE_FINDINGS = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class FencedError(FleetError):
    """Another replica owns the partition, or its state is not what we began with: load it again."""


@dataclass(frozen=True, slots=True)
class Applied:
    """How far a partition's state has consumed which stream; all empty where there is no state.

    Attributes:
        sequence: the last message that was taken in; everything of this partition up to it was taken in or is lost.
        stored_ns: the broker's time of that message; 0 where `sequence` is not one of this partition's messages.
        stream: the stream's identity.
        checked: the broker said that between `sequence` and here no message is of this partition.
        lost: what may have left streams before this partition came to it.
    """

    sequence: int = 0
    stored_ns: int = 0
    stream: str = ""
    checked: int = 0
    lost: tuple[LostRange, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True where nothing was consumed yet."""
        return not self.stream


def connect_redis(url: str) -> Any:
    """Return an asyncio client with short deadlines and one retry (a pooled connection may be a dead one)."""
    return redis.asyncio.Redis.from_url(
        url,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
        retry_on_error=[RedisConnectionError],
        max_connections=64,
    )


def session_key(partition: int, tenant: str, session_id: str, kind: str) -> str:
    """Return the key of one of a session's hashes: ``state``, ``requests`` or ``rows``."""
    return redis_prefix(partition, tenant, session_id) + kind


class Store:
    """Reads and writes of partition state."""

    def __init__(self, client: Any) -> None:
        self._redis = client
        self._flush = client.register_script(_FLUSH)
        self._replace_findings = client.register_script(_REPLACE_FINDINGS)

    async def load_applied(self, partition: int) -> Applied:
        """Return how far a partition has come."""
        applied, stored_ns, stream, checked, lost = await self._redis.hmget(
            redis_prefix(partition) + "meta", "applied", "applied_ns", "stream", "checked", "lost"
        )
        if stream is None:
            return Applied()
        # A state that was written before `checked` and `lost` were stored has neither.
        return Applied(int(applied), int(stored_ns), stream.decode(), int(checked or 0), decode_lost(lost))

    async def lost_ranges(self, num_partitions: int) -> list[LostRange]:
        """Return what may have left the stream before it was counted, of all partitions."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition in range(num_partitions):
                pipe.hget(redis_prefix(partition) + "meta", "lost")
            return [one for found in await pipe.execute() for one in decode_lost(found)]

    async def load_session(
        self, partition: int, tenant: str, session_id: str
    ) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
        """Return a session's state, sources and request summaries in one partition, empty where there is none."""
        async with self._redis.pipeline(transaction=True) as pipe:
            for kind in ("state", "sources", "requests"):
                pipe.hgetall(session_key(partition, tenant, session_id, kind))
            state, sources, requests = await pipe.execute()
        return _decoded(state), _decoded(sources), _decoded(requests)

    async def load_rows(
        self, partition: int, tenant: str, session_id: str, fields: Sequence[str]
    ) -> list[bytes | None]:
        """Return fields of a session's rows."""
        if not fields:
            return []
        values: list[bytes | None] = await self._redis.hmget(
            session_key(partition, tenant, session_id, "rows"), list(fields)
        )
        return values

    async def flush(
        self,
        lease: Lease,
        before: Applied,
        after: Applied,
        writes: Mapping[tuple[str, str], SessionWrites],
    ) -> None:
        """Write all changes of a partition and its new offset, or nothing.

        Safe to repeat with the same arguments, where the answer was lost.

        Raises:
            FencedError: the lease or the state is not ours any more; nothing was written.
        """
        prefix = redis_prefix(lease.partition)
        keys = [lease_key(lease.partition), prefix + "meta", prefix + "sessions"]
        summaries: list[Any] = [len(writes)]
        hashes: list[Any] = []
        for (tenant, session_id), write in writes.items():
            summaries += [f"{tenant}:{session_id}", write.summary]
            for kind in ("state", "sources", "requests", "rows"):
                fields: dict[str, bytes | None] = getattr(write, kind)
                if fields:
                    keys.append(session_key(lease.partition, tenant, session_id, kind))
                    hashes += _changes(fields)
        # Names this write: the offset alone would not, since two owners may come to the same one.
        lost = encode_lost(after.lost)
        flushes = [[*session, write.flush] for session, write in writes.items()]
        write_id = json.dumps([lease.epoch, flushes, after.checked, lost])
        expected = ["", ""] if before.is_empty else [before.sequence, before.stream]
        args = [lease.owner, lease.epoch, *expected, after.sequence, after.stored_ns, after.stream, write_id]
        args += [after.checked, lost]
        result = await self._flush(keys=keys, args=[*args, *summaries, *hashes])
        if result == 0:
            raise FencedError(f"partition {lease.partition}: the lease {lease.epoch} is lost")
        if result == -1:
            raise FencedError(f"partition {lease.partition}: the stored offset is not {before.sequence} any more")

    async def session_summaries(self, num_partitions: int, tenant: str) -> dict[str, list[bytes]]:
        """Return each session's summaries, of all partitions that hold a part of it."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition in range(num_partitions):
                pipe.hgetall(redis_prefix(partition) + "sessions")
            found = await pipe.execute()
        summaries: dict[str, list[bytes]] = {}
        for one in found:
            for name, value in _decoded(one).items():
                owner, _, session_id = name.partition(":")
                if owner == tenant:
                    summaries.setdefault(session_id, []).append(value)
        return summaries

    async def read_heads(
        self, num_partitions: int, tenant: str, session_id: str
    ) -> dict[int, tuple[bytes, dict[str, bytes]]]:
        """Return a session's head and sources, each pair as of one flush, by partition that holds a part of it."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition in range(num_partitions):
                pipe.exists(session_key(partition, tenant, session_id, "state"))
            present = [partition for partition, found in enumerate(await pipe.execute()) if found]
        heads: dict[int, tuple[bytes, dict[str, bytes]]] = {}
        for partition in present:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hget(session_key(partition, tenant, session_id, "state"), "head")
                pipe.hgetall(session_key(partition, tenant, session_id, "sources"))
                head, sources = await pipe.execute()
            if head is not None:
                heads[partition] = (head, _decoded(sources))
        return heads

    async def read_all(
        self, num_partitions: int, tenant: str, session_id: str, kind: str, fields: Sequence[str] | None = None
    ) -> list[dict[str, bytes]]:
        """Return, by partition, the given fields (all: None) of one of a session's hashes; absent ones are left out."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition in range(num_partitions):
                key = session_key(partition, tenant, session_id, kind)
                if fields is None:
                    pipe.hgetall(key)
                else:
                    pipe.hmget(key, list(fields))
            found = await pipe.execute()
        if fields is None:
            return [_decoded(one) for one in found]
        return [{name: value for name, value in zip(fields, one, strict=True) if value is not None} for one in found]

    async def read_state(self, partition: int, tenant: str, session_id: str, fields: Sequence[str]) -> dict[str, bytes]:
        """Return fields of a session's state in one partition."""
        values = await self._redis.hmget(session_key(partition, tenant, session_id, "state"), list(fields))
        return {name: value for name, value in zip(fields, values, strict=True) if value is not None}

    async def read_findings(self, tenant: str, session_id: str) -> bytes | None:
        """Return what was found in a session so far."""
        value: bytes | None = await self._redis.get(_findings_key(tenant, session_id))
        return value

    async def replace_findings(self, tenant: str, session_id: str, before: bytes | None, after: bytes) -> bool:
        """Store what was found in a session, unless another replica stored something since `before` was read."""
        keys = [_findings_key(tenant, session_id)]
        return bool(await self._replace_findings(keys=keys, args=[before or b"", after]))

    async def ping(self) -> None:
        """Raise where Redis does not answer."""
        await self._redis.ping()


def _findings_key(tenant: str, session_id: str) -> str:
    return f"moe:{LAYOUT_VERSION}:{{s{check_id(session_id, 'session_id')}}}:{check_tenant(tenant)}:findings"


def _decoded(value: dict[bytes, bytes]) -> dict[str, bytes]:
    return {name.decode(): data for name, data in value.items()}


def _changes(fields: Mapping[str, bytes | None]) -> list[Any]:
    sets = [(name, value) for name, value in fields.items() if value is not None]
    deletes = [name for name, value in fields.items() if value is None]
    return [len(sets), *(part for pair in sets for part in pair), len(deletes), *deletes]
