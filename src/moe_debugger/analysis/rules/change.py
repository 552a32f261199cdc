"""Rule about change against a baseline: loads that moved, and the same tokens on other experts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.drift import jensen_shannon_bits
from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.intervals import MIN_BLOCKS, Blocks, student_quantile, variance_blocks
from moe_debugger.analysis.rules.look import Look, formatted
from moe_debugger.analysis.token_sample import TokenSample

__all__ = ["LoadChange", "TokenOverlap", "drift", "load_change", "token_overlap"]

# Tokens that both sides must have for a word about tokens.
_MIN_SHARED_TOKENS = 200

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LoadChange:
    """How far two loads are apart.

    Attributes:
        bits: Jensen-Shannon divergence of the loads, 0..1 bit, less what sampling adds (jackknife); not below 0.
        lower: lower bound, one-sided 97.5 %.
        num_blocks: blocks of both sides together.
    """

    bits: float
    lower: float
    num_blocks: int


@dataclass(frozen=True, slots=True)
class TokenOverlap:
    """How many experts the same tokens share.

    Attributes:
        mean: share of a token's experts that both sides use, 0..1; k/E by chance.
        upper: upper bound, one-sided 97.5 %, with the layer's design effect.
        num_tokens: sampled tokens that both sides have.
    """

    mean: float
    upper: float
    num_tokens: int


def load_change(now: Blocks, before: Blocks) -> LoadChange | None:
    """Return the divergence of two sets of blocks; None where either has too few.

    The bias of the divergence (two samples of one router are apart, too) and its error come from leaving out one block
    at a time on either side (Efron 1982).
    """
    if min(now.effective_number, before.effective_number) < MIN_BLOCKS:
        return None
    totals = now.table.sum(axis=0), before.table.sum(axis=0)
    whole = _bits(*totals)
    bias = variance = 0.0
    for table, left_out in (
        (now.table, [_bits(totals[0] - row, totals[1]) for row in now.table]),
        (before.table, [_bits(totals[0], totals[1] - row) for row in before.table]),
    ):
        num, values = len(table), np.array(left_out)
        bias += (num - 1) * (float(values.mean()) - whole)
        variance += (num - 1) / num * float(np.square(values - values.mean()).sum())
    degrees = min(now.effective_number, before.effective_number) - 1
    bits = max(whole - bias, 0.0)
    return LoadChange(bits, bits - student_quantile(degrees) * math.sqrt(variance), len(now.table) + len(before.table))


def _bits(now: _Floats, before: _Floats) -> float:
    return float(jensen_shannon_bits(now, before))


def token_overlap(now: TokenSample, before: TokenSample, design_effect: float) -> TokenOverlap | None:
    """Return how the same tokens were routed on both sides; None where too few tokens are the same."""
    _, at_now, at_before = np.intersect1d(now.keys, before.keys, return_indices=True)
    if len(at_now) < _MIN_SHARED_TOKENS:
        return None
    a, b = now.expert_ids[at_now], before.expert_ids[at_before]
    shared = ((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).any(axis=2).sum(axis=1)
    width = np.maximum(np.maximum((a >= 0).sum(axis=1), (b >= 0).sum(axis=1)), 1)
    overlap = shared / width
    effect = 1.0 if math.isnan(design_effect) else max(design_effect, 1.0)
    error = float(overlap.std()) * math.sqrt(effect / len(overlap))
    return TokenOverlap(float(overlap.mean()), float(overlap.mean()) + 2 * error, len(overlap))


def drift(look: Look, layer_index: int) -> Iterator[Finding]:
    """Find a layer that routes otherwise than in the baseline: other loads, or other experts for the same tokens."""
    limits, layer, before = look.thresholds, look.state.layers[layer_index], look.baseline_state
    if before is None or layer_index not in look.baseline or look.shortage(layer_index):
        return
    old = before.layers[layer_index]
    change = load_change(look.blocks[layer_index], variance_blocks(old))
    overlap = None
    if layer.token_sample is not None and old.token_sample is not None:
        overlap = token_overlap(layer.token_sample, old.token_sample, look.metrics[layer_index].design_effect)
    moved = change is not None and change.lower > limits.drift_bits
    rerouted = overlap is not None and overlap.upper < limits.drift_overlap
    if not moved and not rerouted:
        return
    evidence = []
    if change is not None:
        evidence += [
            EvidenceRow("load_divergence", change.bits, "", None, change.num_blocks, "bits"),
            EvidenceRow(
                "load_divergence_lower", change.lower, f"> {limits.drift_bits:g}", None, change.num_blocks, "bits"
            ),
        ]
    if overlap is not None:
        evidence += [
            EvidenceRow("token_overlap", overlap.mean, "", 1.0, overlap.num_tokens, "of a token's experts"),
            EvidenceRow("token_overlap_upper", overlap.upper, f"< {limits.drift_overlap:g}", None, overlap.num_tokens),
        ]
    yield Finding(
        FindingKind.DRIFT,
        # A router that is trained is meant to change.
        Severity.INFO if look.is_training else Severity.WARNING,
        "drift" if moved and not rerouted else ("drift_tokens" if not moved else "drift_both"),
        layer_index,
        since_step=layer.first_step,
        args={
            "layer": str(layer_index),
            "bits": "unknown" if change is None else formatted(change.bits),
            "overlap": "unknown" if overlap is None else formatted(100 * overlap.mean),
            "chance": formatted(100 * layer.shape.top_k / layer.shape.num_experts),
            "tokens": "0" if overlap is None else str(overlap.num_tokens),
        },
        evidence=tuple(evidence),
        statistic=overlap.upper if rerouted and overlap is not None else change.lower if change is not None else 0.0,
    )
