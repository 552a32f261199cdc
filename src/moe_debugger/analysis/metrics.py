"""The metrics of one layer: pure functions of counts, and `LayerMetrics`, which gathers them with their sample sizes.

Glossary, for one layer:
    T, E, k     valid tokens, routed experts, experts per token.
    c_e         load of expert e: assignments of valid tokens. Their sum is N = T * k where no slot was dropped.
    p_e         c_e / N, the share. 1 / E is the fair share.

Load entropy (how evenly experts are used) and token entropy (how undecided the router is about one token) are
different things and are never averaged into one "entropy". docs/metrics.md says how to read each metric.

Example: counts [6, 2, 0, 0] with E = 4: shares [.75, .25, 0, 0], effective experts 1.75, max/mean 3, MaxVio 2,
CV 1.22, Gini 0.625, Jain 0.4, 2 unused experts.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.document_means import UNKNOWN_INTERVAL, ratio_interval
from moe_debugger.analysis.fixed_sums import FixedSums
from moe_debugger.analysis.intervals import BlockKind, Blocks, Interval, jackknife, variance_blocks
from moe_debugger.analysis.small_samples import BalancedBand, balanced_band
from moe_debugger.analysis.state import LayerState

__all__ = [
    "LayerMetrics",
    "coefficient_of_variation",
    "debiased_coefficient_of_variation",
    "effective_experts",
    "entropy_bias",
    "expert_share",
    "gini",
    "inverse_simpson",
    "jain",
    "layer_metrics",
    "load_entropy",
    "max_over_mean",
    "max_violation",
    "normalised_load_entropy",
    "switch_balancing_loss",
    "unused_experts",
]

_Floats = npt.NDArray[np.float64]
_NAN = float("nan")


def _counts(counts: npt.ArrayLike) -> _Floats:
    return np.asarray(counts, dtype=np.float64)


def expert_share(counts: npt.ArrayLike) -> _Floats:
    """Return p_e = c_e / sum(c), [E] float64 in 0..1, NaN without load. Sample size: sum(c) assignments."""
    c = _counts(counts)
    total = c.sum()
    return c / total if total else np.full(c.shape, _NAN)


def load_entropy(counts: npt.ArrayLike) -> float:
    """Return H = -sum p_e ln p_e in nats, 0..ln E (Shannon 1948); NaN without load.

    Biased low by about `entropy_bias`. Sample size: sum(c) assignments.
    """
    p = expert_share(counts)
    if np.isnan(p).any():
        return _NAN
    p = p[p > 0]
    # `+ 0.0` turns the negative zero of a single used expert into zero.
    return float(-(p * np.log(p)).sum()) + 0.0


def normalised_load_entropy(counts: npt.ArrayLike) -> float:
    """Return H / ln E, 0..1; 1 is even load. NaN without load or with one expert (not applicable)."""
    num_experts = _counts(counts).size
    return load_entropy(counts) / math.log(num_experts) if num_experts > 1 else _NAN


def effective_experts(counts: npt.ArrayLike) -> float:
    """Return exp(H), 1..E: the number of equally loaded experts with the same entropy (Hill 1973, order 1)."""
    return math.exp(load_entropy(counts))


def inverse_simpson(counts: npt.ArrayLike) -> float:
    """Return 1 / sum(p_e^2), 1..E (Hill 1973, order 2): like effective experts, with less weight on rare ones."""
    return float(1 / np.square(expert_share(counts)).sum())


def entropy_bias(num_experts: int, num_assignments: float) -> float:
    """Return by how many nats the load entropy is too low from sampling alone: (E - 1) / (2 N) (Miller 1955).

    With dependent tokens N is the effective sample size, not the number of assignments.
    """
    return (num_experts - 1) / (2 * num_assignments) if num_assignments else _NAN


def max_over_mean(counts: npt.ArrayLike) -> float:
    """Return max(c) / mean(c), 1..E (E / k where a token's experts differ); NaN without load."""
    c = _counts(counts)
    return float(c.max() / c.mean()) if c.sum() else _NAN


def max_violation(counts: npt.ArrayLike) -> float:
    """Return MaxVio = (max(c) - mean(c)) / mean(c) (arXiv 2408.15664, section 4.1), which is max/mean - 1.

    Over all rows of a state it is the paper's "global" one; the mean over training batches ("batch") is larger.
    """
    return max_over_mean(counts) - 1


def coefficient_of_variation(counts: npt.ArrayLike) -> float:
    """Return CV = std(c) / mean(c) with the population's std, 0..sqrt(E - 1); NaN without load."""
    c = _counts(counts)
    return float(c.std() / c.mean()) if c.sum() else _NAN


def debiased_coefficient_of_variation(counts: npt.ArrayLike, *, per_token: float) -> float:
    """Return the CV less what sampling adds at perfect balance: sqrt(max(0, CV^2 - E (1 - a/E) / N)).

    The term is exact for independent tokens; for dependent ones it takes away too little.

    Args:
        counts: [E] load.
        per_token: a, `LayerState.routed_per_token`; k where every slot is routed.
    """
    c = _counts(counts)
    total = c.sum()
    if not total:
        return _NAN
    sampling = c.size * (1 - per_token / c.size) / total
    return math.sqrt(max(0.0, coefficient_of_variation(c) ** 2 - sampling))


def gini(counts: npt.ArrayLike) -> float:
    """Return 2 sum_i i c_(i) / (E sum c) - (E + 1) / E with c_(i) ascending, 0 (even)..(E - 1) / E."""
    c = np.sort(_counts(counts))
    if not c.sum():
        return _NAN
    ranks = np.arange(1, c.size + 1)
    return float(2 * (ranks * c).sum() / (c.size * c.sum()) - (c.size + 1) / c.size)


def jain(counts: npt.ArrayLike) -> float:
    """Return (sum c)^2 / (E sum c^2) = 1 / (1 + CV^2), 1/E..1 (Jain, Chiu, Hawe 1984)."""
    c = _counts(counts)
    return float(c.sum() ** 2 / (c.size * np.square(c).sum())) if c.sum() else _NAN


def unused_experts(counts: npt.ArrayLike) -> int:
    """Return how many experts have no assignment. "Unused here" is not "dead": see the dead-expert rule."""
    return int((_counts(counts) == 0).sum())


def switch_balancing_loss(counts: npt.ArrayLike, mean_probability: npt.ArrayLike) -> float:
    """Return E * sum_e p_e P_e without the coefficient (Fedus et al. 2021, eq. 4-6); 1 at balance.

    p_e is the share of assignments, so balance reads 1; implementations with f_e = c_e / T read k instead. Per layer:
    pooled over layers it cannot see opposite collapses.
    """
    p = expert_share(counts)
    return float(p.size * (p * _counts(mean_probability)).sum())


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """Metrics of one layer; NaN = not applicable or not captured. Formulas: the functions of the same name.

    Attributes:
        num_tokens: valid tokens, the sample size of all that follows unless said otherwise.
        num_blocks: blocks that the intervals rest on; 0 = none, so there are no intervals.
        blocks_of: what they are made of: "requests", "positions", "steps" or "none".
        effective_experts_interval: two-sided 95 % (so each bound is one-sided 97.5 %), from blocks.
        design_effect: variance of the shares over that of independent tokens; NaN without blocks.
        effective_tokens: num_tokens / design_effect (not above num_tokens).
        routed_per_token: sum of a^2 / sum of a over tokens with a routed slots each; k where every slot is routed.
        switch_balancing_loss: over the load and the mean probability of `num_probability_tokens` tokens.
        mean_token_entropy: nats, over `num_token_entropy` tokens; of the router's probabilities.
        mean_confidence: mean top-1 probability, over `num_confidence` tokens.
        mean_margin: K-th minus (K+1)-th selection score, over `num_margin` tokens.
        router_z_loss: mean squared logsumexp of the logits, over `num_z` tokens (ST-MoE, eq. 5).
        mean_token_entropy_interval, mean_confidence_interval, mean_margin_interval, router_z_loss_interval,
            dropped_share_interval: two-sided 95 % from groups of whole requests; NaN where `blocks_of` is another.
        dropped_share, identity_share, skipped_share: slots of that class / all slots of valid tokens.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_tokens: int
    num_assignments: int
    num_padding: int
    num_blocks: int
    blocks_of: str
    share: tuple[float, ...]
    load_entropy: float
    normalised_load_entropy: float
    effective_experts: float
    effective_experts_interval: Interval
    inverse_simpson: float
    max_over_mean: float
    max_violation: float
    hottest_expert: int
    cv: float
    cv_debiased: float
    gini: float
    jain: float
    num_unused: int
    design_effect: float
    effective_tokens: float
    routed_per_token: float
    switch_balancing_loss: float
    num_probability_tokens: int
    router_z_loss: float
    num_z: int
    router_z_loss_interval: Interval
    mean_token_entropy: float
    num_token_entropy: int
    mean_token_entropy_interval: Interval
    mean_confidence: float
    num_confidence: int
    mean_confidence_interval: Interval
    mean_margin: float
    num_margin: int
    mean_margin_interval: Interval
    dropped_share: float
    dropped_share_interval: Interval
    identity_share: float
    skipped_share: float

    @property
    def balanced_band(self) -> BalancedBand:
        """What a perfectly balanced router shows on as many independent tokens as these are worth.

        These are `effective_tokens` where requests are known, else all tokens. Where tokens have other numbers of
        routed slots than k, it is as many tokens of `routed_per_token` slots as have the same load.
        """
        a = min(self.routed_per_token, float(self.num_experts))
        tokens = self.num_assignments / a
        if self.num_tokens and not math.isnan(self.effective_tokens):
            tokens *= self.effective_tokens / self.num_tokens
        return balanced_band(self.num_experts, a, tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as plain values, `balanced_band` with them."""
        return {**asdict(self), "balanced_band": self.balanced_band.to_dict()}


def layer_metrics(state: LayerState, blocks: Blocks | None = None) -> LayerMetrics:
    """Return the metrics of `state`; O(blocks * E).

    Args:
        state: the layer's counts.
        blocks: where variances come from; None = whole requests.
    """
    blocks = variance_blocks(state) if blocks is None else blocks
    counts, shape = state.counts, state.shape
    num_slots = state.num_tokens * shape.top_k
    interval, design_effect = jackknife(blocks, state.routed_per_token)
    has_load = state.num_assignments > 0

    def mean_interval(sums: FixedSums, *, highest: float = math.inf, slots: int = 1) -> Interval:
        if blocks.kind is not BlockKind.REQUESTS:
            return UNKNOWN_INTERVAL
        totals, sizes = sums.by_group()
        return ratio_interval(totals, sizes * slots, highest=highest)

    return LayerMetrics(
        layer_index=shape.layer_index,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_tokens=state.num_tokens,
        num_assignments=state.num_assignments,
        num_padding=state.num_padding,
        num_blocks=len(blocks.table),
        blocks_of=str(blocks.kind),
        share=tuple(expert_share(counts).tolist()),
        load_entropy=load_entropy(counts),
        normalised_load_entropy=normalised_load_entropy(counts),
        effective_experts=effective_experts(counts),
        effective_experts_interval=interval,
        inverse_simpson=inverse_simpson(counts),
        max_over_mean=max_over_mean(counts),
        max_violation=max_violation(counts),
        hottest_expert=int(counts.argmax()) if has_load else -1,
        cv=coefficient_of_variation(counts),
        cv_debiased=debiased_coefficient_of_variation(counts, per_token=state.routed_per_token),
        gini=gini(counts),
        jain=jain(counts),
        num_unused=unused_experts(counts),
        design_effect=design_effect,
        effective_tokens=_NAN if math.isnan(design_effect) else state.num_tokens / max(design_effect, 1.0),
        routed_per_token=state.routed_per_token,
        switch_balancing_loss=switch_balancing_loss(counts, state.mean_probability),
        num_probability_tokens=state.num_probability_tokens,
        router_z_loss=state.z_squared.mean,
        num_z=state.z_squared.num_values,
        router_z_loss_interval=mean_interval(state.z_squared),
        mean_token_entropy=state.router_entropy.mean,
        num_token_entropy=state.router_entropy.num_values,
        mean_token_entropy_interval=mean_interval(state.router_entropy),
        mean_confidence=state.top1_probability.mean,
        num_confidence=state.top1_probability.num_values,
        mean_confidence_interval=mean_interval(state.top1_probability, highest=1.0),
        mean_margin=state.margin.mean,
        num_margin=state.margin.num_values,
        mean_margin_interval=mean_interval(state.margin),
        dropped_share=state.num_dropped_slots / num_slots if num_slots else _NAN,
        dropped_share_interval=mean_interval(state.dropped, highest=1.0, slots=shape.top_k),
        identity_share=state.num_identity_slots / num_slots if num_slots else _NAN,
        skipped_share=state.num_skipped_slots / num_slots if num_slots else _NAN,
    )
