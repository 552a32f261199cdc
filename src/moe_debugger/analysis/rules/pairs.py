"""Rule about experts that are always chosen together: two that act as one."""

from collections.abc import Iterator

import numpy as np

from moe_debugger.analysis.duplicates import always_together
from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.rules.look import Look, formatted

__all__ = ["duplicate_experts"]

# Sampled tokens below which nothing is said of pairs.
_MIN_TOKENS = 200
# Of pairs that qualify, as many are named; more are one phenomenon.
_MAX_PAIRS = 16


def duplicate_experts(look: Look, layer_index: int) -> Iterator[Finding]:
    """Find pairs of experts that nearly the same tokens choose, by the layer's sample of tokens."""
    layer, metrics = look.state.layers[layer_index], look.metrics[layer_index]
    sample, experts = layer.token_sample, layer.shape.num_experts
    if sample is None or layer.shape.top_k < 2 or len(sample.keys) < _MIN_TOKENS or look.shortage(layer_index):
        return
    chosen = np.zeros((len(sample.keys), experts), np.float32)
    rows, slots = np.nonzero((sample.expert_ids >= 0) & (sample.expert_ids < experts))
    chosen[rows, sample.expert_ids[rows, slots]] = 1
    pairs = always_together(
        chosen.T @ chosen,
        chosen.sum(axis=0),
        num_tokens=len(chosen),
        threshold=look.thresholds.duplicate_experts,
        design_effect=metrics.design_effect,
    )
    for pair in pairs[:_MAX_PAIRS]:
        yield Finding(
            FindingKind.DUPLICATE_EXPERTS,
            Severity.WARNING if look.rests_on_requests(layer_index) else Severity.INFO,
            "duplicate_experts",
            layer_index,
            pair.expert_a,
            layer.first_step,
            {
                "layer": str(layer_index),
                "expert": str(pair.expert_a),
                "other": str(pair.expert_b),
                "percent": formatted(100 * pair.jaccard),
                "expected": formatted(100 * pair.expected),
                "tokens": str(len(chosen)),
            },
            (
                EvidenceRow("common_tokens", pair.jaccard, "", pair.expected, pair.num_either, "of their tokens"),
                EvidenceRow(
                    "common_tokens_lower", pair.lower, f"> {look.thresholds.duplicate_experts:g}", None, pair.num_either
                ),
                EvidenceRow("design_effect", metrics.design_effect, sample_size=metrics.num_blocks),
            ),
            pair.lower,
        )
