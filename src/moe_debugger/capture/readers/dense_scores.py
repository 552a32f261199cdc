"""Experts that compute every token, with scores that are zero where a token does not choose them (Llama 4)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..routes import ROUTED, UNUSED, Routes, routes_of_map
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, num_fused_experts, positional_names, router_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_dense_scores"]


def read_dense_scores(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read experts that are called with hidden states alone, by what their router returned: (scores, logits)."""
    names = positional_names(module)
    num_experts = num_fused_experts(module)
    if names is None or len(names) != 1 or num_experts is None:
        return None
    block_name, block = model.parent(name)
    router = router_of(block)
    if router is None:
        return None

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        if not isinstance(output, tuple | list) or len(output) != 2:
            return None
        scores, logits = output
        if getattr(scores, "ndim", 0) != 2 or scores.shape[1] != num_experts or scores.shape != logits.shape:
            return None
        return {"scores": scores.detach(), "logits": logits.detach()}, scores.shape[0]

    return Reading(
        module_name=block_name,
        experts=module,
        router=router,
        num_experts=num_experts,
        top_k=model.top_k(router, block),
        taps=(Tap(router, "after", keep),),
        interpret=_interpret,
        adapter="dense_scores",
        num_shared_experts=model.num_shared(block),
        scoring_function="sigmoid",
        weight_meaning="multiplies the expert's input, not its output",
        is_row_wise=True,
        reduces="scores",
    )


def _interpret(arrays: Arrays, info: LayerInfo) -> Routes:
    scores = arrays["scores"].astype(np.float32, copy=False)
    ids, weights = routes_of_map(scores, scores != 0, num_slots=info.top_k)
    status = None if (ids >= 0).all() else np.where(ids >= 0, ROUTED, UNUSED).astype(np.uint8)
    return Routes(ids, weights, slot_status=status, logits=arrays["logits"])
