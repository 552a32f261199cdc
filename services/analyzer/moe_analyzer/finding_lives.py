"""Findings across looks, replicas and restarts: history in Redis and the catalogue, people's marks in the catalogue.

Redis holds the newest state, which each second of data changes. The catalogue holds it as of the last time that a
finding opened, closed or was superseded, so that an emptied Redis loses no episode, and the marks, which nothing could
rebuild. Any replica may look at a session; of two that do so at once one writes, and the other sees on its next look
what it wrote.
"""

import time

import structlog

from moe_analyzer.errors import NotFoundError
from moe_analyzer.findings import TrackedFindings, with_marks
from moe_analyzer.store import Store
from moe_debugger.analysis import Analysis, Thresholds
from moe_debugger.catalogue import Catalogue
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["MAX_SILENCE_S", "FindingLives"]

_log = structlog.get_logger()

MAX_SILENCE_S = 30 * 24 * 3600
_MAX_ACTOR_CHARS = 128
_NUM_NAMED = 5
_NS = 1_000_000_000


class FindingLives:
    """Opens, updates, closes, acknowledges and silences the findings of sessions."""

    def __init__(self, store: Store, catalogue: Catalogue, thresholds: Thresholds | None = None) -> None:
        self._store = store
        self._catalogue = catalogue
        self._thresholds = thresholds

    async def look(
        self, tenant: str, session_id: str, analysis: Analysis | None = None, newest_ns: int = 0
    ) -> list[pb.Finding]:
        """Return a session's findings with their marks, after taking in what holds of data up to `newest_ns`.

        Args:
            analysis: None = nothing new; only what is known is returned.
        """
        tracked = await self._tracked(tenant, session_id, analysis, newest_ns)
        marks = await self._catalogue.findings.marks(tenant, session_id)
        return with_marks(tracked.in_order(), marks, time.time_ns())

    async def acknowledge(
        self, tenant: str, session_id: str, rule_id: str, *, actor: str, undo: bool = False
    ) -> pb.Finding:
        """Acknowledge a finding's present episode, or take that back; return the finding.

        Acknowledging again changes nothing: who came first, and when, stays.

        Raises:
            NotFoundError: the session has no such finding.
        """
        finding = await self._find(tenant, session_id, rule_id)
        is_done = bool(finding.acknowledged_at_unix_ns)
        if undo or not is_done:
            await self._catalogue.findings.acknowledge(
                tenant,
                session_id,
                rule_id,
                at_unix_ns=0 if undo else time.time_ns(),
                by="" if undo else actor[:_MAX_ACTOR_CHARS],
                opened_at_unix_ns=0 if undo else finding.opened_at_unix_ns,
            )
            _log.info("finding_acknowledged", session_id=session_id, rule_id=rule_id, actor=actor, undo=undo)
        return await self._find(tenant, session_id, rule_id)

    async def silence(self, tenant: str, session_id: str, rule_id: str, *, actor: str, duration_s: int) -> pb.Finding:
        """Silence a finding for `duration_s` from now, whether it is open or not; 0 lifts it. Return the finding.

        Raises:
            InvalidInputError: the duration is too long.
            NotFoundError: the session has no such finding.
        """
        if not 0 <= duration_s <= MAX_SILENCE_S:
            raise InvalidInputError(
                f"duration_s is {duration_s}; expected at most {MAX_SILENCE_S} (30 days), or 0 to lift the silence"
            )
        await self._find(tenant, session_id, rule_id)
        until = time.time_ns() + duration_s * _NS if duration_s else 0
        by = actor[:_MAX_ACTOR_CHARS] if duration_s else ""
        await self._catalogue.findings.silence(tenant, session_id, rule_id, until_unix_ns=until, by=by)
        _log.info("finding_silenced", session_id=session_id, rule_id=rule_id, actor=actor, duration_s=duration_s)
        return await self._find(tenant, session_id, rule_id)

    async def _find(self, tenant: str, session_id: str, rule_id: str) -> pb.Finding:
        findings = await self.look(tenant, session_id)
        for finding in findings:
            if finding.rule_id == rule_id:
                return finding
        names = [finding.rule_id for finding in findings]
        known = ", ".join(names[:_NUM_NAMED]) + (f" and {len(names) - _NUM_NAMED} more" if names[_NUM_NAMED:] else "")
        raise NotFoundError(
            f"session {session_id} has no finding {rule_id[:64]!r}; "
            + (f"it has {known}; GetSession lists them" if names else "it has none; GetSession lists those that come")
        )

    async def _tracked(
        self, tenant: str, session_id: str, analysis: Analysis | None, newest_ns: int
    ) -> TrackedFindings:
        stored = await self._store.read_findings(tenant, session_id)
        if stored is not None:
            tracked = TrackedFindings.decode(stored)
        else:
            tracked = TrackedFindings.of_messages(*await self._catalogue.findings.history(tenant, session_id))
        if analysis is None or not tracked.update(analysis, newest_ns, self._thresholds):
            return tracked
        if tracked.turned or tracked.evicted:
            # Before Redis: what Redis has and the catalogue lacks would be lost with Redis.
            await self._catalogue.findings.save(
                tenant,
                session_id,
                {rule_id: tracked.findings[rule_id].SerializeToString() for rule_id in tracked.turned},
                evaluated_at_unix_ns=newest_ns,
                forget=tracked.evicted,
            )
            for rule_id in sorted(tracked.turned):
                state = pb.FindingState.Name(tracked.findings[rule_id].state).removeprefix("FINDING_STATE_").lower()
                _log.info("finding_turned", session_id=session_id, rule_id=rule_id, state=state)
        await self._store.replace_findings(tenant, session_id, stored, tracked.encode())
        return tracked
