"""Router saturation: how much of its final choice a router has made at a checkpoint, on the same tokens.

Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), section 5.1. For a token with the experts A in one recording and B in
the other, overlap = |A and B| / max(|A|, |B|), which is |A and B| / k where every slot has an expert.

Example: E = 8, k = 2, A = {0, 1}, {2, 3} and B = {1, 0}, {3, 4}: overlap (1 + .5) / 2 = .75, Jaccard (1 + 1/3) / 2 =
.667, chance 2/8 = .25, chance-corrected (.75 - .25) / (1 - .25) = .667.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_debugger.analysis.alignment import AlignedLayer, Alignment
from moe_debugger.analysis.document_means import document_mean
from moe_debugger.analysis.intervals import Interval

__all__ = ["LayerSaturation", "layer_saturation", "router_saturation"]

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class LayerSaturation:
    """Overlap of the choices of one layer; NaN without tokens.

    Attributes:
        num_tokens: matched tokens with an expert in either recording, the sample size.
        num_documents: documents that they come from, the unit of the interval.
        num_without_expert: matched tokens that reached no expert in both recordings; they are left out.
        overlap: mean of |A and B| / max(|A|, |B|), 0..1; overlap_interval: two-sided 95 %, from documents.
        jaccard: mean of |A and B| / |A or B|, 0..1; jaccard_interval likewise.
        chance: overlap of routers that know nothing of each other, mean of min(|A|, |B|) / (E + Z): k / E as a rule.
        chance_corrected: (overlap - chance) / (1 - chance): 0 at chance, 1 where all is the same; NaN where k = E + Z.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_tokens: int
    num_documents: int
    num_without_expert: int
    overlap: float
    overlap_interval: Interval
    jaccard: float
    jaccard_interval: Interval
    chance: float
    chance_corrected: float


def router_saturation(alignment: Alignment) -> Mapping[int, LayerSaturation]:
    """Return the saturation of each layer, by layer index.

    Args:
        alignment: of a checkpoint's rows with those of the final (or any other) checkpoint, on the same text.

    Raises:
        InvalidInputError: no row matched.
    """
    alignment.require_rows()
    return {index: layer_saturation(layer) for index, layer in alignment.layers.items()}


def layer_saturation(layer: AlignedLayer) -> LayerSaturation:
    """Return the saturation of one layer; O(m)."""
    most = np.maximum(layer.num_chosen_a, layer.num_chosen_b)
    has_expert = most > 0
    shared = layer.num_shared[has_expert].astype(np.float64)
    either = (layer.num_chosen_a + layer.num_chosen_b)[has_expert] - shared
    least = np.minimum(layer.num_chosen_a, layer.num_chosen_b)[has_expert]
    overlap = document_mean(shared / most[has_expert], layer.document[has_expert])
    jaccard = document_mean(shared / either, layer.document[has_expert])
    num = overlap.num_tokens
    chance = float(least.mean()) / layer.shape.num_ids if num else _NAN
    return LayerSaturation(
        layer_index=layer.shape.layer_index,
        num_experts=layer.shape.num_experts,
        top_k=layer.shape.top_k,
        num_tokens=num,
        num_documents=overlap.num_documents,
        num_without_expert=layer.num_tokens - num,
        overlap=overlap.value,
        overlap_interval=overlap.interval,
        jaccard=jaccard.value,
        jaccard_interval=jaccard.interval,
        chance=chance,
        chance_corrected=(overlap.value - chance) / (1 - chance) if num and chance < 1 else _NAN,
    )
