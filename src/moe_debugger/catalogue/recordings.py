"""The catalogue's recordings: which run, who writes them, and what became of them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from moe_debugger.catalogue.models import RecordingRow

__all__ = ["MAX_LISTED_RECORDINGS", "RecordingStore"]

MAX_LISTED_RECORDINGS = 500


class RecordingStore:
    """Recordings of all tenants; a part of `Catalogue`, as its `recordings`."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions

    async def add(self, row: RecordingRow) -> bool:
        """Store a recording that begins; False where its session has one that runs."""
        try:
            async with self._sessions.begin() as db:
                db.add(row)
        except IntegrityError:
            return False
        return True

    async def get(self, tenant: str, recording_id: str) -> RecordingRow | None:
        """Return a recording of this tenant, or None."""
        async with self._sessions() as db:
            row = await db.get(RecordingRow, recording_id)
        return row if row is not None and row.tenant == tenant else None

    async def running(self, tenant: str, session_id: str) -> RecordingRow | None:
        """Return the recording of a session that runs, or None."""
        query = select(RecordingRow).where(
            RecordingRow.tenant == tenant, RecordingRow.session_id == session_id, RecordingRow.ended_at_unix_ns == 0
        )
        async with self._sessions() as db:
            return (await db.execute(query)).scalar_one_or_none()

    async def all_running(self) -> Sequence[RecordingRow]:
        """Return the recordings of all tenants that run."""
        query = select(RecordingRow).where(RecordingRow.ended_at_unix_ns == 0)
        async with self._sessions() as db:
            return (await db.execute(query)).scalars().all()

    async def list(self, tenant: str, session_id: str = "") -> Sequence[RecordingRow]:
        """Return the tenant's recordings, newest first; of one session where one is given."""
        query = select(RecordingRow).where(RecordingRow.tenant == tenant)
        if session_id:
            query = query.where(RecordingRow.session_id == session_id)
        query = query.order_by(RecordingRow.started_at_unix_ns.desc()).limit(MAX_LISTED_RECORDINGS)
        async with self._sessions() as db:
            return (await db.execute(query)).scalars().all()

    async def update_running(self, recording_id: str, owner: str, **values: Any) -> RecordingRow | None:
        """Write what its owner says of a recording that runs, and return it; None where it has ended."""
        return await self._update(
            values,
            RecordingRow.recording_id == recording_id,
            RecordingRow.owner == owner,
            RecordingRow.ended_at_unix_ns == 0,
        )

    async def ask_to_stop(self, recording_id: str, stop_at_sequence: int) -> None:
        """Say how far a recording goes; what was said first holds."""
        await self._update(
            {"state": "stopping", "stop_at_sequence": stop_at_sequence},
            RecordingRow.recording_id == recording_id,
            RecordingRow.ended_at_unix_ns == 0,
            RecordingRow.stop_at_sequence == 0,
        )

    async def interrupt(self, recording_id: str, silent_since_unix_ns: int, **values: Any) -> bool:
        """End a recording whose owner was silent since then; False where it was not, or it has ended."""
        row = await self._update(
            {"state": "interrupted", **values},
            RecordingRow.recording_id == recording_id,
            RecordingRow.ended_at_unix_ns == 0,
            RecordingRow.heartbeat_at_unix_ns <= silent_since_unix_ns,
        )
        return row is not None

    async def _update(self, values: dict[str, Any], *conditions: Any) -> RecordingRow | None:
        async with self._sessions.begin() as db:
            statement = update(RecordingRow).where(*conditions).values(**values).returning(RecordingRow)
            return (await db.execute(statement)).scalar_one_or_none()
