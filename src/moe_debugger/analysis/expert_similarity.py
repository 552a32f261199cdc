"""How alike the experts of a layer are: by their weights with hidden units matched, and by what they put out.

Words:
    unit        a hidden unit of an expert's MLP with all weights that touch it: its row of gate and up (and their
                biases) and its column of down. The order of the units means nothing: exchanging two of them, in all
                three matrices, leaves the expert's function as it was.
    aligned     after the order of one expert's units was changed so that the cosine is highest.

Example: expert b is expert a with its two units exchanged: units a = [[1, 0], [0, 1]], b = [[0, 1], [1, 0]]. The
flattened weights have cosine 0; aligned they have 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.assignment import MAX_EXACT, best_assignment
from moe_debugger.analysis.token_rows import plain
from moe_debugger.errors import InvalidInputError

__all__ = [
    "ExpertSimilarity",
    "aligned_similarity",
    "linear_cka",
    "output_similarity",
]

Floats = npt.NDArray[np.float64]
# Pairs of which one has its inputs shuffled, for the level of chance.
_NUM_CHANCE_PAIRS = 8


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSimilarity:
    """How alike each pair of experts of one layer is; symmetric tables, 1 on the diagonal.

    Attributes:
        layer_index: -1 where it is not known.
        expert_ids: the experts that were compared, in the order of the tables; m of them.
        num_units: hidden units of an expert; 0 where weights were not compared.
        aligned_cosine: [m, m] float64, cosine of the weights after matching hidden units, -1..1.
        aligned_cosine_upper: [m, m] float64, no matching gives more; equal to the above where it is exact.
        flattened_cosine: [m, m] float64, cosine in the order in which units are stored. Means nothing for experts that
            were trained apart, and is here only to show the difference.
        chance: aligned cosine of two experts of which one has its inputs shuffled: what matching alone makes of
            unrelated weights. NaN with fewer than two experts.
        is_exact: every matching is the best one.
        output_cosine: [m, m] float64, mean over tokens of the cosine of the experts' outputs; NaN = not compared.
        output_cka: [m, m] float64, linear CKA of the outputs, debiased; NaN = not compared, or fewer than 4 tokens.
        num_tokens: tokens on which outputs were compared, 0 = none.
        not_applicable: why outputs or weights were not compared, "" where they were or were not asked for.
    """

    layer_index: int
    expert_ids: tuple[int, ...]
    num_units: int
    aligned_cosine: Floats
    aligned_cosine_upper: Floats
    flattened_cosine: Floats
    chance: float
    is_exact: bool
    output_cosine: Floats
    output_cka: Floats
    num_tokens: int
    not_applicable: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return plain(self)


def _numpy_product(a: Any, b: Any) -> Floats:
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64).T


def aligned_similarity(
    units: Callable[[int], Any],
    expert_ids: Sequence[int],
    *,
    layer_index: int = -1,
    product: Callable[[Any, Any], Floats] = _numpy_product,
    max_exact: int = MAX_EXACT,
) -> ExpertSimilarity:
    """Return how alike the weights of experts are, hidden units matched.

    The matching that makes the sum of the units' inner products highest makes the cosine of the whole highest, since
    the norms do not depend on the order. Time O(m^2 (I^2 D + I^3)) for m experts of I units with D weights each.

    Args:
        units: gives the units of an expert, [I, D] of any array type that `product` takes and that can be indexed by
            numpy index arrays; called again for each pair, so that not all experts have to be in memory.
        expert_ids: the experts to compare.
        layer_index: for the result.
        product: inner products of the units of two experts, [I, I] float64.
        max_exact: units up to which the matching is exact (`best_assignment`).

    Raises:
        InvalidInputError: no expert is named, or two of them have units of other shapes.
    """
    if not expert_ids:
        raise InvalidInputError("no expert is named; expected one at least")
    num = len(expert_ids)
    aligned, upper, flat = np.eye(num), np.eye(num), np.eye(num)
    first = units(expert_ids[0])
    shape = tuple(first.shape)
    is_exact = True
    norms = [_norm(units(expert), product, shape, expert) for expert in expert_ids]
    for i in range(num):
        a = units(expert_ids[i]) if i else first
        for j in range(i + 1, num):
            scores = product(a, units(expert_ids[j]))
            norm = norms[i] * norms[j]
            found = best_assignment(scores, max_exact=max_exact)
            is_exact &= found.is_exact
            for table, total in ((aligned, found.total), (upper, found.upper_bound), (flat, float(np.trace(scores)))):
                table[i, j] = table[j, i] = total / norm if norm else math.nan
    unknown = np.full((num, num), math.nan)
    return ExpertSimilarity(
        layer_index=layer_index,
        expert_ids=tuple(expert_ids),
        num_units=shape[0],
        aligned_cosine=aligned,
        aligned_cosine_upper=upper,
        flattened_cosine=flat,
        chance=_chance(units, expert_ids, norms, product, max_exact),
        is_exact=is_exact,
        output_cosine=unknown,
        output_cka=unknown.copy(),
        num_tokens=0,
    )


def _norm(rows: Any, product: Callable[[Any, Any], Floats], shape: tuple[int, ...], expert: int) -> float:
    if tuple(rows.shape) != shape or len(shape) != 2:
        raise InvalidInputError(
            f"expert {expert} has units of shape {tuple(rows.shape)}, expected {shape} as the first"
        )
    # The diagonal in parts: the whole table of a wide expert is not needed for it.
    return math.sqrt(
        sum(float(np.trace(product(rows[i : i + 256], rows[i : i + 256]))) for i in range(0, shape[0], 256))
    )


def _chance(
    units: Callable[[int], Any],
    expert_ids: Sequence[int],
    norms: list[float],
    product: Callable[[Any, Any], Floats],
    max_exact: int,
) -> float:
    rng = np.random.default_rng(0)
    pairs = [(i, j) for i in range(len(expert_ids)) for j in range(i + 1, len(expert_ids)) if norms[i] * norms[j]]
    found = []
    for index in rng.permutation(len(pairs))[:_NUM_CHANCE_PAIRS].tolist():
        i, j = pairs[index]
        other = units(expert_ids[j])
        shuffled = other[:, rng.permutation(other.shape[1])]
        matched = best_assignment(product(units(expert_ids[i]), shuffled), max_exact=max_exact)
        found.append(matched.total / (norms[i] * norms[j]))
    return float(np.mean(found)) if found else math.nan


def output_similarity(outputs: Sequence[npt.ArrayLike]) -> tuple[Floats, Floats]:
    """Return the mean cosine and the debiased linear CKA of each pair of experts, both [m, m] float64.

    Args:
        outputs: for each expert its outputs [n, d] for the same n tokens, those of other experts too.

    Raises:
        InvalidInputError: the outputs are of other shapes, or no tables.
    """
    tables = [np.asarray(each, np.float64) for each in outputs]
    if any(table.ndim != 2 or table.shape != tables[0].shape for table in tables):
        raise InvalidInputError(f"outputs have shapes {[table.shape for table in tables]}, expected one [n, d] for all")
    num = len(tables)
    cosine, cka = np.eye(num), np.eye(num)
    lengths = [np.linalg.norm(table, axis=1) for table in tables]
    for i in range(num):
        for j in range(i + 1, num):
            scale = lengths[i] * lengths[j]
            dots = np.einsum("nd,nd->n", tables[i], tables[j])
            is_known = scale > 0
            cosine[i, j] = cosine[j, i] = (
                float((dots[is_known] / scale[is_known]).mean()) if is_known.any() else math.nan
            )
            cka[i, j] = cka[j, i] = linear_cka(tables[i], tables[j])
    return cosine, cka


def linear_cka(x: npt.ArrayLike, y: npt.ArrayLike, *, is_debiased: bool = True) -> float:
    """Return the linear CKA of two sets of outputs for the same tokens.

    ||Yc' Xc||^2 / (||Xc' Xc|| ||Yc' Yc||) in Frobenius norms, c = centred (Kornblith et al. 2019, eq. 2-4). With fewer
    tokens than dimensions that is high for unrelated outputs, so by default HSIC is estimated without bias (Song et al.
    2012, eq. 5; Nguyen et al. 2021); that estimate is about 0 for unrelated outputs and can be below. CKA does not see
    rotations: 1 says that both tell the same tokens apart, not that they are the same function.

    Args:
        x: [n, d].
        y: [n, d'].
        is_debiased: False gives the plain one.

    Returns:
        At most 1; NaN with fewer than 4 tokens (2 for the plain one), or where one side does not vary.

    Raises:
        InvalidInputError: the tables have other numbers of tokens.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise InvalidInputError(f"outputs have shapes {a.shape} and {b.shape}, expected [n, d] for the same n tokens")
    if len(a) < (4 if is_debiased else 2):
        return math.nan
    # Differences alone count, and centring first keeps the digits of outputs with a large mean.
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    k, m = a @ a.T, b @ b.T
    hsic = _unbiased_hsic if is_debiased else _plain_hsic
    scale = hsic(k, k) * hsic(m, m)
    tiny = (np.finfo(np.float64).eps * float(np.trace(k)) * float(np.trace(m))) ** 2
    return hsic(k, m) / math.sqrt(scale) if scale > tiny else math.nan


def _plain_hsic(k: Floats, m: Floats) -> float:
    return float((k * m).sum())


def _unbiased_hsic(k: Floats, m: Floats) -> float:
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones_k, ones_m = k.sum(axis=0), m.sum(axis=0)
    total = float((k * m).sum()) + float(ones_k.sum() * ones_m.sum()) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * float(ones_k @ ones_m)) / (n * (n - 3))
