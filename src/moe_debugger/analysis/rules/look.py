"""What the rules of one call may look at, and what is missing for a claim."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.findings import Thresholds
from moe_debugger.analysis.intervals import MIN_UNITS, BlockKind, Blocks, design_effect, variance_blocks
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
# Requests of different text differ by 1 or more (the design effect); of two experts, with 16 requests, below 0.1 in one
# case of 100,000.
_REPEATED_EFFECT = 0.1
# The counter of different tokens is right to 6.5 %: three times that below all tokens, some are the same for certain.
_CERTAINLY_FEWER = 0.8


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that the rules of one call may look at.

    Attributes:
        blocks: where each layer's variances come from.
        baseline: metrics of the healthy rows, by layer; baseline_blocks: where their variances come from;
            baseline_state: those rows, None without a baseline.
        num_workloads: kinds of text that are known to be in the rows, at least 1.
        num_different: different requests' worth of text, None where that cannot be told.
        num_distinct: about how many different tokens there are, at most, None where that cannot be told.
        expert_ranks: [E] rank of each expert, by layer; empty where experts are not spread over ranks.
        health: what is known of the capture.
    """

    state: RoutingState
    metrics: dict[int, LayerMetrics]
    blocks: dict[int, Blocks]
    thresholds: Thresholds
    baseline: dict[int, LayerMetrics]
    baseline_blocks: dict[int, Blocks]
    baseline_state: RoutingState | None
    num_workloads: int
    num_different: float | None
    num_distinct: float | None
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

    def compares_requests(self, layer_index: int) -> bool:
        """True where the layer's loads and its baseline's both rest on whole requests, or on a training's steps.

        Runs of neighbours that stand for requests without names are none: they may all be of one.
        """
        before = self.baseline_blocks.get(layer_index)
        if self.baseline_state is None or before is None:
            return False
        kinds = {self.blocks[layer_index].kind, before.kind}
        if self.is_training:
            return kinds <= {BlockKind.REQUESTS, BlockKind.STEPS}
        return kinds == {BlockKind.REQUESTS} and self.state.names_requests and self.baseline_state.names_requests

    def knows_variety(self, layer_index: int) -> bool:
        """True where the text is known to be varied: many requests, many tokens that differ, or a training's data."""
        return self.rests_on_requests(layer_index) or _has_fingerprints(self.state) or self.is_training

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
        repetition = self.repetition()
        if repetition:
            return repetition
        kinds, needed = self._token_kinds(), min(1.5 * layer.shape.num_experts, _MIN_TOKEN_KINDS)
        if kinds is not None and kinds < needed:
            return f"text of about {kinds:.0f} kinds of tokens of at least {needed:.0f}"
        if self.blocks[layer_index].kind is BlockKind.NONE:
            return f"{self.state.num_requests} requests of at least {limits.min_requests}, or {MIN_UNITS} blocks"
        if math.isnan(metrics.effective_experts_interval.upper):
            return "tokens per request too uneven, or rows without requests"
        return ""

    def repetition(self) -> str:
        """Return how the text repeats itself, or an empty text where it does not, as far as is known."""
        needed = _MIN_DISTINCT_SHARE * self.thresholds.min_tokens
        if self.num_distinct is None or self.num_distinct >= needed:
            return ""
        if _has_fingerprints(self.state):
            return f"about {self.num_distinct:.0f} different tokens of at least {needed:.0f}: the input repeats itself"
        return f"requests route alike, as copies of one of about {self.num_distinct:.0f} tokens do: no evidence of more"

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
    different, blocks = _request_blocks(state, thresholds)
    metrics = {index: layer_metrics(layer, blocks[index]) for index, layer in state.layers.items()}
    distinct = _num_distinct(state, different)
    if distinct is not None:
        metrics = {index: _bounded(layer, distinct) for index, layer in metrics.items()}
    before: dict[int, LayerMetrics] = {}
    blocks_before: dict[int, Blocks] = {}
    if baseline is not None:
        _, blocks_before = _request_blocks(baseline, thresholds)
        mine = {index: layer for index, layer in baseline.layers.items() if layer.num_assignments}
        before = {index: layer_metrics(layer, blocks_before[index]) for index, layer in mine.items()}
    return Look(
        state=state,
        metrics=metrics,
        blocks=blocks,
        thresholds=thresholds,
        baseline=before,
        baseline_blocks=blocks_before,
        baseline_state=baseline,
        num_workloads=max(num_workloads, state.num_workloads(), 1),
        num_different=different,
        num_distinct=distinct,
        health=health,
        expert_ranks=expert_ranks,
    )


def _blocks(layer: LayerState, state: RoutingState, different: float | None, limits: Thresholds) -> Blocks:
    # Half of the minimum allows for shared beginnings, and for what the fingerprints cannot tell apart.
    repeats = different is not None and different < limits.min_requests / 2
    return variance_blocks(
        layer, num_requests=state.num_requests, min_requests=limits.min_requests, prefers_positions=repeats
    )


def _request_blocks(state: RoutingState, limits: Thresholds) -> tuple[float | None, dict[int, Blocks]]:
    """Return how many different requests' worth of text there is (None = unknown), and each layer's blocks."""
    different = num_different_requests(state)
    blocks = {index: _blocks(layer, state, different, limits) for index, layer in state.layers.items()}
    if different is None and _route_alike(state, blocks):
        different = 1.0
        blocks = {index: _blocks(layer, state, different, limits) for index, layer in state.layers.items()}
    return different, blocks


def _route_alike(state: RoutingState, blocks: Mapping[int, Blocks]) -> bool:
    """Return whether no layer tells one request from another: they are copies of one."""
    effects = [
        design_effect(blocks[index].table, layer.routed_per_token)
        for index, layer in state.layers.items()
        if blocks[index].kind is BlockKind.REQUESTS
    ]
    return max((effect for effect in effects if not math.isnan(effect)), default=math.inf) < _REPEATED_EFFECT


def _has_fingerprints(state: RoutingState) -> bool:
    return any(layer.num_fingerprints for layer in state.layers.values())


def _num_distinct(state: RoutingState, different: float | None) -> float | None:
    """Return about how many different tokens there are, at most; None where that cannot be told.

    Repetition is a property of the text, so the layer that tells most tokens apart answers for all: a collapsed router
    may tell few apart.
    """
    if _has_fingerprints(state):
        return float(max(layer.num_distinct_fingerprints for layer in state.layers.values()))
    return None if different is None else different * state.num_tokens / max(state.num_requests, 1)


def _bounded(metrics: LayerMetrics, distinct: float) -> LayerMetrics:
    """Return `metrics` with no more effective tokens than there are different ones."""
    if not distinct < min(_CERTAINLY_FEWER * metrics.num_tokens, metrics.effective_tokens):
        return metrics
    return replace(metrics, effective_tokens=distinct)


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
