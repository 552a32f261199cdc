"""Copies of modules for replays: float64 weights, no hooks, always the library's plain ("eager") implementation."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["bare_copy", "double", "only"]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def bare_copy(module: nn.Module, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """Return a copy of `module` with its own weights as they are now, in eval mode and without any hook.

    Args:
        module: is left as it is; its weights may be shared, or tensors of inference mode.
        dtype: of the copy's floating point weights; None keeps theirs.
    """
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for name in _HOOKS:
        clone.__dict__[name] = OrderedDict()
    # An instance's own forward is someone's wrapper, the oracle's included.
    clone.__dict__.pop("forward", None)
    clone.__dict__["training"] = False
    clone.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(_own(value, dtype), requires_grad=False)
        for name, value in module.__dict__["_parameters"].items()
    }
    clone.__dict__["_buffers"] = {
        name: None if value is None else _own(value, dtype) for name, value in module.__dict__["_buffers"].items()
    }
    clone.__dict__["_modules"] = {
        name: None if child is None else bare_copy(child, dtype) for name, child in module.__dict__["_modules"].items()
    }
    config: Any = clone.__dict__.get("config")
    if hasattr(config, "_experts_implementation"):
        config = copy.copy(config)
        config._experts_implementation_internal = "eager"
        clone.__dict__["config"] = config
    return clone


def double(value: Any) -> Any:
    """Return a copy of a tensor (or of the tensors in a list, tuple or dict), in float64 where it is floating point."""
    if isinstance(value, torch.Tensor):
        return _own(value, torch.float64)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(double(item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(double(item) for item in value)
    if isinstance(value, Mapping):
        return {key: double(item) for key, item in value.items()}
    return value


def only(weight: torch.Tensor, full: torch.Tensor, expert_id: int | None) -> None:
    """Set `weight` [E, ...] to `full` at `expert_id` and to zero elsewhere; everywhere where that is None."""
    weight.zero_()
    if expert_id is not None:
        weight[expert_id].copy_(full[expert_id])


def _own(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    value = value.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return value.clone()
