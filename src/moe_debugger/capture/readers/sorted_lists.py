"""Routers that return slots sorted by expert (JetMoE, Granite's first code): order, token, gate, sizes, logits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..routes import Routes
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, first_int, router_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_sorted_lists"]


def read_sorted_lists(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read a block that holds a router beside `input_linear` and `output_linear` with [E, out, in] weights."""
    linears = [getattr(module, part, None) for part in ("input_linear", "output_linear")]
    router = router_of(module)
    if router is None or any(getattr(getattr(each, "weight", None), "ndim", 0) != 3 for each in linears):
        return None
    num_experts = int(linears[0].weight.shape[0])  # type: ignore[union-attr]
    top_k = first_int(router, ("top_k",)) or model.top_k(module)

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        if not isinstance(output, tuple | list) or len(output) != 5 or not isinstance(output[3], list):
            return None
        order, _, gates, sizes, logits = output
        return {
            "order": order.detach(),
            "gates": gates.detach(),
            "sizes": list(sizes),
            "logits": logits.detach(),
        }, logits.shape[0]

    return Reading(
        module_name=name,
        experts=module,
        router=router,
        num_experts=num_experts,
        top_k=top_k,
        taps=(Tap(router, "after", keep),),
        interpret=_interpret,
        adapter="sorted_lists",
        num_shared_experts=model.num_shared(module),
        scoring_function="softmax",
        site="attention" if "attn" in name or "attention" in name else "mlp",
    )


def _interpret(arrays: Arrays, info: LayerInfo) -> Routes:
    logits = arrays["logits"]
    k = info.top_k
    # Entry i of the sorted list is slot order[i] (token * k + choice) and belongs to the expert whose block it is in.
    ids = np.empty(len(logits) * k, np.int32)
    weights = np.empty(len(logits) * k, np.float32)
    ids[arrays["order"]] = np.repeat(np.arange(len(arrays["sizes"]), dtype=np.int32), arrays["sizes"])
    weights[arrays["order"]] = arrays["gates"]
    return Routes(ids.reshape(-1, k), weights.reshape(-1, k), logits=logits)
