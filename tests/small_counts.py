"""Healthy loads of few slots a step: each token's experts are drawn from shares that never change."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import ChartSettings, LayerSeries
from moe_debugger.analysis.collapse_chart import run_chart
from moe_debugger.analysis.early_warning import min_slots

__all__ = ["LAYERS", "SmallCounts"]

LAYERS = 4
_WATCHED_STEPS = 2000


@dataclass(frozen=True, slots=True)
class SmallCounts:
    """Steps of `tokens` tokens, each with `top_k` slots on `num_experts` experts.

    Slots are drawn with replacement, which scatters more than k different experts a token do.

    Attributes:
        tokens: of each step; two numbers = drawn anew for each step, from the first to the second.
        sigma: of the log-normal distribution whose quantiles are the experts' shares; 0 = balanced.
    """

    num_experts: int
    top_k: int
    tokens: int | tuple[int, int]
    sigma: float = 0.0

    @property
    def share(self) -> npt.NDArray[np.float64]:
        """[E], sums to 1."""
        quantiles = [NormalDist().inv_cdf((expert + 0.5) / self.num_experts) for expert in range(self.num_experts)]
        share: npt.NDArray[np.float64] = np.exp(self.sigma * np.array(quantiles))
        share /= share.sum()
        return share

    def sizes(self, rng: np.random.Generator, num_steps: int) -> npt.NDArray[np.int64]:
        """Return the tokens of each step."""
        low, high = self.tokens if isinstance(self.tokens, tuple) else (self.tokens, self.tokens)
        return rng.integers(low, high + 1, num_steps)

    def loads(self, rng: np.random.Generator, sizes: npt.NDArray[np.int64], num_series: int) -> npt.NDArray[np.int64]:
        """Return [steps, num_series, E] loads."""
        return rng.multinomial(self.top_k * sizes[:, None], self.share, size=(len(sizes), num_series))

    def false_alarms(
        self, rng: np.random.Generator, page_steps: float, *, num_at_once: float = 8e6
    ) -> tuple[int, float]:
        """Return the alarms in so many watched steps or more of pages of four layers, and the watched steps.

        Args:
            num_at_once: loads to draw at once.
        """
        mean = float(np.mean(self.tokens)) * self.top_k
        point = max(1.0, min_slots(self.num_experts) / mean)
        learnt = 50 + round(max(100.0, 25 * (point + 1)))
        num_steps = learnt + max(_WATCHED_STEPS, round(60 * point))
        num_series = LAYERS * max(1, round(num_at_once / (num_steps * self.num_experts * LAYERS)))
        found, watched = 0, 0.0
        while watched < page_steps:
            sizes = self.sizes(rng, num_steps)
            loads = self.loads(rng, sizes, num_series)
            steps = np.arange(num_steps, dtype=np.uint64)
            series = [LayerSeries.from_loads(steps, loads[:, layer], sizes) for layer in range(num_series)]
            result = run_chart(
                np.stack([layer.log_effective for layer in series], axis=1),
                series[0].first_steps.astype(np.float64),
                series[0].num_tokens.astype(np.float64),
                ChartSettings(),
                num_series=LAYERS,
            )
            assert not result.is_learning
            found += len(result.alarms)
            watched += (num_steps - learnt) * num_series / LAYERS
        return found, watched
