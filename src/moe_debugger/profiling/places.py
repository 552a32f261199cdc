"""What of a model is timed: for each MoE layer its block, router and experts, and what that layout cannot tell apart.

Glossary:
    part    what a time is of: a forward, a block, or a piece of a block (`Part`).
    place   one part of one layer, and where experts are modules of their own, of one expert.
    layout  how a layer runs its experts, which decides what can be measured:
            modules  one call of a module for each expert; each is timed;
            fused    one call for all experts, which groups the tokens and adds the results up itself;
            dense    one call that computes every row with every expert; grouping happens outside of it;
            whole    the block itself computes them; only the block, and the router where it has one, are timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

from moe_debugger.capture import LayerInfo, Site

if TYPE_CHECKING:
    from torch import nn

__all__ = ["WHOLE_MODEL", "LayerPlan", "Layout", "ModulePlace", "Part", "layer_plan"]

# Layer of what belongs to no layer, and expert of what belongs to no expert.
WHOLE_MODEL = -1
Layout = Literal["modules", "fused", "dense", "whole"]
# (arguments, keyword arguments, output or None) of a call -> expert ids [n, k], a list of rows by expert, or None.
ReadIds = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any]
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
_INSIDE = "inside the one call of the experts module: not separable"
_INSIDE_BLOCK = "the block computes its experts itself: not separable"


class Part(IntEnum):
    """What a time is of; the values are codes of columns, the names in lower case are what tables show."""

    FORWARD = 0
    BLOCK = 1
    ROUTER = 2
    EXPERTS = 3
    EXPERT = 4
    SHARED = 5
    WAIT = 6
    DISPATCH = 7
    COMBINE = 8
    REST = 9

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """A module whose calls are timed."""

    module: "nn.Module"
    part: Part
    expert_id: int = WHOLE_MODEL


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one MoE layer is timed.

    Attributes:
        info: the layer as the model's structure describes it.
        places: the modules that are timed; the block first.
        expert_bytes: weights of one expert on this rank, bytes; NaN where they are not known.
        flops_per_row: 2 x elements of one expert's matrices: multiply-adds of one token in one expert, as two
            operations each; NaN where not known.
        id_module, id_moment, read_ids: whose call shows the expert ids, when, and how; None where none does.
        reasons: why a part has no number, by the part's label.
    """

    info: LayerInfo
    layout: Layout
    places: tuple[ModulePlace, ...]
    expert_bytes: float
    flops_per_row: float
    id_module: "nn.Module | None" = None
    id_moment: str = ""
    read_ids: ReadIds | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


def layer_plan(site: Site, modules: "Mapping[str, nn.Module]") -> LayerPlan:
    """Return how the layer of `site` is timed; `modules` are those of the model by name."""
    from torch import nn

    block = modules.get(site.info.module_name)
    experts, num_experts = site.experts, site.info.num_experts
    is_list = isinstance(experts, nn.ModuleList | nn.ModuleDict)
    children = _expert_modules(experts, num_experts) if is_list else []
    is_called = type(experts).forward is not nn.Module.forward and experts is not block
    layout: Layout = "modules" if children else "fused" if is_called else "whole"
    if layout == "fused" and site.info.adapter == "dense_scores":
        layout = "dense"
    places = [] if block is None else [ModulePlace(block, Part.BLOCK)]
    if site.router is not None and site.router is not block:
        places.append(ModulePlace(site.router, Part.ROUTER))
    if is_called:
        places.append(ModulePlace(experts, Part.EXPERTS))
    places += [ModulePlace(child, Part.EXPERT, expert) for expert, child in enumerate(children)]
    shared = _shared(block)
    places += [ModulePlace(child, Part.SHARED) for child in shared]
    expert_bytes, flops = _expert_weights(experts, children, num_experts)
    module, moment, read = _id_tap(site) if layout in ("fused", "whole") else (None, "", None)
    reasons = _reasons(layout, site, read, has_shared=bool(shared))
    return LayerPlan(site.info, layout, tuple(places), expert_bytes, flops, module, moment, read, reasons)


def _expert_modules(experts: "nn.Module", num_experts: int) -> "list[nn.Module]":
    """Return one module for each expert, in their order; empty where the list holds something else."""
    children = [child for name, child in experts.named_children() if name.rpartition("_")[2].isdigit()]
    return children if len(children) == num_experts else []


def _shared(block: "nn.Module | None") -> "list[nn.Module]":
    children = {} if block is None else dict(block.named_children())
    return [children[name] for name in _SHARED_NAMES if name in children]


def _expert_weights(experts: "nn.Module", children: "list[nn.Module]", num_experts: int) -> tuple[float, float]:
    """Return bytes of one expert's weights, and operations for one row; NaN where they cannot be told.

    Experts of one module hold matrices [E, a, b] and biases [E, a]; some stack the matrices of all to [E * a, b].
    """
    held = list(children[0].parameters()) if children else list(experts.parameters())
    has_stacks = any(each.ndim == 3 for each in held)
    num_bytes = operations = 0.0
    parameter: Any
    for parameter in held:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if children:
            share, is_matrix = float(local.numel()), parameter.ndim == 2
        elif has_stacks:
            share, is_matrix = local.numel() / max(1, local.shape[0] if local.ndim else 1), parameter.ndim == 3
        else:
            is_matrix = parameter.ndim == 2 and parameter.shape[0] % num_experts == 0
            share = local.numel() / num_experts
        num_bytes += share * local.element_size()
        operations += 2 * share * is_matrix
    return (num_bytes, operations) if operations else (float("nan"), float("nan"))


def _id_tap(site: Site) -> "tuple[nn.Module | None, str, ReadIds | None]":
    """Return the module, the moment and the reader of a call that shows which experts are computed."""
    tap = next((each for each in site.taps if each.completes and each.module in (site.experts, site.router)), None)
    if tap is None or site.info.adapter not in ("standard", "sorted_lists", "fixed_choice"):
        return None, "", None
    keep = tap.keep

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        kept = keep(args, kwargs, output)
        return None if kept is None else kept[0].get("expert_ids", kept[0].get("sizes"))

    return tap.module, tap.moment, read


def _reasons(layout: Layout, site: Site, read: object, *, has_shared: bool) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if site.router is None:
        reasons["router"] = "the layer has no router of its own"
    if not has_shared:
        reasons["shared"] = "the layer has no shared experts"
    if layout == "fused":
        reasons |= {"dispatch": _INSIDE, "combine": _INSIDE, "expert": "one call computes all experts: estimated"}
    elif layout == "dense":
        reasons["expert"] = "one call computes every row with every expert: estimated"
    elif layout == "whole":
        reasons |= dict.fromkeys(("experts", "dispatch", "combine", "expert"), _INSIDE_BLOCK)
    elif site.router is None:
        reasons["dispatch"] = "the layer has no router of its own, after which it would begin"
    if layout in ("fused", "whole") and read is None:
        reasons["distinct_experts"] = "the profiler does not see this layer's expert ids"
    return reasons
