"""A model of what the experts of one layer cost: time = a + b x rows + c x active experts. Pure numpy.

Where one call computes all experts, no clock sees a single one. The model is fitted on the time of the whole calls, and
what it says of one expert (b x its rows + c where it has any) is an estimate. How far it can be trusted is what it
says of calls that it was not fitted to.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_CALLS", "CostModel", "estimate_experts", "expert_call_model", "fit_cost_model", "relative_error"]

Floats = npt.NDArray[np.float64]
# Below this nothing is fitted: a fifth of it is held out.
MIN_CALLS = 20
# Every fifth call is held out; neighbours share the machine's mood, so they are taken from the whole run.
_HOLD_OUT = 5

# The first calls of a process pay for loading and for caches.
_WARM_UP = 2
_MAX_FITTED = 500


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of a layer's experts; nanoseconds.

    Attributes:
        base: a, of a call whatever it computes.
        per_row: b, of one row in one expert.
        per_expert: c, of an expert that has any row.
        num_fitted, num_held_out: calls that it was fitted to, and judged on.
        held_out_error: median of |said - measured| / measured over the held-out calls.
        held_out_bias: median of (said - measured) / measured over them.
        note: what it could not tell apart; empty where nothing.
        reason: why there is no model; empty where there is one.
    """

    base: float = float("nan")
    per_row: float = float("nan")
    per_expert: float = float("nan")
    num_fitted: int = 0
    num_held_out: int = 0
    held_out_error: float = float("nan")
    held_out_bias: float = float("nan")
    note: str = ""
    reason: str = ""

    @property
    def is_fitted(self) -> bool:
        """Whether there is a model."""
        return not self.reason

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
        times of calls alike; one that says why not where there are fewer than 20 calls. Where all calls had the same
        rows and active experts there is c alone, which then holds the fixed cost too, and `note` says so.
    """
    x, z, y = (np.asarray(each, np.float64)[_WARM_UP:] for each in (rows, active, times))
    is_usable = np.isfinite(y) & (y > 0)
    x, z, y = x[is_usable], z[is_usable], y[is_usable]
    if len(y) < MIN_CALLS:
        return CostModel(reason=f"{len(y)} calls after the warm-up, {MIN_CALLS} are needed")
    if z.max() == 0:
        return CostModel(reason="no expert had any row")
    is_held = np.arange(len(y)) % _HOLD_OUT == _HOLD_OUT - 1
    design = np.stack([np.ones(len(y)), x, z], axis=1)
    note = ""
    if np.ptp(x) == 0 and np.ptp(z) == 0:
        design[:, :2] = 0.0
        note = "all calls had the same rows and active experts: each active expert's share holds the fixed cost too"
    elif np.ptp(z) == 0:
        # Constant: it is part of the fixed cost.
        design[:, 2] = 0.0
    fitted = _non_negative(*_typical(design[~is_held], y[~is_held]))
    error = design[is_held] @ fitted / y[is_held] - 1
    return CostModel(
        base=float(fitted[0]),
        per_row=float(fitted[1]),
        per_expert=float(fitted[2]),
        num_fitted=int((~is_held).sum()),
        num_held_out=int(is_held.sum()),
        held_out_error=float(np.median(np.abs(error))),
        held_out_bias=float(np.median(error)),
        note=note,
    )


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
