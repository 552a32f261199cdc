"""Kinds of experts outside of transformers: a list of modules called one by one, and the GLaM of the examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from oracle.bare import bare_copy, double
from oracle.kinds import Kind, Stacked, autocast_as_now, rows_of
from torch import nn

__all__ = ["CUSTOM_KINDS"]


class ModuleListBlock(Kind):
    """A block that calls the modules of its ModuleList `experts` itself: the block is replayed.

    The gate runs in the model's dtype, so that the replay's choice is the model's bit by bit. Whatever else the block
    holds (shared experts) is silenced with the experts.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        hidden: torch.Tensor = args[0]
        self._hidden: torch.Tensor = double(hidden)
        self._clone._modules["gate"] = _Native(bare_copy(module.get_submodule("gate"), None), hidden.dtype)
        self._experts = list(self._clone.get_submodule("experts").children())
        self.num_experts = len(self._experts)
        self._parameters = [list(expert.parameters()) for expert in self._experts]
        self._full = [[parameter.clone() for parameter in parameters] for parameters in self._parameters]
        self._has_more = False
        for name, child in self._clone.named_children():
            if name not in ("gate", "experts"):
                self._has_more = True
                for parameter in child.parameters():
                    parameter.zero_()
        # The block may round the weights to the dtype of the hidden states.
        self.tolerance = 1e-6 if hidden.dtype == torch.float32 else 2 * float(torch.finfo(hidden.dtype).eps)

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        experts = getattr(module, "experts", None)
        is_plain = type(experts) is nn.ModuleList
        return is_plain and isinstance(getattr(module, "gate", None), nn.Module)

    def run(self, expert_id: int | None) -> torch.Tensor:
        # With all its weights at zero an expert gives zero, whatever its last map is called.
        for index, (parameters, full) in enumerate(zip(self._parameters, self._full, strict=True)):
            for parameter, value in zip(parameters, full, strict=True):
                parameter.copy_(value) if index == expert_id else parameter.zero_()
        return rows_of(type(self._clone).forward(self._clone, self._hidden))

    def unit(self, expert_id: int) -> torch.Tensor:
        for parameter, value in zip(self._parameters[expert_id], self._full[expert_id], strict=True):
            parameter.copy_(value)
        output: torch.Tensor = self._experts[expert_id](self.hidden())
        return output

    def hidden(self) -> torch.Tensor:
        return rows_of(self._hidden)

    def output(self, result: Any) -> torch.Tensor:
        return torch.full_like(self.hidden(), torch.nan) if self._has_more else super().output(result)


class Glam(Stacked):
    """The GLaM of the examples: `experts(hidden, routing)` with `w_in` [E, H, I] and `w_out` [E, I, H]."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        self._args, self._kwargs = double(list(args)), double(kwargs)
        self._parameters = [self._clone.get_parameter("w_out")]
        self._full = [self._parameters[0].clone()]
        self._in = self._clone.get_parameter("w_in")
        self.num_experts = len(self._in)
        self.tolerance = 1e-6 if args[0].dtype == torch.float32 else 2 * float(torch.finfo(args[0].dtype).eps)

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        return all(getattr(getattr(module, part, None), "ndim", 0) == 3 for part in ("w_in", "w_out"))

    def unit(self, expert_id: int) -> torch.Tensor:
        return F.gelu(self.hidden() @ self._in[expert_id]) @ self._full[0][expert_id]


class _Native(nn.Module):
    """Runs a gate in the dtype that it has in the model, inside a block that is replayed in float64."""

    def __init__(self, gate: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = gate
        self.dtype = dtype
        self._as_now = autocast_as_now()

    def forward(self, hidden: torch.Tensor) -> Any:
        with self._as_now():
            return self.gate(hidden.to(self.dtype))


CUSTOM_KINDS: tuple[type[Kind], ...] = (ModuleListBlock, Glam)
