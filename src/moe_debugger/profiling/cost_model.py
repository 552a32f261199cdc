"""A model of what the experts of one layer cost: time = a + b x rows + c x active experts. Pure numpy.

Where one call computes all experts, no clock sees a single one. The model is fitted on the time of the whole calls, and
what it says of one expert (b x its rows + c where it has any) is an estimate. How far it can be trusted is what it
says of calls that it was not fitted to.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import numpy as np
import numpy.typing as npt

__all__ = [
    "MIN_CALLS",
    "CostModel",
    "MergedCost",
    "SizeError",
    "estimate_experts",
    "expert_call_model",
    "fit_cost_model",
    "held_out",
    "relative_error",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
# Below this nothing is fitted: a fifth of it is held out.
MIN_CALLS = 20
# One call in five is held out, drawn among calls alike. A fixed rhythm over the run would miss what comes in a rhythm:
# with 20 new tokens a prompt every prefill would be fitted, or every one held out.
_HOLD_OUT = 5
_SEED = 0

# The first calls of a process pay for loading and for caches.
_WARM_UP = 2
_MAX_FITTED = 500
# What is left of a column beside the others, as a share of its size, below which they are one.
_SAME = 1e-6


class MergedCost(StrEnum):
    """What the calls could not tell apart, since it never changed on its own."""

    NOTHING = "nothing"
    ALL = "all"
    ROWS = "rows"
    ACTIVE = "active"
    ROWS_AND_ACTIVE = "rows_and_active"


_NOTES = {
    MergedCost.NOTHING: "",
    MergedCost.ALL: "all calls had the same rows and active experts: each active expert's share holds the fixed cost "
    "too",
    MergedCost.ROWS: "all calls had the same rows: what a row costs is part of the fixed cost, and is in no expert's "
    "time",
    MergedCost.ACTIVE: "all calls had the same number of active experts: what each of them costs is part of the fixed "
    "cost, and is in no expert's time",
    MergedCost.ROWS_AND_ACTIVE: "rows and active experts only changed together: what an active expert costs is part of "
    "the cost of rows and of the fixed cost",
}


@dataclass(frozen=True, slots=True)
class SizeError:
    """How far a model is off for calls of one size: those whose rows lie between the same powers of 4.

    Attributes:
        min_rows, max_rows: of these calls.
        num_calls, num_held_out: of them, and those that it was judged on.
        time_share: of the time of all calls, by medians.
        error: median of |said - measured| / measured over those held out; NaN where none was.
        bias: median of (said - measured) / measured.
    """

    min_rows: int
    max_rows: int
    num_calls: int
    num_held_out: int
    time_share: float
    error: float
    bias: float

    @property
    def rows(self) -> str:
        """The range of rows in words."""
        ends = f"{self.min_rows:,}" + ("" if self.min_rows == self.max_rows else f" to {self.max_rows:,}")
        return f"{ends} row{'' if self.max_rows == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of a layer's experts; nanoseconds.

    Attributes:
        base: a, of a call whatever it computes.
        per_row: b, of one row in one expert.
        per_expert: c, of an expert that has any row.
        num_fitted, num_held_out: calls that it was fitted to, and judged on.
        held_out_error: median of |said - measured| / measured over the held-out calls of each size, and the mean of
            those weighted by the time of calls of that size: decode steps, however many, say nothing of prefills.
        held_out_bias: the same of (said - measured) / measured.
        sizes: both by size of the calls, the smallest first.
        merged: what it could not tell apart.
        reason: why there is no model; empty where there is one.
    """

    base: float = float("nan")
    per_row: float = float("nan")
    per_expert: float = float("nan")
    num_fitted: int = 0
    num_held_out: int = 0
    held_out_error: float = float("nan")
    held_out_bias: float = float("nan")
    sizes: tuple[SizeError, ...] = ()
    merged: MergedCost = MergedCost.NOTHING
    reason: str = ""

    @property
    def is_fitted(self) -> bool:
        """Whether there is a model."""
        return not self.reason

    @property
    def note(self) -> str:
        """What it could not tell apart, and the calls on which nothing judged it; empty where nothing."""
        unknown = [size.rows for size in self.sizes if not size.num_held_out]
        lines = [_NOTES[self.merged]]
        if unknown:
            lines.append(f"how far it is off for calls with {', '.join(unknown)} is not known: too few to hold one out")
        return "; ".join(line for line in lines if line)

    @property
    def worst(self) -> SizeError | None:
        """The size of calls for which it is off most; None where nothing was held out."""
        return max((size for size in self.sizes if size.num_held_out), key=lambda size: size.error, default=None)

    def time(self, rows: Floats, active: Floats) -> Floats:
        """Return the time of calls with so many rows in so many active experts."""
        return self.base + self.per_row * rows + self.per_expert * active


def fit_cost_model(rows: npt.ArrayLike, active: npt.ArrayLike, times: npt.ArrayLike) -> CostModel:
    """Fit the model to calls of one layer, in the order in which they ran.

    Args:
        rows: [n] rows over all experts (assignments) of each call.
        active: [n] experts with any row.
        times: [n] measured nanoseconds.

    Returns:
        The model with the smallest sum of squared relative errors whose coefficients are not negative, over the median
        times of calls alike; one that says why not where there are fewer than 20 calls. A cost that the fitted calls
        cannot tell from another is 0, and `merged` says which. Where all of them had the same rows and active experts
        there is c alone, which then holds the fixed cost too.
    """
    x, z, y = (np.asarray(each, np.float64) for each in (rows, active, times))
    is_usable = np.isfinite(y) & (y > 0)
    x, z, y, is_warm = x[is_usable], z[is_usable], y[is_usable], (np.arange(len(y)) >= _WARM_UP)[is_usable]
    if is_warm.sum() < MIN_CALLS:
        return CostModel(reason=f"{is_warm.sum()} calls after the warm-up, {MIN_CALLS} are needed")
    if z.max() == 0:
        return CostModel(reason="no expert had any row")
    is_held = np.zeros(len(y), bool)
    is_held[is_warm] = held_out(x[is_warm], z[is_warm])
    is_fitted = is_warm & ~is_held
    design = np.stack([np.ones(len(y)), x, z], axis=1)
    merged, columns = _separable(x[is_fitted], z[is_fitted])
    design[:, [column for column in range(3) if column not in columns]] = 0.0
    fitted = _non_negative(*_typical(design[is_fitted], y[is_fitted]))
    errors = _errors(x, y, design @ fitted / y - 1, is_held)
    judged = [each for each in errors if each.num_held_out]
    weights = np.array([each.time_share for each in judged])
    return CostModel(
        base=float(fitted[0]),
        per_row=float(fitted[1]),
        per_expert=float(fitted[2]),
        num_fitted=int(is_fitted.sum()),
        num_held_out=int(is_held.sum()),
        held_out_error=float(np.average([each.error for each in judged], weights=weights)),
        held_out_bias=float(np.average([each.bias for each in judged], weights=weights)),
        sizes=errors,
        merged=merged,
    )


def _sizes(rows: Floats) -> Ints:
    """Return [n] the power of 4 at or below each number of rows; 0 rows are with 1."""
    return np.floor(np.log2(np.maximum(rows, 1)) / 2).astype(np.int64)


def held_out(rows: Floats, active: Floats) -> Flags:
    """Return [n] which calls a model is judged on: of each size one in five, and one where there are two to nine.

    Calls with the same rows [n] and active experts [n] are drawn from alike; the draw is the same for the same calls.
    """
    rng = np.random.default_rng(_SEED)
    is_held = np.zeros(len(rows), bool)
    # Calls alike lie together, in a random order: each run of five then holds out one of (nearly) each kind.
    order = np.lexsort((rng.random(len(rows)), active, rows))
    for own in np.split(order, np.flatnonzero(np.diff(_sizes(rows[order]))) + 1):
        if len(own) > 1:
            ends = np.linspace(0, len(own), max(1, len(own) // _HOLD_OUT) + 1).astype(np.int64)
            is_held[own[ends[:-1] + (rng.random(len(ends) - 1) * np.diff(ends)).astype(np.int64)]] = True
    return is_held


def _separable(rows: Floats, active: Floats) -> tuple[MergedCost, tuple[int, ...]]:
    """Return what calls with these rows and active experts cannot tell apart, and the columns that they can."""
    same_rows, same_active = np.ptp(rows) == 0, np.ptp(active) == 0
    if same_rows and same_active:
        return MergedCost.ALL, (2,)
    if same_rows:
        return MergedCost.ROWS, (0, 2)
    if same_active:
        return MergedCost.ACTIVE, (0, 1)
    alike = np.unique(np.stack([rows, active], axis=1), axis=0)
    x, z = (alike - alike.mean(axis=0)).T
    # What of z is no multiple of x.
    left = z - x * (x @ z) / (x @ x)
    if left @ left <= _SAME * (z @ z):
        return MergedCost.ROWS_AND_ACTIVE, (0, 1)
    return MergedCost.NOTHING, (0, 1, 2)


def _errors(rows: Floats, times: Floats, error: Floats, is_held: Flags) -> tuple[SizeError, ...]:
    size = _sizes(rows)
    nan, spent = float("nan"), {int(one): float(np.median(times[size == one])) for one in np.unique(size)}
    total = sum(took * int((size == one).sum()) for one, took in spent.items())
    found = []
    for one, took in spent.items():
        own = size == one
        held = error[own & is_held]
        found.append(
            SizeError(
                min_rows=int(rows[own].min()),
                max_rows=int(rows[own].max()),
                num_calls=int(own.sum()),
                num_held_out=len(held),
                time_share=took * int(own.sum()) / total,
                error=float(np.median(np.abs(held))) if len(held) else nan,
                bias=float(np.median(held)) if len(held) else nan,
            )
        )
    return tuple(found)


def _typical(design: Floats, times: Floats) -> tuple[Floats, Floats, Floats]:
    """Return distinct rows of the design, the median time of each, and how many calls it stands for.

    What disturbs a call (another process, a collection of garbage) only ever makes it longer, and by a lot: a mean over
    calls that ought to be alike would be the disturbance's.
    """
    kinds, kind, numbers = np.unique(design, axis=0, return_inverse=True, return_counts=True)
    ordered = times[np.lexsort((times, kind.reshape(-1)))]
    first = np.cumsum(numbers) - numbers
    medians = (ordered[first + (numbers - 1) // 2] + ordered[first + numbers // 2]) / 2
    return kinds, medians, numbers.astype(np.float64)


def _non_negative(design: Floats, times: Floats, numbers: Floats) -> Floats:
    """Return the coefficients of least squared relative error, none below 0: the best of all subsets of columns.

    Args:
        design: [n, p].
        times: [n].
        numbers: [n] calls that each stands for.
    """
    share = np.sqrt(numbers)
    weighted = design / times[:, None] * share[:, None]
    # Columns of like size, for the solver's sake.
    scale = np.sqrt((weighted**2).sum(axis=0))
    columns = [int(column) for column in np.flatnonzero(scale)]
    best, best_loss = np.zeros(design.shape[1]), np.inf
    for size in range(len(columns), 0, -1):
        for chosen in (list(each) for each in combinations(columns, size)):
            found = np.linalg.lstsq(weighted[:, chosen] / scale[chosen], share, rcond=None)[0]
            loss = float(((weighted[:, chosen] / scale[chosen] @ found - share) ** 2).sum())
            # A tie goes to the model with more terms, which came first.
            if (found >= 0).all() and loss < best_loss * (1 - 1e-12):
                best, best_loss = np.zeros(design.shape[1]), loss
                best[chosen] = found / scale[chosen]
    return best


def estimate_experts(model: CostModel, rows: npt.ArrayLike) -> Floats:
    """Return the estimated time of each expert, [..., E] nanoseconds: what it adds to its call.

    Args:
        rows: [..., E] rows of each expert; an expert without any takes no time.
    """
    counts = np.asarray(rows, np.float64)
    return np.where(counts > 0, model.per_row * counts + model.per_expert, 0.0)


def relative_error(said: npt.ArrayLike, measured: npt.ArrayLike) -> float:
    """Return the median of |said - measured| / measured where something was measured; NaN without any."""
    a, b = np.asarray(said, np.float64), np.asarray(measured, np.float64)
    is_measured = b > 0
    if not is_measured.any():
        return float("nan")
    return float(np.median(np.abs(a[is_measured] / b[is_measured] - 1)))


def expert_call_model(rows: npt.ArrayLike, times: npt.ArrayLike) -> tuple[float, float] | None:
    """Fit time = c + b x rows to measured calls of single experts.

    Args:
        rows: [n] rows of each call, above 0.
        times: [n] measured nanoseconds.

    Returns:
        (c, b) of least relative error, none below 0; None where fewer than 20 calls were measured.
    """
    x, y = np.asarray(rows, np.float64), np.asarray(times, np.float64)
    x, y = x[y > 0], y[y > 0]
    if len(y) < MIN_CALLS:
        return None
    # Thousands of calls say no more than an even sample of them.
    step = max(1, len(y) // _MAX_FITTED)
    fitted = _non_negative(*_typical(np.stack([np.ones(len(y)), x], axis=1)[::step], y[::step]))
    return float(fitted[0]), float(fitted[1])
