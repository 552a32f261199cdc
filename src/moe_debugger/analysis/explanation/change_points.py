"""Where a series changed: one level, a ramp, another level, fitted by least squares.

Glossary:
    model       y[t] = before + (after - before) * clip((t - a) / (b - a), 0, 1) + noise, with a < b. A jump is the ramp
                with b = a + 1; a slow collapse is one with b far from a. t counts values, not steps.
    onset       the first value that is no longer at the level from before: a + 1, and from there back over all values
                that lie more than two standard deviations on the new level's side. A collapse begins slowly (entropy is
                flat near balance), where a straight ramp starts too late.
    evidence    n_eff / 2 * ln(RSS without a change / RSS with it): the log-likelihood ratio under Gaussian noise of
                unknown variance. n_eff = n (1 - r) / (1 + r), r the lag-1 correlation of the residuals (0 at least),
                because neighbouring steps resemble each other.
    penalty     what the best of all places must beat: `PENALTY` * ln n (a level, a and b were chosen freely).

Example: 0, 0, 0, 0, 0, 1, 1, 1, 1, 1 has its onset at 5 and ends its ramp there, before 0, after 1.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["PENALTY", "Change", "find_change"]

Floats = npt.NDArray[np.float64]

# Three free parameters at ln n each; docs/explanations.md has the rate of false changes on noise.
PENALTY = 3.0
# Values before and after, at least.
_MIN_SIDE = 4
_MAX_CORRELATION = 0.95
# Half of the 95 % quantile of chi-squared with one degree of freedom: profile likelihood of the onset.
_PROFILE = 1.92
_SIGMAS = 2.0
# Relative to the sum of squares: below it the fit is exact, and the ratio would be infinite.
_EXACT = 1e-9


@dataclass(frozen=True, slots=True)
class Change:
    """A change of level; indices count the values of the series.

    Attributes:
        onset: first value after the level from before was left.
        end: first value on the new level (the last value of the series where it may still go on).
        first_onset, last_onset: where it may lie: the 95 % profile-likelihood interval of a + 1, begun as early as the
            first of the values in a row that lie on the new level's side of `before`.
        before, after: the fitted levels.
        log_likelihood_ratio: evidence in nats, of `num_effective` effective values.
        penalty: what it takes to be a change.
        correlation: lag-1 correlation of the residuals.
    """

    onset: int
    end: int
    first_onset: int
    last_onset: int
    before: float
    after: float
    log_likelihood_ratio: float
    penalty: float
    num_effective: float
    correlation: float

    @property
    def is_significant(self) -> bool:
        """True where the evidence exceeds the penalty."""
        return self.log_likelihood_ratio > self.penalty


def find_change(values: npt.ArrayLike, *, direction: int = 0) -> Change | None:
    """Return the best change of `values`, significant or not; O(n^2) time and memory.

    Args:
        values: [n] finite numbers in order.
        direction: 1 = rises only, -1 = falls only, 0 = both.

    Returns:
        None where there are fewer than 8 values, they are all equal, or none goes in `direction`.

    Raises:
        InvalidInputError: values have another shape or are not finite, or direction is none of these.
    """
    y = np.asarray(values, np.float64)
    if y.ndim != 1 or not np.isfinite(y).all():
        raise InvalidInputError(f"values: shape {y.shape}, expected finite numbers [n]")
    if direction not in (-1, 0, 1):
        raise InvalidInputError(f"direction {direction}: expected -1, 0 or 1")
    n = y.size
    if n < 2 * _MIN_SIDE:
        return None
    centred = y - y.mean()
    total = float(centred @ centred)
    if total <= _EXACT * max(1.0, float(y @ y)):
        return None
    first_a, last_a = _MIN_SIDE - 1, n - 1 - _MIN_SIDE
    a = np.arange(first_a, last_a + 1)
    slope, explained = _ramps(centred, a)
    if direction:
        explained = np.where(np.sign(slope) == direction, explained, -1.0)
    best = int(explained.argmax())
    row, column = divmod(best, explained.shape[1])
    if explained[row, column] <= 0:
        return None
    onset_a, end = int(a[row]), column
    ramp = np.clip((np.arange(n) - onset_a) / (end - onset_a), 0.0, 1.0)
    rise = float(slope[row, column])
    before = float(y.mean() - rise * ramp.mean())
    residuals = y - before - rise * ramp
    correlation = _lag_one(residuals)
    effective = n * (1 - correlation) / (1 + correlation)
    floor = _EXACT * total
    per_a = effective / 2 * np.log(total / np.maximum(total - explained.max(axis=1).clip(0.0), floor))
    ratio = float(per_a[row])
    near = np.flatnonzero(per_a >= ratio - _PROFILE)
    departure = np.sign(rise) * (y - before)
    onset = _walk_back(departure, onset_a + 1, _SIGMAS * _spread(departure[: onset_a + 1]) + _EXACT * abs(rise))
    return Change(
        onset=onset,
        end=end,
        first_onset=_walk_back(departure, min(onset, int(a[near[0]]) + 1), _EXACT * abs(rise)),
        last_onset=int(a[near[-1]]) + 1,
        before=before,
        after=before + rise,
        log_likelihood_ratio=ratio,
        penalty=PENALTY * math.log(n),
        num_effective=effective,
        correlation=correlation,
    )


def _ramps(centred: Floats, a: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return slope and explained sum of squares of the ramp from each a (rows) to each b = 0..n-1 (columns).

    Both sums over a ramp have closed forms in cumulative sums of y and t y; where b <= a the explained sum is -1.
    """
    n = centred.size
    t = np.arange(n)
    sums = np.r_[0.0, np.cumsum(centred)]
    moments = np.r_[0.0, np.cumsum(centred * t)]
    length = t[None, :] - a[:, None]
    is_ramp = length > 0
    length = np.where(is_ramp, length, 1)
    # Inside of the ramp lie t = a+1 .. b-1; from b on the ramp is 1.
    inside = sums[t][None, :] - sums[a + 1][:, None]
    inside_moment = moments[t][None, :] - moments[a + 1][:, None]
    xy = (inside_moment - a[:, None] * inside) / length + (sums[n] - sums[t])[None, :]
    ones = (n - t)[None, :]
    x = (length - 1) / 2 + ones
    xx = (length - 1) * (2 * length - 1) / (6 * length) + ones - x * x / n
    is_fit = is_ramp & (xx > 1e-12)
    xx = np.where(is_fit, xx, 1.0)
    return np.where(is_fit, xy / xx, 0.0), np.where(is_fit, xy * xy / xx, -1.0)


def _walk_back(departure: Floats, start: int, limit: float) -> int:
    """Return the first of the values before `start`, without a gap, that departed by more than `limit`."""
    while start > 1 and departure[start - 1] > limit:
        start -= 1
    return start


def _spread(values: Floats) -> float:
    """Return the standard deviation of the values, from their median absolute deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _lag_one(residuals: Floats) -> float:
    power = float(residuals @ residuals)
    if power <= 0:
        return 0.0
    return min(max(float(residuals[1:] @ residuals[:-1]) / power, 0.0), _MAX_CORRELATION)
