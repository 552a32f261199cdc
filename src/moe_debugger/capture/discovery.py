"""Finds the MoE layers of a model by their structure, never by the names of their classes.

Glossary:
    experts module   the module that is called with (hidden [T, H], expert ids [T, k], weights [T, k]).
    router           its sibling ``gate`` or ``router``, whose first output is the logits [T, E].
    site             one experts module with its router: one MoE layer as the capture sees it.
"""

import inspect
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import ModelNotSupportedError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Discovery", "LayerInfo", "Site", "find_sites"]

_ROUTER_NAMES = ("gate", "router")
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
# The first number after one of these is the layer's place in its stack, in every architecture of transformers 5.
_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|block|layer|h)\.(\d+)(?:\.|$)")
_MAX_NAMES_IN_ERROR = 12


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One MoE layer as the model's structure describes it.

    Attributes:
        layer_index: index among the model's MoE layers, from 0.
        model_layer_index: index among all layers of its stack.
        module_name: name of the module that holds router and experts.
        top_k: 0 where only a forward will tell.
        scoring_function: how logits become probabilities: "softmax", "sigmoid", "probabilities" (the router gives
            them itself) or "unknown". Before the first forward it is what the structure says, afterwards what the
            applied weights confirmed.
        weight_meaning: what the experts module does with the weights it is given.
        unavailable_reason: why router statistics are NaN; empty where they are there.
    """

    layer_index: int
    model_layer_index: int
    module_name: str
    stack: str
    num_experts: int
    top_k: int
    num_shared_experts: int = 0
    num_identity_experts: int = 0
    scoring_function: str = "unknown"
    weight_meaning: str = "multiplies the expert's output"
    unavailable_reason: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """An experts module, its router where there is one, and what is known about the layer."""

    info: LayerInfo
    experts: "nn.Module"
    router: "nn.Module | None"


@dataclass(frozen=True, slots=True)
class Discovery:
    """What `find_sites` found.

    Attributes:
        sites: the layers that can be read, in the order of the model's modules.
        unreadable: module name and reason of each MoE-like module that cannot be.
    """

    sites: tuple[Site, ...]
    unreadable: tuple[tuple[str, str], ...]


def find_sites(model: "nn.Module") -> Discovery:
    """Return the MoE layers of `model`.

    Raises:
        ModelNotSupportedError: there is none that can be read; the text names the modules looked at.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ModelNotSupportedError(
            f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself, not a pipeline or a path"
        )
    modules = dict(model.named_modules())
    sites: list[Site] = []
    unreadable: list[tuple[str, str]] = []
    for name, module in modules.items():
        if name.rpartition(".")[2] != "experts" and not hasattr(module, "_is_expert_parallel"):
            continue
        if any(name.startswith(f"{site.info.module_name}.experts.") for site in sites):
            continue
        reason = _unreadable_reason(module)
        if reason:
            unreadable.append((name, reason))
            continue
        block_name = name.rpartition(".")[0]
        block = modules[block_name]
        sites.append(_site(model, block_name, block, module, len(sites)))
    if not sites:
        raise ModelNotSupportedError(_nothing_found_text(model, modules, unreadable))
    return Discovery(tuple(sites), tuple(unreadable))


def _unreadable_reason(module: "nn.Module") -> str:
    from torch import nn

    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return f"{type(module).__name__} holds one module per expert, without token ids at its entrance"
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    # A wrapper around forward takes *args and says nothing: the hook checks each call's arguments anyway.
    takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    if len(named) < 4 and not takes_any:  # self, hidden states, expert ids, weights
        return f"{type(module).__name__}.forward does not take (hidden states, expert ids, weights)"
    if _num_experts(module) is None:
        return f"{type(module).__name__} does not say its number of experts"
    return ""


def _site(model: "nn.Module", block_name: str, block: "nn.Module", experts: "nn.Module", layer_index: int) -> Site:
    router = next((child for name in _ROUTER_NAMES if (child := getattr(block, name, None)) is not None), None)
    config = _text_config(model)
    number = _LAYER_NUMBER.search(block_name)
    num_weighted = _num_experts(experts) or 0
    # Zero-compute experts have logits but no weights of their own.
    num_identity = _first_int(experts, ("zero_expert_num", "num_zero_experts")) or 0
    scoring = str(_first_of((router, config), ("scoring_func", "score_function", "scoring_function")) or "")
    if router is None:
        scoring = "unknown"
    elif scoring not in ("softmax", "sigmoid"):
        scoring = "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"
    info = LayerInfo(
        layer_index=layer_index,
        model_layer_index=int(number.group(1)) if number else layer_index,
        module_name=block_name,
        stack=_stack(block_name),
        num_experts=num_weighted,
        top_k=_top_k(router, block, config),
        num_shared_experts=_num_shared(block, config),
        num_identity_experts=num_identity,
        scoring_function=scoring,
    )
    if router is None:
        info = replace(info, unavailable_reason="the layer has no module named gate or router, so no logits are seen")
    return Site(info, experts, router)


def _num_experts(experts: "nn.Module") -> int | None:
    # Under expert parallelism `num_experts` is the local count, the parameters keep the global shape.
    for name in ("gate_up_proj", "down_proj", "up_proj"):
        weight = getattr(experts, name, None)
        if weight is not None and getattr(weight, "ndim", 0) == 3:
            return int(weight.shape[0])
    return _first_int(experts, ("num_experts", "num_local_experts", "n_routed_experts"))


def _top_k(router: "nn.Module | None", block: "nn.Module", config: Any) -> int:
    for owner in (router, block):
        value = _first_int(owner, ("top_k", "num_experts_per_tok", "moe_top_k", "moe_k"))
        if value:
            return value
    return _first_int(config, ("num_experts_per_tok", "moe_topk", "moe_k", "top_k")) or 0


def _num_shared(block: "nn.Module", config: Any) -> int:
    if all(getattr(block, name, None) is None for name in _SHARED_NAMES):
        return 0
    return _first_int(config, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")) or 1


def _text_config(model: "nn.Module") -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _first_of(owners: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    return next(
        (value for owner in owners for name in names if (value := getattr(owner, name, None)) is not None), None
    )


def _first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _stack(name: str) -> str:
    tokens = name.split(".")
    if any(token in ("vision_tower", "visual", "vision_model") for token in tokens):
        return "vision"
    return "encoder" if "encoder" in tokens else "decoder"


def _nothing_found_text(model: "nn.Module", modules: "dict[str, nn.Module]", unreadable: list[tuple[str, str]]) -> str:
    name = type(model).__name__
    if unreadable:
        shown = "; ".join(f"{module_name}: {reason}" for module_name, reason in unreadable[:_MAX_NAMES_IN_ERROR])
        return (
            f"{name} has MoE-like modules, but none that can be read ({len(unreadable)} looked at): {shown}. "
            "A layer is readable when its `experts` module is called with (hidden states, expert ids, weights)"
        )
    # One name per shape of path, so that 60 equal layers take one entry.
    kinds: dict[str, str] = {}
    for module_name, module in modules.items():
        if module_name and not any(True for _ in module.children()):
            kinds.setdefault(re.sub(r"\d+", "*", module_name), type(module).__name__)
    shown = ", ".join(f"{path} ({kind})" for path, kind in list(kinds.items())[:_MAX_NAMES_IN_ERROR])
    more = f" and {len(kinds) - _MAX_NAMES_IN_ERROR} more kinds" if len(kinds) > _MAX_NAMES_IN_ERROR else ""
    return (
        f"{name} looks dense: none of its {len(modules)} modules is named `experts` or marked as an experts module. "
        f"Looked at: {shown}{more}. Pass a Mixture-of-Experts model (for example Mixtral, Qwen3-MoE, OLMoE, "
        "DeepSeek-V3, GPT-OSS), or the model itself where this object wraps it"
    )
