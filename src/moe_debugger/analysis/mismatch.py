"""Train-inference mismatch: how often two recordings of the same tokens chose other experts.

Words:
    router      one layer for one token. It differs where the sets of experts differ; the order of slots does not count.
    slot        a router has k slots; max(|A|, |B|) - |A and B| of them differ.
    margin      K-th minus (K+1)-th selection score in the first recording: what a numeric difference must cross.

If routers differed independently with rate q, a token would differ in one of its L layers at least with
1 - (1 - q)^L. Real ones come together, so what is measured lies below; both are shown.

Example: two tokens, two layers, k = 2. {0, 1} against {1, 0} and {0, 2} against {0, 3} in layer 0, the same in layer 1:
router rates .5 and 0, slot rates .25 and 0, token rate .5, q = .25, independent prediction 1 - .75^2 = .4375.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.alignment import AlignedLayer, Alignment
from moe_debugger.analysis.document_means import document_mean
from moe_debugger.analysis.intervals import Interval
from moe_debugger.errors import InvalidInputError

__all__ = ["LayerMismatch", "MarginBucket", "Mismatch", "routing_mismatch"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_NAN = float("nan")
# Mismatch sits at small margins: the lowest twentieth has a bucket of its own.
_QUANTILES = (0.05, 0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class MarginBucket:
    """Tokens of one layer whose margin lies in [lower, upper); NaN bounds: the margin is not known.

    Attributes:
        num_tokens: sample size.
        router_rate: share of them whose set of experts differs, NaN without tokens.
        slot_rate: share of their slots that differ.
        router_interval, slot_interval: two-sided 95 %, from documents.
    """

    lower: float
    upper: float
    num_tokens: int
    router_rate: float
    router_interval: Interval
    slot_rate: float
    slot_interval: Interval


@dataclass(frozen=True, slots=True)
class LayerMismatch:
    """Mismatch of one layer.

    Attributes:
        num_tokens: matched tokens, the sample size; num_documents: where they come from.
        router_rate: share of tokens whose set of experts differs; router_interval: two-sided 95 %, from documents.
        slot_rate: mean share of the k slots that differ; 1 - |A and B| / k where every slot has an expert.
        slot_interval: two-sided 95 %, from documents.
        by_margin: buckets of the first recording's margin, ascending, that of unknown margins last; empty where no
            margins were captured.
    """

    layer_index: int
    num_tokens: int
    num_documents: int
    router_rate: float
    router_interval: Interval
    slot_rate: float
    slot_interval: Interval
    by_margin: tuple[MarginBucket, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Mismatch of all compared layers.

    Attributes:
        layers: by layer index.
        num_layers: L.
        num_tokens: tokens that matched at every layer, the sample size of what follows.
        num_incomplete_tokens: tokens that matched at some layers only; they are in `layers` alone.
        num_documents: documents of the tokens.
        token_rate: share of tokens with another set of experts in one layer at least; token_interval: 95 %.
        router_rate: q, the mean over those tokens and all layers.
        independent_token_rate: 1 - (1 - q)^L, what token_rate would be if routers differed independently.
    """

    layers: Mapping[int, LayerMismatch]
    num_layers: int
    num_tokens: int
    num_incomplete_tokens: int
    num_documents: int
    token_rate: float
    token_interval: Interval
    router_rate: float
    independent_token_rate: float


def routing_mismatch(alignment: Alignment, *, margin_edges: Sequence[float] | None = None) -> Mismatch:
    """Return how often the choices of two recordings differ; O(m log m).

    Args:
        alignment: of the training engine's rows with the inference engine's, or of any two recordings of one text.
            Name the layers of one stack where a model has an encoder and a decoder: a token is a document and position.
        margin_edges: ascending bounds between margin buckets, in the unit of the router's selection score; None = the
            5, 25, 50 and 75 % quantiles of each layer's own margins, because layers differ in scale.

    Raises:
        InvalidInputError: no row matched, or `margin_edges` do not ascend.
    """
    alignment.require_rows()
    if margin_edges is not None and (np.diff(margin_edges) <= 0).any():
        raise InvalidInputError(f"margin_edges are {list(margin_edges)}, expected ascending values")
    margin = alignment.a.margin
    layers = {
        index: _layer_mismatch(layer, None if margin is None else margin[layer.rows_a], margin_edges)
        for index, layer in alignment.layers.items()
    }
    num_layers = len(layers)
    document, times, num_differing = _by_token(list(alignment.layers.values()))
    is_complete = times == num_layers
    document, num_differing = document[is_complete], num_differing[is_complete]
    token = document_mean((num_differing > 0).astype(np.float64), document)
    q = float(num_differing.mean()) / num_layers if len(document) else _NAN
    return Mismatch(
        layers=layers,
        num_layers=num_layers,
        num_tokens=token.num_tokens,
        num_incomplete_tokens=int(np.count_nonzero(~is_complete)),
        num_documents=token.num_documents,
        token_rate=token.value,
        token_interval=token.interval,
        router_rate=q,
        independent_token_rate=1 - (1 - q) ** num_layers,
    )


def _by_token(layers: list[AlignedLayer]) -> tuple[_Ints, _Ints, _Ints]:
    """Return of each token its document, at how many layers it matched, and at how many its set differs."""
    document = np.concatenate([layer.document for layer in layers])
    position = np.concatenate([layer.position for layer in layers])
    differs = np.concatenate([_num_differing_slots(layer) > 0 for layer in layers])
    key = document * (int(position.max(initial=0)) + 1) + position
    _, first, token, times = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    return document[first], times, np.bincount(token[differs], minlength=len(first))


def _num_differing_slots(layer: AlignedLayer) -> _Ints:
    differing: _Ints = np.maximum(layer.num_chosen_a, layer.num_chosen_b) - layer.num_shared
    return differing


def _layer_mismatch(layer: AlignedLayer, margin: _Floats | None, edges: Sequence[float] | None) -> LayerMismatch:
    slots = _num_differing_slots(layer) / layer.shape.top_k
    router = document_mean((slots > 0).astype(np.float64), layer.document)
    slot = document_mean(slots, layer.document)
    return LayerMismatch(
        layer_index=layer.shape.layer_index,
        num_tokens=router.num_tokens,
        num_documents=router.num_documents,
        router_rate=router.value,
        router_interval=router.interval,
        slot_rate=slot.value,
        slot_interval=slot.interval,
        by_margin=() if margin is None else _by_margin(slots, margin, layer.document, edges),
    )


def _by_margin(
    slots: _Floats, margin: _Floats, document: _Ints, edges: Sequence[float] | None
) -> tuple[MarginBucket, ...]:
    is_known = ~np.isnan(margin)
    if edges is not None:
        bounds = np.asarray(edges, np.float64)
    elif is_known.any():
        bounds = np.unique(np.quantile(margin[is_known], _QUANTILES))
    else:
        bounds = np.empty(0)
    # One more bucket past the last holds the unknown margins.
    bucket = np.where(is_known, np.searchsorted(bounds, margin, side="right"), len(bounds) + 1)
    limits = [-np.inf, *bounds.tolist(), np.inf]
    ranges = [*itertools.pairwise(limits), (_NAN, _NAN)]
    found = []
    for number, (lower, upper) in enumerate(ranges):
        is_own = bucket == number
        router = document_mean((slots[is_own] > 0).astype(np.float64), document[is_own])
        slot = document_mean(slots[is_own], document[is_own])
        found.append(
            MarginBucket(lower, upper, router.num_tokens, router.value, router.interval, slot.value, slot.interval)
        )
    return tuple(found)
