"""Cross-layer transitions: which experts of the next MoE layer take the tokens of an expert.

Glossary, over the tokens that both layers have:
    N_i     tokens with expert i at the first layer.   N_j   with expert j at the next one.   N_ij   with both.
    P(j|i)  N_ij / N_i. Its sum over j is K', the experts per token of the next layer.
    lift    N_ij T / (N_i N_j): 1 where the next layer's choice does not depend on the first one's.

Rows are matched by rank, request, forward and position, never by their number: layers may have seen other rows. Layers
have experts of their own, so "expert 3 goes to expert 3" means nothing in itself.

Example: E = E' = 2, k = 1, tokens 0 -> 1, 0 -> 1, 1 -> 0: P(1|0) = 1, N_1 of the next layer = 2 of 3, lift 1.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_debugger.analysis.expert_pairs import MAX_DENSE_EXPERTS, ExpertPair, PairCandidates, pair_stripes
from moe_debugger.analysis.token_rows import DecisionRows, Floats, Ints, LayerRows, plain, unique_rows
from moe_debugger.errors import InvalidInputError

__all__ = ["Transitions", "layer_transitions"]

_NAN = float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """Transitions of one pair of layers; `not_applicable` says why where there are none.

    Attributes:
        layer_index, next_layer_index: the layers; they have `num_experts` and `next_num_experts` routed experts, and
            `top_k` and `next_top_k` slots.
        num_tokens: T, tokens matched: the sample size. Of the valid rows of both layers, `num_unmatched` have no
            partner, `num_ambiguous` share their key with another row of their layer, and `num_other_token` matched one
            with another token id (an encoder's and a decoder's rows do).
        expert_tokens: [E] int64, N_i: the sample size of row i. next_expert_tokens: [E'] int64, N_j.
        counts: [E, E'] int64, N_ij; None where either layer has more than 512 experts, as the two below.
        conditional: [E, E'] float64, P(j|i) in row i; NaN where expert i was not used.
        lift: [E, E'] float64, NaN where either was not used.
        chance: [E'] float64, N_j / T: P(j|i) if layers chose independently with these loads.
        row_sum_error: the self-check: largest distance of the sum over j of P(j|i) from the mean number of experts that
            the tokens with i have at the next layer (K' without dropped slots), which is counted without pairs.
        top_pairs: transitions furthest above independence, most telling first.
    """

    layer_index: int
    next_layer_index: int
    num_experts: int
    next_num_experts: int
    top_k: int
    next_top_k: int
    num_tokens: int
    num_unmatched: int
    num_ambiguous: int
    num_other_token: int
    not_applicable: str
    expert_tokens: Ints
    next_expert_tokens: Ints
    counts: Ints | None
    conditional: Floats | None
    lift: Floats | None
    chance: Floats
    row_sum_error: float
    top_pairs: tuple[ExpertPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return plain(self)


def layer_transitions(
    decisions: Mapping[str, Any],
    *,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    num_identity_experts: int | Sequence[int] = 0,
    pairs: Sequence[tuple[int, int]] | None = None,
    num_top_pairs: int = 20,
) -> dict[tuple[int, int], Transitions]:
    """Return the transitions of each pair of layers. Time O(n log n + n k k' + E E').

    Args:
        decisions: columns as for `analyze`. Required besides: `request_id`, `position`. Used where present:
            `forward_index`, `rank`, `token_id`, `is_padding`, `slot_status`, `phase`, `step`.
        num_experts: E, or one per layer index.
        top_k: k, or one per layer index.
        num_identity_experts: Z, or one per layer index.
        pairs: (layer, next layer); None = each layer with the one of the next index, but of two stacks (where
            `decisions` knows its layers, as those of a session do).
        num_top_pairs: how many transitions to list for each pair.

    Raises:
        InvalidInputError: a column is missing or of another length, ids are out of range, or `pairs` names a layer
            without rows.
    """
    rows = DecisionRows(decisions, num_experts=num_experts, top_k=top_k, num_identity_experts=num_identity_experts)
    if pairs is None:
        pairs = [(i, i + 1) for i in rows.shapes if i + 1 in rows.shapes and rows.is_one_stack(i, i + 1)]
    missing = sorted({index for pair in pairs for index in pair} - rows.shapes.keys())
    if missing:
        raise InvalidInputError(f"pairs names the layers {missing}, which have no rows; there are {[*rows.shapes]}")
    codes = rows.token_codes()
    token_id = rows.column("token_id")
    # One layer is the next of one pair and the first of another: keep it for both, and no more than two at a time.
    known: dict[int, tuple[LayerRows, Ints, int]] = {}
    results = {}
    for pair in pairs:
        known = {index: known.get(index) or _keyed(rows.layer(index), codes) for index in pair}
        first, second = known[pair[0]], known[pair[1]]
        results[pair] = _transitions(first, second, codes, token_id, num_top_pairs)
    return results


def _keyed(layer: LayerRows, codes: Ints) -> tuple[LayerRows, Ints, int]:
    return layer, *unique_rows(codes[layer.row])


def _transitions(
    first: tuple[LayerRows, Ints, int],
    second: tuple[LayerRows, Ints, int],
    codes: Ints,
    token_id: Any,
    num_top_pairs: int,
) -> Transitions:
    (one, own, ambiguous), (two, others, next_ambiguous) = first, second
    code_one, code_two = codes[one.row[own]], codes[two.row[others]]
    if not np.array_equal(code_one, code_two):
        _, in_one, in_two = np.intersect1d(code_one, code_two, assume_unique=True, return_indices=True)
        own, others = own[in_one], others[in_two]
    num_unmatched = len(code_one) + len(code_two) - 2 * len(own)
    num_other = 0
    if token_id is not None:
        token, next_token = token_id[one.row[own]], token_id[two.row[others]]
        is_same = (token == next_token) | (token < 0) | (next_token < 0)
        num_other = int(np.count_nonzero(~is_same))
        own, others = own[is_same], others[is_same]
    a, b = one.experts[own], two.experts[others]
    num_a, num_b, total = one.shape.num_experts, two.shape.num_experts, len(own)
    used = np.bincount(a.reshape(-1), minlength=num_a + 1)[:num_a].astype(np.int64)
    next_used = np.bincount(b.reshape(-1), minlength=num_b + 1)[:num_b].astype(np.int64)
    counts = conditional = lift = None
    if num_a <= MAX_DENSE_EXPERTS and num_b <= MAX_DENSE_EXPERTS:
        counts = np.zeros((num_a, num_b), np.int64)
    candidates = PairCandidates(a, b, num_pairs=num_top_pairs)
    row_sums = np.zeros(num_a, np.int64)
    for start, table in pair_stripes(a, num_a, b, num_b):
        row_sums[start : start + len(table)] = table.sum(axis=1)
        candidates.add(start, table, used, next_used)
        if counts is not None:
            counts[start : start + len(table)] = table
    divisor = np.where(used > 0, used, _NAN)
    if counts is not None:
        conditional = counts / divisor[:, None]
        lift = conditional * (total / np.where(next_used > 0, next_used, _NAN))[None, :]
    sizes = np.repeat(two.num_routed[others], a.shape[1]).astype(np.float64)
    expected = np.bincount(a.reshape(-1), sizes, minlength=num_a + 1)[:num_a]
    errors = np.abs(row_sums - expected) / divisor
    return Transitions(
        layer_index=one.shape.layer_index,
        next_layer_index=two.shape.layer_index,
        num_experts=num_a,
        next_num_experts=num_b,
        top_k=one.shape.top_k,
        next_top_k=two.shape.top_k,
        num_tokens=total,
        num_unmatched=num_unmatched,
        num_ambiguous=ambiguous + next_ambiguous,
        num_other_token=num_other,
        not_applicable="" if total else "no token has rows in both layers",
        expert_tokens=used,
        next_expert_tokens=next_used,
        counts=counts,
        conditional=conditional,
        lift=lift,
        chance=next_used / total if total else np.full(num_b, _NAN),
        row_sum_error=float(np.nanmax(errors)) if used.any() else _NAN,
        top_pairs=candidates.pairs(used, next_used, one.block[own], one.num_blocks),
    )
