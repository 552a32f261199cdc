"""Rows of `experts`, `layers`, `steps` and `requests` from token rows: sums that are added batch by batch.

What they hold is bounded by layers x experts, by steps x layers or by requests x layers, never by rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import RoutingState, fold_decisions, merge_all
from moe_debugger.query.rows import LayerFacts, RowBatch
from moe_debugger.query.table import Column, Labels
from moe_debugger.query.tables import Table, expert_table, layer_table, request_table
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["Derived", "TooManyGroupsError", "derived", "module_labels", "step_table", "steps_of_state"]

Array = npt.NDArray[Any]
_NUM_PHASES = 5
# A stack whose tokens are a request's tokens; no name means it too.
_MAIN_STACKS = ("decoder", "")


class TooManyGroupsError(Exception):
    """More groups than are kept; `what` and `number` say which and how many."""

    def __init__(self, what: str, number: int) -> None:
        self.what, self.number = what, number
        super().__init__(f"{number:,} {what}")


class Derived(Protocol):
    """Sums of token rows that become a table.

    Attributes:
        raw: captured columns that are needed.
    """

    raw: frozenset[str]

    def add(self, batch: RowBatch, rows: Array) -> None:
        """Count the rows of a batch with the indexes `rows`."""
        ...

    def table(self, probabilities: RoutingState | None = None) -> Table:
        """Return the table of what was counted.

        Args:
            probabilities: sums of the router's probabilities of the counted rows; None = not known.
        """
        ...


def derived(subject: str, layers: Sequence[LayerFacts], columns: frozenset[str], max_groups: int) -> Derived:
    """Return the sums that make a subject's table of token rows.

    Args:
        columns: of the subject, that are wanted.
    """
    match subject:
        case "experts":
            return _Experts(layers, with_weights="mean_gate_weight" in columns)
        case "layers":
            return _Layers(layers)
        case "steps":
            return _Steps(layers, max_groups)
        case _:
            return _Requests(layers, max_groups)


def _whole_or(rows: Array, batch: RowBatch) -> Any:
    """Return an index of `rows` that copies nothing where they are all rows of the batch."""
    return slice(None) if len(rows) == len(batch) else rows


def _flat(values: Array, is_load: Array) -> Array:
    """Return the values of the slots that are load, [m]."""
    return values.reshape(-1) if is_load.all() else values[is_load]


class _Shapes:
    """E of each layer by its index, and where its experts stand among all of them."""

    def __init__(self, layers: Sequence[LayerFacts]) -> None:
        size = max((layer.layer_index for layer in layers), default=-1) + 1
        self.num_experts = np.zeros(size, np.int64)
        for layer in layers:
            self.num_experts[layer.layer_index] = layer.num_experts
        self.first = np.concatenate([[0], np.cumsum(self.num_experts)])

    def load(self, batch: RowBatch, some: Array) -> tuple[Array, Array, Array]:
        """Return the layers [n], the expert ids [n, k] and which slots are load [n, k], of some rows."""
        rows = _whole_or(some, batch)
        layer = batch.raw["layer_index"][rows]
        ids = batch.raw["expert_ids"][rows]
        is_load = (ids >= 0) & (ids < self.num_experts[layer][:, None])
        status = batch.raw.get("slot_status")
        if status is not None:
            status = status[rows]
            is_load &= (status == pb.SLOT_STATUS_ROUTED) | (status == pb.SLOT_STATUS_UNSPECIFIED)
        return layer, ids, is_load


class _Experts:
    def __init__(self, layers: Sequence[LayerFacts], *, with_weights: bool) -> None:
        self._layers = layers
        self._shapes = _Shapes(layers)
        self._counts = np.zeros(int(self._shapes.first[-1]), np.int64)
        self._weights = np.zeros(len(self._counts)) if with_weights else None
        more = {"gate_weights"} if with_weights else set()
        self.raw = frozenset({"expert_ids", "slot_status", *more})

    def add(self, batch: RowBatch, rows: Array) -> None:
        layer, ids, is_load = self._shapes.load(batch, rows)
        cells = _flat(self._shapes.first[layer][:, None] + ids, is_load)
        self._counts += np.bincount(cells, minlength=len(self._counts))
        if self._weights is not None:
            weights = _flat(batch.raw["gate_weights"][_whole_or(rows, batch)], is_load)
            self._weights += np.bincount(cells, weights, minlength=len(self._counts))

    def table(self, probabilities: RoutingState | None = None) -> Table:
        counts, weights = {}, {}
        for layer in self._layers:
            place = slice(self._shapes.first[layer.layer_index], self._shapes.first[layer.layer_index + 1])
            counts[layer.layer_index] = self._counts[place]
            if self._weights is not None:
                weights[layer.layer_index] = self._weights[place]
        known = {} if probabilities is None else probabilities.layers
        means = {index: layer.mean_probability for index, layer in known.items()}
        return expert_table(self._layers, counts, weight_sums=weights, mean_probability=means)


# What the metrics of a layer need; requests, positions and steps are for intervals and histories.
_FOLDED = frozenset(
    {
        "layer_index",
        "is_padding",
        "expert_ids",
        "slot_status",
        "margin",
        "router_entropy",
        "router_logsumexp",
        "top1_probability",
    }
)


class _Layers:
    raw = _FOLDED

    def __init__(self, layers: Sequence[LayerFacts]) -> None:
        self._layers = layers
        self._state = RoutingState({})
        size = max((layer.layer_index for layer in layers), default=-1) + 1
        self._sizes = {"num_experts": [1] * size, "top_k": [1] * size, "num_identity_experts": [0] * size}
        for layer in layers:
            self._sizes["num_experts"][layer.layer_index] = layer.num_experts
            self._sizes["top_k"][layer.layer_index] = max(1, layer.top_k)
            self._sizes["num_identity_experts"][layer.layer_index] = layer.num_identity_experts

    def add(self, batch: RowBatch, rows: Array) -> None:
        columns = {name: column[rows] for name, column in batch.raw.items() if name in _FOLDED}
        part = fold_decisions(columns, **self._sizes)
        self._state = merge_all([self._state, part]) if self._state.layers else part

    def table(self, probabilities: RoutingState | None = None) -> Table:
        state = self._state
        if probabilities is not None:
            # Of the layers that were counted alone: a condition on layers may have left the others unread.
            known = {index: layer for index, layer in probabilities.layers.items() if index in state.layers}
            state = merge_all([state, RoutingState(known)])
        return layer_table(self._layers, state)


class _Steps:
    raw = frozenset({"step", "expert_ids", "slot_status"})

    def __init__(self, layers: Sequence[LayerFacts], max_groups: int) -> None:
        self._layers = layers
        self._shapes = _Shapes(layers)
        self._width = max((layer.num_experts for layer in layers), default=1)
        self._max_groups = max_groups
        self._tokens: dict[tuple[int, int], int] = {}
        self._counts: dict[tuple[int, int], Array] = {}

    def add(self, batch: RowBatch, rows: Array) -> None:
        if not len(rows):
            return
        layer, ids, is_load = self._shapes.load(batch, rows)
        step = batch.raw["step"][rows]
        steps, step_place = np.unique(step, return_inverse=True)
        size = len(self._shapes.num_experts)
        groups, place = np.unique(step_place * size + layer, return_inverse=True)
        tokens = np.bincount(place, minlength=len(groups))
        cells = (place[:, None] * self._width + ids)[is_load]
        counts = np.bincount(cells, minlength=len(groups) * self._width).reshape(len(groups), self._width)
        for at, group in enumerate(groups.tolist()):
            key = int(steps[group // size]), group % size
            if key in self._counts:
                self._tokens[key] += int(tokens[at])
                self._counts[key] = self._counts[key] + counts[at]
            else:
                self._tokens[key], self._counts[key] = int(tokens[at]), counts[at].copy()
        if len(self._counts) > self._max_groups:
            raise TooManyGroupsError("steps x layers", len(self._counts))

    def table(self, probabilities: RoutingState | None = None) -> Table:
        keys = sorted(self._counts)
        counts = np.array([self._counts[key] for key in keys], np.int64).reshape(len(keys), self._width)
        layer = np.array([key[1] for key in keys], np.int64)
        return step_table(
            np.array([key[0] for key in keys], np.int64),
            layer,
            np.array([self._tokens[key] for key in keys], np.int64),
            counts,
            self._shapes.num_experts[layer],
        )


def step_table(step: Array, layer: Array, tokens: Array, counts: Array, num_experts: Array) -> Table:
    """Return the rows of `steps`.

    Args:
        step, layer, tokens, num_experts: [n].
        counts: [n, W] assignments of each expert; W is the largest of `num_experts`, unused past a layer's own.
    """
    total = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = counts / total[:, None]
        entropy = -np.where(counts > 0, share * np.log(np.where(counts > 0, share, 1.0)), 0.0).sum(axis=1)
        effective = np.where(total > 0, np.exp(entropy), np.nan)
        max_load = np.where(total > 0, counts.max(axis=1, initial=0) * num_experts / total, np.nan)
    hottest = counts.argmax(axis=1) if counts.shape[1] else np.zeros(len(step), np.int64)
    return Table(
        {
            "step": Column(step),
            "layer": Column(layer),
            "tokens": Column(tokens),
            "assignments": Column(total),
            "effective_experts": Column(effective),
            "max_load": Column(max_load),
            "hottest_expert": Column(hottest, total == 0),
            "used_experts": Column(np.count_nonzero(counts, axis=1)),
        },
        len(step),
    )


def steps_of_state(layers: Sequence[LayerFacts], state: RoutingState) -> tuple[Table, tuple[str, ...]]:
    """Return the rows of `steps` from sums, and what is to be said of them: buckets of steps stand for steps."""
    width = max((layer.num_experts for layer in layers), default=1)
    step, index, tokens, counts, sizes = [], [], [], [], []
    notes: dict[str, None] = {}
    for layer in layers:
        found = state.layers.get(layer.layer_index)
        series = None if found is None else found.load_series
        if series is None or not len(series.num_tokens):
            continue
        n = len(series.num_tokens)
        own = np.zeros((n, width), np.int64)
        own[:, : layer.num_experts] = series.counts
        step.append(series.first_steps.astype(np.int64))
        index.append(np.full(n, layer.layer_index, np.int64))
        tokens.append(series.num_tokens.astype(np.int64))
        counts.append(own)
        sizes.append(np.full(n, layer.num_experts, np.int64))
        if series.width > 1:
            notes[f"each row is a bucket of {series.width} steps, named by its first one"] = None
        if not series.has_one_clock:
            notes["the sources count steps by themselves: equal numbers are not the same moment"] = None
    if not step:
        none = np.zeros(0, np.int64)
        return step_table(none, none, none, np.zeros((0, width), np.int64), none), ()
    order = np.lexsort((np.concatenate(index), np.concatenate(step)))
    columns = [np.concatenate(part)[order] for part in (step, index, tokens, counts, sizes)]
    return step_table(*columns), tuple(notes)


class _Requests:
    raw = frozenset({"request_index", "phase", "step"})

    def __init__(self, layers: Sequence[LayerFacts], max_groups: int) -> None:
        self._size = max((layer.layer_index for layer in layers), default=-1) + 1
        self._side = {layer.layer_index for layer in layers if layer.stack not in _MAIN_STACKS}
        self._max_groups = max_groups
        self._places: dict[str, int] = {}
        self._tokens: dict[tuple[int, int], Array] = {}
        self._steps: dict[int, tuple[int, int]] = {}

    def add(self, batch: RowBatch, rows: Array) -> None:
        if not len(rows):
            return
        own = batch.raw["request_index"][rows].astype(np.int64)
        phase = np.minimum(batch.raw["phase"][rows], _NUM_PHASES - 1).astype(np.int64)
        cells = (own * self._size + batch.raw["layer_index"][rows]) * _NUM_PHASES + phase
        found, counts = np.unique(cells, return_counts=True)
        for cell, count in zip(found.tolist(), counts.tolist(), strict=True):
            request, layer = divmod(cell // _NUM_PHASES, self._size)
            key = self._place(batch.request_ids[int(request)]), layer
            if key not in self._tokens:
                self._tokens[key] = np.zeros(_NUM_PHASES, np.int64)
            self._tokens[key][cell % _NUM_PHASES] += count
        if "step" in batch.raw:
            order = np.argsort(own, kind="stable")
            starts = np.flatnonzero(np.r_[True, np.diff(own[order]) > 0])
            steps = batch.raw["step"][rows][order].astype(np.int64)
            lows, highs = np.minimum.reduceat(steps, starts), np.maximum.reduceat(steps, starts)
            for at, low, high in zip(own[order][starts].tolist(), lows.tolist(), highs.tolist(), strict=True):
                place = self._place(batch.request_ids[int(at)])
                before = self._steps.get(place, (low, high))
                self._steps[place] = min(before[0], low), max(before[1], high)
        if len(self._tokens) > self._max_groups:
            raise TooManyGroupsError("requests x layers", len(self._tokens))

    def _place(self, request_id: str) -> int:
        return self._places.setdefault(request_id, len(self._places))

    def table(self, probabilities: RoutingState | None = None) -> Table:
        by_layer: list[dict[int, Array]] = [{} for _ in self._places]
        for (place, layer), tokens in self._tokens.items():
            by_layer[place][layer] = tokens
        tokens = np.zeros((len(by_layer), 3), np.int64)
        for place, layers in enumerate(by_layer):
            # An encoder's tokens are not added to a decoder's.
            main = [each for layer, each in layers.items() if layer not in self._side] or list(layers.values())
            tokens[place] = [
                max(int(each.sum()) for each in main),
                max(int(each[pb.PHASE_PREFILL]) for each in main),
                max(int(each[pb.PHASE_DECODE]) for each in main),
            ]
        steps = np.array([self._steps.get(place, (-1, -1)) for place in range(len(by_layer))], np.int64).reshape(-1, 2)
        return request_table(list(self._places), tokens, steps)


def module_labels(layers: Sequence[LayerFacts]) -> Labels:
    """Return the modules' names, at the places of the layers' indexes."""
    size = max((layer.layer_index for layer in layers), default=-1) + 1
    names = {layer.layer_index: layer.module for layer in layers}
    return Labels([names.get(index, "") for index in range(size)])
