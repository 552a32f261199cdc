"""Answers from Redis and the catalogue: the same from any replica, whichever partitions it owns."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_analyzer._wire import account_message, layer_snapshot, roll_up, routes_message, source_message, summary_message
from moe_analyzer.aggregate import RESOLUTIONS_S, PartHead, SourceState, rollup_field
from moe_analyzer.blob import unpack
from moe_analyzer.errors import NotFoundError
from moe_analyzer.explaining import Explainer
from moe_analyzer.finding_lives import FindingLives
from moe_analyzer.lifecycle import CLOSE_GRACE_NS
from moe_analyzer.live_analysis import LiveAnalysis
from moe_analyzer.lost import num_lost
from moe_analyzer.promise import state_promise
from moe_analyzer.requests import RequestEntry, RowChunk, counts_field, decode_counts, rows_field
from moe_analyzer.series import INDEX_FIELD, StoredPoint, chunk_fields, read_chunk, series_messages
from moe_analyzer.session_query import QueryDesk, SessionReader
from moe_analyzer.store import Store
from moe_debugger.analysis import Analysis, CaptureHealth, LayerShape, RoutingState, Thresholds, merge_all
from moe_debugger.capture_health import HealthCheck, merge_checks
from moe_debugger.catalogue import Catalogue, SessionRow
from moe_debugger.errors import InvalidInputError
from moe_debugger.query.messages import result_to_proto
from moe_debugger.query.rows import LayerFacts
from moe_debugger.v1 import query_pb2
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2 as pb
from moe_debugger.wire.ids import check_id, check_tenant

__all__ = ["NotFoundError", "Queries"]

_MAX_POINTS = 720
_DEFAULT_POINTS = 120
_MAX_SERIES_POINTS = 10_000
_DEFAULT_SERIES_POINTS = 1000
_MAX_REQUESTS = 1000
_DEFAULT_REQUESTS = 100
_MAX_REQUEST_ID_CHARS = 128
_NS = 1_000_000_000


@dataclass(slots=True)
class MergedSession:
    """A session over all partitions."""

    flushes: dict[int, int]
    newest_ns: int
    newest_data_ns: int
    num_dead_lettered: int
    totals: RoutingState
    recent: RoutingState
    sources: list[SourceState]


class Queries:
    """All questions that can be asked about sessions."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        *,
        num_partitions: int,
        recent_window_s: int,
        stale_after_s: float,
        thresholds: Thresholds | None = None,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._num_partitions = num_partitions
        self._recent_window_s = recent_window_s
        self._stale_after_ns = int(stale_after_s * _NS)
        self._thresholds = thresholds
        self._desk = QueryDesk(store, num_partitions)
        self._lives = FindingLives(store, catalogue, thresholds)
        self._analyses = LiveAnalysis(store, Explainer(self._settings_series), thresholds)

    async def list_sessions(self, tenant: str) -> list[pb.Session]:
        """Return the tenant's sessions, newest first."""
        rows = await self._catalogue.list_sessions(check_tenant(tenant))
        summaries = await self._store.session_summaries(self._num_partitions, tenant)
        sessions = []
        for row in rows:
            newest, sources = 0, []
            for data in summaries.get(row.session_id, []):
                header, _ = unpack(data)
                newest = max(newest, header["newest"])
                sources.extend(header["sources"])
            sessions.append(self._session(row, newest, [(seen, goodbye) for seen, goodbye in sources]))
        return sessions

    async def snapshot(self, tenant: str, session_id: str) -> tuple[pb.SessionSnapshot, dict[int, int]]:
        """Return the whole picture of a session, and the flush number of each partition in it.

        Raises:
            NotFoundError: the tenant has no such session.
        """
        row = await self._row(tenant, session_id)
        merged = await self._merged(tenant, session_id)
        findings, analysis = await self._findings(tenant, session_id, merged)
        now = time.time_ns()
        descriptions: dict[int, routing.LayerDescription] = {}
        for source in merged.sources:
            for layer in source.manifest.layers if source.manifest is not None else ():
                descriptions.setdefault(layer.layer_index, layer)
        snapshot = pb.SessionSnapshot(
            session=self._session(
                row, merged.newest_ns, [(one.last_seen_ns, one.said_goodbye) for one in merged.sources]
            ),
            sequence=sum(merged.flushes.values()),
            layers=[
                layer_snapshot(descriptions.get(index), layer, merged.recent.layers.get(index))
                for index, layer in merged.totals.layers.items()
            ],
            account=account_message(
                merged.sources,
                merged.num_dead_lettered,
                self._live_ids(merged.sources, now),
                num_lost_stream_messages=num_lost(
                    await self._store.lost_ranges(self._num_partitions),
                    opened_ns=row.created_at_unix_ns,
                    closed_ns=row.closed_at_unix_ns and row.closed_at_unix_ns + CLOSE_GRACE_NS,
                ),
            ),
            sources=[source_message(one, is_live=self._is_live(one, now)) for one in merged.sources],
            findings=findings,
            first_step=merged.totals.first_step or 0,
            last_step=merged.totals.last_step or 0,
            recent_window_s=self._recent_window_s,
            taken_at_unix_ns=now,
        )
        if analysis is not None:
            state_promise(snapshot, analysis)
        return snapshot, merged.flushes

    async def evaluate(self, tenant: str, session_id: str) -> None:
        """Look for findings in the newest data and remember them."""
        await self._findings(tenant, session_id, await self._merged(tenant, session_id))

    async def acknowledge_finding(
        self, tenant: str, session_id: str, rule_id: str, *, actor: str, undo: bool
    ) -> pb.Finding:
        """Acknowledge a finding, or take that back; see `FindingLives.acknowledge`."""
        await self._row(tenant, session_id)
        return await self._lives.acknowledge(tenant, session_id, rule_id, actor=actor, undo=undo)

    async def silence_finding(
        self, tenant: str, session_id: str, rule_id: str, *, actor: str, duration_s: int
    ) -> pb.Finding:
        """Silence a finding for a time, or no more; see `FindingLives.silence`."""
        await self._row(tenant, session_id)
        return await self._lives.silence(tenant, session_id, rule_id, actor=actor, duration_s=duration_s)

    async def history(self, tenant: str, session_id: str, resolution_s: int, max_points: int) -> list[pb.RollUp]:
        """Return the newest roll-ups of one resolution, oldest first.

        Raises:
            InvalidInputError: the resolution is none of 1, 10, 60.
            NotFoundError: the tenant has no such session.
        """
        if resolution_s not in RESOLUTIONS_S:
            raise InvalidInputError(f"resolution_s is {resolution_s}, expected one of {list(RESOLUTIONS_S)}")
        await self._row(tenant, session_id)
        heads = await self._store.read_heads(self._num_partitions, tenant, session_id)
        decoded = [PartHead.decode(head) for head, _ in heads.values()]
        newest_s = max((head.newest_data_ns for head, _ in decoded), default=0) // _NS
        last = newest_s - newest_s % resolution_s
        count = min(max_points or _DEFAULT_POINTS, _MAX_POINTS)
        starts = [last - resolution_s * back for back in reversed(range(count))]
        states = await self._rollups(tenant, session_id, heads, resolution_s, starts)
        layers = sorted({index for _, totals in decoded for index in totals.layers})
        return [roll_up(start, resolution_s, merge_all(states[start]), layers) for start in starts if states.get(start)]

    async def series(
        self, tenant: str, session_id: str, names: Sequence[str], max_points: int
    ) -> tuple[list[pb.Series], int]:
        """Return the newest points of the training series, by source, and how many points are not kept.

        Args:
            names: the series wanted; empty = all but those with a value for each expert.
            max_points: of each series; fewer where all together would be too much for one answer.

        Raises:
            NotFoundError: the tenant has no such session.
        """
        await self._row(tenant, session_id)
        heads = await self._store.read_heads(self._num_partitions, tenant, session_id)
        ranks: dict[str, int] = {}
        points: list[StoredPoint] = []
        num_not_kept = 0
        for partition, (_, sources) in heads.items():
            for source_id, data in sources.items():
                source = SourceState.decode(source_id, data)
                ranks[source_id] = source.manifest.coordinates.global_rank if source.manifest is not None else 0
                num_not_kept += source.status.num_series_points_dropped
            index = (await self._store.read_state(partition, tenant, session_id, [INDEX_FIELD])).get(INDEX_FIELD)
            if index is None:
                continue
            fields, not_kept = chunk_fields(index, with_experts=bool(names))
            num_not_kept += not_kept
            if fields:
                chunks = await self._store.read_state(partition, tenant, session_id, fields)
                # A chunk may have made room since its index was read.
                points += [point for name in fields if name in chunks for point in read_chunk(chunks[name])]
        limit = min(max_points or _DEFAULT_SERIES_POINTS, _MAX_SERIES_POINTS)
        return series_messages(points, ranks, names, limit), num_not_kept

    async def _settings_series(self, tenant: str, session_id: str) -> list[pb.Series]:
        return (await self.series(tenant, session_id, (), _MAX_SERIES_POINTS))[0]

    async def list_requests(self, tenant: str, session_id: str, max_results: int) -> list[pb.RequestSummary]:
        """Return the newest requests, the last one seen first.

        Raises:
            NotFoundError: the tenant has no such session.
        """
        await self._row(tenant, session_id)
        entries: dict[str, list[RequestEntry]] = {}
        for part in await self._store.read_all(self._num_partitions, tenant, session_id, "requests"):
            for request_id, data in part.items():
                entries.setdefault(request_id, []).append(RequestEntry.decode_summary(request_id, data))
        summaries = [summary_message(parts) for parts in entries.values()]
        summaries.sort(key=lambda one: (-one.last_seen_at_unix_ns, one.request_id))
        return summaries[: min(max_results or _DEFAULT_REQUESTS, _MAX_REQUESTS)]

    async def request_routes(self, tenant: str, session_id: str, request_id: str) -> pb.RequestRoutes:
        """Return all kept decisions of one request.

        Raises:
            InvalidInputError: the request id is empty or too long.
            NotFoundError: the tenant has no such session, or the session no such request.
        """
        if not request_id or len(request_id) > _MAX_REQUEST_ID_CHARS:
            raise InvalidInputError(
                f"request_id {request_id[:40]!r} is not valid; expected 1 to {_MAX_REQUEST_ID_CHARS} characters"
            )
        await self._row(tenant, session_id)
        parts = await self._store.read_all(self._num_partitions, tenant, session_id, "requests", [request_id])
        entries: list[RequestEntry] = []
        chunks: list[RowChunk] = []
        for partition, found in enumerate(parts):
            if request_id not in found:
                continue
            entry = RequestEntry.decode_summary(request_id, found[request_id])
            names = [counts_field(request_id), *(rows_field(request_id, one) for one in range(entry.num_chunks))]
            counts, *rows = await self._store.load_rows(partition, tenant, session_id, names)
            entry.counts = {} if counts is None else decode_counts(counts)
            entries.append(entry)
            chunks.extend(RowChunk.decode(one) for one in rows if one is not None)
        if not entries:
            raise NotFoundError(
                f"request {request_id!r} is not in session {session_id}; it was not routed there, or is too old"
            )
        return routes_message(entries, chunks)

    async def query(self, tenant: str, session_id: str, text: str) -> query_pb2.QueryResult:
        """Return what a query of docs/query.md finds in a session.

        Raises:
            QueryError: the query has a fault, or would cost more than the fleet allows.
            NotFoundError: the tenant has no such session.
        """
        row = await self._row(tenant, session_id)
        merged = await self._merged(tenant, session_id)
        manifests = [source.manifest for source in merged.sources if source.manifest is not None]
        described = {layer.layer_index: layer for one in reversed(manifests) for layer in one.layers}

        async def findings() -> list[pb.Finding]:
            return (await self._findings(tenant, session_id, merged))[0]

        async def series(names: list[str]) -> tuple[list[pb.Series], int]:
            return await self.series(tenant, session_id, names, _MAX_SERIES_POINTS)

        reader = SessionReader(
            tenant,
            session_id,
            row.model_name,
            [_facts(described.get(index), layer.shape) for index, layer in sorted(merged.totals.layers.items())],
            merged.totals,
            findings,
            series,
            has_rows=any(one.level != routing.CAPTURE_LEVEL_COUNTS for one in manifests) or not manifests,
            has_token_ids=any(one.level >= routing.CAPTURE_LEVEL_ROUTES_TOKENS for one in manifests),
            sampling_rate=min((one.sampling_rate for one in manifests if one.sampling_rate), default=1.0),
        )
        return result_to_proto(await self._desk.answer(text, reader))

    async def session(self, tenant: str, session_id: str) -> pb.Session:
        """Return one session.

        Raises:
            NotFoundError: the tenant has no such session.
        """
        row = await self._row(tenant, session_id)
        heads = await self._store.read_heads(self._num_partitions, tenant, session_id)
        newest = max((PartHead.decode(head)[0].newest_ns for head, _ in heads.values()), default=0)
        sources = [SourceState.decode(one, data) for _, found in heads.values() for one, data in found.items()]
        return self._session(row, newest, [(one.last_seen_ns, one.said_goodbye) for one in sources])

    async def _row(self, tenant: str, session_id: str) -> SessionRow:
        check_id(session_id, "session_id")
        row = await self._catalogue.get_session(check_tenant(tenant), session_id)
        if row is None:
            raise NotFoundError(f"session {session_id} does not exist; list the sessions for those that do")
        return row

    def _session(self, row: SessionRow, newest_ns: int, sources: list[tuple[int, bool]]) -> pb.Session:
        now = time.time_ns()
        last_seen = max(row.last_seen_at_unix_ns, newest_ns)
        state = pb.SESSION_STATE_OPEN
        if row.closed_at_unix_ns:
            state = pb.SESSION_STATE_CLOSED
        elif now - last_seen > self._stale_after_ns:
            state = pb.SESSION_STATE_STALE
        return pb.Session(
            session_id=row.session_id,
            name=row.name,
            model_name=row.model_name,
            model_type=row.model_type,
            state=state,
            created_at_unix_ns=row.created_at_unix_ns,
            last_seen_at_unix_ns=last_seen,
            closed_at_unix_ns=row.closed_at_unix_ns,
            num_sources=len(sources),
            num_live_sources=sum(not goodbye and now - seen <= self._stale_after_ns for seen, goodbye in sources),
        )

    def _is_live(self, source: SourceState, now_ns: int) -> bool:
        return not source.said_goodbye and now_ns - source.last_seen_ns <= self._stale_after_ns

    def _live_ids(self, sources: Iterable[SourceState], now_ns: int) -> set[str]:
        return {one.source_id for one in sources if self._is_live(one, now_ns)}

    async def _merged(self, tenant: str, session_id: str) -> MergedSession:
        heads = await self._store.read_heads(self._num_partitions, tenant, session_id)
        merged = MergedSession({}, 0, 0, 0, RoutingState({}), RoutingState({}), [])
        totals = []
        for partition, (data, sources) in heads.items():
            head, state = PartHead.decode(data)
            merged.flushes[partition] = head.flush
            merged.newest_ns = max(merged.newest_ns, head.newest_ns)
            merged.newest_data_ns = max(merged.newest_data_ns, head.newest_data_ns)
            merged.num_dead_lettered += head.num_dead_lettered
            totals.append(state)
            merged.sources.extend(SourceState.decode(one, value) for one, value in sources.items())
        merged.totals = merge_all(totals)
        merged.sources.sort(key=lambda one: (one.manifest.started_at_unix_ns if one.manifest else 0, one.source_id))
        newest_s = merged.newest_data_ns // _NS
        seconds = [newest_s - back for back in range(self._recent_window_s)]
        found = await self._rollups(tenant, session_id, heads, 1, seconds)
        merged.recent = merge_all([state for states in found.values() for state in states])
        return merged

    async def _rollups(
        self, tenant: str, session_id: str, partitions: Iterable[int], resolution_s: int, starts: list[int]
    ) -> dict[int, list[RoutingState]]:
        """Return the partitions' roll-ups by start, those that exist."""
        names = [rollup_field(resolution_s, start) for start in starts]
        found: dict[int, list[RoutingState]] = {}
        for partition in partitions:
            values = await self._store.read_state(partition, tenant, session_id, names)
            for start, name in zip(starts, names, strict=True):
                if name in values:
                    found.setdefault(start, []).append(RoutingState.from_bytes(values[name]))
        return found

    async def _findings(
        self, tenant: str, session_id: str, merged: MergedSession
    ) -> tuple[list[pb.Finding], Analysis | None]:
        health = _health(merged.sources)
        # A source whose hooks never fire sends no data, and that is what there is to say about it.
        newest_ns = merged.newest_data_ns or (0 if health.is_healthy else merged.newest_ns)
        analysis = None
        if newest_ns:
            analysis = await self._analyses.of(
                tenant,
                session_id,
                recent=merged.recent,
                totals=merged.totals,
                sources=merged.sources,
                flushes=merged.flushes,
                health=health,
                newest_ns=newest_ns,
            )
        return await self._lives.look(tenant, session_id, analysis, newest_ns), analysis


def _facts(described: routing.LayerDescription | None, shape: LayerShape) -> LayerFacts:
    known = described or routing.LayerDescription()
    return LayerFacts(
        shape.layer_index,
        shape.num_experts,
        shape.top_k,
        shape.num_identity_experts,
        known.module_name,
        known.stack,
        tuple(known.expert_parallel_ranks),
    )


def _health(sources: list[SourceState]) -> CaptureHealth:
    dropped: dict[str, int] = {}
    for source in sources:
        for one in source.counters.dropped:
            if one.reason != routing.DROP_REASON_SAMPLED_OUT and one.num_decisions:
                name = routing.DropReason.Name(one.reason).removeprefix("DROP_REASON_").lower()
                dropped[name] = dropped.get(name, 0) + one.num_decisions
    return CaptureHealth(
        num_produced=sum(source.counters.num_produced for source in sources),
        dropped=dropped,
        num_missing_messages=sum(source.sequences.num_missing for source in sources),
        problems=tuple(problem for source in sources for problem in source.status.problems),
        checks=merge_checks(HealthCheck.from_proto(one) for source in sources for one in source.status.checks),
    )
