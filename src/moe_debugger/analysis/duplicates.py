"""Experts that are nearly the same: by their weights, and by always being chosen together.

Two experts with nearly the same weights waste a place; two that are chosen by the same tokens act as one larger expert,
whatever their weights. The two need not agree, so they are looked for apart.

Example: similarities of four experts that are 0.2 everywhere but 0.98 for experts 1 and 3: that pair stands out, and is
found. Where all are 0.98 (copies of one dense MLP, before training has told them apart) no pair does.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_debugger.analysis.expert_similarity import ExpertSimilarity

__all__ = [
    "NearDuplicates",
    "SimilarPair",
    "TogetherPair",
    "always_together",
    "duplicate_weights",
    "near_duplicate_experts",
]

_Z95 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class SimilarPair:
    """Two experts whose similarity stands out.

    Attributes:
        similarity: theirs, as given.
        excess: (similarity - median of the other pairs) / (1.4826 MAD of the other pairs).
    """

    expert_a: int
    expert_b: int
    similarity: float
    excess: float


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Pairs of nearly equal experts, most similar first.

    Attributes:
        pairs: those at or above the threshold that stand out from the rest.
        threshold, min_excess: where the lines were drawn.
        num_pairs: pairs of experts compared.
        median, mad: of the similarities of all pairs not at or above the threshold; NaN where there is none.
        is_uniformly_alike: half of all pairs or more are at or above the threshold. Then none is a duplicate of another
            in particular: experts that were copied from one, or that never trained apart.
        not_applicable: why nothing could be said, else "".
    """

    pairs: tuple[SimilarPair, ...]
    threshold: float
    min_excess: float
    num_pairs: int
    median: float
    mad: float
    is_uniformly_alike: bool
    not_applicable: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return asdict(self)


def near_duplicate_experts(
    similarity: npt.ArrayLike, *, threshold: float = 0.9, min_excess: float = 6.0
) -> NearDuplicates:
    """Return the pairs of experts that are nearly the same.

    Two conditions: the similarity is `threshold` or more (an effect that matters), and it is `min_excess` robust
    standard deviations above the median of the pairs below the threshold (it stands out from what experts of this layer
    share anyway). The null is those other pairs, not 0: experts of one layer are alike to some degree.

    Args:
        similarity: [E, E], symmetric, such as `ExpertSimilarity.aligned_cosine` or `output_cosine`; NaN = unknown.
        threshold: 0..1.
        min_excess: robust standard deviations.

    Raises:
        InvalidInputError: `similarity` is no square symmetric table, or `threshold` not in 0..1.
    """
    table = np.asarray(similarity, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not np.allclose(table, table.T, equal_nan=True):
        raise InvalidInputError(f"similarity has shape {table.shape}, expected a symmetric [experts, experts] table")
    if not 0 < threshold <= 1:
        raise InvalidInputError(f"threshold is {threshold}, expected above 0 and at most 1")
    first, second = np.triu_indices(len(table), 1)
    values = table[first, second]
    is_known = np.isfinite(values)
    first, second, values = first[is_known], second[is_known], values[is_known]
    others = values[values < threshold]
    median = float(np.median(others)) if len(others) else math.nan
    mad = float(np.median(np.abs(others - median))) if len(others) else math.nan
    is_alike = len(values) > 0 and 2 * len(others) <= len(values)
    reason = "fewer than two experts with a known similarity" if not len(values) else ""
    if len(values) and len(others) < 3:
        reason = f"only {len(others)} other pairs to compare with, expected 3 or more"
    pairs: list[SimilarPair] = []
    if not reason and not is_alike:
        # Pairs that are all the same have no spread; differences below 1 % are none that matter.
        spread = max(1.4826 * mad, 0.01)
        pairs = [
            SimilarPair(int(a), int(b), float(value), (float(value) - median) / spread)
            for a, b, value in zip(first, second, values, strict=True)
            if value >= threshold and (value - median) / spread >= min_excess
        ]
    return NearDuplicates(
        pairs=tuple(sorted(pairs, key=lambda pair: -pair.similarity)),
        threshold=threshold,
        min_excess=min_excess,
        num_pairs=len(values),
        median=median,
        mad=mad,
        is_uniformly_alike=is_alike,
        not_applicable=reason,
    )


def duplicate_weights(similarity: "ExpertSimilarity", *, threshold: float = 0.9) -> list[Finding]:
    """Return a finding for each pair of experts with nearly the same weights, `near_duplicate_experts` of them.

    Weights are no statistics of tokens: there is no interval, and nothing of a stated rate of false alarms.

    Args:
        similarity: as `moe_debugger.expert_similarity` gives it.
        threshold: of the aligned cosine.
    """
    found = near_duplicate_experts(similarity.aligned_cosine, threshold=threshold)
    findings = []
    for pair in found.pairs:
        a, b = similarity.expert_ids[pair.expert_a], similarity.expert_ids[pair.expert_b]
        outputs = float(similarity.output_cosine[pair.expert_a, pair.expert_b])
        evidence = [
            EvidenceRow(
                "aligned_cosine", pair.similarity, f">= {threshold:g}", found.median, similarity.num_units, "cosine"
            ),
            EvidenceRow(
                "excess", pair.excess, f">= {found.min_excess:g}", None, found.num_pairs, "standard deviations"
            ),
        ]
        if similarity.num_tokens:
            evidence.append(EvidenceRow("output_cosine", outputs, "", None, similarity.num_tokens, "cosine"))
        findings.append(
            Finding(
                FindingKind.DUPLICATE_EXPERTS,
                Severity.WARNING,
                "duplicate_weights",
                similarity.layer_index if similarity.layer_index >= 0 else None,
                a if similarity.layer_index >= 0 else None,
                args={
                    "layer": str(similarity.layer_index),
                    "expert": str(a),
                    "other": str(b),
                    "cosine": f"{pair.similarity:.3f}",
                    "median": f"{found.median:.3f}",
                },
                evidence=tuple(evidence),
                statistic=pair.similarity,
            )
        )
    return findings


@dataclass(frozen=True, slots=True)
class TogetherPair:
    """Two experts that are chosen by (nearly) the same tokens.

    Attributes:
        num_together: tokens that chose both; num_either: tokens that chose one of them at least.
        jaccard: num_together / num_either.
        lower: one-sided 95 % lower bound of the long-run share (Wilson), over num_either / design_effect trials.
        expected: the same share for unrelated experts with these loads.
    """

    expert_a: int
    expert_b: int
    num_together: int
    num_either: int
    jaccard: float
    lower: float
    expected: float


def always_together(
    pair_tokens: npt.ArrayLike,
    expert_tokens: npt.ArrayLike,
    *,
    num_tokens: int,
    threshold: float = 0.9,
    design_effect: float = 1.0,
) -> tuple[TogetherPair, ...]:
    """Return the pairs whose share of common tokens is proved to be `threshold` or more, highest first.

    A share proved this high is far above `expected` unless both experts are chosen by nearly every token; those (an
    expected share of half the threshold or more) are left out, because loads alone explain them.

    Args:
        pair_tokens: [E, E], N_ij: tokens that chose both (`Coactivation.counts`).
        expert_tokens: [E], N_i: tokens that chose i (`Coactivation.expert_tokens`).
        num_tokens: T.
        threshold: of the Jaccard index, 0..1.
        design_effect: of the layer's shares; below 1 counts as 1, and with NaN (unknown) nothing is proved.

    Raises:
        InvalidInputError: tables of other sizes, or numbers that cannot be counts of the same tokens.
    """
    pairs, experts = np.asarray(pair_tokens, np.float64), np.asarray(expert_tokens, np.float64)
    if pairs.shape != (len(experts), len(experts)):
        raise InvalidInputError(f"pair_tokens has shape {pairs.shape}, expected {(len(experts), len(experts))}")
    first, second = np.triu_indices(len(experts), 1)
    both, a, b = pairs[first, second], experts[first], experts[second]
    if (both < 0).any() or (both > np.minimum(a, b)).any() or (experts > num_tokens).any():
        raise InvalidInputError("pair_tokens, expert_tokens and num_tokens are not counts of the same tokens")
    either = a + b - both
    found = []
    for i in np.flatnonzero((either > 0) & (both >= threshold * either)).tolist():
        share_a, share_b = a[i] / num_tokens, b[i] / num_tokens
        expected = share_a * share_b / (share_a + share_b - share_a * share_b)
        jaccard = both[i] / either[i]
        lower = _wilson_lower(jaccard, either[i] / max(design_effect, 1.0) if design_effect == design_effect else 0.0)
        if lower >= threshold and expected < threshold / 2:
            pair = (int(first[i]), int(second[i]), int(both[i]), int(either[i]))
            found.append(TogetherPair(*pair, jaccard=float(jaccard), lower=lower, expected=float(expected)))
    return tuple(sorted(found, key=lambda pair: (-pair.lower, pair.expert_a, pair.expert_b)))


def _wilson_lower(share: float, num: float) -> float:
    if num <= 0:
        return 0.0
    z = _Z95
    centre = share + z * z / (2 * num)
    width = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return float((centre - width) / (1 + z * z / num))
