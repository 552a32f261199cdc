"""The balancing loss that a model adds to its own, read from its outputs without waiting for the device."""

from typing import TYPE_CHECKING, Any

from .readout import is_tensor

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["BalanceLossReader"]

# The weight of the balancing loss, on the model itself or in its config, by the names that libraries use.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "moe_aux_loss_coef")


class BalanceLossReader:
    """Keeps the balancing loss of each training forward (`aux_loss`, or one for each stack) until it is taken.

    Args:
        model: gets one forward hook, which changes nothing and never raises.
    """

    def __init__(self, model: "nn.Module") -> None:
        self._model = model
        self._losses: list[torch.Tensor] = []
        self._handle: Any = model.register_forward_hook(self._keep)

    def take(self) -> "dict[str, Any]":
        """Return `balance_loss`, the mean over the forwards since the last call, and `balance_coef`; else nothing.

        The coefficient is given only beside a balancing loss: one that the model does not use is none.
        """
        losses, self._losses = self._losses, []
        if not losses:
            return {}
        import torch

        # The device does the mean, behind the forwards: no value is read here.
        values: dict[str, Any] = {"balance_loss": torch.stack([loss.reshape(()) for loss in losses]).float().mean()}
        coefficient = _coefficient(self._model)
        if coefficient is not None:
            values["balance_coef"] = coefficient
        return values

    def detach(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        self._losses.clear()

    def _keep(self, module: "nn.Module", args: Any, output: Any) -> None:
        if not module.training:
            return
        loss = _balance_loss(output)
        if loss is not None:
            self._losses.append(loss.detach())


def _balance_loss(output: Any) -> "torch.Tensor | None":
    """Return the loss of all stacks: encoder-decoders give one each, and multiply their sum."""
    found: torch.Tensor | None = None
    for name in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss"):
        loss = getattr(output, name, None)
        # A stack without experts has the number 0.
        if loss is not None and is_tensor(loss) and loss.numel() == 1:
            found = loss if found is None else found + loss
    return found


def _coefficient(model: "nn.Module") -> float | None:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    for owner in (model, get_text_config() if callable(get_text_config) else None, config):
        for name in _COEFFICIENTS:
            value = getattr(owner, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
    return None
