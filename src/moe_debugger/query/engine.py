"""Runs plans over sources within a cost cap."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_debugger.analysis import RoutingState
from moe_debugger.errors import QueryCostError
from moe_debugger.query.binding import Capabilities, Plan, Scope, bind
from moe_debugger.query.columns import Place
from moe_debugger.query.derive import Derived, TooManyGroupsError, derived, module_labels
from moe_debugger.query.gather import Groups, Rows, gatherer
from moe_debugger.query.limits import LOCAL_LIMITS, Limits
from moe_debugger.query.parser import parse
from moe_debugger.query.result import QueryResult
from moe_debugger.query.rows import LayerFacts, RowBatch, RowColumns, raw_columns, row_bytes
from moe_debugger.query.table import matches
from moe_debugger.query.tables import Table
from moe_debugger.query.vocabulary import TokenTexts

__all__ = ["QuerySource", "execute", "run_query"]


# Columns that need the router's probabilities, which are kept as sums over all tokens and never of single rows.
_OF_PROBABILITIES = frozenset({"mean_probability", "balancing_loss"})


class QuerySource(Protocol):
    """What can be asked: a session, a recording, or what the fleet holds of a session."""

    @property
    def capabilities(self) -> Capabilities:
        """What there is, and why the rest is not."""
        ...

    @property
    def layers(self) -> Sequence[LayerFacts]:
        """The MoE layers."""
        ...

    def num_rows(self, scope: Scope) -> int:
        """Return how many token rows `batches` would read; an upper bound."""
        ...

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        """Yield token rows in order, with the captured columns `raw`; those outside of `scope` may be left out."""
        ...

    def table(self, plan: Plan) -> Table | None:
        """Return the rows of a subject without reading token rows; None where they must be read."""
        ...

    def notes(self, plan: Plan) -> Sequence[str]:
        """Return what the rows do not cover, in sentences."""
        ...


def run_query(text: str | bytes, source: QuerySource, limits: Limits = LOCAL_LIMITS) -> QueryResult:
    """Return what a query finds in a source.

    Raises:
        QueryError: the query has a fault; the error has the place.
        QueryCostError: it would read more than `limits` allow.
    """
    query = parse(text)
    shown = text if isinstance(text, str) else text.decode("utf-8")
    return execute(bind(query, shown, source.capabilities, limits), source, limits)


def execute(plan: Plan, source: QuerySource, limits: Limits = LOCAL_LIMITS) -> QueryResult:
    """Return what a plan finds in a source; see `run_query`."""
    run = _Run(plan, source, limits)
    try:
        return run.result()
    except TooManyGroupsError as error:
        raise QueryCostError(
            f"the query makes {error.number:,} {error.what}, and at most {limits.max_groups:,} are kept at a time; "
            f"{_advice(plan)}",
            plan.text,
        ) from None


@dataclass(slots=True)
class _Progress:
    started: float
    num_expected: int
    num_read: int = 0


class _Run:
    def __init__(self, plan: Plan, source: QuerySource, limits: Limits) -> None:
        self._plan = plan
        self._source = source
        self._limits = limits
        self._progress = _Progress(time.monotonic(), 0)
        self._gather: Rows | Groups = gatherer(plan, limits.max_groups)
        self._ended_early = False

    def result(self) -> QueryResult:
        plan, source = self._plan, self._source
        if plan.subject.name == "tokens":
            self._scan_tokens()
        else:
            table = source.table(plan)
            if table is None:
                sums = derived(plan.subject.name, source.layers, frozenset(plan.columns), self._limits.max_groups)
                self._scan_into(sums)
                table = sums.table(self._probabilities())
            else:
                self._progress.num_read += table.num_rows
                self._check_rows(table.num_rows, 0)
            self._take(table)
        gathered = self._gather.finish()
        num_shown = len(gathered.columns[0].values) if gathered.columns else 0
        return QueryResult(
            query=str(plan.query),
            subject=plan.subject.name,
            columns=gathered.columns,
            num_matched=None if self._ended_early else gathered.num_matched,
            is_truncated=self._ended_early or num_shown < gathered.num_matched,
            num_rows_scanned=self._progress.num_read,
            elapsed_s=time.monotonic() - self._progress.started,
            notes=(*_what_is_not(plan, source.layers), *_not_of_rows(plan), *source.notes(plan)),
        )

    def _probabilities(self) -> RoutingState | None:
        """Return the sums of the router's probabilities, where a column needs them and all rows are counted."""
        plan, read = self._plan, self._source.capabilities.probabilities
        if read is None or plan.row_condition is not None or not _OF_PROBABILITIES & set(plan.columns):
            return None
        return read()

    def _take(self, table: Table) -> None:
        columns = table.columns.__getitem__
        rows = np.arange(table.num_rows)
        if self._plan.condition is not None:
            rows = np.flatnonzero(matches(self._plan.condition, columns, table.num_rows))
        self._gather.add(columns, rows)

    def _scan_tokens(self) -> None:
        plan = self._plan
        raw = raw_columns(frozenset(plan.columns))
        # Reading ends with the limit, so how much there is does not matter: how much is read does.
        may_end_early = not plan.order and not plan.is_grouped
        for batch, columns in self._rows(raw, is_checked=not may_end_early):
            mask = ~batch.raw["is_padding"]
            if plan.condition is not None:
                mask &= matches(plan.condition, columns, len(batch))
            self._gather.add(columns, np.flatnonzero(mask))
            if self._gather.is_full:
                self._ended_early = True
                return

    def _scan_into(self, sums: Derived) -> None:
        plan = self._plan
        raw = raw_columns(plan.row_columns) | sums.raw
        absent = self._source.capabilities.absent.get("tokens", {})
        if "*" in absent:
            # The same sums without rows: there are none to be counted.
            return
        for batch, columns in self._rows(raw, is_checked=True):
            mask = ~batch.raw["is_padding"]
            if plan.scope.layers is not None:
                mask &= np.isin(batch.raw["layer_index"], list(plan.scope.layers))
            if plan.row_condition is not None:
                mask &= matches(plan.row_condition, columns, len(batch))
            sums.add(batch, np.flatnonzero(mask))

    def _rows(self, raw: frozenset[str], *, is_checked: bool) -> "Iterator[tuple[RowBatch, RowColumns]]":
        source, plan, progress = self._source, self._plan, self._progress
        progress.num_expected = source.num_rows(plan.scope)
        width = row_bytes(raw, max((layer.top_k for layer in source.layers), default=1))
        if is_checked:
            self._check_rows(progress.num_expected, width)
        vocabulary = source.capabilities.vocabulary
        token_texts = None if vocabulary is None else TokenTexts(vocabulary)
        modules = module_labels(source.layers)
        for batch in source.batches(raw, plan.scope):
            progress.num_read += len(batch)
            self._check_rows(progress.num_read, width, is_running=True)
            elapsed = time.monotonic() - progress.started
            if elapsed > self._limits.max_seconds:
                raise QueryCostError(
                    f"the query was stopped after {elapsed:.1f} s with {progress.num_read:,} of about "
                    f"{progress.num_expected:,} rows read; the cap is {self._limits.max_seconds:g} s; {_advice(plan)}",
                    plan.text,
                )
            yield batch, RowColumns(batch, modules, token_texts)

    def _check_rows(self, num_rows: int, width: int, *, is_running: bool = False) -> None:
        verb = "has read" if is_running else "would read about"
        limits, size = self._limits, num_rows * width
        if num_rows > limits.max_rows:
            raise QueryCostError(
                f"the query {verb} {num_rows:,} rows, and the cap is {limits.max_rows:,}; {_advice(self._plan)}",
                self._plan.text,
            )
        if size > limits.max_bytes:
            raise QueryCostError(
                f"the query {verb} {num_rows:,} rows or {size / 1e6:,.0f} MB of columns, and the cap is "
                f"{limits.max_bytes / 1e6:,.0f} MB; {_advice(self._plan)}",
                self._plan.text,
            )


def _advice(plan: Plan) -> str:
    """Return how to narrow a query, by bounds that it does not have yet."""
    usable = {column.name for column in plan.subject.columns if column.place in (Place.ROWS, Place.BOTH)}
    usable |= set(plan.subject.names) if plan.subject.name == "tokens" else set()
    given = {
        "layer": plan.scope.layers is not None,
        "request": plan.scope.requests is not None,
        "step": plan.scope.first_step is not None or plan.scope.last_step is not None,
    }
    examples = {"layer": "`layer = 3`", "request": '`request = "..."`', "step": "`step between 100 and 200`"}
    missing = [examples[name] for name, is_given in given.items() if not is_given and name in usable]
    if missing:
        return f"narrow it with {' or '.join(missing)} in `where`, joined by `and`"
    return "narrow it further, or record the session and query the recording where it lies"


def _what_is_not(plan: Plan, layers: Sequence[LayerFacts]) -> list[str]:
    """Say which layers and experts were asked for and are none: else no rows look as if they were quiet ones."""
    if not layers:
        return []
    known = sorted(layer.layer_index for layer in layers)
    asked = plan.asked("layer")
    # Slots may hold identity experts, whose ids come after those of the routed ones.
    sizes = [
        layer.num_experts + (layer.num_identity_experts if plan.subject.name in ("tokens", "requests") else 0)
        for layer in layers
        if not asked & set(known) or layer.layer_index in asked
    ]
    notes = []
    if none := sorted(asked - set(known)):
        notes.append(f"there is no layer {_some(none)}: the layers are {known[0]} to {known[-1]}")
    if none := sorted(expert for expert in plan.asked("expert") if not 0 <= expert < max(sizes)):
        notes.append(f"there is no expert {_some(none)}: the experts are 0 to {max(sizes) - 1}")
    return notes


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8]))


def _not_of_rows(plan: Plan) -> list[str]:
    """Say which columns are missing because the query chooses tokens."""
    if plan.row_condition is None:
        return []
    return [
        f"`{name}` is missing: the router's probabilities are kept as sums over all tokens, and `where` chooses some"
        for name in sorted(_OF_PROBABILITIES & set(plan.columns))
    ]
