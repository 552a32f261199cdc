"""Capacity and drops: which slots found their expert full, and where in a text.

Glossary, for one layer:
    C           capacity of an expert in one forward: ceil(cf T K / E), T the valid tokens of that forward.
    demand d_e  slots of valid tokens that wanted expert e: routed ones and dropped ones (by `intended_expert_ids`).
    overflow    sum over experts of max(0, d_e - C), summed over forwards: what a capacity factor of cf would drop.

Many layers drop nothing by construction ("dropless"). A share of 0 would claim that drops were possible and did not
happen, so there the answer is "not applicable".

Example: E = 2, K = 1, one forward of 4 tokens that want 0, 0, 0, 1, cf = 1: C = 2, overflow 1 of 4 slots = 0.25. Served
in the order of the batch it is the third token's.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.analyze import _running_index
from moe_debugger.analysis.intervals import Interval
from moe_debugger.analysis.token_rows import (
    DecisionRows,
    Ints,
    LayerRows,
    block_sums,
    plain,
    ratio_interval,
)
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["CapacityDrops", "PositionDrops", "capacity_drops", "expert_capacity"]

_NAN = float("nan")
_NO_INTERVAL = Interval(_NAN, _NAN)
_POSITION_BOUNDS = (0, 16, 64, 256, 1024, 4096, 16384)


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Return C = ceil(cf T K / E), slots per expert and forward (Fedus et al. 2021, eq. 3; with K, GShard)."""
    # Twelve digits: 1.1 * 10 is 11 slots, not the 12 that its binary rounding would give.
    return math.ceil(round(capacity_factor * num_tokens * top_k / num_experts, 12))


def balanced_overflow(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> float:
    """Return the overflow, in slots, that a perfectly balanced router has on average in one forward of T tokens.

    An expert's demand is then binomial (T draws of chance K/E), so this is E * sum_x>C (x - C) P(x).
    """
    capacity = expert_capacity(capacity_factor, num_tokens, top_k, num_experts)
    if capacity >= num_tokens:
        return 0.0
    if top_k >= num_experts:
        return float(num_experts * (num_tokens - capacity))
    chance = top_k / num_experts
    logs = np.r_[0.0, np.cumsum(np.log(np.arange(1, num_tokens + 1)))]
    x = np.arange(capacity + 1, num_tokens + 1)
    log_p = logs[num_tokens] - logs[x] - logs[num_tokens - x] + x * math.log(chance)
    log_p += (num_tokens - x) * math.log1p(-chance)
    return float(num_experts * np.dot(x - capacity, np.exp(log_p)))


@dataclass(frozen=True, slots=True)
class PositionDrops:
    """Drops of tokens at positions `first`..`last` (None = to the end) of their requests; NaN = not applicable.

    Attributes:
        num_slots: T K of these tokens, the sample size.
        dropped_share: `num_dropped` / `num_slots`; `interval`: 95 %, from blocks of requests.
        overflow_share: `num_overflow` / `num_slots`, with each forward served in the order of its batch, slot by slot.
    """

    first: int
    last: int | None
    num_slots: int
    num_dropped: int
    dropped_share: float
    interval: Interval
    num_overflow: int
    overflow_share: float


@dataclass(frozen=True, slots=True)
class CapacityDrops:
    """Drops of one layer: what was dropped, and what a capacity factor would drop. NaN = not applicable.

    Attributes:
        num_slots: T K, slots of valid tokens: the sample size.
        dropped_share: `num_dropped` / `num_slots`; `interval`: 95 %, from blocks of requests. `not_applicable` says why
            it is NaN: nothing was captured that would tell, or the layer is dropless as far as is known.
        capacity_factor: cf as given, NaN where none was.
        num_forwards: forwards, each with a capacity of its own.
        overflow_share: `num_overflow` / `num_slots`. `overflow_not_applicable` says why it is NaN.
        balanced_overflow_share: what a perfectly balanced router would overflow on average in forwards of these sizes:
            small forwards overflow by chance.
        by_position: by position in the request; empty without the column `position`.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_tokens: int
    num_slots: int
    num_dropped: int
    dropped_share: float
    interval: Interval
    not_applicable: str
    capacity_factor: float
    num_forwards: int
    num_overflow: int
    overflow_share: float
    balanced_overflow_share: float
    overflow_not_applicable: str
    by_position: tuple[PositionDrops, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return plain(self)


def capacity_drops(
    decisions: Mapping[str, Any],
    *,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    num_identity_experts: int | Sequence[int] = 0,
    capacity_factor: float | Sequence[float | None] | None = None,
    position_bounds: Sequence[int] = _POSITION_BOUNDS,
) -> dict[int, CapacityDrops]:
    """Return the drops of each layer, by layer index; O(n k log(n k)).

    Args:
        decisions: columns as for `analyze`. Used where present: `slot_status`, `intended_expert_ids`, `forward_index`,
            `rank`, `position`, `is_padding`, `request_id`, `phase`, `step`.
        num_experts: E, or one per layer index.
        top_k: k, or one per layer index.
        num_identity_experts: Z, or one per layer index.
        capacity_factor: cf of the layers, or one per layer index; None = no capacity is known.
        position_bounds: first positions of the buckets, ascending from 0.

    Raises:
        InvalidInputError: a column is missing or of another length, ids or an argument are out of range.
    """
    bounds = [int(bound) for bound in position_bounds]
    if not bounds or bounds[0] != 0 or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise InvalidInputError(f"position_bounds is {bounds}, expected ascending positions from 0 on")
    rows = DecisionRows(decisions, num_experts=num_experts, top_k=top_k, num_identity_experts=num_identity_experts)
    forwards = rows.forward_codes()
    return {
        index: _drops(rows, rows.layer(index), _factor(capacity_factor, index), forwards, bounds)
        for index in rows.shapes
    }


def _factor(capacity_factor: float | Sequence[float | None] | None, layer_index: int) -> float | None:
    factor: Any = capacity_factor
    if isinstance(factor, Sequence | np.ndarray) and not isinstance(factor, str) and np.ndim(factor):
        if layer_index >= len(factor):
            raise InvalidInputError(f"capacity_factor has {len(factor)} entries, but the rows have layer {layer_index}")
        factor = factor[layer_index]
    if factor is None:
        return None
    if not isinstance(factor, int | float | np.integer | np.floating) or not 0 < factor < math.inf:
        raise InvalidInputError(
            f"capacity_factor is {factor!r}, expected a number above 0, None (no capacity), or one for each layer index"
        )
    return float(factor)


def _drops(
    rows: DecisionRows, layer: LayerRows, factor: float | None, forwards: Ints | None, bounds: list[int]
) -> CapacityDrops:
    shape, tokens = layer.shape, len(layer.row)
    is_dropped = np.zeros(layer.expert_ids.shape, np.bool_)
    if layer.slot_status is not None:
        is_dropped = layer.slot_status == pb.SLOT_STATUS_DROPPED
    dropped = is_dropped.sum(axis=1)
    num_dropped, num_slots = int(dropped.sum()), tokens * shape.top_k
    reason = _why_not(layer, num_dropped, factor)
    over = np.zeros(tokens, np.int64)
    num_forwards, balanced = 0, _NAN
    demand = _demand(rows, layer, is_dropped)
    over_reason = _why_no_overflow(tokens, factor, forwards, demand is None)
    if factor is not None and forwards is not None and demand is not None and not over_reason:
        over, sizes = _overflow(layer, demand, forwards[layer.row], factor)
        num_forwards = len(sizes)
        kinds, times = np.unique(sizes, return_counts=True)
        each = [balanced_overflow(factor, size, shape.top_k, shape.num_experts) for size in kinds.tolist()]
        balanced = float(np.dot(each, times)) / num_slots
    every = np.ones(tokens, np.bool_)
    whole = _of_bucket(layer, every, dropped, over, (0, None), not reason, not over_reason)
    position = rows.column("position")
    buckets: list[PositionDrops] = []
    if position is not None:
        bucket = np.searchsorted(bounds, position[layer.row].astype(np.int64), side="right") - 1
        spans = [(first, after - 1) for first, after in itertools.pairwise(bounds)]
        for number, span in enumerate([*spans, (bounds[-1], None)]):
            is_own = bucket == number
            if is_own.any():
                buckets.append(_of_bucket(layer, is_own, dropped, over, span, not reason, not over_reason))
    return CapacityDrops(
        layer_index=shape.layer_index,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_tokens=tokens,
        num_slots=num_slots,
        num_dropped=num_dropped,
        dropped_share=whole.dropped_share,
        interval=whole.interval,
        not_applicable=reason,
        capacity_factor=_NAN if factor is None else factor,
        num_forwards=num_forwards,
        num_overflow=whole.num_overflow,
        overflow_share=whole.overflow_share,
        balanced_overflow_share=balanced,
        overflow_not_applicable=over_reason,
        by_position=tuple(buckets),
    )


def _why_not(layer: LayerRows, num_dropped: int, factor: float | None) -> str:
    if not len(layer.row):
        return "no valid tokens"
    if layer.slot_status is None:
        return "slot_status was not captured, so dropped slots cannot be told from others"
    if not num_dropped and factor is None:
        return "no slot was dropped and no capacity factor was given: dropless as far as is known"
    return ""


def _why_no_overflow(tokens: int, factor: float | None, forwards: Ints | None, is_demand_unknown: bool) -> str:
    if not tokens:
        return "no valid tokens"
    if factor is None:
        return "no capacity factor was given (dropless layers have none)"
    if forwards is None:
        return "capacity is that of one forward, and forward_index was not given"
    if is_demand_unknown:
        return "the experts that dropped slots were meant for are not known (intended_expert_ids)"
    return ""


def _demand(rows: DecisionRows, layer: LayerRows, is_dropped: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32] | None:
    """Return the routed expert that each slot wanted, [n, k], -1 = none; None where a dropped slot's is unknown."""
    experts = layer.shape.num_experts
    wanted = np.where(layer.is_load, layer.expert_ids, -1).astype(np.int32)
    if not is_dropped.any():
        return wanted
    intended = rows.column("intended_expert_ids")
    if intended is None:
        return None
    meant = intended[layer.row][:, : layer.shape.top_k][is_dropped]
    if meant.min() < 0 or meant.max() >= experts:
        return None
    wanted[is_dropped] = meant
    return wanted


def _overflow(layer: LayerRows, demand: npt.NDArray[np.int32], forwards: Ints, factor: float) -> tuple[Ints, Ints]:
    """Return how many slots of each token come too late, [n], and the tokens of each forward."""
    shape = layer.shape
    _, forward, sizes = np.unique(forwards, return_inverse=True, return_counts=True)
    kinds, kind = np.unique(sizes, return_inverse=True)
    of_kind = [expert_capacity(factor, size, shape.top_k, shape.num_experts) for size in kinds.tolist()]
    capacity = np.asarray(of_kind, np.int64)[kind]
    row, slot = np.nonzero(demand >= 0)
    queue = forward[row] * shape.num_experts + demand[row, slot]
    # Any integers will do as groups, and these may be more than 32 bits.
    is_late = _running_index(queue) >= capacity[forward[row]]  # type: ignore[arg-type]
    return np.bincount(row[is_late], minlength=len(demand)).astype(np.int64), sizes.astype(np.int64)


def _of_bucket(
    layer: LayerRows,
    is_own: npt.NDArray[np.bool_],
    dropped: Ints,
    over: Ints,
    span: tuple[int, int | None],
    has_drops: bool,
    has_overflow: bool,
) -> PositionDrops:
    block, num_slots = layer.block[is_own], int(is_own.sum()) * layer.shape.top_k
    num_dropped, num_overflow = int(dropped[is_own].sum()), int(over[is_own].sum())
    interval = _NO_INTERVAL
    if has_drops:
        slots = block_sums(block, layer.num_blocks) * layer.shape.top_k
        interval = ratio_interval(block_sums(block, layer.num_blocks, dropped[is_own]), slots)
    return PositionDrops(
        first=span[0],
        last=span[1],
        num_slots=num_slots,
        num_dropped=num_dropped,
        dropped_share=num_dropped / num_slots if has_drops else _NAN,
        interval=interval,
        num_overflow=num_overflow,
        overflow_share=num_overflow / num_slots if has_overflow else _NAN,
    )
