"""Specialisation: which kinds of text, and which tokens, an expert is chosen for.

Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), sections 5.3 and 5.4. Rates are over tokens and their sets of experts
(one that has two slots of a token counts once), so they sum to k over the experts of a layer (to less where slots
reached no routed expert), and chance is k / (E + Z).

Example: k = 1, workload "code" has 4 tokens, 3 of them on expert 0: its rate is .75. Token 7 occurs once, on expert 0:
its rate is 1, but of one token; shrunk towards the layer's overall .5 by 10 tokens' worth it is (1 + 10 * .5) / 11 =
.545.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.intervals import MIN_BLOCKS, student_quantile
from moe_debugger.analysis.row_set import RowSet, comparable_layers
from moe_debugger.analysis.token_rows import expert_sets
from moe_debugger.errors import InvalidInputError

__all__ = ["DomainSpecialisation", "VocabularySpecialisation", "domain_specialisation", "vocabulary_specialisation"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
# A table of all pairs is much faster than sorting, unless nearly all of it is empty.
_MAX_TABLE_RATIO = 8


@dataclass(frozen=True, slots=True, eq=False)
class DomainSpecialisation:
    """N(e, D) / N_D of one layer, for the D labels of the column `workload`.

    Attributes:
        labels: [D] names.
        num_tokens: [D] int64, N_D, the sample sizes; num_documents: [D] int64, documents (in training: of one step).
        rate: [D, E] float64, share of the label's tokens that chose the expert, 0..1.
        half_width: [D, E] float64, of the two-sided 95 % interval from documents; NaN with fewer than 4 documents'
            worth (Kish's effective number).
        chance: k / (E + Z), the rate where nothing is special and all are chosen alike.
        num_unlabelled: tokens without a label, left out.
    """

    layer_index: int
    labels: tuple[str, ...]
    num_tokens: _Ints
    num_documents: _Ints
    rate: _Floats
    half_width: _Floats
    chance: float
    num_unlabelled: int


@dataclass(frozen=True, slots=True, eq=False)
class VocabularySpecialisation:
    """N(x, e) / N_x of one layer, for the pairs of token and expert that occur; m pairs, by token, then expert.

    Attributes:
        token_id: [m] int64, x, the token that went in; expert_id: [m] int64, e.
        num_together: [m] int64, N(x, e); num_tokens: [m] int64, N_x, the sample size.
        rate: [m] float64, N(x, e) / N_x, 0..1. Of a token that occurs once it is 0 or 1, whatever the router does.
        shrunk_rate: [m] float64, (N(x, e) + t r_e) / (N_x + t), with r_e the expert's rate over all tokens and
            t = prior_tokens.
        overall_rate: [E] float64, r_e.
        num_unknown: tokens whose id is not known, left out.
    """

    layer_index: int
    token_id: _Ints
    expert_id: _Ints
    num_together: _Ints
    num_tokens: _Ints
    rate: _Floats
    shrunk_rate: _Floats
    overall_rate: _Floats
    prior_tokens: float
    num_unknown: int

    def top_tokens(self, expert_id: int, num: int = 10) -> list[tuple[int, float, int]]:
        """Return (token id, shrunk rate, N_x) of the tokens that an expert is most special for, highest first."""
        of_expert = np.flatnonzero(self.expert_id == expert_id)
        best = of_expert[np.argsort(-self.shrunk_rate[of_expert], kind="stable")[:num]]
        return [(int(self.token_id[i]), float(self.shrunk_rate[i]), int(self.num_tokens[i])) for i in best]


def domain_specialisation(rows: RowSet, *, layers: Sequence[int] | None = None) -> Mapping[int, DomainSpecialisation]:
    """Return the domain specialisation of each layer, by layer index; O(n k log(n k)) whatever documents there are.

    Raises:
        InvalidInputError: the rows have no column `workload`, or no label in it, or not the layers.
    """
    wanted = comparable_layers(rows, rows, layers)
    if rows.workload is None or not rows.workloads:
        raise InvalidInputError("there is no label: add a column `workload` that names the kind of text of each row")
    return {i: _domains(rows, rows.workload, i) for i in wanted}


def _domains(rows: RowSet, workload: _Ints, layer_index: int) -> DomainSpecialisation:
    bound, shape = rows.bounds[layer_index], rows.shapes[layer_index]
    label, unit = workload[bound], rows.unit[bound]
    num_labels, num_units, experts = len(rows.workloads), len(rows.units), shape.num_experts
    sets = expert_sets(rows.expert_ids[bound], rows.is_load[bound], experts)
    is_labelled = label >= 0
    num_tokens = np.bincount(label[is_labelled], minlength=num_labels)
    cells = (label[:, None] * experts + sets)[(sets < experts) & is_labelled[:, None]]
    counts = np.bincount(cells, minlength=num_labels * experts).reshape(num_labels, experts)
    with np.errstate(invalid="ignore"):
        rate = counts / num_tokens[:, None]
    half_width = np.full(rate.shape, np.nan)
    num_documents = np.zeros(num_labels, np.int64)
    for d in range(num_labels):
        of_label = (label == d) & (unit >= 0)
        sizes = np.bincount(unit[of_label], minlength=num_units)
        num_documents[d] = np.count_nonzero(sizes)
        # An interval from some of the tokens would be one of another number.
        if np.count_nonzero(of_label) == num_tokens[d]:
            half_width[d] = _half_width(sets[of_label], unit[of_label], sizes, rate[d])
    return DomainSpecialisation(
        layer_index=layer_index,
        labels=rows.workloads,
        num_tokens=num_tokens,
        num_documents=num_documents,
        rate=rate,
        half_width=half_width,
        chance=shape.top_k / shape.num_ids,
        num_unlabelled=int(np.count_nonzero(~is_labelled)),
    )


def _half_width(sets: npt.NDArray[np.int32], unit: _Ints, sizes: _Ints, rate: _Floats) -> _Floats:
    """Return half of the 95 % interval of a ratio over documents (Cochran 1977, eq. 6.13), [E].

    Args:
        sets: [n, k] the tokens' experts, E where there is none.
        unit: [n] document of each token.
        sizes: [documents] tokens of each, 0 where none is here.
        rate: [E].
    """
    experts, squares = len(rate), np.square(sizes)
    num, total = int(np.count_nonzero(sizes)), float(sizes.sum())
    kish = total**2 / float(squares.sum()) if num else 0.0
    if kish < MIN_BLOCKS:
        return np.full(experts, np.nan)
    # Only the documents that use an expert, not a table of all: those may be as many as there are tokens.
    pairs, together = _counted((unit[:, None] * experts + sets)[sets < experts], len(sizes) * experts)
    document, expert = pairs // experts, pairs % experts
    residuals = np.square(together - rate[expert] * sizes[document])
    spread = np.bincount(expert, residuals, minlength=experts)
    # A document without the expert is its rate times the document's size away from it.
    spread += np.square(rate) * (squares.sum() - np.bincount(expert, squares[document], minlength=experts))
    width: _Floats = student_quantile(kish - 1) * np.sqrt(num / (num - 1) * spread) / total
    return width


def vocabulary_specialisation(
    rows: RowSet, *, layers: Sequence[int] | None = None, prior_tokens: float = 10.0
) -> Mapping[int, VocabularySpecialisation]:
    """Return the vocabulary specialisation of each layer, by layer index; O(n k log(n k)), at most n k pairs.

    Args:
        rows: with the column `token_id`, the token that went in. For predicted tokens give those as `token_id`.
        layers: the layers; None = all.
        prior_tokens: how many tokens' worth of the layer's overall rate each rate is shrunk by, more than 0.

    Raises:
        InvalidInputError: no token id is known, the rows have not the layers, or `prior_tokens` is not above 0.
    """
    wanted = comparable_layers(rows, rows, layers)
    if rows.token_id is None or (rows.token_id < 0).all():
        raise InvalidInputError("there are no token ids: record at level `routes+tokens` or above")
    if not prior_tokens > 0:
        raise InvalidInputError(f"prior_tokens is {prior_tokens}, expected more than 0")
    return {i: _vocabulary(rows, rows.token_id, i, prior_tokens) for i in wanted}


def _counted(codes: _Ints, num_codes: int) -> tuple[_Ints, _Ints]:
    """Return the codes that occur, ascending, and how often each does."""
    if num_codes > _MAX_TABLE_RATIO * len(codes):
        return np.unique(codes, return_counts=True)
    table = np.bincount(codes, minlength=num_codes)
    found = np.flatnonzero(table)
    return found, table[found]


def _vocabulary(rows: RowSet, token_id: _Ints, layer_index: int, prior: float) -> VocabularySpecialisation:
    bound, experts = rows.bounds[layer_index], rows.shapes[layer_index].num_experts
    is_known = token_id[bound] >= 0
    sets = expert_sets(rows.expert_ids[bound][is_known], rows.is_load[bound][is_known], experts)
    is_there = sets < experts
    tokens, token, sizes = np.unique(token_id[bound][is_known], return_inverse=True, return_counts=True)
    pairs, together = _counted((token[:, None] * experts + sets)[is_there], len(tokens) * experts)
    of_token, expert = pairs // experts, pairs % experts
    num_known = len(sets)
    counts = np.bincount(sets[is_there], minlength=experts)
    overall = counts / num_known if num_known else np.full(experts, np.nan)
    num_tokens = sizes[of_token]
    return VocabularySpecialisation(
        layer_index=layer_index,
        token_id=tokens[of_token],
        expert_id=expert.astype(np.int64),
        num_together=together,
        num_tokens=num_tokens,
        rate=together / num_tokens,
        shrunk_rate=(together + prior * overall[expert]) / (num_tokens + prior),
        overall_rate=overall,
        prior_tokens=prior,
        num_unknown=int(np.count_nonzero(~is_known)),
    )
