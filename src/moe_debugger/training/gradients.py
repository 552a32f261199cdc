"""Norms of gradients and weights per MoE layer and expert, computed where the parameters are.

Nothing is written to a parameter, a gradient or the random state, and nothing waits for the device: a vector for each
device is left for `Readout`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .parameters import LayerParameters, Slot, find_parameters
from .readout import Readout
from .series import SeriesPoint

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["GradientProbe", "Reading"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the values of one point lie: `device` is an index of the readout's vectors, -1 = there are none."""

    name: str
    layer_index: int
    size: int
    is_per_expert: bool
    device: int = -1
    start: int = 0


@dataclass(slots=True)
class Reading:
    """One step's norms on their way to the host.

    Attributes:
        notes: why values are NaN.
    """

    step: int
    places: list[_Place]
    readout: Readout
    notes: list[str]

    def is_ready(self) -> bool:
        """Return whether `points` would not wait."""
        return self.readout.is_ready()

    def points(self) -> list[SeriesPoint]:
        """Return the points, waiting for the device."""
        vectors = self.readout.values()
        return [
            SeriesPoint(
                self.step,
                place.name,
                place.layer_index,
                place.is_per_expert,
                np.full(place.size, np.nan)
                if place.device < 0
                else vectors[place.device][place.start : place.start + place.size].copy(),
            )
            for place in self.places
        ]


class GradientProbe:
    """Measures the layers of a model.

    Args:
        sites: the capture's sites.
        model: the model that they are of.
        layer_numbers: index of a layer in the whole model by its index in this rank's part; empty = the same.
    """

    def __init__(
        self, sites: Sequence[Any], model: "nn.Module", layer_numbers: Mapping[int, int] | None = None
    ) -> None:
        self._layers: list[LayerParameters] = [find_parameters(site, model) for site in sites]
        for layer in self._layers:
            layer.layer_index = (layer_numbers or {}).get(layer.layer_index, layer.layer_index)

    def measure(self, step: int) -> Reading:
        """Start to read all norms as they are now: after backward, before `zero_grad`."""
        import torch

        builder = _Builder()
        with torch.no_grad():
            for layer in self._layers:
                _measure_layer(builder, layer)
            vectors = [torch.cat(parts) for parts in builder.parts.values()]
        return Reading(step, builder.places, Readout(vectors), builder.notes)


class _Builder:
    """Collects each device's values into what becomes one vector."""

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self.parts: dict[Any, list[torch.Tensor]] = {}
        self.notes: list[str] = []
        self._lengths: dict[Any, int] = {}

    def add(
        self, layer: LayerParameters, name: str, value: "torch.Tensor | str", *, is_per_expert: bool = False
    ) -> None:
        """Add a tensor of the point's values, or the reason why there is none."""
        size = layer.num_experts if is_per_expert else 1
        if isinstance(value, str):
            self.notes.append(f"{name} of layer {layer.layer_index} ({layer.module_name}): {value}")
            self.places.append(_Place(name, layer.layer_index, size, is_per_expert))
            return
        device = value.device
        parts = self.parts.setdefault(device, [])
        start = self._lengths.get(device, 0)
        parts.append(value.reshape(-1))
        self._lengths[device] = start + size
        number = list(self.parts).index(device)
        self.places.append(_Place(name, layer.layer_index, size, is_per_expert, number, start))


def _measure_layer(builder: _Builder, layer: LayerParameters) -> None:
    if layer.router:
        weights = [tensor for slot in layer.router if (tensor := slot.tensor()) is not None]
        builder.add(layer, "router_gradient_norm", _joint_norm([_gradient(one) for one in weights]))
        builder.add(layer, "router_weight_norm", _joint_norm([_readable(one.detach()) for one in weights]))
    else:
        builder.add(layer, "router_gradient_norm", "no module with the router's parameters is known")
        builder.add(layer, "router_weight_norm", "no module with the router's parameters is known")
    builder.add(layer, "expert_gradient_norm", _expert_norms(builder, layer), is_per_expert=True)
    biases = [tensor for slot in layer.bias if (tensor := slot.tensor()) is not None]
    if biases:
        low, high = _range([_readable(one.detach()) for one in biases])
        builder.add(layer, "selection_bias_min", low)
        builder.add(layer, "selection_bias_max", high)


def _range(biases: "list[torch.Tensor | str]") -> "tuple[torch.Tensor | str, torch.Tensor | str]":
    import torch

    for bias in biases:
        if isinstance(bias, str):
            return bias, bias
    values = torch.cat([bias.reshape(-1).float() for bias in biases if not isinstance(bias, str)])
    return values.min(), values.max()


def _gradient(parameter: "torch.Tensor") -> "torch.Tensor | str":
    if not parameter.requires_grad:
        return "the parameters are frozen, so they have no gradient"
    if parameter.grad is None:
        return "there is no gradient: it was read before backward or after zero_grad, or the loss did not reach it"
    return _readable(parameter.grad)


def _readable(tensor: "torch.Tensor") -> "torch.Tensor | str":
    # The norm of a sharded tensor needs a collective, which only the training loop may start.
    if hasattr(tensor, "to_local"):
        return "the parameters are sharded over ranks, and the norm of a shard is not that of the parameter"
    if tensor.is_meta or tensor.is_sparse:
        return "the tensor is sparse or holds no data"
    return tensor


def _norm(tensor: "torch.Tensor", *, rows: int | None = None) -> "torch.Tensor":
    """L2 norm over everything, or over everything but the first of [rows, ...], in float32 at least."""
    import torch

    dtype = torch.float32 if tensor.element_size() < 4 else None
    if rows is None:
        whole: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
        return whole
    by_row: torch.Tensor = torch.linalg.vector_norm(tensor.reshape(rows, -1), dim=1, dtype=dtype)
    return by_row


def _joint_norm(tensors: "Sequence[torch.Tensor | str]") -> "torch.Tensor | str":
    import torch

    for tensor in tensors:
        if isinstance(tensor, str):
            return tensor
    if not tensors:
        return "there are no such parameters"
    joint: torch.Tensor = torch.linalg.vector_norm(
        torch.stack([_norm(one) for one in tensors if not isinstance(one, str)])
    )
    return joint


def _expert_norms(builder: _Builder, layer: LayerParameters) -> "torch.Tensor | str":
    """Return [E] norms over all parameters of each expert, fused or its own."""
    import torch

    parts: list[torch.Tensor] = []
    for slot in layer.fused:
        gradient = _slot_gradient(slot)
        if isinstance(gradient, str):
            return gradient
        rows = layer.num_experts
        if gradient.shape[0] == rows + layer.num_identity_experts:
            # Identity experts may have rows, which nothing computes with.
            gradient = gradient[:rows]
        parts.append(_norm(gradient, rows=rows))
    if layer.separate:
        norms = [_joint_norm([_slot_gradient(slot) for slot in slots]) for slots in layer.separate]
        found = [norm for norm in norms if not isinstance(norm, str)]
        if not found:
            return next(norm for norm in norms if isinstance(norm, str))
        missing = [norm for norm in norms if isinstance(norm, str)]
        if missing:
            # An expert without a token in the step has no gradient, where each is a module of its own.
            builder.notes.append(
                f"expert_gradient_norm of layer {layer.layer_index} ({layer.module_name}), some experts: {missing[0]}"
            )
        nan = torch.full_like(found[0], float("nan"))
        parts.append(torch.stack([nan if isinstance(norm, str) else norm for norm in norms]))
    if not parts:
        return "no parameter with one part for each expert is known"
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)


def _slot_gradient(slot: Slot) -> "torch.Tensor | str":
    tensor = slot.tensor()
    return "the parameter is gone" if tensor is None else _gradient(tensor)
