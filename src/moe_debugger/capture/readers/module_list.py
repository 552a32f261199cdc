"""Old-style code: a gate and a plain ModuleList (or ModuleDict) with one module per expert.

Experts get subsets of rows without token ids. Two kinds of gate are known:

* a gate module that returns ids and weights itself (DeepSeek's MoEGate): they are taken as they are;
* a linear gate that returns logits [n, E]: softmax and top-k as the block's attributes say (`norm_topk_prob`).

In both, the number of rows that every expert received must be the number of times that its id was read; where it is
not, the forward's routes of this layer are refused, never guessed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..routes import Routes
from ..sites import Arrays, LayerInfo, Tap
from .base import Model, Reading, is_ids_and_weights, router_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["read_module_list"]


def read_module_list(model: Model, name: str, module: "nn.Module") -> Reading | None:
    """Read a ModuleList or ModuleDict without a forward of its own, by the gate beside it."""
    from torch import nn

    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module).forward is not nn.Module.forward:
        return None
    block_name, block = model.parent(name)
    gate = router_of(block)
    children = list(module.children())
    top_k = model.top_k(gate, block)
    if gate is None or len(children) < 2 or not top_k:
        return None
    # Mixtral's first code always renormalised and has no attribute; Qwen's and OLMoE's say it.
    normalises = bool(getattr(block, "norm_topk_prob", True))

    def keep_gate(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        if isinstance(output, tuple | list):
            tensors = [each for each in output if hasattr(each, "ndim")]
            ids = next((each for each in tensors if each.ndim == 2 and not each.is_floating_point()), None)
            weights = next(
                (each for each in tensors if ids is not None and each.shape == ids.shape and each is not ids), None
            )
            if not is_ids_and_weights(ids, weights):
                return None
            assert ids is not None
            assert weights is not None
            return {"expert_ids": ids.detach(), "gate_weights": weights.detach()}, ids.shape[0]
        if getattr(output, "ndim", 0) < 2 or output.shape[-1] != len(children):
            return None
        logits = output.detach().reshape(-1, output.shape[-1])
        return {"logits": logits}, logits.shape[0]

    def interpret(arrays: Arrays, info: LayerInfo) -> Routes:
        return _interpret(arrays, info, top_k, normalises=normalises)

    taps = [Tap(gate, "after", keep_gate, completes=False)]
    taps += [Tap(child, "before", _keep_rows(index), completes=False) for index, child in enumerate(children)]
    taps.append(Tap(block, "after", lambda args, kwargs, output: ({}, 0)))
    return Reading(
        module_name=block_name,
        experts=module,
        router=gate,
        num_experts=len(children),
        top_k=top_k,
        taps=tuple(taps),
        interpret=interpret,
        adapter="module_list",
        num_shared_experts=model.num_shared(block),
        scoring_function="softmax" if isinstance(gate, nn.Linear) else "unknown",
        unavailable_reason="" if isinstance(gate, nn.Linear) else "the gate returns its choice alone, without logits",
        weight_meaning="multiplies the expert's output; where the gate is linear, recomputed as softmax, top-k"
        + (" and renormalisation" if normalises else ""),
    )


def _keep_rows(index: int) -> Any:
    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return {f"rows_{index}": int(hidden.shape[:-1].numel())}, 0

    return keep


def _interpret(arrays: Arrays, info: LayerInfo, top_k: int, *, normalises: bool) -> Routes:
    logits = arrays.get("logits")
    if "expert_ids" in arrays:
        ids, weights = arrays["expert_ids"].astype(np.int32), arrays["gate_weights"].astype(np.float32, copy=False)
    else:
        assert logits is not None
        ids, weights = _select(logits, top_k, normalises=normalises)
    received = np.array([arrays.get(f"rows_{index}", 0) for index in range(info.num_experts)])
    read = np.bincount(ids[ids >= 0].reshape(-1), minlength=info.num_experts)
    if not np.array_equal(received, read):
        raise ValueError(
            f"the experts received {received.tolist()} rows, the gate's top-{top_k} would be {read.tolist()}: this "
            "layer selects in another way; register an adapter that says how (moe_debugger.Adapter)"
        )
    return Routes(ids, weights, logits=logits)


def _select(
    logits: npt.NDArray[np.float32], top_k: int, *, normalises: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    import torch

    # torch's own top-k, on float32 as this code does it: half-precision logits tie, and ties must break as they did.
    probabilities = torch.softmax(torch.from_numpy(logits), dim=1, dtype=torch.float32)
    weights, ids = torch.topk(probabilities, top_k, dim=-1)
    if normalises:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.numpy().astype(np.int32), weights.numpy()
