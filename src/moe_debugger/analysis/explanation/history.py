"""A layer's loads over steps, and where it crossed a limit.

Steps are joined into buckets that hold enough assignments to be compared (10 for each expert) and are few enough to be
searched (160), so that a decode step of three tokens is not taken for a collapse.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.change_points import Change, find_change
from moe_debugger.analysis.findings import Finding, FindingKind
from moe_debugger.analysis.state import LayerState, RoutingState
from moe_debugger.errors import InvalidInputError

__all__ = [
    "COLLAPSES",
    "LayerHistory",
    "Limit",
    "histories_from_decisions",
    "histories_from_state",
    "is_of_single_steps",
]

Floats = npt.NDArray[np.float64]

MAX_BUCKETS = 160
_ASSIGNMENTS_PER_EXPERT = 10
# A layer has crossed its limit where so many buckets in a row are beyond it.
_RUN = 3
# A layer beyond its limit has recovered where so many buckets in a row are within it.
_RECOVERY = 8
# A series that falls begins to count once it has risen so far from its lowest to its highest value (warm-up).
_SETTLED = 0.75

# Kinds that show in falling effective experts.
COLLAPSES = (FindingKind.ROUTER_COLLAPSE, FindingKind.COLLAPSE_WARNING, FindingKind.LOAD_IMBALANCE)


class LayerHistory:
    """Loads of one layer over steps.

    Args:
        layer_index: of the MoE layer.
        steps: [n] first step of each row, ascending.
        counts: [n, E] assignments to each expert.
        num_tokens: [n] valid tokens; None = the number is not known.
        width: steps of a row.

    Raises:
        InvalidInputError: shapes do not fit, or steps do not ascend.
    """

    def __init__(
        self,
        layer_index: int,
        steps: npt.ArrayLike,
        counts: npt.ArrayLike,
        num_tokens: npt.ArrayLike | None = None,
        *,
        width: int = 1,
    ) -> None:
        self.layer_index = layer_index
        own, table = np.asarray(steps).astype(np.int64), np.asarray(counts).astype(np.float64)
        tokens = table.sum(axis=1) if num_tokens is None and table.ndim == 2 else np.asarray(num_tokens, np.float64)
        if own.ndim != 1 or table.ndim != 2 or not table.shape[1] or not len(own) == len(table) == tokens.size:
            raise InvalidInputError(
                f"layer {layer_index}: steps {own.shape}, counts {table.shape} and tokens {tokens.shape} do not fit; "
                "expected [n], [n, E] and [n]"
            )
        if (np.diff(own) <= 0).any():
            raise InvalidInputError(f"layer {layer_index}: steps do not ascend; give each step once, in order")
        self.raw_steps, self.raw_counts = own, table
        self.last_step: int = int(own[-1]) + width - 1 if len(own) else 0
        starts = _bucket_starts(table.sum(axis=1), _ASSIGNMENTS_PER_EXPERT * table.shape[1])
        self.steps = own[starts]
        self.counts: Floats = np.add.reduceat(table, starts, axis=0) if len(starts) else table[:0]
        self.num_tokens: Floats = np.add.reduceat(tokens, starts) if len(starts) else tokens[:0]

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts.shape[1])

    @property
    def num_steps(self) -> int:
        """Steps from the first to the last."""
        return self.last_step - int(self.steps[0]) + 1 if len(self.steps) else 0

    @cached_property
    def effective_experts(self) -> Floats:
        """[n] float64, exp of the entropy of each bucket's load; 1..E."""
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        logs = np.log(np.where(share > 0, share, 1.0))
        effective: Floats = np.exp(-(share * logs).sum(axis=1))
        return effective

    @cached_property
    def load_ratio(self) -> Floats:
        """[n, E] float64, each expert's share over the fair share 1/E."""
        ratio: Floats = self.counts * self.num_experts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        return ratio

    @cached_property
    def fall(self) -> tuple[Change | None, int]:
        """The best fall of ln(effective experts), in buckets after the second value, the first that was looked at.

        Kept, because the findings of all layers ask for it.
        """
        start = self.settled_from()
        return find_change(np.log(self.effective_experts[start:]), direction=-1), start

    def bucket_end(self, bucket: int) -> int:
        """Return the last step of a bucket."""
        end: int = int(self.steps[bucket + 1]) - 1 if bucket + 1 < len(self.steps) else self.last_step
        return end

    def settled_from(self) -> int:
        """Return the first bucket that counts: where effective experts have come three quarters of the way up.

        A router that begins uneven and then spreads its load has not collapsed in its warm-up.
        """
        values = self.effective_experts
        if not len(values):
            return 0
        low, high = float(values.min()), float(values.max())
        return int(np.argmax(values >= low + _SETTLED * (high - low)))


@dataclass(frozen=True, slots=True)
class Limit:
    """A finding's rule, in a form that can be tried on any layer and bucket.

    Attributes:
        metric: "effective_experts" or "load_ratio".
        value: limit as a part of all experts (effective experts), or a load ratio.
        is_upper: True where beyond means above.
        expert_id: of a load ratio; None = the largest (or smallest) of all experts.
    """

    metric: str
    value: float
    is_upper: bool
    expert_id: int | None = None

    @classmethod
    def of(cls, finding: Finding, num_experts: int) -> "Limit | None":
        """Return the limit of `finding`, read from its evidence; None where its rule is not one of loads."""
        kind = finding.kind
        if is_of_single_steps(finding):
            number = _number_in_rule(finding, ("max_over_mean_batch_lower",))
            return None if number is None else cls("load_ratio", number, True)
        if kind in COLLAPSES:
            number = _number_in_rule(finding, ("effective_experts", "effective_experts_upper"))
            return None if number is None else cls("effective_experts", number / num_experts, False)
        if kind is FindingKind.HOT_EXPERT:
            return cls("load_ratio", _number_in_rule(finding, ("load_ratio",)) or 3.0, True, finding.expert_id)
        if kind is FindingKind.COLD_EXPERT:
            return cls("load_ratio", _number_in_rule(finding, ("load_ratio",)) or 0.2, False, finding.expert_id)
        if kind is FindingKind.DEAD_EXPERT:
            # 1 % of the fair share, the line below which an expert is called dead.
            return cls("load_ratio", 0.01, False, finding.expert_id)
        return None

    def values(self, history: LayerHistory, *, is_own_layer: bool) -> Floats:
        """Return [n] what is compared with the limit; on other layers than the finding's, the most extreme expert."""
        if self.metric == "effective_experts":
            effective: Floats = history.effective_experts / history.num_experts
            return effective
        if is_own_layer and self.expert_id is not None and self.expert_id < history.num_experts:
            own: Floats = history.load_ratio[:, self.expert_id]
            return own
        extreme: Floats = history.load_ratio.max(axis=1) if self.is_upper else history.load_ratio.min(axis=1)
        return extreme

    def last_crossing(self, history: LayerHistory, *, is_own_layer: bool) -> tuple[int, int] | None:
        """Return since when the layer was within the limit, and the bucket in which it then crossed it; None without.

        The crossing is the first of 3 buckets in a row beyond the limit, behind warm-up and behind the last recovery
        (8 in a row within it); 0 where the layer was beyond it from the first bucket on. A layer that recovered and
        stayed within the limit has none, but for the finding's own, which crossed it by the finding.
        """
        values = self.values(history, is_own_layer=is_own_layer)
        is_beyond = values > self.value if self.is_upper else values < self.value
        start = history.settled_from() if self.metric == "effective_experts" else 0
        crossed = _runs(is_beyond[start:], _RUN)
        recovered = _runs(~is_beyond[start:], _RECOVERY)
        if not len(crossed) or (not is_own_layer and len(recovered) and recovered[-1] > crossed[-1]):
            return None
        recovered = recovered[recovered < crossed[-1]]
        if not len(recovered):
            # The highest value of a layer's warm-up is its first that counts: beyond there, it was so before, too.
            return (start, start + int(crossed[0])) if crossed[0] else (0, 0)
        fell_before = crossed[crossed < recovered[-1]]
        since = int(fell_before[-1]) + _RUN if len(fell_before) else 0
        return start + since, start + int(crossed[crossed > recovered[-1]][0])


def _runs(is_true: npt.NDArray[np.bool_], length: int) -> npt.NDArray[np.intp]:
    """Return the places from which on `length` values in a row are true."""
    if len(is_true) < length:
        return np.zeros(0, np.intp)
    return np.flatnonzero(np.lib.stride_tricks.sliding_window_view(is_true, length).all(axis=1))


def is_of_single_steps(finding: Finding) -> bool:
    """Return whether an imbalance is one of single steps: the hot expert changes from step to step."""
    return finding.kind is FindingKind.LOAD_IMBALANCE and any(
        row.metric == "max_over_mean_batch" for row in finding.evidence
    )


def histories_from_state(state: RoutingState) -> dict[int, LayerHistory]:
    """Return the history that each layer's state holds; layers without one, or with several clocks, are left out."""
    found = {}
    for index, layer in state.layers.items():
        history = _history_of(layer)
        if history is not None:
            found[index] = history
    return found


def _history_of(layer: LayerState) -> LayerHistory | None:
    series = layer.load_series
    # Equal step numbers of independent sources mean nothing.
    if series is None or not len(series.first_steps) or not series.has_one_clock:
        return None
    index = layer.shape.layer_index
    return LayerHistory(index, series.first_steps, series.counts, series.num_tokens, width=series.width)


def histories_from_decisions(
    columns: Mapping[str, Any], shapes: Iterable[tuple[int, int]], *, step_column: str = "step"
) -> dict[int, LayerHistory]:
    """Return the history of each layer from rows in the form of `session.decisions()`.

    Args:
        columns: `layer_index`, `expert_ids` and the step column; `is_padding` and `slot_status` are used where present.
        shapes: (layer_index, num_experts) of each layer.
        step_column: "step" in training; "forward_index" where all rows have one step.

    Raises:
        InvalidInputError: a column is missing or has another length.
    """
    from moe_debugger.planning import loads_from_decisions

    layer_index = np.asarray(columns["layer_index"]) if "layer_index" in columns else np.zeros(0)
    found = {}
    for index, num_experts in shapes:
        rows = layer_index == index
        if not rows.any():
            continue
        names = ("expert_ids", step_column, "is_padding", "slot_status")
        part = {name: np.asarray(columns[name])[rows] for name in names if name in columns}
        part["layer_index"] = np.zeros(int(rows.sum()), np.int64)
        loads = loads_from_decisions(part, num_experts=num_experts, num_layers=1, step_column=step_column)
        if len(loads.steps):
            found[index] = LayerHistory(index, loads.steps, loads.counts[:, 0])
    return found


def _number_in_rule(finding: Finding, metrics: tuple[str, ...]) -> float | None:
    for metric in metrics:
        for row in finding.evidence:
            if row.metric == metric and row.rule:
                try:
                    return float(row.rule.lstrip("<>= "))
                except ValueError:
                    continue
    return None


def _bucket_starts(assignments: Floats, needed: float) -> npt.NDArray[np.intp]:
    """Return the first row of each bucket: so many rows that all fit, and that each has the assignments it needs."""
    n = len(assignments)
    rows = max(1, -(-n // MAX_BUCKETS))
    starts: list[int] = []
    begin, total = 0, 0.0
    for row in range(n):
        total += float(assignments[row])
        if row - begin + 1 >= rows and total >= needed:
            starts.append(begin)
            begin, total = row + 1, 0.0
    # What is left over at the end belongs to the last bucket.
    return np.asarray(starts, np.intp)
