"""What the services ask the catalogue: small transactions, no SQL outside this package."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from moe_debugger.catalogue.findings import FindingStore
from moe_debugger.catalogue.models import SessionRow, SourceRow
from moe_debugger.catalogue.recordings import RecordingStore
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.ids import check_id, check_tenant, new_id

__all__ = ["Catalogue", "OpenedSession"]

_MAX_NAME_CHARS = 128
_MAX_JOIN_ATTEMPTS = 5
# More than a busy second replica needs for its transaction on the same SQLite file.
_SQLITE_BUSY_TIMEOUT_MS = 5_000


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """The session that a source belongs to, and whether it was there before."""

    session_id: str
    joined: bool


class Catalogue:
    """Sessions and sources of all tenants.

    Args:
        url: SQLAlchemy URL with an async driver, e.g. ``sqlite+aiosqlite:////data/catalogue.db``.

    Attributes:
        findings: the findings of all sessions.
    """

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        if self._is_sqlite:
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self.findings = FindingStore(self._sessions, is_sqlite=self._is_sqlite)
        self.recordings = RecordingStore(self._sessions)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def ping(self) -> None:
        """Raise where the database does not answer or has another schema."""
        async with self._sessions() as db:
            await db.execute(select(SessionRow.session_id).limit(1))

    async def open_session(
        self, tenant: str, name: str, *, model_name: str = "", model_type: str = "", must_be_new: bool = False
    ) -> OpenedSession:
        """Join the open session called `name`, or open it.

        Raises:
            InvalidInputError: the name is not usable, is open already (`must_be_new`), or is open with another model.
        """
        check_tenant(tenant)
        name = (name or model_name or "session").strip()
        if not name or len(name) > _MAX_NAME_CHARS or not name.isprintable():
            raise InvalidInputError(
                f"session name {name[:64]!r} is not valid; expected 1 to {_MAX_NAME_CHARS} printable characters"
            )
        for _ in range(_MAX_JOIN_ATTEMPTS):
            joined = await self._join(tenant, name, model_name=model_name, must_be_new=must_be_new)
            if joined is not None:
                return joined
            now = time.time_ns()
            row = SessionRow(
                session_id=new_id(),
                tenant=tenant,
                name=name,
                model_name=model_name[:256],
                model_type=model_type[:128],
                created_at_unix_ns=now,
                last_seen_at_unix_ns=now,
            )
            try:
                async with self._sessions.begin() as db:
                    db.add(row)
            except IntegrityError:
                continue  # another source opened it between the two transactions: join that one
            return OpenedSession(row.session_id, joined=False)
        raise InvalidInputError(f"session {name!r} was opened and closed all the time; try again")

    async def _join(self, tenant: str, name: str, *, model_name: str, must_be_new: bool) -> OpenedSession | None:
        async with self._sessions.begin() as db:
            row = await self._open_row(db, tenant, name)
            if row is None:
                return None
            if must_be_new:
                raise InvalidInputError(
                    f"session {name!r} is open already ({row.session_id}); close it, or choose another name"
                )
            if model_name and row.model_name and model_name != row.model_name:
                raise InvalidInputError(
                    f"session {name!r} is open with the model {row.model_name!r}, not {model_name!r}; "
                    "close it, or choose another name"
                )
            row.last_seen_at_unix_ns = max(row.last_seen_at_unix_ns, time.time_ns())
            return OpenedSession(row.session_id, joined=True)

    @staticmethod
    async def _open_row(db: AsyncSession, tenant: str, name: str) -> SessionRow | None:
        query = select(SessionRow).where(
            SessionRow.tenant == tenant, SessionRow.name == name, SessionRow.closed_at_unix_ns == 0
        )
        return (await db.execute(query)).scalar_one_or_none()

    async def get_session(self, tenant: str, session_id: str) -> SessionRow | None:
        """Return a session of this tenant, or None."""
        async with self._sessions() as db:
            row = await db.get(SessionRow, session_id)
        return row if row is not None and row.tenant == tenant else None

    async def list_sessions(self, tenant: str, limit: int = 500) -> Sequence[SessionRow]:
        """Return the tenant's sessions, newest first."""
        query = (
            select(SessionRow)
            .where(SessionRow.tenant == tenant)
            .order_by(SessionRow.created_at_unix_ns.desc())
            .limit(limit)
        )
        async with self._sessions() as db:
            return (await db.execute(query)).scalars().all()

    async def open_sessions(self) -> Sequence[SessionRow]:
        """Return the open sessions of all tenants."""
        async with self._sessions() as db:
            return (await db.execute(select(SessionRow).where(SessionRow.closed_at_unix_ns == 0))).scalars().all()

    async def sessions_by_id(self, session_ids: Iterable[str]) -> dict[str, SessionRow]:
        """Return those of the sessions that exist, of all tenants."""
        ids = list(session_ids)
        if not ids:
            return {}
        async with self._sessions() as db:
            rows = (await db.execute(select(SessionRow).where(SessionRow.session_id.in_(ids)))).scalars().all()
        return {row.session_id: row for row in rows}

    async def touch_sessions(self, last_seen: dict[str, int]) -> None:
        """Raise the last-seen times (session id -> Unix ns)."""
        if not last_seen:
            return
        async with self._sessions.begin() as db:
            for session_id, seen in last_seen.items():
                await db.execute(
                    update(SessionRow)
                    .where(SessionRow.session_id == session_id, SessionRow.last_seen_at_unix_ns < seen)
                    .values(last_seen_at_unix_ns=seen)
                )

    async def close_session(
        self, session_id: str, closed_at_unix_ns: int, reason: str, *, unseen_since_unix_ns: int | None = None
    ) -> bool:
        """Close an open session; return False where it was closed before, or was seen after `unseen_since_unix_ns`."""
        statement = update(SessionRow).where(SessionRow.session_id == session_id, SessionRow.closed_at_unix_ns == 0)
        if unseen_since_unix_ns is not None:
            statement = statement.where(SessionRow.last_seen_at_unix_ns <= unseen_since_unix_ns)
        async with self._sessions.begin() as db:
            result: Any = await db.execute(
                statement.values(closed_at_unix_ns=closed_at_unix_ns, close_reason=reason[:256])
            )
        return bool(result.rowcount)

    async def record_source(
        self,
        tenant: str,
        session_id: str,
        source_id: str,
        *,
        manifest: bytes,
        model_name: str,
        model_type: str,
        started_at_unix_ns: int,
    ) -> None:
        """Store a source and its manifest; a session that the catalogue has lost comes back under a name of its own."""
        check_tenant(tenant)
        check_id(session_id, "session_id")
        check_id(source_id, "source_id")
        now = time.time_ns()
        try:
            async with self._sessions.begin() as db:
                if await db.get(SourceRow, source_id) is not None:
                    return
                if await db.get(SessionRow, session_id) is None:
                    db.add(
                        SessionRow(
                            session_id=session_id,
                            tenant=tenant,
                            name=f"{model_name[:80] or 'session'} (recovered {session_id[-6:]})",
                            model_name=model_name[:256],
                            model_type=model_type[:128],
                            created_at_unix_ns=started_at_unix_ns or now,
                            last_seen_at_unix_ns=now,
                        )
                    )
                    await db.flush()
                db.add(
                    SourceRow(
                        source_id=source_id,
                        tenant=tenant,
                        session_id=session_id,
                        manifest=manifest,
                        started_at_unix_ns=started_at_unix_ns,
                    )
                )
        except IntegrityError:
            # Another replica stored the same row first; what is there is the same manifest.
            return

    async def get_manifest(self, tenant: str, session_id: str, source_id: str) -> bytes | None:
        """Return the stored manifest of a source of this session, or None."""
        async with self._sessions() as db:
            row = await db.get(SourceRow, source_id)
        return row.manifest if row is not None and (row.tenant, row.session_id) == (tenant, session_id) else None


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_SQLITE_BUSY_TIMEOUT_MS}")
    cursor.close()
