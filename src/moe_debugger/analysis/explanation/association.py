"""How strongly something observed goes with an onset, in nats: the scores that all rules share.

Example: 300 steps were seen and the load began to fall at step 120, give or take nothing. A setting that jumped once,
at step 119, would have come so close by chance with probability 2 / 300: score ln 150 = 5.0.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.model import Onset

__all__ = ["CAP", "Correlation", "onset_score", "rank_correlation"]

Floats = npt.NDArray[np.float64]

# A score counts for no more than odds of 20 to 1 when weights are made: observing is not intervening.
CAP = math.log(20)
_MIN_PAIRS = 8


def onset_score(changed_at: int, onset: Onset | None, num_steps: int, *, num_changes: int = 1) -> float:
    """Return -ln p, p the chance that a change at a random step had come so close before the onset.

    ``p = min(1, num_changes * (lag + width) / num_steps)``, lag = steps from the change to the earliest onset (0 within
    the interval of the onset), width = steps of that interval. A change after the whole interval scores 0: what comes
    later is no cause.

    Args:
        changed_at: first step with the new value.
        num_steps: steps over which it could have changed.
        num_changes: changes of the same kind that were seen; each had its chance.
    """
    if onset is None or changed_at > onset.last_step or num_steps < 1:
        return 0.0
    lag = max(0, onset.first_step - changed_at)
    width = onset.last_step - onset.first_step + 1
    return -math.log(min(1.0, num_changes * (lag + width) / num_steps))


@dataclass(frozen=True, slots=True)
class Correlation:
    """Spearman's rank correlation of two series.

    Attributes:
        value: -1..1.
        num_effective: pairs' worth of independent ones, n (1 - a b) / (1 + a b) with a, b their lag-1 correlations
            (Bartlett 1935), 3 at least.
        score: -num_effective / 2 * ln(1 - value^2), the log-likelihood ratio against none.
    """

    value: float
    num_effective: float
    num_pairs: int
    score: float


def rank_correlation(x: Floats, y: Floats) -> Correlation | None:
    """Return the correlation of [n] and [n] values in order; None for fewer than 8 pairs, or where one is constant."""
    n = len(x)
    if n < _MIN_PAIRS:
        return None
    a, b = _ranks(x), _ranks(y)
    a -= a.mean()
    b -= b.mean()
    power = math.sqrt(float(a @ a) * float(b @ b))
    if power <= 0:
        return None
    value = min(1.0, max(-1.0, float(a @ b) / power))
    shared = max(0.0, float(a[1:] @ a[:-1]) / float(a @ a) * (float(b[1:] @ b[:-1]) / float(b @ b)))
    effective = max(3.0, n * (1 - shared) / (1 + shared))
    return Correlation(value, effective, n, -effective / 2 * math.log(max(1e-6, 1 - value * value)))


def _ranks(values: Floats) -> Floats:
    """Return ranks from 0, ties sharing their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts + 1) / 2)[index]
    return ranks
