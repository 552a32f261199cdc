"""The catalogue's findings: their history as of the last turn, and what people said about them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from moe_debugger.catalogue.models import FindingMarkRow, FindingRow

__all__ = ["FindingMarks", "FindingStore"]


@dataclass(frozen=True, slots=True)
class FindingMarks:
    """What people said about one finding; 0 and empty = nothing.

    Attributes:
        acknowledged_opened_at_unix_ns: begin of the episode that was acknowledged.
        silenced_until_unix_ns: may be in the past, where the silence is over.
    """

    acknowledged_at_unix_ns: int = 0
    acknowledged_by: str = ""
    acknowledged_opened_at_unix_ns: int = 0
    silenced_until_unix_ns: int = 0
    silenced_by: str = ""


class FindingStore:
    """Findings of all tenants; a part of `Catalogue`, as its `findings`.

    Raises:
        sqlalchemy.exc.IntegrityError: (what writes) the session is not in the catalogue.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession], *, is_sqlite: bool) -> None:
        self._sessions = sessions
        # The same statement in two dialects: there is no common one.
        self._insert: Any = sqlite.insert if is_sqlite else postgresql.insert

    async def history(self, tenant: str, session_id: str) -> tuple[list[bytes], int]:
        """Return a session's findings as messages, and the broker's time of the newest data behind any of them."""
        query = select(FindingRow).where(FindingRow.tenant == tenant, FindingRow.session_id == session_id)
        async with self._sessions() as db:
            rows = (await db.execute(query)).scalars().all()
        return [row.message for row in rows], max((row.evaluated_at_unix_ns for row in rows), default=0)

    async def save(
        self,
        tenant: str,
        session_id: str,
        messages: Mapping[str, bytes],
        *,
        evaluated_at_unix_ns: int,
        forget: Iterable[str] = (),
    ) -> None:
        """Store findings (rule id -> message), unless something newer is there; forget others."""
        async with self._sessions.begin() as db:
            for rule_id, message in messages.items():
                insert = self._insert(FindingRow).values(
                    session_id=session_id,
                    rule_id=rule_id,
                    tenant=tenant,
                    message=message,
                    evaluated_at_unix_ns=evaluated_at_unix_ns,
                )
                await db.execute(
                    insert.on_conflict_do_update(
                        index_elements=["session_id", "rule_id"],
                        set_={"message": message, "evaluated_at_unix_ns": evaluated_at_unix_ns},
                        where=FindingRow.evaluated_at_unix_ns <= evaluated_at_unix_ns,
                    )
                )
            gone = list(forget)
            if gone:
                await db.execute(
                    delete(FindingRow).where(FindingRow.session_id == session_id, FindingRow.rule_id.in_(gone))
                )

    async def marks(self, tenant: str, session_id: str) -> dict[str, FindingMarks]:
        """Return what people said about a session's findings, by rule id."""
        query = select(FindingMarkRow).where(FindingMarkRow.tenant == tenant, FindingMarkRow.session_id == session_id)
        async with self._sessions() as db:
            rows = (await db.execute(query)).scalars().all()
        return {
            row.rule_id: FindingMarks(
                row.acknowledged_at_unix_ns,
                row.acknowledged_by,
                row.acknowledged_opened_at_unix_ns,
                row.silenced_until_unix_ns,
                row.silenced_by,
            )
            for row in rows
        }

    async def acknowledge(
        self, tenant: str, session_id: str, rule_id: str, *, at_unix_ns: int, by: str, opened_at_unix_ns: int
    ) -> None:
        """Store that an episode was acknowledged, and by whom; zeros take it back."""
        await self._mark(
            tenant,
            session_id,
            rule_id,
            acknowledged_at_unix_ns=at_unix_ns,
            acknowledged_by=by,
            acknowledged_opened_at_unix_ns=opened_at_unix_ns,
        )

    async def silence(self, tenant: str, session_id: str, rule_id: str, *, until_unix_ns: int, by: str) -> None:
        """Store until when a finding is silenced, and by whom; 0 lifts it."""
        await self._mark(tenant, session_id, rule_id, silenced_until_unix_ns=until_unix_ns, silenced_by=by)

    async def _mark(self, tenant: str, session_id: str, rule_id: str, **values: Any) -> None:
        insert = self._insert(FindingMarkRow).values(session_id=session_id, rule_id=rule_id, tenant=tenant, **values)
        async with self._sessions.begin() as db:
            await db.execute(insert.on_conflict_do_update(index_elements=["session_id", "rule_id"], set_=values))
