"""Rule about change against a baseline: loads that moved, and the same tokens on other experts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.assignment import best_assignment
from moe_debugger.analysis.drift import jensen_shannon_bits
from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.intervals import MIN_BLOCKS, Blocks, student_quantile
from moe_debugger.analysis.rules.look import Look, formatted
from moe_debugger.analysis.token_sample import TokenSample

__all__ = [
    "LoadChange",
    "LostExperts",
    "TokenOverlap",
    "drift",
    "load_change",
    "lost_experts",
    "relabelled_agreement",
    "token_overlap",
]

# Tokens that both sides must have for a word about tokens, and the part of the smaller sample that they must be: other
# text under the same names has a few tokens in common with it, at most a third where most of them are spaces.
_MIN_SHARED_TOKENS = 200
_MIN_SHARED_PART = 0.5
# An expert has changed places where it is proved to keep less than this part of its tokens, at this level over all
# experts of all layers.
_MIN_KEPT = 0.5
_LEVEL = 0.01
# Experts that a finding names; of more it says how many.
_MAX_NAMED = 12
# Agreement beyond chance from which on experts are taken for renumbered: 1 on the same tokens, about 0 on other text.
_MIN_RELABELLED = 0.7
# The table of pairs of experts takes 32 MB for so many.
_MAX_RELABELLED = 2048

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.signedinteger]
_Bools = npt.NDArray[np.bool_]


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


@dataclass(frozen=True, slots=True)
class LostExperts:
    """Experts that take other tokens than before.

    Attributes:
        experts: their ids before, ascending.
        worst: the one of them that kept least of its tokens.
        kept: the part that it kept, 0..1; num_tokens: its sampled tokens before.
    """

    experts: tuple[int, ...]
    worst: int
    kept: float
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
    a, b, part = _shared(now, before)
    if len(a) < _MIN_SHARED_TOKENS or part < _MIN_SHARED_PART:
        return None
    overlap = _num_common(a, b) / np.maximum(np.maximum((a >= 0).sum(axis=1), (b >= 0).sum(axis=1)), 1)
    effect = 1.0 if math.isnan(design_effect) else max(design_effect, 1.0)
    error = float(overlap.std()) * math.sqrt(effect / len(overlap))
    return TokenOverlap(float(overlap.mean()), float(overlap.mean()) + 2 * error, len(overlap))


def lost_experts(
    now: TokenSample, before: TokenSample, *, design_effect: float, part: float, num_tests: int
) -> LostExperts | None:
    """Return the experts that are proved to keep less than half of their tokens, None where there is none.

    The proof is Chernoff's bound on the binomial tail, exp(-n KL(kept, 1/2)). Sampled tokens stand further apart than a
    request's tokens do: of the design effect's excess over 1, the sampled part of the tokens is left.

    Args:
        design_effect: of all tokens of the layer, NaN where not known.
        part: sampled tokens of all tokens, 0..1.
        num_tests: experts of all layers.
    """
    a, b, _ = _shared(now, before)
    effect = 1.0 if math.isnan(design_effect) else 1.0 + max(design_effect - 1, 0.0) * part
    is_used = b >= 0
    is_kept = ((b[:, :, None] == a[:, None, :]) & is_used[:, :, None]).any(axis=2)
    num = np.bincount(b[is_used])
    kept = np.bincount(b[is_kept], minlength=len(num)) / np.maximum(num, 1)
    # Relative entropy of the part that was kept to a half.
    entropy = np.array([_binary_entropy(p) for p in kept.tolist()])
    is_lost = (kept < _MIN_KEPT) & (num / effect * (math.log(2) - entropy) > math.log(num_tests / _LEVEL))
    experts = np.flatnonzero(is_lost)
    if not len(experts):
        return None
    worst = int(experts[np.lexsort((-num[experts], kept[experts]))[0]])
    return LostExperts(tuple(experts.tolist()), worst, float(kept[worst]), int(num[worst]))


def _binary_entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _shared(now: TokenSample, before: TokenSample) -> tuple[_Ids, _Ids, float]:
    """Return the routes of the tokens that both have, and the part that they are of the smaller sample."""
    _, at_now, at_before = np.intersect1d(now.keys, before.keys, return_indices=True)
    # A sample that is not whole says nothing of tokens with larger keys than its own.
    ends = [sample.keys[-1] for sample in (now, before) if not sample.is_whole]
    reach = [int((sample.keys <= min(ends)).sum()) if ends else len(sample.keys) for sample in (now, before)]
    return now.expert_ids[at_now], before.expert_ids[at_before], len(at_now) / max(min(reach), 1)


def _num_common(a: _Ids, b: _Ids) -> npt.NDArray[np.intp]:
    """Return how many experts each row of `a` has in common with that of `b`; -1 is none."""
    common: npt.NDArray[np.intp] = ((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).any(axis=2).sum(axis=1)
    return common


def relabelled_agreement(now: TokenSample, before: TokenSample) -> float:
    """Return how far the routes of the tokens that both have agree beyond chance once the experts are renumbered.

    The numbers are given by the best assignment on one half of the tokens, and judged on the other: (agreement -
    chance) / (1 - chance) (Cohen 1960), chance being that of independent tokens with the same loads. 1 = the same
    tokens with permuted experts, about 0 = other tokens; NaN without a token, or with more than 2,048 experts in use.
    """
    a, b, _ = _shared(now, before)
    names_a, names_b = np.unique(a[a >= 0]), np.unique(b[b >= 0])
    size = max(len(names_a), len(names_b))
    if not 0 < size <= _MAX_RELABELLED:
        return float("nan")
    # Keys are hashes, so every second token is a random half.
    pairs = _pairs(np.searchsorted(names_a, a[::2]), a[::2] >= 0, np.searchsorted(names_b, b[::2]), b[::2] >= 0, size)
    column = best_assignment(pairs).column
    new_name = np.full(int(names_a[-1]) + 1, -1)
    is_known = column[: len(names_a)] < len(names_b)
    new_name[names_a[is_known]] = names_b[column[: len(names_a)][is_known]]
    a, b = a[1::2], b[1::2]
    relabelled = np.where(a >= 0, new_name[a], -1)
    ids = int(max(relabelled.max(initial=0), b.max(initial=0))) + 1
    loads_a = np.bincount(relabelled[relabelled >= 0], minlength=ids)
    loads_b = np.bincount(b[b >= 0], minlength=ids)
    slots = max(int((a >= 0).sum()), int((b >= 0).sum()), 1)
    agreement = float(_num_common(relabelled, b).sum()) / slots
    chance = float(loads_a @ loads_b) / max(len(a), 1) / slots
    return (agreement - chance) / (1 - chance) if chance < 1 else float("nan")


def _pairs(a: _Ids, in_a: _Bools, b: _Ids, in_b: _Bools, size: int) -> npt.NDArray[np.int64]:
    """Return how many tokens have expert i on one side and j on the other, [size, size]."""
    both = in_a[:, :, None] & in_b[:, None, :]
    cells = (a[:, :, None] * size + b[:, None, :])[both]
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def _rerouted(look: Look, layer_index: int) -> tuple[TokenOverlap, LostExperts | None] | None:
    """Return the overlap of the same tokens, where these use other experts; None where they do not, or may be others.

    A few experts that changed places hardly show in the overlap of all tokens: they come with it, where there are any.

    With token ids in both samples a common token is the same one. By request and position alone it may be another text
    under the same names: then only a renumbering of the experts that fits the tokens shows that they are the same.
    """
    if look.baseline_state is None:
        return None
    layers = (look.state.layers[layer_index], look.baseline_state.layers[layer_index])
    now, before = (layer.token_sample for layer in layers)
    if now is None or before is None:
        return None
    overlap = token_overlap(now, before, look.metrics[layer_index].design_effect)
    if overlap is None:
        return None
    lost = lost_experts(
        now,
        before,
        design_effect=look.metrics[layer_index].design_effect,
        part=len(now.keys) / max(layers[0].num_tokens, 1),
        num_tests=sum(shape.num_experts for shape in look.state.shapes),
    )
    if lost is None and not overlap.upper < look.thresholds.drift_overlap:
        return None
    # Where every row has its token id, it is part of the key.
    is_same = all(int(layer.token_classes.sum()) == layer.num_tokens for layer in layers)
    return (overlap, lost) if is_same or relabelled_agreement(now, before) >= _MIN_RELABELLED else None


def drift(look: Look, layer_index: int) -> Iterator[Finding]:
    """Find a layer that routes otherwise than in the baseline: other loads, or other experts for the same tokens."""
    limits, layer, before = look.thresholds, look.state.layers[layer_index], look.baseline_state
    if before is None or layer_index not in look.baseline or look.shortage(layer_index):
        return
    change = load_change(look.blocks[layer_index], look.baseline_blocks[layer_index])
    found = _rerouted(look, layer_index)
    overlap, lost = (None, None) if found is None else found
    moved, rerouted = change is not None and change.lower > limits.drift_bits, overlap is not None
    of_few = lost is not None and overlap is not None and not overlap.upper < limits.drift_overlap
    if not moved and not rerouted:
        return
    # Loads of stretches move with the topic; the same tokens on other experts do not.
    is_sure = rerouted or look.compares_requests(layer_index)
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
    if lost is not None:
        evidence.append(
            EvidenceRow("expert_overlap", lost.kept, f"< {_MIN_KEPT:g} proved", 1.0, lost.num_tokens, "of its tokens")
        )
    yield Finding(
        FindingKind.DRIFT,
        # A router that is trained is meant to change.
        Severity.WARNING if is_sure and not look.is_training else Severity.INFO,
        _code(moved=moved, rerouted=rerouted, of_few=of_few),
        layer_index,
        lost.worst if of_few and lost is not None and len(lost.experts) == 1 else None,
        since_step=layer.first_step,
        args={
            "layer": str(layer_index),
            "bits": "unknown" if change is None else formatted(change.bits),
            "overlap": "unknown" if overlap is None else formatted(100 * overlap.mean),
            "chance": formatted(100 * layer.shape.top_k / layer.shape.num_experts),
            "tokens": "0" if overlap is None else str(overlap.num_tokens),
            **({} if lost is None else _lost_args(lost)),
        },
        evidence=tuple(evidence),
        statistic=overlap.upper if rerouted and overlap is not None else change.lower if change is not None else 0.0,
    )


def _code(*, moved: bool, rerouted: bool, of_few: bool) -> str:
    if not rerouted:
        return "drift"
    if of_few:
        return "drift_experts"
    return "drift_both" if moved else "drift_tokens"


def _lost_args(lost: LostExperts) -> dict[str, str]:
    shown = ", ".join(map(str, lost.experts[:_MAX_NAMED]))
    return {
        "lost": shown + (f" and {len(lost.experts) - _MAX_NAMED} more" if len(lost.experts) > _MAX_NAMED else ""),
        "worst": str(lost.worst),
        "kept": formatted(100 * lost.kept),
        "sampled": str(lost.num_tokens),
    }
