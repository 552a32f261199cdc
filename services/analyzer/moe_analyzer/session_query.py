"""Answers queries of docs/query.md about a session, from what the fleet holds of it.

Sums, findings, series and the list of requests are read at once; rows of requests are read while the query runs, some
requests at a time, so that a query ends with its limit or its cap and not with the last row.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_analyzer._wire import summary_message
from moe_analyzer.requests import RequestEntry, RowChunk, rows_field
from moe_analyzer.step_history import INDEX_FIELD, StepHistory, chunk_fields
from moe_analyzer.store import Store
from moe_debugger.analysis import RoutingState
from moe_debugger.query import FLEET_LIMITS, Limits, QueryResult, execute, parse
from moe_debugger.query.binding import Capabilities, Plan, Scope, bind
from moe_debugger.query.derive import steps_of_state
from moe_debugger.query.rows import LayerFacts, RowBatch
from moe_debugger.query.table import All, Compare, OneOf
from moe_debugger.query.tables import Table, expert_table, finding_table, layer_table, request_table, series_table
from moe_debugger.query.vocabulary import vocabulary_of
from moe_debugger.v1 import session_pb2 as pb
from moe_debugger.wire.codec import NO_EXPERT

__all__ = ["QueryDesk", "SessionReader"]

_NO_EXPERT_U16 = 0xFFFF
# Requests whose rows are read by one call to Redis.
_REQUESTS_AT_ONCE = 32
_MAX_CONCURRENT = 2
_READ_TIMEOUT_S = 5.0
_NOT_KEPT = "the fleet keeps the routes of requests without it; record the session and query the recording"

ABSENT: dict[str, dict[str, str]] = {
    "tokens": dict.fromkeys(
        ("margin", "dropped_slots", "router_entropy", "router_logsumexp", "top1_probability"), _NOT_KEPT
    ),
    "experts": {},
    "layers": {},
    "steps": dict.fromkeys(
        ("token_id", "token", "position", "request", "phase"), "the fleet keeps sums of steps; record the session"
    ),
    "requests": dict.fromkeys(("first_step", "last_step"), _NOT_KEPT),
}


@dataclass(frozen=True, slots=True)
class SessionReader:
    """How a query reads its session; the tenant was checked before.

    Attributes:
        state: the whole session's sums.
        findings: gives them in order.
        series: gives the series of some names (all but those by expert: none), and how many points are not kept.
        has_rows, has_token_ids: what the sources' levels say; sampling_rate: the least of them.
    """

    tenant: str
    session_id: str
    model_name: str
    layers: Sequence[LayerFacts]
    state: RoutingState
    findings: Callable[[], Awaitable[list[pb.Finding]]]
    series: Callable[[list[str]], Awaitable[tuple[list[pb.Series], int]]]
    has_rows: bool = True
    has_token_ids: bool = True
    sampling_rate: float = 1.0


class QueryDesk:
    """Runs queries, a few at a time, on threads of its own: the loop that consumes the stream never waits for one."""

    def __init__(self, store: Store, num_partitions: int, limits: Limits = FLEET_LIMITS) -> None:
        self._store = store
        self._num_partitions = num_partitions
        self._limits = limits
        self._threads = ThreadPoolExecutor(_MAX_CONCURRENT, thread_name_prefix="query")
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)

    def plan(self, text: str, model_name: str, *, has_rows: bool, has_token_ids: bool) -> Plan:
        """Return what a query does.

        Raises:
            QueryError: it has a fault, or asks for what the fleet does not have.
        """
        return bind(parse(text), text, _capabilities(model_name, has_rows, has_token_ids), self._limits)

    async def answer(self, text: str, reader: SessionReader) -> QueryResult:
        """Return what a query finds in a session.

        Raises:
            QueryError: it has a fault. QueryCostError: it would cost more than the fleet allows.
        """
        plan = self.plan(text, reader.model_name, has_rows=reader.has_rows, has_token_ids=reader.has_token_ids)
        async with self._slots:
            source = FleetSource(plan, reader, self._store, self._num_partitions, asyncio.get_running_loop())
            await source.load()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, execute, plan, source, self._limits)


def _capabilities(model_name: str, has_rows: bool, has_token_ids: bool) -> Capabilities:
    vocabulary = vocabulary_of(None, model_name)
    absent: dict[str, dict[str, str]] = {subject: dict(columns) for subject, columns in ABSENT.items()}
    if not has_rows:
        reason = 'its sources send sums alone (level "counts")'
        absent["tokens"]["*"] = absent["requests"]["*"] = reason
        for subject in ("experts", "layers"):
            absent[subject] |= dict.fromkeys(("token_id", "token", "position", "request", "phase", "step"), reason)
    elif not has_token_ids:
        reason = 'token ids are captured from level "routes+tokens" on'
        for subject in ("tokens", "experts", "layers", "requests"):
            absent[subject] |= dict.fromkeys(("token_id", "token"), reason)
    elif vocabulary is None:
        reason = "the fleet does not have the model's tokenizer; ask for `token_id`"
        for subject in ("tokens", "experts", "layers", "requests"):
            absent[subject] |= {"token": reason}
    return Capabilities("a live session", absent, vocabulary)


class FleetSource:
    """What the fleet holds of one session, for one plan."""

    def __init__(
        self,
        plan: Plan,
        reader: SessionReader,
        store: Store,
        num_partitions: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._store = store
        self._num_partitions = num_partitions
        self._loop = loop
        self._entries: list[list[tuple[int, RequestEntry]]] = []
        self._table: Table | None = None
        self._notes: list[str] = []
        self.layers = reader.layers
        self.capabilities = _capabilities(reader.model_name, reader.has_rows, reader.has_token_ids)

    async def load(self) -> None:
        """Read what the plan needs beside rows."""
        plan, reader = self._plan, self._reader
        match plan.subject.name:
            case "findings":
                self._table = finding_table(await reader.findings(), time.time_ns())
            case "series":
                self._table = await self._series()
            case "steps":
                state = await self._state_with_steps()
                self._table, notes = steps_of_state(self.layers, state)
                self._notes += notes
            case "experts" if plan.row_condition is None:
                self._table = expert_table(
                    self.layers,
                    {index: layer.counts for index, layer in reader.state.layers.items()},
                    mean_probability={index: layer.mean_probability for index, layer in reader.state.layers.items()},
                )
            case "layers" if plan.row_condition is None:
                self._table = layer_table(self.layers, reader.state)
            case _:
                await self._load_requests()
                if plan.subject.name == "requests" and plan.row_condition is None:
                    self._table = self._requests()

    def num_rows(self, scope: Scope) -> int:
        """Return how many token rows are kept, of the requests and layers in scope."""
        return sum(
            entry.num_rows_kept * sum(scope.layers is None or layer in scope.layers for layer in entry.tokens)
            for parts in self._entries
            for _, entry in parts
        )

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        """Yield the kept rows, request after request, each one's layer after layer; runs on a thread of its own."""
        kept = [parts for parts in self._entries if any(entry.num_rows_kept for _, entry in parts)]
        for at in range(0, len(kept), _REQUESTS_AT_ONCE):
            some = kept[at : at + _REQUESTS_AT_ONCE]
            reading = asyncio.run_coroutine_threadsafe(self._read(some), self._loop)
            for request_id, chunks in reading.result(_READ_TIMEOUT_S):
                for chunk in _together(chunks):
                    yield from _batches(request_id, chunk, scope)

    def table(self, plan: Plan) -> Table | None:
        """Return what `load` has read."""
        return self._table

    def notes(self, plan: Plan) -> Sequence[str]:
        """Return what the rows do not cover."""
        notes = list(self._notes)
        if self._entries and self._table is None:
            lost = sum(entry.num_rows_not_kept for parts in self._entries for _, entry in parts)
            if lost:
                notes.append(f"{lost:,} token rows of these requests were counted and are not kept")
            notes.append(f"of the {len(self._entries):,} newest requests, whose rows the fleet keeps within a budget")
        if self._reader.sampling_rate < 1:
            notes.append(f"{self._reader.sampling_rate:.3g} of the requests were captured; counts are of those")
        return notes

    async def _load_requests(self) -> None:
        reader, wanted = self._reader, self._plan.scope.requests
        fields = None if wanted is None else sorted(name for name in wanted if name)
        if fields == []:
            return
        parts = await self._store.read_all(self._num_partitions, reader.tenant, reader.session_id, "requests", fields)
        found: dict[str, list[tuple[int, RequestEntry]]] = {}
        for partition, own in enumerate(parts):
            for request_id, data in own.items():
                found.setdefault(request_id, []).append((partition, RequestEntry.decode_summary(request_id, data)))
        # In the order in which they came.
        self._entries = sorted(
            found.values(), key=lambda each: (min(entry.first_seen_ns for _, entry in each), each[0][1].request_id)
        )

    async def _read(self, some: Sequence[list[tuple[int, RequestEntry]]]) -> list[tuple[str, list[RowChunk]]]:
        reader = self._reader
        by_partition: dict[int, list[str]] = {}
        for parts in some:
            for partition, entry in parts:
                fields = (rows_field(entry.request_id, number) for number in range(entry.num_chunks))
                by_partition.setdefault(partition, []).extend(fields)
        data: dict[str, list[RowChunk]] = {}
        for partition, names in by_partition.items():
            values = await self._store.load_rows(partition, reader.tenant, reader.session_id, names)
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    data.setdefault(name.rpartition(":")[0], []).append(RowChunk.decode(value))
        return [(parts[0][1].request_id, data.get(parts[0][1].request_id, [])) for parts in some]

    async def _series(self) -> Table:
        series, num_not_kept = await self._reader.series(_names(self._plan))
        if num_not_kept:
            self._notes.append(f"{num_not_kept:,} points of series are not kept")
        if not _names(self._plan):
            self._notes.append('series by expert are read where the query names them: `name = "..."`')
        columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("step", "layer", "expert", "value", "rank")}
        names: list[str] = []
        sources: list[str] = []
        for one in series:
            step = np.frombuffer(one.step, "<u8").astype(np.int64)
            width = max(1, one.num_values)
            size = len(step) * width
            experts = np.arange(width) if one.is_per_expert else np.full(width, -1)
            columns["step"].append(np.repeat(step, width))
            columns["layer"].append(np.full(size, one.layer_index if one.HasField("layer_index") else -1, np.int64))
            columns["expert"].append(np.tile(experts, len(step)))
            columns["value"].append(np.frombuffer(one.value, "<f8"))
            columns["rank"].append(np.full(size, one.global_rank, np.int64))
            names += [one.name] * size
            sources += [one.source_id] * size
        joined = {name: np.concatenate([np.zeros(0, np.int64), *parts]) for name, parts in columns.items()}
        return series_table(
            joined["step"], names, joined["layer"], joined["expert"], joined["value"], rank=joined["rank"],
            source=sources,
        )  # fmt: skip

    async def _state_with_steps(self) -> RoutingState:
        reader = self._reader
        whole = RoutingState.empty(layer.shape for layer in reader.state.layers.values())
        for partition in range(self._num_partitions):
            index = await self._store.read_state(partition, reader.tenant, reader.session_id, [INDEX_FIELD])
            if INDEX_FIELD not in index:
                continue
            fields = [INDEX_FIELD, *chunk_fields(index[INDEX_FIELD])]
            found = await self._store.read_state(partition, reader.tenant, reader.session_id, fields)
            if any(name not in found for name in chunk_fields(found[INDEX_FIELD])):
                # The history was written anew between the two calls; the next query sees it.
                self._notes.append("a part of the steps was being written and is left out; ask again")
                continue
            part = RoutingState.empty(layer.shape for layer in reader.state.layers.values())
            StepHistory().load(found, part)
            whole = whole.merge(part)
        return whole

    def _requests(self) -> Table:
        summaries = [summary_message([entry for _, entry in parts]) for parts in self._entries]
        tokens = [[one.num_tokens, one.num_prefill_tokens, one.num_decode_tokens] for one in summaries]
        seen = [[one.first_seen_at_unix_ns / 1e9, one.last_seen_at_unix_ns / 1e9] for one in summaries]
        return request_table(
            [one.request_id for one in summaries],
            np.array(tokens, np.int64).reshape(-1, 3),
            seen=np.array(seen, np.float64).reshape(-1, 2),
            has_routes=np.array([one.has_routes for one in summaries], np.bool_),
        )


def _names(plan: Plan) -> list[str]:
    """Return the series that a condition names; none where it names none."""
    condition = plan.condition
    for part in condition.parts if isinstance(condition, All) else (condition,):
        match part:
            case Compare("name", "=", str(value)):
                return [value]
            case OneOf("name", values):
                return [str(value) for value in values]
            case _:
                pass
    return []


def _together(chunks: Sequence[RowChunk]) -> list[RowChunk]:
    """Return chunks with those of the same columns joined: few large batches are read faster than many small ones."""
    joined: list[RowChunk] = []
    for chunk in chunks:
        place = next((place for place, each in enumerate(joined) if each.fits(chunk)), None)
        if place is None:
            joined.append(chunk)
        else:
            joined[place] = joined[place].plus(chunk)
    return joined


def _batches(request_id: str, chunk: RowChunk, scope: Scope) -> Iterator[RowBatch]:
    n = chunk.num_rows
    for layer, ids in chunk.expert_ids.items():
        if scope.layers is not None and layer not in scope.layers:
            continue
        weights = chunk.gate_weights.get(layer)
        experts = ids.astype(np.int32)
        experts[ids == _NO_EXPERT_U16] = NO_EXPERT
        raw: dict[str, npt.NDArray[Any]] = {
            "layer_index": np.full(n, layer, np.uint32),
            "is_padding": np.zeros(n, np.bool_),
            "request_index": np.zeros(n, np.uint32),
            "position": chunk.position,
            "phase": chunk.phase,
            "expert_ids": experts,
            "gate_weights": np.full(ids.shape, np.nan, np.float32) if weights is None else weights.astype(np.float32),
        }
        if chunk.step is not None:
            raw["step"] = chunk.step
        if chunk.token_id is not None:
            raw["token_id"] = chunk.token_id.astype(np.int32)
        yield RowBatch(raw, (request_id,))
