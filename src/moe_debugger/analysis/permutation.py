"""Is a difference between two groups of requests more than chance? A permutation test that exchanges whole requests.

Tokens of one document resemble each other, so tests that take tokens for independent call two halves of one healthy
population different nearly always. Here the unit is the document (in training: of one step): where nothing differs, any
exchange of documents between the groups is as likely as the real one, so the rate of false alarms is the stated one
whatever happens inside a document. This needs rows: counts and folded states have no documents to exchange.

Documents that both groups have (the same text before and after) are exchanged within their pair; the others among
themselves, with as many in each group as before.

Example: three documents on expert 0 against three on expert 1 give JS = 1 bit. Of the 20 ways to deal six documents
into three and three, 2 give that much: p is about .1, and no test of six documents can give less with this statistic.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.drift import jensen_shannon_bits
from moe_debugger.analysis.row_set import RowSet, comparable_layers
from moe_debugger.errors import InvalidInputError

__all__ = ["LayerPermutation", "PermutationResult", "permutation_test"]

_Floats = npt.NDArray[np.float64]
# Permutations times documents that are drawn at once: 32 MiB of float64.
_MAX_CELLS = 1 << 22

Statistic = Callable[[_Floats, _Floats], _Floats]


@dataclass(frozen=True, slots=True)
class LayerPermutation:
    """The test of one layer.

    Attributes:
        statistic: of the groups as they are; JS of the loads in bits unless another was given.
        p_value: (1 + b) / (1 + m), b of m exchanges gave as much or more (Phipson & Smyth 2010).
        p_value_adjusted: the share of exchanges in which any layer lies as many standard deviations above its mean as
            this one does (Westfall & Young 1993, single-step max T): with a bound on it, the rate of a false alarm in
            any layer at all is the bound.
        null_mean: mean of the statistic over the exchanges: what chance alone gives.
        null_upper: its 95 % quantile.
    """

    layer_index: int
    statistic: float
    p_value: float
    p_value_adjusted: float
    null_mean: float
    null_upper: float


@dataclass(frozen=True, slots=True)
class PermutationResult:
    """The test of all layers.

    Attributes:
        layers: by layer index.
        num_permutations: m.
        num_units_a, num_units_b: documents (in training: of one step) of each group, the sample size.
        num_paired: of these, documents that both groups have.
        smallest_p_value: 1 / (1 + m), or the least that the arrangements of so few documents can give where that is
            more: about the smallest p-value that there can be. Of 3 + 3 documents 2/20: sides of one size have a mirror
            image.
        num_rows_left_out: rows without a document.
    """

    layers: Mapping[int, LayerPermutation]
    num_permutations: int
    num_units_a: int
    num_units_b: int
    num_paired: int
    smallest_p_value: float
    num_rows_left_out: int

    @property
    def p_value(self) -> float:
        """The p-value of "no layer differs": the smallest adjusted one."""
        return min(layer.p_value_adjusted for layer in self.layers.values())


def permutation_test(
    a: RowSet,
    b: RowSet,
    *,
    layers: Sequence[int] | None = None,
    num_permutations: int = 999,
    seed: int = 0,
    statistic: Statistic = jensen_shannon_bits,
) -> PermutationResult:
    """Test whether the loads of two groups of documents differ; O(m * documents * E) for each layer.

    Args:
        a: rows of one group.
        b: rows of the other, of the same model.
        layers: the layers to compare; None = all.
        num_permutations: m, at least 19 (below, no p-value could be 0.05).
        seed: of the exchanges. The result does not depend on the order of rows.
        statistic: of loads [m, E] and [m, E], gives [m]; the larger, the more different.

    Raises:
        InvalidInputError: not rows, not comparable, fewer than 19 exchanges or two documents in a group, or a layer
            without load.
    """
    wanted = comparable_layers(a, b, layers)
    if num_permutations < 19:
        raise InvalidInputError(f"num_permutations is {num_permutations}, expected 19 or more")
    if min(len(a.units), len(b.units)) < 2:
        raise InvalidInputError(
            f"the groups have {len(a.units)} and {len(b.units)} documents, a test that exchanges whole documents needs "
            "two in each at least (rows must name them, by `request_id`)"
        )
    exchange = _Exchange.of(a.units, b.units)
    drawn = exchange.draw(num_permutations, np.random.default_rng(seed))
    # One layer at a time: a layer's loads by document can be large.
    values = np.column_stack([_values(exchange, drawn, a, b, i, statistic) for i in wanted])
    p_values = _p_values(values)
    distance = np.round(_largest(values), 9)
    adjusted = (distance[:, -1:] >= distance[0, :-1]).mean(axis=0)
    return PermutationResult(
        layers={
            i: LayerPermutation(
                layer_index=i,
                statistic=float(values[0, column]),
                p_value=float(p_values[column]),
                p_value_adjusted=float(adjusted[column]),
                null_mean=float(values[1:, column].mean()),
                null_upper=float(np.quantile(values[1:, column], 0.95)),
            )
            for column, i in enumerate(wanted)
        },
        num_permutations=num_permutations,
        num_units_a=len(a.units),
        num_units_b=len(b.units),
        num_paired=len(exchange.paired_a),
        smallest_p_value=max(1 / (1 + num_permutations), exchange.smallest_p_value()),
        num_rows_left_out=a.num_without_document() + b.num_without_document(),
    )


def _values(
    exchange: "_Exchange", drawn: npt.NDArray[np.uint8], a: RowSet, b: RowSet, layer_index: int, statistic: Statistic
) -> _Floats:
    """Return the statistic of one layer for each arrangement, the real one first; [1 + m]."""
    loads_a, loads_b = a.unit_loads(layer_index), b.unit_loads(layer_index)
    if not loads_a.any() or not loads_b.any():
        raise InvalidInputError(f"layer {layer_index} has no load in one of the groups: there is nothing to compare")
    step = max(1, _MAX_CELLS // max(drawn.shape[1], loads_a.shape[1]))
    parts = [statistic(*exchange.apply(drawn[at : at + step], loads_a, loads_b)) for at in range(0, len(drawn), step)]
    # An arrangement that leaves a group without load shows no difference.
    return np.nan_to_num(np.concatenate(parts), nan=0.0)


def _p_values(values: _Floats) -> _Floats:
    """Return for the real arrangement (row 0) the share of arrangements with as much or more, itself included, [L].

    Args:
        values: [1 + m, L].
    """
    # The same loads on swapped sides may differ in the last digits.
    tied = np.round(values, 12)
    p_values: _Floats = (tied >= tied[0]).mean(axis=0)
    return p_values


def _largest(values: _Floats) -> _Floats:
    """Return each layer's distance from its mean in standard deviations, and after them the largest, [1 + m, L + 1].

    Not the smallest p-value: with as many layers as permutations / 20 some arrangement is the extreme one of some layer
    so often that no adjusted p-value could be 0.05.
    """
    spread = values.std(axis=0)
    distance = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return np.column_stack([distance, distance.max(axis=1)])


@dataclass(frozen=True, slots=True, eq=False)
class _Exchange:
    """Which documents may be exchanged for which.

    Attributes:
        paired_a, paired_b: [s] indices of the documents that both groups have, in the same order.
        single_a, single_b: indices of the others.
    """

    paired_a: npt.NDArray[np.intp]
    paired_b: npt.NDArray[np.intp]
    single_a: npt.NDArray[np.intp]
    single_b: npt.NDArray[np.intp]

    @classmethod
    def of(cls, units_a: tuple[str, ...], units_b: tuple[str, ...]) -> "_Exchange":
        at_a = {name: u for u, name in enumerate(units_a)}
        at_b = {name: u for u, name in enumerate(units_b)}
        paired = sorted(at_a.keys() & at_b.keys())
        return cls(
            np.array([at_a[name] for name in paired], np.intp),
            np.array([at_b[name] for name in paired], np.intp),
            np.array([at_a[name] for name in sorted(at_a.keys() - at_b.keys())], np.intp),
            np.array([at_b[name] for name in sorted(at_b.keys() - at_a.keys())], np.intp),
        )

    def draw(self, num: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """Return the real arrangement and `num` random ones, [1 + num, pairs + singles].

        Columns of pairs: 1 = swapped. Columns of the others, those of a, then those of b: 1 = in the first group.
        """
        num_pairs, num_a, num_b = len(self.paired_a), len(self.single_a), len(self.single_b)
        drawn = np.zeros((1 + num, num_pairs + num_a + num_b), np.uint8)
        drawn[:, num_pairs : num_pairs + num_a] = 1
        drawn[1:, :num_pairs] = rng.integers(0, 2, (num, num_pairs), np.uint8)
        drawn[1:, num_pairs:] = rng.permuted(drawn[1:, num_pairs:], axis=1)
        return drawn

    def apply(self, drawn: npt.NDArray[np.uint8], loads_a: _Floats, loads_b: _Floats) -> tuple[_Floats, _Floats]:
        """Return the loads of both groups for each arrangement, [c, E] each; exact, as they are whole numbers."""
        pairs_a, pairs_b = loads_a[self.paired_a], loads_b[self.paired_b]
        # A swapped pair changes the first group by the difference; a single one adds what it has.
        parts = np.concatenate([pairs_b - pairs_a, loads_a[self.single_a], loads_b[self.single_b]])
        first: _Floats = pairs_a.sum(axis=0) + drawn.astype(np.float64) @ parts
        return first, loads_a.sum(axis=0) + loads_b.sum(axis=0) - first

    def smallest_p_value(self) -> float:
        """Return the least share of arrangements: one of all, or two where each has a mirror image."""
        a, b = len(self.single_a), len(self.single_b)
        log = math.lgamma(a + b + 1) - math.lgamma(a + 1) - math.lgamma(b + 1) + len(self.paired_a) * math.log(2)
        return min(1.0, (2 if a == b else 1) * math.exp(-log))
