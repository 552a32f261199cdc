"""What the rules of one call may look at, and what is missing for a claim."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.findings import Thresholds
from moe_debugger.analysis.intervals import MIN_UNITS, BlockKind, Blocks, variance_blocks
from moe_debugger.analysis.metrics import LayerMetrics, effective_experts, layer_metrics
from moe_debugger.analysis.state import LayerState, RoutingState
from moe_debugger.capture_health import CaptureHealth
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["Look", "formatted", "look_at", "num_different_requests"]

# Routers go by the token first of all: with fewer kinds of them than this (digits are ten), even a healthy one has
# little to tell apart. Code, prose, tables and sums have 14 to 25 by bytes, and more by words.
_MIN_TOKEN_KINDS = 12.0
# Tokens that must differ, of the minimum of tokens: allows for shared beginnings, and for tokens that look alike.
_MIN_DISTINCT_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that the rules of one call may look at.

    Attributes:
        blocks: where each layer's variances come from.
        baseline: metrics of the healthy rows, by layer; baseline_state: those rows, None without a baseline.
        num_workloads: kinds of text that are known to be in the rows, at least 1.
        num_different: different requests' worth of text, None where that cannot be told.
        expert_ranks: [E] rank of each expert, by layer; empty where experts are not spread over ranks.
        health: what is known of the capture.
    """

    state: RoutingState
    metrics: dict[int, LayerMetrics]
    blocks: dict[int, Blocks]
    thresholds: Thresholds
    baseline: dict[int, LayerMetrics]
    baseline_state: RoutingState | None
    num_workloads: int
    num_different: float | None
    health: CaptureHealth | None
    expert_ranks: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)

    @property
    def is_training(self) -> bool:
        """True where more than half of the tokens were training tokens."""
        return self._phase_share(pb.PHASE_TRAIN) > 0.5

    @property
    def may_be_training(self) -> bool:
        """True where steps may be those of a training: it says so, or the rows do not say what they are."""
        return self.is_training or self._phase_share(pb.PHASE_UNSPECIFIED) > 0.5

    @property
    def is_representative(self) -> bool:
        """True where skew is a property of the router rather than of one kind of text."""
        return self.num_workloads >= 2 or self.is_training

    def rests_on_requests(self, layer_index: int) -> bool:
        """True where variances of the layer come from whole requests."""
        return self.blocks[layer_index].kind is BlockKind.REQUESTS

    def knows_variety(self, layer_index: int) -> bool:
        """True where the text is known to be varied: many requests, many tokens that differ, or a training's data."""
        return self.rests_on_requests(layer_index) or self._distinct_tokens() is not None or self.is_training

    def routing_confidence(self, layer_index: int) -> float:
        """Return 1 - mean token entropy / ln (E + Z), 0..1; NaN where probabilities were not captured."""
        # The router's probabilities are over identity experts, too.
        experts = self.state.layers[layer_index].shape.num_ids
        if experts < 2:
            return float("nan")
        return 1 - self.metrics[layer_index].mean_token_entropy / math.log(experts)

    def is_undecided(self, layer_index: int) -> bool:
        """True where the router's probabilities are known to be nearly even."""
        return self.routing_confidence(layer_index) < self.thresholds.routing_confidence

    def _phase_share(self, phase: int) -> float:
        tokens = self.state.phase_tokens
        total = int(tokens.sum())
        return int(tokens[phase]) / total if total else 0.0

    def shortage(self, layer_index: int) -> str:
        """Return what is missing for any claim about the layer, or an empty text."""
        layer, metrics, limits = self.state.layers[layer_index], self.metrics[layer_index], self.thresholds
        if layer.num_tokens < limits.min_tokens:
            return f"{layer.num_tokens} tokens of at least {limits.min_tokens}"
        needed = _MIN_DISTINCT_SHARE * limits.min_tokens
        distinct = self._distinct_tokens()
        if distinct is not None and distinct < needed:
            return f"about {distinct:.0f} different tokens of at least {needed:.0f}: the input repeats itself"
        kinds, needed = self._token_kinds(), min(1.5 * layer.shape.num_experts, _MIN_TOKEN_KINDS)
        if kinds is not None and kinds < needed:
            return f"text of about {kinds:.0f} kinds of tokens of at least {needed:.0f}"
        if self.blocks[layer_index].kind is BlockKind.NONE:
            return f"{self.state.num_requests} requests of at least {limits.min_requests}, or {MIN_UNITS} blocks"
        if math.isnan(metrics.effective_experts_interval.upper):
            return "tokens per request too uneven, or rows without requests"
        return ""

    def _distinct_tokens(self) -> float | None:
        """About how many different tokens there are, None where that cannot be told.

        Repetition is a property of the text, so the layer that tells most tokens apart answers for all: a collapsed
        router may tell few apart.
        """
        answers = [layer.num_distinct_fingerprints for layer in self.state.layers.values() if layer.num_fingerprints]
        return max(answers, default=None)

    def _token_kinds(self) -> float | None:
        """Effective number of kinds of tokens (exp of the entropy of token classes), None where not captured."""
        classes = self.state.token_classes
        return effective_experts(classes) if classes.any() else None


def look_at(
    state: RoutingState,
    *,
    thresholds: Thresholds,
    baseline: RoutingState | None,
    num_workloads: int,
    health: CaptureHealth | None,
    expert_ranks: Mapping[int, npt.NDArray[np.int64]],
) -> Look:
    """Return what the rules need of `state`."""
    different = num_different_requests(state)
    blocks = {index: _blocks(layer, state, different, thresholds) for index, layer in state.layers.items()}
    before: dict[int, LayerMetrics] = {}
    if baseline is not None:
        mine = {index: layer for index, layer in baseline.layers.items() if layer.num_assignments}
        before = {index: layer_metrics(layer) for index, layer in mine.items()}
    return Look(
        state=state,
        metrics={index: layer_metrics(layer, blocks[index]) for index, layer in state.layers.items()},
        blocks=blocks,
        thresholds=thresholds,
        baseline=before,
        baseline_state=baseline,
        num_workloads=max(num_workloads, state.num_workloads(), 1),
        num_different=different,
        health=health,
        expert_ranks=expert_ranks,
    )


def _blocks(layer: LayerState, state: RoutingState, different: float | None, limits: Thresholds) -> Blocks:
    # Half of the minimum allows for shared beginnings, and for what the fingerprints cannot tell apart.
    repeats = different is not None and different < limits.min_requests / 2
    return variance_blocks(
        layer, num_requests=state.num_requests, min_requests=limits.min_requests, prefers_positions=repeats
    )


def num_different_requests(state: RoutingState) -> float | None:
    """Return how many requests' worth of different text the rows hold, None where that cannot be told.

    Repeated text repeats its fingerprints; the number of different ones over the mean length of a request is how many
    different requests there really were.
    """
    answers = []
    for layer in state.layers.values():
        if layer.num_fingerprints:
            length = max(layer.num_fingerprints / max(state.num_requests, 1), 1.0)
            answers.append(layer.num_distinct_fingerprints / length)
    return max(answers, default=None)


def formatted(value: float) -> str:
    """Return `value` with three digits, or whole from 100 on."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
