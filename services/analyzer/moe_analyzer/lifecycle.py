"""Sessions' lives: opened by request, kept alive by messages, closed by goodbye, by request or by silence."""

import asyncio
import contextlib
import time
from collections.abc import Iterable

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from sqlalchemy.exc import SQLAlchemyError

from moe_debugger.catalogue import Catalogue
from moe_debugger.errors import InvalidInputError, MoEDebuggerError
from moe_debugger.v1 import control_pb2 as control
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import check_format_version, format_version
from moe_debugger.wire.subjects import OPEN_SESSION_SUBJECTS

__all__ = ["SessionDirectory", "answer_open_session"]

_log = structlog.get_logger()

_QUEUE_GROUP = "moe-analyzers"
# What was stored this soon after the close was on its way already, and counts. Owners hear of a close within less.
CLOSE_GRACE_NS = 2_000_000_000
_REFRESH_S = 0.5
_SWEEP_S = 5.0
# A replica that has just started may have messages to read that show a session alive.
_SWEEP_AFTER_START_S = 60.0


class SessionDirectory:
    """What the consuming side needs of the catalogue, without a query per message."""

    def __init__(self, catalogue: Catalogue, *, close_after_s: float) -> None:
        self._catalogue = catalogue
        self._close_after_ns = int(close_after_s * 1e9)
        self._closed_at: dict[str, int] = {}
        self._last_seen: dict[str, int] = {}
        self._to_close: dict[str, tuple[int, str]] = {}
        self._to_record: dict[str, tuple[str, pb.SourceManifest]] = {}
        self._manifests: dict[str, pb.SourceManifest | None] = {}
        self._started = time.monotonic()

    def is_late(self, session_id: str, stored_ns: int) -> bool:
        """Return whether a message was stored after its session's close."""
        closed_at = self._closed_at.get(session_id, 0)
        return bool(closed_at) and stored_ns > closed_at + CLOSE_GRACE_NS

    async def learn(self, session_id: str) -> None:
        """Look a session up before its first message is taken in."""
        if session_id not in self._closed_at:
            await self._refresh([session_id])

    async def manifest(self, tenant: str, session_id: str, source_id: str) -> pb.SourceManifest | None:
        """Return a source's manifest from the catalogue, where the stream has lost it."""
        if source_id not in self._manifests:
            data = await self._catalogue.get_manifest(tenant, session_id, source_id)
            self._manifests[source_id] = None if data is None else pb.SourceManifest.FromString(data)
        return self._manifests[source_id]

    def saw(self, session_id: str, stored_ns: int) -> None:
        """Note a sign of life."""
        self._last_seen[session_id] = max(stored_ns, self._last_seen.get(session_id, 0))

    def record_source(self, tenant: str, manifest: pb.SourceManifest) -> None:
        """Store a source in the catalogue, soon."""
        self._manifests.pop(manifest.source_id, None)
        self._to_record[manifest.source_id] = (tenant, manifest)

    def close_soon(self, session_id: str, closed_at_ns: int, reason: str) -> None:
        """Close a session, soon."""
        self._to_close.setdefault(session_id, (closed_at_ns, reason))

    async def close_now(self, session_id: str, reason: str) -> None:
        """Close a session that may be closed already."""
        await self._catalogue.close_session(session_id, time.time_ns(), reason)
        await self._refresh([session_id])

    async def run(self) -> None:
        """Keep the catalogue and this cache alike, until cancelled."""
        next_sweep = time.monotonic() + _SWEEP_S
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.sync()
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + _SWEEP_S
                    await self.sweep()
            except (SQLAlchemyError, OSError) as error:
                # Nothing is lost: what was to be written stays in the queues.
                _log.warning("catalogue_unavailable", error=str(error))

    async def sync(self) -> None:
        """Write what is queued, then read what changed."""
        for source_id, (tenant, manifest) in list(self._to_record.items()):
            await self._catalogue.record_source(
                tenant,
                manifest.session_id,
                source_id,
                manifest=manifest.SerializeToString(),
                model_name=manifest.model_name,
                model_type=manifest.model_type,
                started_at_unix_ns=manifest.started_at_unix_ns,
            )
            self._to_record.pop(source_id, None)
        seen, self._last_seen = self._last_seen, {}
        try:
            await self._catalogue.touch_sessions(seen)
        except BaseException:
            for session_id, stored_ns in seen.items():
                self.saw(session_id, stored_ns)
            raise
        for session_id, (closed_at, reason) in list(self._to_close.items()):
            if await self._catalogue.close_session(session_id, closed_at, reason):
                _log.info("session_closed", session_id=session_id, reason=reason)
            self._to_close.pop(session_id, None)
        await self._refresh(self._closed_at)

    async def _refresh(self, session_ids: Iterable[str]) -> None:
        ids = list(session_ids)
        rows = await self._catalogue.sessions_by_id(ids)
        for session_id in ids:
            row = rows.get(session_id)
            self._closed_at[session_id] = 0 if row is None else row.closed_at_unix_ns

    async def sweep(self) -> None:
        """Close the sessions that were silent for too long."""
        if time.monotonic() - self._started < min(_SWEEP_AFTER_START_S, self._close_after_ns / 1e9):
            return
        limit = time.time_ns() - self._close_after_ns
        for row in await self._catalogue.open_sessions():
            if row.last_seen_at_unix_ns <= limit and await self._catalogue.close_session(
                row.session_id, time.time_ns(), "silent for too long", unseen_since_unix_ns=limit
            ):
                _log.info("session_closed", session_id=row.session_id, reason="silent for too long")


async def answer_open_session(client: Client, catalogue: Catalogue) -> None:
    """Answer sources that ask for their session; any replica may answer."""

    async def answer(message: Msg) -> None:
        response = control.OpenSessionResponse(format_version=format_version())
        try:
            request = control.OpenSessionRequest.FromString(message.data)
            check_format_version(request.format_version, "OpenSessionRequest")
            opened = await catalogue.open_session(
                message.subject.split(".")[3],
                request.name,
                model_name=request.model_name,
                model_type=request.model_type,
                must_be_new=request.must_be_new,
            )
            response.session_id, response.joined = opened.session_id, opened.joined
            _log.info("session_opened", session_id=opened.session_id, joined=opened.joined)
        except InvalidInputError as error:
            response.error = str(error)
        except MoEDebuggerError as error:
            response.error = str(error)
        except SQLAlchemyError as error:
            _log.error("open_session_failed", error=str(error))
            return  # no answer: the source asks again
        except Exception as error:  # noqa: BLE001 - the edge: bytes that are no request must not end the subscription
            response.error = f"OpenSessionRequest cannot be read: {type(error).__name__}"
        if message.reply:
            with contextlib.suppress(Exception):  # the source has gone
                await client.publish(message.reply, response.SerializeToString())

    await client.subscribe(OPEN_SESSION_SUBJECTS, queue=_QUEUE_GROUP, cb=answer)
