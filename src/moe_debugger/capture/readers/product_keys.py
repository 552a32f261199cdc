"""Experts that are rows of embeddings, chosen by product keys (Doge): there are no indices to see, only logits.

The choice is recomputed from the router's output exactly as the library does it, on the capture's thread. The library
views the logits as [2, T, keys], which mixes the tokens of a forward; that is what ran, so that is what is read.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..routes import Routes
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, first_int

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_product_keys"]

# What a number can say of a tensor that leaves compiled code.
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_product_keys(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read a module that holds `router_gate` beside the embeddings `down_embed` and `up_embed`."""
    router = getattr(module, "router_gate", None)
    if router is None or any(getattr(module, part, None) is None for part in ("down_embed", "up_embed")):
        return None
    num_experts, num_keys = first_int(module, ("num_experts",)), first_int(module, ("num_keys",))
    top_k = first_int(module, ("top_k",))
    if not num_experts or not num_keys or not top_k:
        return None
    is_normalised = bool(getattr(module, "norm_topk_prob", False))

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        if getattr(output, "ndim", 0) < 2 or output.shape[-1] != 2 * num_keys:
            return None
        kept = {"keys": output.detach(), "dtype": _DTYPES.index(str(output.dtype).rpartition(".")[2])}
        return kept, int(output.shape[:-1].numel())

    def interpret(arrays: Arrays, info: LayerInfo) -> Routes:
        return _interpret(arrays, num_keys, top_k, is_normalised=is_normalised)

    return Reading(
        module_name=name,
        experts=module,
        router=router,
        num_experts=num_experts,
        top_k=top_k,
        taps=(Tap(router, "after", keep),),
        interpret=interpret,
        adapter="product_keys",
        num_shared_experts=1 if getattr(module, "gate_proj", None) is not None else 0,
        scoring_function="unknown",
        unavailable_reason="product keys give no score for every expert, only for the candidates",
    )


def _interpret(arrays: Arrays, num_keys: int, top_k: int, *, is_normalised: bool) -> Routes:
    import torch

    # In the model's dtype and by torch's own top-k: sums that round to a tie must tie here too, and break as they did.
    logits = torch.from_numpy(arrays["keys"]).to(getattr(torch, _DTYPES[arrays["dtype"]]))
    num_tokens = logits.shape[:-1].numel()
    (scores_x, scores_y), (indices_x, indices_y) = logits.reshape(2, num_tokens, -1).topk(num_keys, dim=-1)
    scores = (scores_x.unsqueeze(-1) + scores_y.unsqueeze(-2)).reshape(num_tokens, -1)
    experts = (indices_x.unsqueeze(-1) * num_keys + indices_y.unsqueeze(-2)).reshape(num_tokens, -1)
    best, where = scores.topk(top_k, dim=-1)
    weights = torch.softmax(best, dim=-1)
    if is_normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    ids = experts.gather(-1, where)
    return Routes(ids.numpy().astype(np.int32), weights.float().numpy())
