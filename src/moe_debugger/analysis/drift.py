"""Drift between two sets of rows: of the loads, and of the single tokens' choices. Neither says enough alone.

The loads of a router whose experts were permuted may be the same, so loads hide it; and tokens can only be compared
where both recordings have the same text. So both are given together.

Two halves of one healthy recording differ too, the more the fewer documents there are. That is the noise floor: the
Jensen-Shannon divergence between random halves of whole documents of one recording. It is taken off the divergence
between a half of one recording and the half of the other that has the *other* documents, because that comparison has as
many documents and shares as few of them: without drift both are the same on average, and `drift_bits` is 0.

Example: loads [3, 1] against [1, 3] have JS = 0.189 bits; [1, 0] against [0, 1] have 1 bit, the most there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.alignment import Alignment, align
from moe_debugger.analysis.document_means import UNKNOWN_INTERVAL
from moe_debugger.analysis.intervals import Interval
from moe_debugger.analysis.row_set import RowSet, comparable_layers
from moe_debugger.analysis.saturation import layer_saturation
from moe_debugger.errors import InvalidInputError

__all__ = ["Drift", "LayerDrift", "jensen_shannon_bits", "routing_drift"]

_Floats = npt.NDArray[np.float64]
_NAN = float("nan")
# Fewer documents than this in a recording give no halves of two.
_MIN_DOCUMENTS = 4
_HIDDEN = "loads alone do not show experts that were permuted"


def jensen_shannon_bits(loads_a: npt.ArrayLike, loads_b: npt.ArrayLike) -> _Floats:
    """Return the Jensen-Shannon divergence of the shares of loads, [...] float64 in bits, 0..1 (Lin 1991, eq. 4.1).

    Args:
        loads_a: [..., E] loads, or anything proportional to them.
        loads_b: [..., E].

    Returns:
        NaN where either has no load.

    Raises:
        InvalidInputError: they are of other numbers of experts, or negative.
    """
    a, b = np.asarray(loads_a, np.float64), np.asarray(loads_b, np.float64)
    if a.shape[-1:] != b.shape[-1:] or (a < 0).any() or (b < 0).any():
        raise InvalidInputError(
            f"loads have shapes {a.shape} and {b.shape}; expected loads of the same experts, 0 or more each"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        p, q = a / a.sum(axis=-1, keepdims=True), b / b.sum(axis=-1, keepdims=True)
        middle = (p + q) / 2
        terms = np.where(p > 0, p * np.log2(p / middle), 0.0) + np.where(q > 0, q * np.log2(q / middle), 0.0)
    bits = np.clip(terms.sum(axis=-1) / 2, 0.0, 1.0)
    return np.where((a.sum(axis=-1) > 0) & (b.sum(axis=-1) > 0), bits, _NAN)


@dataclass(frozen=True, slots=True)
class LayerDrift:
    """Drift of one layer.

    Attributes:
        num_assignments_a, num_assignments_b: N of each set; of rows with a document, as all that follows.
        num_documents_a, num_documents_b: documents (in training: of one step) with load.
        js_bits: JS of the loads of the whole sets, 0..1 bits, noise included; NaN without load.
        across_bits: mean JS between a half of one set and a half of the other, of different documents.
        noise_floor_bits: mean JS between the halves of one set; NaN with fewer than 4 documents in either set.
        drift_bits: across_bits - noise_floor_bits; about 0 without drift, and then negative half the time.
        num_splits: random splits into halves that were averaged.
        num_tokens: tokens of both sets that matched; overlap, overlap_interval, chance_overlap: as
            `LayerSaturation`, NaN where none matched.
    """

    layer_index: int
    num_assignments_a: int
    num_assignments_b: int
    num_documents_a: int
    num_documents_b: int
    js_bits: float
    across_bits: float
    noise_floor_bits: float
    drift_bits: float
    num_splits: int
    num_tokens: int
    overlap: float
    overlap_interval: Interval
    chance_overlap: float


@dataclass(frozen=True, slots=True)
class Drift:
    """Drift by layer, and what was not compared.

    Attributes:
        layers: by layer index.
        notes: one sentence for each thing that was not compared.
    """

    layers: Mapping[int, LayerDrift]
    notes: tuple[str, ...]


def routing_drift(
    a: RowSet, b: RowSet, *, layers: Sequence[int] | None = None, num_splits: int = 32, seed: int = 0
) -> Drift:
    """Return the drift from `a` to `b`; O(n log n + splits * documents * E) for each layer.

    Args:
        a: rows of one recording.
        b: rows of the other, of the same model.
        layers: the layers to compare; None = all.
        num_splits: random splits into halves.
        seed: of the splits. The result does not depend on the order of rows.

    Raises:
        InvalidInputError: the recordings are not comparable (see `comparable_layers`).
    """
    wanted = comparable_layers(a, b, layers)
    alignment, notes = _alignment(a, b, wanted)
    names = sorted({*a.units, *b.units})
    halves = _halves(names, a, b, num_splits, np.random.default_rng(seed))
    if halves is None:
        notes.append(
            f"there are {len(a.units)} and {len(b.units)} documents: below {_MIN_DOCUMENTS} there is no noise floor"
        )
    result = {i: _layer_drift(i, a, b, names, halves, alignment) for i in wanted}
    return Drift(result, tuple(notes))


def _alignment(a: RowSet, b: RowSet, layers: list[int]) -> tuple[Alignment | None, list[str]]:
    if a.position is None or b.position is None:
        return None, [f"no token by token comparison (the column `position` is missing): {_HIDDEN}"]
    alignment = align(a, b, layers=layers)
    notes = list(alignment.account())
    if not alignment.num_rows:
        return None, [*notes, f"no token by token comparison (no row matched): {_HIDDEN}"]
    return alignment, notes


def _halves(
    names: list[str], a: RowSet, b: RowSet, num_splits: int, rng: np.random.Generator
) -> npt.NDArray[np.float64] | None:
    """Return which documents are in the first half, [splits, documents] of 0 and 1.

    Documents of both sets, of the first alone and of the second alone are halved each for themselves, so that both
    sets are halved.
    """
    if min(len(a.units), len(b.units)) < _MIN_DOCUMENTS or num_splits < 1:
        return None
    of_a, of_b = set(a.units), set(b.units)
    first = np.zeros((num_splits, len(names)))
    for kind in ((True, True), (True, False), (False, True)):
        members = np.array([u for u, name in enumerate(names) if (name in of_a, name in of_b) == kind], np.intp)
        # One document too many goes to either half.
        alternate = (np.arange(len(members)) + rng.integers(0, 2, (num_splits, 1))) % 2
        first[:, members] = rng.permuted(alternate, axis=1)
    return first


def _layer_drift(
    layer_index: int,
    a: RowSet,
    b: RowSet,
    names: list[str],
    halves: _Floats | None,
    alignment: Alignment | None,
) -> LayerDrift:
    loads_a, loads_b = a.unit_loads(layer_index), b.unit_loads(layer_index)
    across = floor = _NAN
    if halves is not None:
        place = {name: u for u, name in enumerate(names)}
        first_a = halves[:, [place[name] for name in a.units]] @ loads_a
        first_b = halves[:, [place[name] for name in b.units]] @ loads_b
        second_a, second_b = loads_a.sum(axis=0) - first_a, loads_b.sum(axis=0) - first_b
        across = float((jensen_shannon_bits(first_a, second_b) + jensen_shannon_bits(second_a, first_b)).mean() / 2)
        floor = float((jensen_shannon_bits(first_a, second_a) + jensen_shannon_bits(first_b, second_b)).mean() / 2)
    overlap = layer_saturation(alignment.layers[layer_index]) if alignment is not None else None
    return LayerDrift(
        layer_index=layer_index,
        num_assignments_a=int(loads_a.sum()),
        num_assignments_b=int(loads_b.sum()),
        num_documents_a=int(loads_a.any(axis=1).sum()),
        num_documents_b=int(loads_b.any(axis=1).sum()),
        js_bits=float(jensen_shannon_bits(loads_a.sum(axis=0), loads_b.sum(axis=0))),
        across_bits=across,
        noise_floor_bits=floor,
        drift_bits=across - floor,
        num_splits=0 if halves is None else len(halves),
        num_tokens=0 if overlap is None else overlap.num_tokens,
        overlap=_NAN if overlap is None else overlap.overlap,
        overlap_interval=UNKNOWN_INTERVAL if overlap is None else overlap.overlap_interval,
        chance_overlap=_NAN if overlap is None else overlap.chance,
    )
