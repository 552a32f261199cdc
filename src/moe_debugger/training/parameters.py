"""Which parameters of a MoE layer are its router's, its experts' and its selection bias."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["LayerParameters", "Slot", "find_parameters"]

# Added to the scores before top-k and not learnt by gradient, where a router balances without a loss.
_SELECTION_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "correction_bias", "balancing_biases")
# One module for each expert: "0", "expert_0".
_EXPERT_NUMBER = re.compile(r"(?:^|[^\d])(\d+)$")
_SHARED_WORD = "shared"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a module; what is there may be replaced (moved, sharded) between two readings."""

    owner: "nn.Module"
    name: str

    def tensor(self) -> "torch.Tensor | None":
        """Return the parameter or buffer that is there now."""
        return getattr(self.owner, self.name, None)


@dataclass(slots=True)
class LayerParameters:
    """Where the parameters of one MoE layer are.

    Attributes:
        router: those that make the scores; the selection bias is none of them.
        fused: those that hold all experts: dimension 0 is E times a number of rows, or E and the identity experts.
        separate: for each expert its own ones; empty where experts have no module of their own.
        bias: selection biases, parameters or buffers.
    """

    layer_index: int
    module_name: str
    num_experts: int
    num_identity_experts: int = 0
    router: list[Slot] = field(default_factory=list)
    fused: list[Slot] = field(default_factory=list)
    separate: list[list[Slot]] = field(default_factory=list)
    bias: list[Slot] = field(default_factory=list)


def find_parameters(site: Any, model: "nn.Module") -> LayerParameters:
    """Return the parameters of a capture site (`info`, `experts` and `router` are read)."""
    info, experts, router = site.info, getattr(site, "experts", None), getattr(site, "router", None)
    num_identity = getattr(info, "num_identity_experts", 0)
    found = LayerParameters(info.layer_index, info.module_name, info.num_experts, num_identity)
    if router is not None:
        found.router = [slot for slot in _slots(router) if slot.name not in _SELECTION_BIAS_NAMES]
    for owner in (router, _block(model, info.module_name)):
        if owner is not None and not found.bias:
            found.bias = [slot for slot in _slots(owner, with_buffers=True) if slot.name in _SELECTION_BIAS_NAMES]
    if experts is not None:
        known = {id(slot.tensor()) for slot in (*found.router, *found.bias)}
        _collect_experts(experts, found, known)
    return found


def _collect_experts(module: "nn.Module", found: LayerParameters, known: set[int]) -> None:
    from torch import nn

    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        numbered = {
            int(match[1]): child for name, child in module.named_children() if (match := _EXPERT_NUMBER.search(name))
        }
        if sorted(numbered) == list(range(found.num_experts)):
            found.separate = found.separate or [[] for _ in range(found.num_experts)]
            for number, child in numbered.items():
                found.separate[number].extend(_slots(child))
            return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in known and _is_fused(module, parameter, found):
            found.fused.append(Slot(module, name))
    for name, child in module.named_children():
        if _SHARED_WORD not in name:
            _collect_experts(child, found, known)


def _is_fused(owner: "nn.Module", parameter: "torch.Tensor", found: LayerParameters) -> bool:
    num_experts = found.num_experts
    if parameter.ndim == 0:
        return False
    if parameter.shape[0] in (num_experts, num_experts + found.num_identity_experts):
        return True
    # Experts below one another in a matrix [E * rows, columns], as in DBRX; only where the owner says so.
    says_so = num_experts in (getattr(owner, "num_experts", None), getattr(owner, "moe_num_experts", None))
    return says_so and parameter.ndim == 2 and parameter.shape[0] % num_experts == 0


def _slots(module: "nn.Module", *, with_buffers: bool = False) -> Iterator[Slot]:
    for owner in module.modules():
        for name, _ in owner.named_parameters(recurse=False):
            yield Slot(owner, name)
        if with_buffers:
            for name, _ in owner.named_buffers(recurse=False):
                yield Slot(owner, name)


def _block(model: "nn.Module", module_name: str) -> "nn.Module | None":
    try:
        return model.get_submodule(module_name)
    except AttributeError:
        return None
