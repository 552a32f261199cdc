"""How evenly ranks are loaded: per step and layer first, because ranks wait for each other at every layer of a step.

Adding up the loads of many steps before taking the highest hides what a step waits for. Two ranks, two steps: rank 0 is
given (2, 0) assignments and rank 1 (0, 2). The sums are (2, 2), even; but each step waits for a rank that has twice the
mean.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning.loads import Floats, check_counts
from moe_debugger.planning.placement import Ints, Placement

__all__ = [
    "RankMetrics",
    "active_experts",
    "critical_load",
    "expected_active_experts",
    "mean_load",
    "rank_loads",
    "rank_metrics",
]


@dataclass(frozen=True, slots=True, eq=False)
class RankMetrics:
    """Balance of the ranks over the steps of a window. NaN where there is no load.

    Attributes:
        layer_imbalance: [num_layers] mean over steps of max_r n / mean_r n; steps without load at the layer are left
            out.
        layer_balancedness: [num_layers] mean over steps of mean_r n / max_r n.
        layer_window_imbalance: [num_layers] max / mean of the loads summed over the window: what hides rotation.
        num_layer_steps: [num_layers] steps with load, over which the means are taken.
        imbalance: sum of per-step, per-layer maxima over the sum of means; 1 = even.
        window_imbalance: the same, with loads summed over the window first; at most `imbalance`.
        waste_share: 1 - sum of means / sum of maxima: of the ranks' time in experts, the share spent waiting.
        step_bound: mean over steps of sum over layers of max_r n, assignments; times the time of one, a lower bound on
            the time of a step's experts.
        num_steps: steps of the window.
    """

    layer_imbalance: Floats
    layer_balancedness: Floats
    layer_window_imbalance: Floats
    num_layer_steps: Ints
    imbalance: float
    window_imbalance: float
    waste_share: float
    step_bound: float
    num_steps: int

    @property
    def persistent_share(self) -> float:
        """Share of the excess over even load that is still there in the window's sums, 0..1; NaN where even.

        Near 0 the imbalance is of single steps: a hot expert that rotates, or the noise of small batches.
        """
        excess = self.imbalance - 1
        return (self.window_imbalance - 1) / excess if excess > 1e-12 else float("nan")


def rank_loads(loads: Any, placement: Placement, *, rng: np.random.Generator | None = None) -> Floats:
    """Return [num_steps, num_layers, num_ranks] float64, the assignments that each rank computes.

    Args:
        loads: [num_steps, num_layers, num_experts], or `StepLoads`.
        rng: without it the copies of an expert share its load evenly, in fractions. With it each assignment goes to a
            copy at random, as engines do without looking at the load; loads have to be whole numbers.

    Raises:
        InvalidInputError: loads and placement are of different layers or experts, or not whole numbers with `rng`.
    """
    counts = _matching(loads, placement)
    if rng is None:
        even: Floats = (counts.transpose(1, 0, 2) @ placement.shares()).transpose(1, 0, 2)
        return even
    if (counts != np.floor(counts)).any():
        raise InvalidInputError("loads are no whole numbers: they can not be dealt one by one; leave rng out")
    copies = placement.num_copies
    # Experts with one copy need no dealing; they are most of them.
    alone = counts * (copies == 1)
    result = np.ascontiguousarray((alone.transpose(1, 0, 2) @ placement.shares()).transpose(0, 2, 1))
    order = np.argsort(placement.physical_to_logical, axis=1, kind="stable")
    starts = np.cumsum(copies, axis=1) - copies
    for number in np.unique(copies[copies > 1]).tolist():
        layers, experts = np.nonzero(copies == number)
        slots = order[layers[:, None], starts[layers, experts][:, None] + np.arange(number)]
        dealt = rng.multinomial(counts[:, layers, experts].astype(np.int64), np.full(number, 1 / number))
        np.add.at(result, (layers[:, None], placement.slot_ranks[slots]), dealt.transpose(1, 2, 0))
    return result.transpose(2, 0, 1)


def critical_load(ranks: Floats) -> Floats:
    """Return [num_steps] sum over layers of max_r n, of rank loads [num_steps, num_layers, num_ranks]."""
    result: Floats = ranks.max(axis=2).sum(axis=1)
    return result


def mean_load(ranks: Floats) -> Floats:
    """Return [num_steps] sum over layers of mean_r n, of rank loads [num_steps, num_layers, num_ranks]."""
    result: Floats = ranks.mean(axis=2).sum(axis=1)
    return result


def rank_metrics(ranks: Floats) -> RankMetrics:
    """Return the balance of rank loads [num_steps, num_layers, num_ranks]."""
    ranks = check_counts(ranks, "rank loads")
    highest, mean = ranks.max(axis=2), ranks.mean(axis=2)
    summed = ranks.sum(axis=0)
    num = (mean > 0).sum(axis=0)
    total_highest, total_mean = float(highest.sum()), float(mean.sum())
    return RankMetrics(
        layer_imbalance=_mean_ratio(highest, mean, num),
        layer_balancedness=_mean_ratio(mean, highest, num),
        layer_window_imbalance=_ratio(summed.max(axis=1), summed.mean(axis=1)),
        num_layer_steps=num,
        imbalance=total_highest / total_mean if total_mean else float("nan"),
        window_imbalance=float(summed.max(axis=1).sum()) / total_mean if total_mean else float("nan"),
        waste_share=1 - total_mean / total_highest if total_highest else float("nan"),
        step_bound=total_highest / len(ranks) if len(ranks) else float("nan"),
        num_steps=len(ranks),
    )


def active_experts(loads: Any, placement: Placement) -> Ints:
    """Return [num_steps, num_layers, num_ranks] int64, slots of each rank that were given a token.

    In decode a step reads the weights of these, and that, not the number of tokens, is what takes the time. The first n
    copies of an expert are taken to be used by n tokens, the most that can be.

    Raises:
        InvalidInputError: loads and placement are of different layers or experts.
    """
    counts = _matching(loads, placement)
    table = placement.physical_to_logical
    copies = placement.num_copies
    order = np.argsort(table, axis=1, kind="stable")
    first = np.cumsum(copies, axis=1) - copies
    earlier = np.empty_like(table)
    np.put_along_axis(
        earlier, order, np.arange(table.shape[1]) - np.repeat(first.ravel(), copies.ravel()).reshape(table.shape), 1
    )
    is_active = counts[:, np.arange(placement.num_layers)[:, None], table] > earlier
    shape = (len(counts), placement.num_layers, placement.num_ranks, placement.slots_per_rank)
    active: Ints = is_active.reshape(shape).sum(axis=3)
    return active


def expected_active_experts(num_experts: int, top_k: int, num_tokens: float) -> float:
    """Return E (1 - (1 - k / E)^B), the expected distinct experts of B independent tokens under uniform routing.

    A rank that holds E / R of them, once each, has 1 / R of that. Skewed or correlated routing reaches fewer.

    Raises:
        InvalidInputError: not 1 <= k <= E, or B negative.
    """
    if not 1 <= top_k <= num_experts or num_tokens < 0:
        raise InvalidInputError(
            f"num_experts {num_experts}, top_k {top_k}, num_tokens {num_tokens}: expected 1 <= k <= E and 0 or more"
        )
    return float(num_experts * (1 - (1 - top_k / num_experts) ** num_tokens))


def _matching(loads: Any, placement: Placement) -> Floats:
    counts = check_counts(loads)
    if counts.shape[1:] != (placement.num_layers, placement.num_experts):
        raise InvalidInputError(
            f"loads have {counts.shape[1]} layers of {counts.shape[2]} experts, the placement "
            f"{placement.num_layers} of {placement.num_experts}"
        )
    return counts


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _mean_ratio(above: Floats, below: Floats, num: Ints) -> Floats:
    total = np.divide(above, below, out=np.zeros_like(above), where=below > 0).sum(axis=0)
    return _ratio(total, num.astype(np.float64))
