"""NATS subjects, the stream's shape and Redis keys: one builder for each, ids checked, so no subject can be injected.

A source publishes on ``moe.v1.ev.<tenant>.<session>.<source>``; the stream stores it under
``moe.v1.ev.<partition>.<tenant>.<session>.<source>``, the partition being a hash of the three tokens, so that one
source stays in order in one partition while a large session spreads over all of them.
"""

from dataclasses import dataclass

from moe_debugger.errors import WireFormatError
from moe_debugger.wire.ids import ID_PATTERN, TENANT_PATTERN, check_id, check_tenant

__all__ = [
    "DEAD_LETTER_STREAM",
    "DEAD_LETTER_SUBJECT",
    "EVENT_STREAM",
    "EVENT_SUBJECTS",
    "LAYOUT_VERSION",
    "OPEN_SESSION_SUBJECTS",
    "StoredSubject",
    "event_subject",
    "live_subject",
    "open_session_subject",
    "parse_stored_subject",
    "partition_filter",
    "partition_transform",
    "redis_prefix",
    "session_filter",
    "source_filter",
]

LAYOUT_VERSION = 1
EVENT_STREAM = "MOE_EVENTS"
EVENT_SUBJECTS = "moe.v1.ev.*.*.*"
DEAD_LETTER_STREAM = "MOE_DEAD_LETTERS"
DEAD_LETTER_SUBJECT = "moe.v1.dead"
OPEN_SESSION_SUBJECTS = "moe.v1.ctl.*.open_session"


def event_subject(tenant: str, session_id: str, source_id: str) -> str:
    """Return the subject on which a source publishes."""
    return f"moe.v1.ev.{check_tenant(tenant)}.{check_id(session_id, 'session_id')}.{check_id(source_id, 'source_id')}"


def open_session_subject(tenant: str) -> str:
    """Return the request subject on which a source asks for its session."""
    return f"moe.v1.ctl.{check_tenant(tenant)}.open_session"


def live_subject(tenant: str, session_id: str) -> str:
    """Return the core NATS subject of a session's live deltas."""
    return f"moe.v1.live.{check_tenant(tenant)}.{check_id(session_id, 'session_id')}"


def partition_transform(num_partitions: int) -> tuple[str, str]:
    """Return the stream's subject transform (source, destination) for `num_partitions`."""
    return EVENT_SUBJECTS, (
        f"moe.v1.ev.{{{{partition({num_partitions},1,2,3)}}}}.{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}.{{{{wildcard(3)}}}}"
    )


def partition_filter(partition: int) -> str:
    """Return the filter subject of one partition in the stream."""
    return f"moe.v1.ev.{int(partition)}.*.*.*"


def session_filter(tenant: str, session_id: str) -> str:
    """Return the filter subject of one session's messages in the stream, in whatever partitions they are."""
    return f"moe.v1.ev.*.{check_tenant(tenant)}.{check_id(session_id, 'session_id')}.*"


def source_filter(tenant: str, session_id: str, source_id: str) -> str:
    """Return the filter subject of one source's messages in the stream."""
    return f"{session_filter(tenant, session_id).removesuffix('*')}{check_id(source_id, 'source_id')}"


@dataclass(frozen=True, slots=True)
class StoredSubject:
    """The tokens of a stored event's subject."""

    partition: int
    tenant: str
    session_id: str
    source_id: str


def parse_stored_subject(subject: str) -> StoredSubject:
    """Read a stored event's subject.

    Raises:
        WireFormatError: it is not one of ours.
    """
    tokens = subject.split(".")
    if len(tokens) == 7 and tokens[:3] == ["moe", "v1", "ev"] and tokens[3].isdecimal():
        partition, tenant, session_id, source_id = tokens[3:]
        if TENANT_PATTERN.match(tenant) and ID_PATTERN.match(session_id) and ID_PATTERN.match(source_id):
            return StoredSubject(int(partition), tenant, session_id, source_id)
    raise WireFormatError(f"subject {subject[:200]!r} is not moe.v1.ev.<partition>.<tenant>.<session>.<source>")


def redis_prefix(partition: int, tenant: str | None = None, session_id: str | None = None) -> str:
    """Return the prefix of a partition's keys, or of one session's keys within it.

    The braces are Redis Cluster's hash tag: offset, lease and windows of a partition share a slot.
    """
    prefix = f"moe:{LAYOUT_VERSION}:{{p{int(partition)}}}:"
    if tenant is not None and session_id is not None:
        prefix += f"{check_tenant(tenant)}:{check_id(session_id, 'session_id')}:"
    return prefix
