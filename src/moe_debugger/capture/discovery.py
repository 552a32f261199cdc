"""Finds the MoE layers of a model by their structure, never by the names of their classes."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import ModelNotSupportedError

from .adapter import registered_adapters
from .readers import READERS, Model, Reading, read_by_adapter
from .sites import LayerInfo, Site

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Discovery", "LayerInfo", "Site", "find_sites"]

# The first of these that a number follows holds a stack's layers, in every architecture of transformers 5.
_LAYERS = ("layers", "blocks", "block", "layer", "h")
_VISION = ("vision_tower", "visual", "vision_model", "vision_encoder")
_MAX_NAMES_IN_ERROR = 12
_ADAPTER_TEXT = """To watch it all the same, say how its layers are read and attach again:

    class MyAdapter(moe_debugger.Adapter):
        name = "mine"
        def matches(self, name, module):        # is this module one MoE layer?
            return type(module).__name__ == "{kind}"
        def describe(self, module):
            return moe_debugger.LayerShape(num_experts=..., top_k=...)
        def hooked(self, module):               # whose call is read
            return module.{router}
        def read(self, call):                   # what that call returned, as ids [n, k] and weights [n, k]
            logits, weights, expert_ids = call.output
            return moe_debugger.Routing(expert_ids=expert_ids, gate_weights=weights, logits=logits)

    moe_debugger.register_adapter(MyAdapter())

`moe-debugger check-adapter` proves such an adapter by silencing one expert at a time."""


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
    """Return the MoE layers of `model`; registered adapters are asked first.

    Raises:
        ModelNotSupportedError: there is none that can be read; the text names the modules looked at.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ModelNotSupportedError(
            f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself, not a pipeline or a path"
        )
    # A module that stands in several places of the model has several names.
    modules = dict(model.named_modules(remove_duplicate=False))
    searched = Model(modules, _text_config(model))
    sites: list[Site] = []
    unreadable: list[tuple[str, str]] = []
    read: list[str] = []
    done: set[tuple[int, int]] = set()
    for name, module in modules.items():
        # A shared layer is one site. Experts that blocks share are one for each block, which has its own router.
        place = (id(module), id(modules[name.rpartition(".")[0]]) if _is_named_experts(name, module) else 0)
        if place in done or any(name.startswith(f"{inside}." if inside else "") for inside in read):
            continue
        done.add(place)
        reading = _by_adapters(searched, name, module)
        is_adapters = reading is not None
        if reading is None:
            candidate = _is_named_experts(name, module)
            reading = _by_structure(searched, name, module, is_named_experts=candidate)
            if reading is None and candidate:
                unreadable.append((name, _unreadable_reason(module)))
        if reading is not None:
            sites.append(_site(searched, reading, len(sites)))
            # What lies inside the experts is theirs, and inside a layer that an adapter reads it is the adapter's.
            owner = module if is_adapters else reading.experts
            read += [other for other, held in modules.items() if held is owner] or [name]
    if not sites:
        raise ModelNotSupportedError(_nothing_found_text(model, modules, unreadable))
    return Discovery(_told_apart(sites), tuple(unreadable))


def _is_named_experts(name: str, module: "nn.Module") -> bool:
    return name.rpartition(".")[2] == "experts" or hasattr(module, "_is_expert_parallel")


def _told_apart(sites: list[Site]) -> tuple[Site, ...]:
    """Mark the sites that share their experts module: a call of it belongs to the one whose router was just seen."""
    number = Counter(id(site.experts) for site in sites)
    return tuple(replace(site, is_shared=True) if number[id(site.experts)] > 1 else site for site in sites)


def _by_adapters(model: Model, name: str, module: "nn.Module") -> Reading | None:
    for adapter in registered_adapters():
        reading = read_by_adapter(adapter, model, name, module)
        if reading is not None:
            return reading
    return None


def _by_structure(model: Model, name: str, module: "nn.Module", *, is_named_experts: bool) -> Reading | None:
    for reader in READERS:
        # Readers of blocks know them by what they hold; readers of experts need to be told which module that is.
        if not is_named_experts and reader.__name__ not in ("read_sorted_lists", "read_product_keys"):
            continue
        reading = reader(model, name, module)
        if reading is not None:
            return reading
    return None


def _site(model: Model, reading: Reading, layer_index: int) -> Site:
    root, number = _place(reading.module_name)
    stack = _stack(model, reading.module_name, root)
    info = LayerInfo(
        layer_index=layer_index,
        model_layer_index=layer_index if number is None else number,
        module_name=reading.module_name,
        stack=stack,
        num_experts=reading.num_experts,
        top_k=reading.top_k,
        num_shared_experts=reading.num_shared_experts,
        num_identity_experts=reading.num_identity_experts,
        scoring_function=reading.scoring_function,
        weight_meaning=reading.weight_meaning,
        unavailable_reason=reading.unavailable_reason,
        site=reading.site,
        block_scale=reading.block_scale,
        adapter=reading.adapter,
    )
    return Site(
        info,
        reading.experts,
        reading.router,
        root,
        reading.taps,
        reading.interpret,
        reading.pool,
        is_row_wise=reading.is_row_wise,
        reduces=reading.reduces,
    )


def _place(module_name: str) -> tuple[str, int | None]:
    """Return the name of the stack that holds the layer, and the layer's number in it."""
    parts = module_name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part in _LAYERS and parts[index + 1].isdigit():
            return ".".join(parts[:index]), int(parts[index + 1])
    return "", None


def _stack(model: Model, name: str, root: str) -> str:
    parts = name.split(".")
    # A vision tower may have any name (or none, watched by itself), but says what it takes; so does what holds it.
    around = [".".join(root.split(".")[:length]) for length in range(len(root.split(".")), -1, -1)]
    says = (getattr(model.modules.get(each), "main_input_name", None) for each in around)
    if next((main for main in says if isinstance(main, str)), "") == "pixel_values":
        return "vision"
    if any(part in _VISION for part in parts):
        return "vision"
    return "encoder" if "encoder" in parts else "decoder"


def _text_config(model: "nn.Module") -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _unreadable_reason(module: "nn.Module") -> str:
    from torch import nn

    kind = type(module).__name__
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return (
            f"{kind} holds one module per expert, but beside it there is no gate with a known number of slots "
            "(an attribute top_k or num_experts_per_tok of the gate, its block or the config)"
        )
    return f"{kind}.forward takes neither (hidden states, expert ids, weights) nor a form that is known"


def _nothing_found_text(model: "nn.Module", modules: "dict[str, nn.Module]", unreadable: list[tuple[str, str]]) -> str:
    name = type(model).__name__
    if unreadable:
        shown = "; ".join(f"{module_name}: {reason}" for module_name, reason in unreadable[:_MAX_NAMES_IN_ERROR])
        block = modules[unreadable[0][0].rpartition(".")[0]]
        router = next((child for child, _ in block.named_children() if child in ("gate", "router")), "router")
        return (
            f"{name} has MoE-like modules, but none that can be read ({len(unreadable)} looked at): {shown}. "
            + _ADAPTER_TEXT.format(kind=type(block).__name__, router=router)
        )
    # One name per shape of path, so that 60 equal layers take one entry.
    kinds: dict[str, str] = {}
    for module_name, module in modules.items():
        if not any(True for _ in module.children()):
            kinds.setdefault(re.sub(r"\d+", "*", module_name) or "the model itself", type(module).__name__)
    shown = ", ".join(f"{path} ({kind})" for path, kind in list(kinds.items())[:_MAX_NAMES_IN_ERROR])
    more = f" and {len(kinds) - _MAX_NAMES_IN_ERROR} more kinds" if len(kinds) > _MAX_NAMES_IN_ERROR else ""
    return (
        f"{name} looks dense: none of its {len(modules)} modules is named `experts` or marked as an experts module. "
        f"Looked at: {shown}{more}. Pass a Mixture-of-Experts model (for example Mixtral, Qwen3-MoE, OLMoE, "
        "DeepSeek-V3, GPT-OSS), or the model itself where this object wraps it. "
        + _ADAPTER_TEXT.format(kind="MyMoE", router="router")
    )
