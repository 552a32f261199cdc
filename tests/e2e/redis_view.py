"""What Redis holds of a session, read from its keys."""

from typing import Any

import numpy as np
import numpy.typing as npt
import redis

from moe_analyzer.aggregate import PartHead
from moe_analyzer.requests import counts_field, decode_counts
from moe_analyzer.store import session_key

NUM_PARTITIONS = 16
TENANT = "default"


def redis_counts(url: str, session_id: str) -> npt.NDArray[np.int64]:
    """Return [layers, experts] summed over the partitions that hold a part of the session."""
    parts: list[npt.NDArray[np.int64]] = []
    with redis.Redis.from_url(url) as client:
        for partition in range(NUM_PARTITIONS):
            head: Any = client.hget(session_key(partition, TENANT, session_id, "state"), "head")
            if head is not None:
                _, totals = PartHead.decode(head)
                parts.append(np.stack([layer.counts for layer in totals.layers.values()]).astype(np.int64))
    assert parts, f"Redis holds nothing of session {session_id}"
    return np.asarray(np.sum(parts, axis=0), np.int64)


def redis_request_counts(url: str, session_id: str, request_id: str) -> npt.NDArray[np.int64]:
    """Return [layers, experts] of one request."""
    parts: list[npt.NDArray[np.int64]] = []
    with redis.Redis.from_url(url) as client:
        for partition in range(NUM_PARTITIONS):
            data: Any = client.hget(session_key(partition, TENANT, session_id, "rows"), counts_field(request_id))
            if data is not None:
                counts = decode_counts(data)
                parts.append(np.stack([counts[layer] for layer in sorted(counts)]).astype(np.int64))
    assert parts, f"Redis holds nothing of request {request_id}"
    return np.asarray(np.sum(parts, axis=0), np.int64)
