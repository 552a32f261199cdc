"""Experts without a router: the caller says which one an image takes (ViTPose's dataset index)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..routes import Routes
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, positional_names

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_fixed_choice"]


def read_fixed_choice(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read a list of experts that is called with (hidden [B, S, H], index for each image)."""
    from torch import nn

    if not isinstance(module, nn.ModuleDict | nn.ModuleList) or type(module).forward is nn.Module.forward:
        return None
    names = positional_names(module)
    if names is None or len(names) != 2 or not len(module):
        return None

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        hidden = args[0] if args else kwargs.get(names[0])
        choice = args[1] if len(args) > 1 else kwargs.get(names[1])
        if getattr(hidden, "ndim", 0) != 3 or choice is None or choice.is_floating_point():
            return None
        assert hidden is not None
        rows = choice.detach().reshape(-1, 1).expand(hidden.shape[0], hidden.shape[1])
        return {"expert_ids": rows.reshape(-1, 1)}, int(hidden.shape[0] * hidden.shape[1])

    return Reading(
        module_name=model.parent(name)[0],
        experts=module,
        router=None,
        num_experts=len(module),
        top_k=1,
        taps=(Tap(module, "before", keep),),
        interpret=_interpret,
        adapter="fixed_choice",
        weight_meaning="always 1: the caller's index chooses, nothing is weighed",
        unavailable_reason="there is no router: the caller's index chooses the expert",
        is_row_wise=True,
    )


def _interpret(arrays: Arrays, info: LayerInfo) -> Routes:
    ids = arrays["expert_ids"].astype(np.int32)
    return Routes(ids, np.ones(ids.shape, np.float32))
