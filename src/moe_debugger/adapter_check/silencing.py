"""Experts that are silent for a while: their output weights are zero, and come back bit by bit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_debugger.capture import Adapter
from moe_debugger.errors import InvalidInputError

from .recording import Layer

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Experts", "output_weights", "restored_buffers", "silenced"]


class Experts:
    """The silenced experts of a layer, which may speak one at a time."""

    def __init__(self, weights: "Mapping[int, Sequence[torch.Tensor]]") -> None:
        self._weights = weights
        self._full = {expert_id: [each.detach().clone() for each in weights[expert_id]] for expert_id in weights}

    def silence(self, *expert_ids: int) -> None:
        """Set the output weights of these experts, or of all, to zero."""
        for expert_id in expert_ids or self._weights:
            for tensor in self._weights[expert_id]:
                tensor.zero_()

    def speak(self, expert_id: int, power: int = 0) -> None:
        """Give one expert its output weights times 2^power, which rounds nothing."""
        for tensor, full in zip(self._weights[expert_id], self._full[expert_id], strict=True):
            tensor.copy_(full)
            if power:
                tensor.mul_(2.0**power)

    def restore(self) -> None:
        """Give all experts the output weights that they had."""
        for expert_id, tensors in self._weights.items():
            for tensor, full in zip(tensors, self._full[expert_id], strict=True):
                tensor.copy_(full)


@contextmanager
def silenced(weights: "Mapping[int, Sequence[torch.Tensor]]") -> Iterator[Experts]:
    """Silence experts until the block is left, however it is left."""
    experts = Experts(weights)
    try:
        experts.silence()
        yield experts
    finally:
        experts.restore()


@contextmanager
def restored_buffers(model: "nn.Module") -> Iterator[None]:
    """Give the model's buffers (counters, say) the values back that they had."""
    import torch

    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def output_weights(adapter: Adapter, layer: Layer, expert_ids: Sequence[int]) -> "dict[int, list[torch.Tensor]]":
    """Return the output weights of each expert, by the adapter.

    Raises:
        InvalidInputError: what the adapter returned cannot silence one expert alone; the text says why.
    """
    module = layer.module
    owned = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    owner_of: dict[tuple[object, ...], int] = {}
    weights: dict[int, list[torch.Tensor]] = {}
    for expert_id in expert_ids:
        where = f"expert_output_weights(module, {expert_id})"
        try:
            given = list(adapter.expert_output_weights(module, expert_id))
        except NotImplementedError:
            raise InvalidInputError(
                "the adapter has no expert_output_weights, without which no expert can be silenced: return the "
                "parameters of an expert's last map, such as [module.experts.w_out[expert_id]]"
            ) from None
        except Exception as error:
            raise InvalidInputError(
                f"{where} raised {type(error).__name__}: {error}; the layer is described with "
                f"{layer.reading.num_experts} experts"
            ) from error
        if not given:
            raise InvalidInputError(f"{where} returned no tensor")
        for tensor in given:
            if not hasattr(tensor, "untyped_storage") or not tensor.is_floating_point():
                raise InvalidInputError(f"{where} returned {_shown(tensor)}; expected floating tensors")
            if tensor.is_meta:
                raise InvalidInputError(f"{where} is on the meta device; load the model without offloading")
            if tensor.untyped_storage().data_ptr() not in owned:
                raise InvalidInputError(
                    f"{where} returned a copy: zeroing it would change nothing in the model; return the parameter "
                    "itself or a view of it (an index, a slice, .view, .T), and no .clone(), .to() or .contiguous()"
                )
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if owner_of.setdefault(key, expert_id) != expert_id:
                raise InvalidInputError(
                    f"{where} returned the same parameter as for expert {owner_of[key]}: silencing one would silence "
                    "both; return the part of this expert alone"
                )
        weights[expert_id] = given
    return weights


def _shown(value: Any) -> str:
    return f"{value.dtype}" if hasattr(value, "dtype") else type(value).__name__
