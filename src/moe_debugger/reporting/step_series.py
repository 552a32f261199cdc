"""Loads over steps in few buckets, from the history that the analysis keeps of each layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from moe_debugger.analysis.step_loads import LoadSeries

__all__ = ["MAX_BUCKETS", "LayerSteps", "effective_over_steps"]

MAX_BUCKETS = 96

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerSteps:
    """Loads of one layer over its steps.

    Attributes:
        first_steps: [n] int64, first step of each bucket, ascending; last_step: of the last one.
        counts: [n, E] int64, load of each expert.
        num_tokens: [n] int64, valid tokens; none is 0.
    """

    first_steps: _Ints
    last_step: int
    counts: _Ints
    num_tokens: _Ints

    @classmethod
    def of(cls, series: "LoadSeries") -> Self:
        """Return the loads in at most 96 buckets of equally many buckets of the series."""
        starts = np.arange(0, len(series.num_tokens), max(1, -(-len(series.num_tokens) // MAX_BUCKETS)))
        return cls(
            series.first_steps[starts].astype(np.int64),
            series.last or 0,
            np.add.reduceat(series.counts.astype(np.int64), starts, axis=0)
            if len(starts)
            else _none(series.num_experts),
            np.add.reduceat(series.num_tokens.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64),
        )

    def at_least(self, num_tokens: int) -> "LayerSteps":
        """Return neighbours joined until each has so many tokens; what remains at the end is left out."""
        starts, total, open_at = [], 0, 0
        for at, tokens in enumerate(self.num_tokens.tolist()):
            total += tokens
            if total >= num_tokens:
                starts.append(open_at)
                total, open_at = 0, at + 1
        if not starts:
            return LayerSteps(self.first_steps[:0], self.last_step, self.counts[:0], self.num_tokens[:0])
        ends = [*starts[1:], open_at]
        return LayerSteps(
            self.first_steps[starts],
            self.last_step,
            np.array([self.counts[a:b].sum(axis=0) for a, b in zip(starts, ends, strict=True)]),
            np.array([self.num_tokens[a:b].sum() for a, b in zip(starts, ends, strict=True)]),
        )


def effective_over_steps(counts: _Ints) -> npt.NDArray[np.float64]:
    """Return exp of the load entropy of each row of [n, E]; NaN for a row without load."""
    c = counts.astype(np.float64)
    total = c.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = c / total
        terms = np.where(p > 0, p * np.log(p), 0.0)
    return np.where(total[:, 0] > 0, np.exp(-terms.sum(axis=1)), np.nan)


def _none(num_experts: int) -> _Ints:
    return np.zeros((0, num_experts), np.int64)
