"""Sees an optimizer's step inside a step's block: the last moment at which the gradients are surely there."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["OptimizerWatch"]


class OptimizerWatch:
    """Calls `read` once, before the first step of an optimizer that has parameters of `model`.

    Loops often call `optimizer.step` and `zero_grad` inside of the block; after it there would be nothing to read.
    """

    def __init__(self, model: "nn.Module", read: Callable[[], None]) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self.has_read = False
        self._model = model
        self._read = read
        self._handle: Any = register_optimizer_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.has_read:
            return
        own = {id(parameter) for parameter in self._model.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            self.has_read = True
            self._read()
