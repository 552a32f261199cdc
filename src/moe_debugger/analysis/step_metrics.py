"""Balance of single steps, beside that of their sum: what a hot expert that rotates from step to step hides from sums.

Example: two steps, two experts, loads [[2, 0], [0, 2]]. Their sum [2, 2] is even (MaxVio "global" 0), yet in each step
one expert has twice the mean (MaxVio "batch" 1).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.metrics import coefficient_of_variation, max_violation
from moe_debugger.analysis.small_samples import balanced_band
from moe_debugger.errors import InvalidInputError

__all__ = ["StepBalance", "step_balance"]


@dataclass(frozen=True, slots=True)
class StepBalance:
    """Balance of one layer over single steps (training batches, forwards); NaN where there is none.

    Attributes:
        num_steps: steps with load, over which every mean is taken.
        num_assignments: load of all of them.
        max_violation_batch: mean over steps of max(c)/mean(c) - 1 (MaxVio "batch", arXiv 2408.15664, section 4.1).
        max_violation_highest: the highest of any step.
        max_violation_global: MaxVio of the loads summed over the steps; at most `max_violation_batch` where steps are
            of one size.
        max_violation_at_balance: `max_violation_batch` expected of a perfectly balanced router with independent tokens
            in steps of these sizes; NaN where k was not given.
        cv_batch: mean over steps of std(c)/mean(c).
        cv_global: CV of the loads summed over the steps.
        persistent_share: `max_violation_global` / `max_violation_batch`: near 1 the same experts are hot in every step,
            near 0 the imbalance is of single steps (it rotates, or steps are small). NaN where every step is even.
        num_hottest_experts: how many different experts were the hottest of a step.
    """

    num_steps: int
    num_assignments: int
    max_violation_batch: float
    max_violation_highest: float
    max_violation_global: float
    max_violation_at_balance: float
    cv_batch: float
    cv_global: float
    persistent_share: float
    num_hottest_experts: int

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as plain values."""
        return asdict(self)


def step_balance(counts: npt.ArrayLike, *, top_k: int | None = None) -> StepBalance:
    """Return the balance of one layer over single steps; O(s E).

    Args:
        counts: [s, E], load of each expert in each step. Each row has to be one step: rows that hold the sum of several
            (a series that was thinned out) hide what this is to show. Steps without load are left out.
        top_k: k, for the value at perfect balance; None = not wanted.

    Raises:
        InvalidInputError: `counts` is no table, or holds negative or non-finite numbers or text, or k is not in 1..E.
    """
    try:
        table = np.asarray(counts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"step loads are no table of numbers ({error}); expected [steps, experts]") from error
    if table.ndim != 2 or not table.shape[1]:
        raise InvalidInputError(f"step loads have shape {table.shape}, expected [steps, experts]")
    if not np.isfinite(table).all() or (table < 0).any():
        raise InvalidInputError("step loads hold negative or non-finite numbers; expected counts")
    if top_k is not None and not 1 <= top_k <= table.shape[1]:
        raise InvalidInputError(f"top_k is {top_k}, expected 1 to {table.shape[1]}, the experts of the layer")
    table = table[table.sum(axis=1) > 0]
    if not len(table):
        nan = math.nan
        return StepBalance(0, 0, nan, nan, nan, nan, nan, nan, nan, 0)
    sums = table.sum(axis=1)
    means = sums / table.shape[1]
    violations = table.max(axis=1) / means - 1
    batch, overall = float(violations.mean()), max_violation(table.sum(axis=0))
    return StepBalance(
        num_steps=len(table),
        num_assignments=int(sums.sum()),
        max_violation_batch=batch,
        max_violation_highest=float(violations.max()),
        max_violation_global=overall,
        max_violation_at_balance=math.nan if top_k is None else _at_balance(sums / top_k, table.shape[1], top_k),
        cv_batch=float((table.std(axis=1) / means).mean()),
        cv_global=coefficient_of_variation(table.sum(axis=0)),
        persistent_share=overall / batch if batch > 1e-12 else math.nan,
        num_hottest_experts=len(np.unique(table.argmax(axis=1))),
    )


def _at_balance(tokens: npt.NDArray[np.float64], num_experts: int, top_k: int) -> float:
    # Steps mostly have few different sizes; those of less than one token are as good as one.
    sizes, num = np.unique(np.maximum(np.round(tokens), 1), return_counts=True)
    if len(sizes) > 32:
        # Bands vary slowly with T, so neighbouring sizes share one.
        order = np.quantile(np.repeat(sizes, num), (np.arange(32) + 0.5) / 32)
        sizes, num = np.unique(np.round(order), return_counts=True)
    bands = [balanced_band(num_experts, top_k, float(size)).max_over_mean.expected - 1 for size in sizes]
    return float(np.average(bands, weights=num))
