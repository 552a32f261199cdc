"""What a perfectly balanced router shows on few tokens: the band beside every load metric.

Words:
    balanced    each token takes k different experts of E, all sets of k alike, independent of every other token.
    a           where tokens have other numbers of routed slots than k (identity experts, dropped slots): a token's
                number, tokens weighted by it, `LayerState.routed_per_token`. It may be fractional; a = k otherwise.
    band        mean and central 95 % of a metric over such routers with T tokens.

A value inside the band is what balance looks like on so few tokens, and no sign of skew. Tokens of real text are alike,
so give their *effective* number (T over the design effect), as `LayerMetrics.balanced_band` does.

Example: E = 8, k = 2, T = 16: a balanced router has a CV of 0.42 (0.21 to 0.68) and max/mean of 1.7, though nothing is
wrong with it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["BalancedBand", "Band", "balanced_band", "balanced_counts", "balanced_rank_imbalance"]

_Floats = npt.NDArray[np.float64]
_NUM_DRAWS = 400
# Wide layers with few choices: above this, choices are drawn one by one instead of as sets, which makes the variance of
# a count too high by a factor of 1 / (1 - k/E), less than 1.01 there.
_MAX_EXACT_EXPERTS = 2048
_MAX_SHARE_OF_EXPERTS = 0.01
# Above this T bands are simulated at two T an octave alone, and drawn between them: a growing session, and layers of
# different effective sizes, ask for few.
_MAX_OWN_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Band:
    """A metric under perfect balance.

    Attributes:
        expected: its mean. Simulated, so right to a standard error of 1/20 of the metric's spread, but where said.
        lower, upper: its central 95 %.
    """

    expected: float
    lower: float
    upper: float

    def holds(self, value: float) -> bool:
        """Return whether `value` is within the band; False for NaN."""
        # Rounding must not put a constant (k = E) outside of its own band.
        slack = 1e-9 * (1 + abs(self.expected))
        return self.lower - slack <= value <= self.upper + slack


@dataclass(frozen=True, slots=True)
class BalancedBand:
    """Load metrics of a perfectly balanced router on few tokens; NaN where there is no token.

    Attributes:
        num_experts: E.
        top_k: experts of a token: k, or a (see the module's text), in steps of at most 1/64 of E - a.
        num_tokens: T, independent tokens, rounded to a whole number.
        cv_rms: sqrt(E[CV^2]) = sqrt(E (1 - k/E) / (T k)), exact: what `cv_debiased` takes away.
        cv, max_over_mean, gini, normalised_load_entropy, effective_experts: bands; formulas as in `metrics`.
        switch_balancing_loss: 1 + CV^2, the loss of routers whose probabilities lie evenly on the chosen experts.
            Flatter ones are nearer to 1; with flat ones it is 1 whatever the loads are.
        num_unused: band of the experts without load; its `expected` is E (1 - k/E)^T, exact for whole k.
    """

    num_experts: int
    top_k: float
    num_tokens: int
    cv_rms: float
    cv: Band
    max_over_mean: Band
    gini: Band
    normalised_load_entropy: Band
    effective_experts: Band
    num_unused: Band
    switch_balancing_loss: Band

    def to_dict(self) -> dict[str, Any]:
        """Return the bands as plain values."""
        return asdict(self)


def balanced_band(num_experts: int, top_k: float, num_tokens: float) -> BalancedBand:
    """Return what a perfectly balanced router shows on `num_tokens` independent tokens.

    Simulated with a fixed seed (400 draws, the same in every process) and cached; about 10 ms for 64 experts, 50 ms for
    256, whatever T is. Above T = 128 it is simulated for two T an octave and interpolated.

    Args:
        num_experts: E.
        top_k: k, or a where tokens have other numbers of experts: see the module's text.
        num_tokens: T, or the effective number of tokens; may be fractional. With a: load / a.

    Raises:
        InvalidInputError: not 1 <= k <= E, or T is negative or not finite.
    """
    _check_sizes(num_experts, top_k, num_tokens)
    load = num_tokens * top_k
    top_k = _rounded(num_experts, top_k)
    tokens = round(load / top_k)
    bands = _bands(num_experts, top_k, tokens) if tokens <= _MAX_OWN_TOKENS else _between(num_experts, top_k, tokens)
    free = 1 - top_k / num_experts
    unused = float(num_experts)
    for each, num in _token_kinds(top_k, tokens):
        unused *= (1 - each / num_experts) ** num
    cv_rms = math.sqrt(num_experts * free / (tokens * top_k)) if tokens else math.nan
    loss = Band(1 + cv_rms**2, 1 + bands["cv"].lower ** 2, 1 + bands["cv"].upper ** 2)
    return BalancedBand(
        num_experts=num_experts,
        top_k=top_k,
        num_tokens=tokens,
        cv_rms=cv_rms,
        cv=bands["cv"],
        max_over_mean=bands["max_over_mean"],
        gini=bands["gini"],
        normalised_load_entropy=bands["normalised_load_entropy"],
        effective_experts=bands["effective_experts"],
        num_unused=Band(unused, bands["num_unused"].lower, bands["num_unused"].upper),
        switch_balancing_loss=loss,
    )


def balanced_rank_imbalance(num_experts: int, top_k: int, num_ranks: int, num_tokens: float) -> Band:
    """Return max_r / mean_r of the load of R ranks in one step and layer, of a perfectly balanced router.

    Ranks have E / R experts each, without copies. `expected` is also that of the mean over steps of this size;
    1 - 1 / expected is about the waste that no fixed placement can take away. Simulated and cached, as `balanced_band`.

    Args:
        num_experts: E.
        top_k: k.
        num_ranks: R, a divisor of E.
        num_tokens: tokens of one step.

    Raises:
        InvalidInputError: not 1 <= k <= E, R does not divide E, or the number of tokens is negative or not finite.
    """
    _check_sizes(num_experts, top_k, num_tokens)
    if num_ranks < 1 or num_experts % num_ranks:
        raise InvalidInputError(f"num_ranks {num_ranks}: expected a divisor of the {num_experts} experts")
    return _rank_band(num_experts, top_k, num_ranks, round(num_tokens))


@lru_cache(maxsize=1024)
def _rank_band(num_experts: int, top_k: int, num_ranks: int, num_tokens: int) -> Band:
    if not num_tokens:
        return Band(math.nan, math.nan, math.nan)
    rng = np.random.default_rng([num_experts, top_k, num_ranks, num_tokens])
    counts = balanced_counts(num_experts, top_k, num_tokens, _NUM_DRAWS, rng)
    ranks = counts.reshape(_NUM_DRAWS, num_ranks, -1).sum(axis=2)
    return _band(ranks.max(axis=1) * num_ranks / (num_tokens * top_k))


def _check_sizes(num_experts: int, top_k: float, num_tokens: float) -> None:
    if not 1 <= top_k <= num_experts or not (math.isfinite(num_tokens) and num_tokens >= 0):
        raise InvalidInputError(
            f"num_experts {num_experts}, top_k {top_k}, num_tokens {num_tokens}: expected 1 <= k <= E and T >= 0"
        )


def _rounded(num_experts: int, top_k: float) -> float:
    """Return a rounded so that looks at a growing session share bands; the spread, E - a, to 1/64 of itself or less."""
    free = num_experts - top_k
    if top_k == int(top_k):
        return int(top_k)
    unit = min(1.0, 2.0 ** math.floor(math.log2(free / 32)))
    return max(1.0, num_experts - round(free / unit) * unit)


def _token_kinds(top_k: float, num_tokens: int) -> list[tuple[int, int]]:
    """Return whole numbers of experts and how many tokens have each: about the load and the spread of T tokens of a.

    Of the load the part a - floor(a) is that of tokens with one expert more than floor(a).
    """
    low = math.floor(top_k)
    if low == top_k:
        return [(low, num_tokens)]
    load = num_tokens * top_k
    more = round(load * (top_k - low) / (low + 1))
    return [(low, max(round((load - more * (low + 1)) / low), 0)), (low + 1, more)]


def balanced_counts(
    num_experts: int, top_k: float, num_tokens: int, num_draws: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return [num_draws, E] int64, the loads of so many balanced routers on `num_tokens` tokens each.

    Exact without drawing tokens: experts are visited one by one, and a token that still has r choices to make among the
    m experts left takes the next with probability r / m. So only the number of tokens with each r is kept, and the time
    is O(draws E k) whatever T is.
    """
    shape, kinds = (num_draws, num_experts), _token_kinds(top_k, num_tokens)
    if num_experts > _MAX_EXACT_EXPERTS and top_k <= _MAX_SHARE_OF_EXPERTS * num_experts:
        load = sum(each * num for each, num in kinds)
        return rng.multinomial(load, np.full(num_experts, 1 / num_experts), size=num_draws)
    counts = np.empty(shape, np.int64)
    # waiting[r] is the number of tokens with r choices to make.
    most = math.ceil(top_k)
    waiting = np.zeros((most + 1, num_draws), np.int64)
    for each, num in kinds:
        waiting[each] = num
    choices = np.arange(1, most + 1, dtype=np.float64)[:, None]
    for expert in range(num_experts):
        taking = rng.binomial(waiting[1:], np.minimum(choices / (num_experts - expert), 1.0))
        waiting[1:] -= taking
        waiting[:-1] += taking
        counts[:, expert] = taking.sum(axis=0)
    return counts


def _between(num_experts: int, top_k: float, tokens: int) -> dict[str, Band]:
    """Return the bands at T between two T that are simulated, by what changes least with T."""
    half_octave = math.floor(2 * math.log2(tokens))
    low, high = round(2 ** (half_octave / 2)), round(2 ** ((half_octave + 1) / 2))
    weight = math.log(tokens / low) / math.log(high / low)
    at_low, at_high = _bands(num_experts, top_k, low), _bands(num_experts, top_k, high)

    def drawn(name: str, a: float, b: float) -> float:
        # Each is `limit - c T^-power` with a nearly constant c: deviations shrink with sqrt(T), lost entropy with T.
        limit, power = _LIMITS[name](num_experts)
        c = (1 - weight) * (limit - a) * low**power + weight * (limit - b) * high**power
        return float(limit - c / tokens**power)

    return {
        name: Band(
            *(drawn(name, getattr(band, at), getattr(at_high[name], at)) for at in ("expected", "lower", "upper"))
        )
        for name, band in at_low.items()
    }


# What each metric becomes with many tokens, and the power of T at which it does.
_LIMITS: dict[str, Callable[[int], tuple[float, float]]] = {
    "cv": lambda num_experts: (0.0, 0.5),
    "max_over_mean": lambda num_experts: (1.0, 0.5),
    "gini": lambda num_experts: (0.0, 0.5),
    "normalised_load_entropy": lambda num_experts: (1.0, 1.0),
    "effective_experts": lambda num_experts: (float(num_experts), 1.0),
    "num_unused": lambda num_experts: (0.0, 0.0),
}


@lru_cache(maxsize=1024)
def _bands(num_experts: int, top_k: float, num_tokens: int) -> dict[str, Band]:
    names = ("cv", "max_over_mean", "gini", "normalised_load_entropy", "effective_experts", "num_unused")
    if not num_tokens:
        return dict.fromkeys(names, Band(math.nan, math.nan, math.nan))
    # Whole k have seeds of their own; others share that of the next.
    rng = np.random.default_rng([num_experts, math.ceil(top_k), num_tokens])
    counts = balanced_counts(num_experts, top_k, num_tokens, _NUM_DRAWS, rng).astype(np.float64)
    load = counts[0].sum()
    mean = load / num_experts
    share = counts / load
    entropy = -(share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum(axis=1)
    ordered = np.sort(counts, axis=1)
    ranks = np.arange(1, num_experts + 1)
    values: dict[str, _Floats] = {
        "cv": counts.std(axis=1) / mean,
        "max_over_mean": ordered[:, -1] / mean,
        "gini": 2 * (ordered * ranks).sum(axis=1) / (num_experts**2 * mean) - (num_experts + 1) / num_experts,
        "normalised_load_entropy": entropy / math.log(num_experts) if num_experts > 1 else entropy * math.nan,
        "effective_experts": np.exp(entropy),
        "num_unused": (counts == 0).sum(axis=1).astype(np.float64),
    }
    return {name: _band(value) for name, value in values.items()}


def _band(values: _Floats) -> Band:
    lower, upper = np.quantile(values, [0.025, 0.975])
    return Band(float(values.mean()), float(lower), float(upper))
