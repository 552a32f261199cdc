"""Co-activation: which experts of one layer are used for the same tokens.

Glossary, for one layer:
    N_i     tokens whose set holds expert i.   N_ij   tokens whose set holds both i and j (all unordered pairs).
    P(j|i)  N_ij / N_i. Its sum over j is K - 1, because a token with i has K - 1 other experts.
    lift    N_ij T / (N_i N_j).

Two experts that have nothing to do with each other do not have lift 1: a token that took i has only K - 1 choices left.
With even loads P(j|i) is (K - 1)/(E - 1), and the lift (1 - 1/K) E/(E - 1): 0.571 at 8/2.

Example: E = 3, K = 2, sets {0, 1}, {0, 1}, {0, 2}: N = [3, 2, 1], N_01 = 2, N_02 = 1; P(1|0) = 2/3, P(0|1) = 1,
lift of (0, 1) = 2 * 3 / (3 * 2) = 1, chance lift 0.75.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_debugger.analysis.expert_pairs import MAX_DENSE_EXPERTS, ExpertPair, PairCandidates, pair_stripes
from moe_debugger.analysis.token_rows import DecisionRows, Floats, Ints, LayerRows, plain

__all__ = ["Coactivation", "expert_coactivation"]

_NAN = float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Coactivation:
    """Co-activation of one layer; `not_applicable` says why where there is none, and then all else is empty or NaN.

    Attributes:
        num_tokens: T, valid tokens.
        num_partial_tokens: tokens with fewer than K routed experts (dropped, skipped, identity or unused slots).
        expert_tokens: [E] int64, N_i: the sample size of row i.
        counts: [E, E] int64, N_ij, symmetric, 0 on the diagonal; None above 512 experts, as the two below.
        conditional: [E, E] float64, P(j|i) in row i, 0 on the diagonal, NaN where expert i was not used.
        lift: [E, E] float64, NaN on the diagonal and where either was not used.
        row_sum: [E] float64, sum over j of P(j|i); K - 1 where no token with i is partial. NaN where i was not used.
        row_sum_error: the self-check: largest distance of `row_sum` from the mean number of other experts of the tokens
            with i, which is counted without pairs. 0 but for rounding.
        chance: P(j|i) of unrelated experts with even loads: (K - 1)/(E - 1), less with partial tokens.
        chance_lift: lift of the same.
        top_pairs: those furthest above their expectation N_i N_j / T * chance_lift, most telling first.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_tokens: int
    num_partial_tokens: int
    not_applicable: str
    expert_tokens: Ints
    counts: Ints | None
    conditional: Floats | None
    lift: Floats | None
    row_sum: Floats
    row_sum_error: float
    chance: float
    chance_lift: float
    top_pairs: tuple[ExpertPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return plain(self)


def expert_coactivation(
    decisions: Mapping[str, Any],
    *,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    num_identity_experts: int | Sequence[int] = 0,
    num_top_pairs: int = 20,
) -> dict[int, Coactivation]:
    """Return the co-activation of each layer, by layer index (OLMoE, arXiv 2409.02060, section 5.2, over all pairs).

    Time O(T K^2 + E^2), memory O(T K) and at most 4 million cells of a table.

    Args:
        decisions: columns as for `analyze`. Used where present: `is_padding`, `slot_status`; for intervals
            `request_id`, `phase`, `step`, `forward_index`.
        num_experts: E, or one per layer index.
        top_k: k, or one per layer index.
        num_identity_experts: Z, or one per layer index.
        num_top_pairs: how many pairs to list.

    Raises:
        InvalidInputError: a column is missing or of another length, or ids are out of range.
    """
    rows = DecisionRows(decisions, num_experts=num_experts, top_k=top_k, num_identity_experts=num_identity_experts)
    return {index: _coactivation(rows.layer(index), num_top_pairs) for index in rows.shapes}


def _coactivation(layer: LayerRows, num_top_pairs: int) -> Coactivation:
    shape, sizes = layer.shape, layer.num_routed
    experts, total = shape.num_experts, len(sizes)
    used = np.bincount(layer.experts.reshape(-1), minlength=experts + 1)[:experts].astype(np.int64)
    others, slots = int((sizes * (sizes - 1)).sum()), int(sizes.sum())
    reason = ""
    if shape.top_k == 1 or experts == 1:
        reason = "a token uses one expert at this layer, so there are no pairs"
    elif not others:
        reason = "no valid token used two routed experts"
    if reason:
        return Coactivation(
            shape.layer_index, experts, shape.top_k, total, layer.num_partial, reason, used, None, None, None,
            np.full(experts, _NAN), _NAN, _NAN, _NAN, (),
        )  # fmt: skip
    chance_lift = total * others * experts / ((experts - 1) * slots**2)
    candidates = PairCandidates(
        layer.experts, layer.experts, num_pairs=num_top_pairs, expected_lift=chance_lift, is_unordered=True
    )
    is_dense = experts <= MAX_DENSE_EXPERTS
    counts = np.zeros((experts, experts), np.int64) if is_dense else None
    row_sums = np.zeros(experts, np.int64)
    for first, table in pair_stripes(layer.experts, experts, layer.experts, experts):
        rows = np.arange(len(table))
        table[rows, first + rows] = 0
        row_sums[first : first + len(table)] = table.sum(axis=1)
        candidates.add(first, table, used, used)
        if counts is not None:
            counts[first : first + len(table)] = table
    divisor = np.where(used > 0, used, _NAN)
    row_sum = row_sums / divisor
    weights = np.repeat(sizes - 1, layer.experts.shape[1]).astype(np.float64)
    expected = np.bincount(layer.experts.reshape(-1), weights, minlength=experts + 1)[:experts] / divisor
    conditional = lift = None
    if counts is not None:
        conditional = counts / divisor[:, None]
        lift = conditional * (total / divisor)[None, :]
        np.fill_diagonal(lift, _NAN)
    return Coactivation(
        layer_index=shape.layer_index,
        num_experts=experts,
        top_k=shape.top_k,
        num_tokens=total,
        num_partial_tokens=layer.num_partial,
        not_applicable="",
        expert_tokens=used,
        counts=counts,
        conditional=conditional,
        lift=lift,
        row_sum=row_sum,
        row_sum_error=float(np.nanmax(np.abs(row_sum - expected))),
        chance=others / (slots * (experts - 1)),
        chance_lift=chance_lift,
        top_pairs=candidates.pairs(used, used, layer.block, layer.num_blocks),
    )
