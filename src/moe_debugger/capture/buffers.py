"""Buffers that a model writes its routes into again and again: what lies there is copied before it is overwritten.

Nearly all routers return new tensors, of which a reference is enough. torch counts the writes into each tensor; only
one that was written in place can be such a buffer (or one that was normalised, which is copied for nothing). Buffers
that were made under `torch.inference_mode` have no such count, and are not recognised.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .raw import RawLayer

__all__ = ["copy_written", "copy_written_layers"]


def copy_written(tensors: dict[str, Any]) -> None:
    """Replace the tensors that were written in place by copies."""
    tensors.update({name: tensor.clone() for name, tensor, _ in _written(tensors)})


def copy_written_layers(layers: Sequence[RawLayer]) -> list[RawLayer]:
    """Copy what was written in place of the layers of one forward, in the order of their calls.

    All tensors are held, so that no memory can have been freed and used again: where those of two layers lie in one
    place, the later layer has overwritten the earlier one's.

    Returns:
        The layers that were overwritten; what lies there is not theirs.
    """
    written = [(layer, *found) for layer in layers for found in _written(layer.tensors)]
    last = {place: layer for layer, _, _, place in written}
    for layer, name, tensor, _ in written:
        layer.tensors[name] = tensor.clone()
    lost = {id(layer) for layer, _, _, place in written if last[place] is not layer}
    return [layer for layer in layers if id(layer) in lost]


def _written(tensors: dict[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, int]]]:
    """Yield the tensors that were written in place, with their device and address."""
    import torch

    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and not value.is_inference() and value._version and value.numel():
            try:
                yield name, value, (value.device, value.data_ptr())
            except RuntimeError:
                # A stand-in of torch.func, which has no memory.
                continue
