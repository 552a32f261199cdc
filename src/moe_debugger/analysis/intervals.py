"""How sure a number is: intervals and tests from blocks of whole requests, never from tokens as if independent.

A healthy router whose preference is shared within a document shows z-scores of 16 to 87 against an independent-token
null. So the unit of sampling here is the block (see `moe_debugger.analysis.state`), and the design effect says how much
wider that makes the interval.

Blocks are whole requests where there are enough of them, else stretches of positions, else stretches of steps. The last
two know nothing of what all stretches of one request share, so their intervals are too narrow where requests differ:
rules say which blocks they rest on, and claim less from them.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.state import LayerState

__all__ = [
    "MIN_BLOCKS",
    "MIN_UNITS",
    "BlockKind",
    "Blocks",
    "Interval",
    "benjamini_hochberg",
    "design_effect",
    "effective_number",
    "jackknife",
    "row_entropies",
    "share_tests",
    "student_quantile",
    "student_upper_tail",
    "variance_blocks",
]

_Floats = npt.NDArray[np.float64]
# 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054
# Below this many blocks (Kish's effective number) a variance between blocks says nothing.
MIN_BLOCKS = 4.0
# Requests, or else stretches of positions or steps, that a variance should rest on.
MIN_UNITS = 20


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided 95 % interval; NaN where blocks do not allow one."""

    lower: float
    upper: float


_UNKNOWN = Interval(float("nan"), float("nan"))


def student_quantile(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t (Cornish-Fisher expansion; within 1 % for 4 degrees or more)."""
    z, v = _Z, max(degrees, 1.0)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def student_upper_tail(t: _Floats, degrees: float) -> _Floats:
    """Return P(T > t) for Student's t, by Wallace's normal approximation (Wallace 1959, within 1 % of the tail)."""
    v = max(degrees, 1.0)
    # Without any variance t is as large as numbers are; its square must be one, too.
    t = np.clip(t, -1e100, 1e100)
    z = np.sign(t) * np.sqrt(v * np.log1p(np.square(t) / v)) * (8 * v + 1) / (8 * v + 3)
    return np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in z.ravel().tolist()]).reshape(z.shape)


def row_entropies(table: _Floats) -> _Floats:
    """Return the load entropy in nats of each row of counts [n, E]."""
    p = table / table.sum(axis=1, keepdims=True)
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    entropies: _Floats = -(p * logs).sum(axis=1)
    return entropies


class BlockKind(StrEnum):
    """What the blocks of a variance are made of."""

    REQUESTS = "requests"
    POSITIONS = "positions"
    STEPS = "steps"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks that a layer's variances come from.

    Attributes:
        table: [b, E] float64, load of each block that holds any.
        kind: what a block is.
    """

    table: _Floats
    kind: BlockKind

    @property
    def effective_number(self) -> float:
        """Effective number of blocks of unequal size (Kish 1965): as many equal ones would be as good."""
        return effective_number(self.table.sum(axis=1))


def variance_blocks(
    state: LayerState,
    *,
    num_requests: float | None = None,
    min_requests: int = MIN_UNITS,
    prefers_positions: bool = False,
) -> Blocks:
    """Return the blocks of `state`: whole requests where there are enough, else stretches of positions, else of steps.

    Args:
        num_requests: different requests behind the rows; None = enough of them.
        min_requests: how many are enough.
        prefers_positions: True where requests repeat each other, so that they are no independent ones.
    """
    requests = _occupied(state.block_counts)
    enough = num_requests is None or num_requests >= min_requests
    if enough and not prefers_positions and effective_number(requests.sum(axis=1)) >= MIN_BLOCKS:
        return Blocks(requests, BlockKind.REQUESTS)
    if state.position_counts is not None:
        positions = _occupied(state.position_counts)
        # Blocks are hashed: 20 stretches occupy about 17 of 64.
        if len(positions) >= min(16, len(state.position_counts) * 2 // 3):
            return Blocks(positions, BlockKind.POSITIONS)
    if state.load_series is not None and not requests.size and len(state.load_series.counts) >= MIN_UNITS:
        groups = np.array_split(state.load_series.counts.astype(np.float64), MIN_UNITS)
        return Blocks(_occupied(np.stack([group.sum(axis=0) for group in groups])), BlockKind.STEPS)
    return Blocks(np.zeros((0, state.shape.num_experts)), BlockKind.NONE)


def _occupied(table: npt.NDArray[np.generic]) -> _Floats:
    floats: _Floats = table.astype(np.float64)
    occupied: _Floats = floats[floats.sum(axis=1) > 0]
    return occupied


def effective_number(sizes: _Floats) -> float:
    """Return the effective number of blocks of unequal size (Kish 1965): as many equal ones would be as good."""
    return float(sizes.sum() ** 2 / np.square(sizes).sum()) if len(sizes) else 0.0


def jackknife(blocks: Blocks, per_token: float) -> tuple[Interval, float]:
    """Return the 95 % interval of effective experts, and the design effect of the shares; `per_token` as there.

    Delete-one-block jackknife (Efron 1982) on the load entropy, whose interval is then exponentiated. The upper bound
    starts from the jackknife's bias-corrected entropy where that is higher: sampling makes entropy look low.

    NaN for both with fewer than 4 blocks' worth of requests.
    """
    table, kish = blocks.table, blocks.effective_number
    if kish < MIN_BLOCKS:
        return _UNKNOWN, float("nan")
    num, total = len(table), table.sum(axis=0)
    entropy = float(row_entropies(total[None, :])[0])
    left_out = row_entropies(total - table)
    error = math.sqrt((num - 1) / num * float(np.square(left_out - left_out.mean()).sum()))
    corrected = num * entropy - (num - 1) * float(left_out.mean())
    width = student_quantile(kish - 1) * error
    highest = math.log(table.shape[1])
    upper = min(max(entropy, corrected) + width, highest)
    interval = Interval(math.exp(max(entropy - width, 0.0)), math.exp(upper))
    return interval, design_effect(table, per_token)


def _share_variance(table: _Floats, total: _Floats) -> _Floats:
    """Return the variance of each share, linearised over blocks (ratio estimator; Cochran 1977, eq. 6.13)."""
    share = total / total.sum()
    residual = table - share * table.sum(axis=1, keepdims=True)
    num = len(table)
    variance: _Floats = num / (num - 1) * np.square(residual).sum(axis=0) / total.sum() ** 2
    return variance


def design_effect(table: _Floats, per_token: float) -> float:
    """Return the variance of the shares between blocks over that of independent tokens (Kish 1965); NaN without load.

    Args:
        table: [b, E] load per block.
        per_token: routed slots of a token, `LayerState.routed_per_token`; k where every slot is routed.
    """
    total = table.sum(axis=0)
    if len(table) < 2 or not total.any():
        return float("nan")
    share = total / total.sum()
    # a draws of each token without replacement. The variance of a share p is the sum over independent tokens of
    # E (x - p a)^2 = p E a - p^2 E a^2, over N^2, which is p (1 - p a') / N with a' = E a^2 / E a.
    chosen = np.clip(share * per_token, 0, 1)
    independent = float((chosen * (1 - chosen)).sum() / (per_token * total.sum()))
    return float(_share_variance(table, total).sum()) / independent if independent > 0 else float("nan")


def share_tests(blocks: Blocks, per_token: float, *, hot: float, cold: float) -> tuple[_Floats, _Floats] | None:
    """Test each expert's share against the effect floors `hot` / E and `cold` / E.

    The null is "the long-run share lies between the floors", so natural skew inside them is no evidence at all. The
    standard error is the larger of the blocks' own and of that of a share at the floor under the layer's design
    effect (`per_token` as there): an expert that no block happened to use has no variance of its own.

    Returns:
        p-values [E] for "above hot / E", and [E] for "below cold / E"; None where there are too few blocks.
    """
    table, kish = blocks.table, blocks.effective_number
    if kish < MIN_BLOCKS:
        return None
    total = table.sum(axis=0)
    experts = table.shape[1]
    share = total / total.sum()
    variance = _share_variance(table, total)
    effect = design_effect(table, per_token)
    effect = 1.0 if math.isnan(effect) else max(effect, 1.0)

    def tail(floor: float, sign: float) -> _Floats:
        at_floor = effect * floor * (1 - min(floor, 1.0)) / float(total.sum())
        error = np.sqrt(np.maximum(variance, at_floor))
        error = np.maximum(error, np.finfo(np.float64).tiny)
        return student_upper_tail(sign * (share - floor) / error, kish - 1)

    return tail(hot / experts, 1.0), tail(cold / experts, -1.0)


def benjamini_hochberg(p_values: _Floats, rate: float) -> npt.NDArray[np.bool_]:
    """Return which of `p_values` are discoveries at false discovery rate `rate` (Benjamini & Hochberg 1995)."""
    flat = p_values.ravel()
    order = np.argsort(flat)
    passes = flat[order] <= rate * np.arange(1, flat.size + 1) / max(flat.size, 1)
    found = np.zeros(flat.size, np.bool_)
    if passes.any():
        found[order[: int(np.flatnonzero(passes).max()) + 1]] = True
    return found.reshape(p_values.shape)
