"""Old-style code: a gate and a plain ModuleList (or ModuleDict) with one module per expert.

Experts get subsets of rows without token ids. Two kinds of gate are known:

* a gate module that returns ids and weights itself (DeepSeek's MoEGate): they are taken as they are;
* a linear gate that returns logits [n, E]: top-k, and softmax or sigmoid with or without renormalisation.

In both, the number of rows that every expert received must be the number of times that its id was read; where it is
not, the forward's routes of this layer are refused, never guessed. Weights are NaN until a forward has shown that they
are what the block applies (`applied_weights`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..routes import Routes
from ..sites import Arrays, LayerInfo, Tap
from .applied_weights import AppliedWeights, Rule
from .base import SHARED_NAMES, Model, Reading, is_ids_and_weights, router_of

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
    # Mixtral's first code always renormalised and has no attribute; Qwen's and OLMoE's say it. The output confirms it.
    normalises = bool(getattr(block, "norm_topk_prob", True))
    applied = AppliedWeights()

    def keep_gate(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
        kept = keep_choice(output)
        return None if kept is None else ({**kept[0], **applied.keep_features("gate", _given(args, kwargs))}, kept[1])

    def keep_choice(output: Any) -> tuple[dict[str, Any], int] | None:
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

    def keep_block(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        return applied.keep_sums("block", output), 0

    def interpret(arrays: Arrays, info: LayerInfo) -> Routes:
        return _interpret(arrays, info, top_k, applied, normalises=normalises)

    taps = [Tap(gate, "after", keep_gate, completes=False)]
    taps += [Tap(child, "after", _keep_rows(index, applied), completes=False) for index, child in enumerate(children)]
    taps += _shared_taps(block, applied)
    taps.append(Tap(block, "after", keep_block))
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
        weight_meaning="multiplies the expert's output; where the gate is linear, recomputed from its logits and "
        "confirmed by the block's output",
    )


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _keep_rows(index: int, applied: AppliedWeights) -> Any:
    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        hidden = _given(args, kwargs)
        kept = {**applied.keep_features(str(index), hidden), **applied.keep_sums(str(index), output)}
        return {**kept, f"rows_{index}": int(hidden.shape[:-1].numel())}, 0

    return keep


def _shared_taps(block: "nn.Module", applied: AppliedWeights) -> list[Tap]:
    children = dict(block.named_children())
    shared = next((children[name] for name in SHARED_NAMES if name in children), None)
    gate = next((children[f"{name}_gate"] for name in SHARED_NAMES if f"{name}_gate" in children), None)

    def keep_shared(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        return applied.keep_sums("shared", output), 0

    def keep_gate(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int]:
        is_one = not applied.is_decided and getattr(output, "ndim", 0) >= 2 and output.shape[-1] == 1
        return ({"shared_gate": output.detach().reshape(-1).clone()} if is_one else {}), 0

    taps = [] if shared is None else [Tap(shared, "after", keep_shared, completes=False)]
    return taps if gate is None else [*taps, Tap(gate, "after", keep_gate, completes=False)]


def _interpret(arrays: Arrays, info: LayerInfo, top_k: int, applied: AppliedWeights, *, normalises: bool) -> Routes:
    logits = arrays.get("logits")
    if "expert_ids" in arrays:
        ids = arrays["expert_ids"].astype(np.int32)
        rules = [("the gate's weights", arrays["gate_weights"].astype(np.float32, copy=False))]
    else:
        assert logits is not None
        ids, rules = _select(logits, top_k, normalises=normalises)
    received = np.array([arrays.get(f"rows_{index}", 0) for index in range(info.num_experts)])
    read = np.bincount(ids[ids >= 0].reshape(-1), minlength=info.num_experts)
    if not np.array_equal(received, read):
        raise ValueError(
            f"the experts received {received.tolist()} rows, the gate's top-{top_k} would be {read.tolist()}: this "
            "layer selects in another way; register an adapter that says how (moe_debugger.Adapter)"
        )
    applied.decide(arrays, ids, rules, info.num_experts)
    weights = dict(rules).get(applied.rule)
    if weights is None:
        return Routes(ids, np.full(ids.shape, np.nan, np.float32), weights_reason=applied.reason)
    return Routes(ids, weights, logits=logits)


def _select(
    logits: npt.NDArray[np.float32], top_k: int, *, normalises: bool
) -> tuple[npt.NDArray[np.int32], list[Rule]]:
    """Return the ids, which are those of the largest logits by every rule, and their weights by each rule."""
    import torch

    # torch's own top-k, on float32 as this code does it: half-precision logits tie, and ties must break as they did.
    values = torch.from_numpy(logits)
    softmax = torch.softmax(values, dim=1, dtype=torch.float32)
    ids = torch.topk(softmax, top_k, dim=-1).indices
    rules = []
    for name, scores in (("softmax", softmax), ("sigmoid", torch.sigmoid(values))):
        chosen = scores.gather(1, ids)
        both = [
            (f"top-{top_k} of {name}, renormalised", chosen / chosen.sum(dim=-1, keepdim=True)),
            (f"top-{top_k} of {name}", chosen),
        ]
        rules += both if normalises else both[::-1]
    return ids.numpy().astype(np.int32), [(name, weights.numpy()) for name, weights in rules]
