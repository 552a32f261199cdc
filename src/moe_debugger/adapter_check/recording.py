"""One real forward of the model: what each layer was called with, what it gave, and what the adapter read there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.capture.readers.base import Reading

from .tensors import copied, first_rows, is_same, tensors_in

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Layer", "LayerCall", "find_rows_order", "record"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One module that the adapter matches, and how it is read."""

    name: str
    module: "nn.Module"
    reading: Reading


@dataclass(slots=True)
class LayerCall:
    """The first call of a layer in a forward.

    Attributes:
        args, kwargs: copies of what the layer was called with.
        hidden: [T, H], the rows of its first floating tensor.
        result: a copy of what it returned.
        arrays: what the adapter read, as numpy; None where it read nothing.
        num_calls, num_reads: of the layer, and of the hooked module within its first call.
        problems: of `read`.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden: "torch.Tensor | None" = None
    result: Any = None
    arrays: dict[str, npt.NDArray[Any]] | None = None
    num_calls: int = 0
    num_reads: int = 0
    problems: list[str] = field(default_factory=list)


def record(model: "nn.Module", layers: Sequence[Layer], inputs: Mapping[str, Any]) -> dict[str, LayerCall]:
    """Run the model once, and return the call of each layer by its name.

    Whatever the model itself raises comes through; an error of the adapter becomes a problem of its layer.
    """
    calls = {layer.name: LayerCall() for layer in layers}
    handles = [handle for layer in layers for handle in _watch(layer, calls[layer.name])]
    try:
        model(**copied(dict(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def find_rows_order(
    model: "nn.Module", layers: Sequence[Layer], inputs: Mapping[str, Any], calls: Mapping[str, LayerCall]
) -> dict[int, npt.NDArray[np.int64]]:
    """Return where each token of the forward is among the layers' rows, by the number of rows.

    Found by changing the last token of the first text, and looking which rows of a layer's input follow. Only the first
    layer of that many rows is asked: behind it, capacity lets tokens depend on those of other texts.
    """
    orders: dict[int, npt.NDArray[np.int64]] = {}
    asked: set[int] = set()
    for name in ("decoder_input_ids", "input_ids"):
        ids: Any = inputs.get(name)
        if getattr(ids, "ndim", 0) != 2 or min(ids.shape) < 2 or bool((ids == ids[0, -1]).all()):
            continue
        changed = ids.clone()
        changed[0, -1] = ids[ids != ids[0, -1]][0]
        after = record(model, layers, {**inputs, name: changed})
        for layer in layers:
            one, other = calls[layer.name].hidden, after[layer.name].hidden
            if one is None or other is None or one.shape != other.shape or len(one) != ids.numel():
                continue
            if len(one) in asked:
                break
            asked.add(len(one))
            rows = (one != other).any(dim=-1).nonzero().flatten().cpu().numpy()
            order = _order(rows, *ids.shape)
            if order is not None:
                orders[len(one)] = order
            break
    return orders


def _order(rows: npt.NDArray[np.int64], num_texts: int, length: int) -> npt.NDArray[np.int64] | None:
    tokens = np.arange(num_texts * length)
    if length - 1 in rows and (rows < length).all():
        return tokens
    if (length - 1) * num_texts in rows and (rows % num_texts == 0).all():
        # Rows are [sequence, batch], as in Megatron: token (b, s) is row s * B + b.
        return tokens.reshape(length, num_texts).T.reshape(-1)
    return None


def _watch(layer: Layer, call: LayerCall) -> list[Any]:
    is_inside = False

    def enter(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal is_inside
        call.num_calls += 1
        if call.num_calls == 1:
            is_inside = True
            call.args, call.kwargs = copied(args), copied(kwargs)
            call.hidden = first_rows((call.args, call.kwargs))

    def leave(module: "nn.Module", args: Any, kwargs: Any, output: Any) -> None:
        nonlocal is_inside
        if is_inside:
            call.result = copied(output)
        is_inside = False

    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_inside:
            call.num_reads += 1
            if call.num_reads == 1:
                _read(layer, call, args, kwargs, output)

    tap = layer.reading.taps[0]
    handles = [layer.module.register_forward_pre_hook(enter, with_kwargs=True)]
    if tap.moment == "before":
        handles.append(tap.module.register_forward_pre_hook(lambda m, a, k: read(a, k, None), with_kwargs=True))
    else:
        handles.append(tap.module.register_forward_hook(lambda m, a, k, o: read(a, k, o), with_kwargs=True))
    # After the hook that reads: the hooked module may be the layer itself.
    handles.append(layer.module.register_forward_hook(leave, with_kwargs=True))
    return handles


def _read(layer: Layer, call: LayerCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    before = [tensor.detach().clone() for tensor in tensors_in((args, kwargs, output))]
    try:
        kept = layer.reading.taps[0].keep(args, kwargs, output)
    except Exception as error:  # noqa: BLE001 - the adapter is code of the user's, which is what is checked
        call.problems.append(f"read() raised {type(error).__name__}: {error}")
        return
    assert kept is not None
    now = list(tensors_in((args, kwargs, output)))
    if len(now) != len(before) or not all(is_same(one, other) for one, other in zip(before, now, strict=True)):
        call.problems.append("read() changed the tensors of the call: return what is there, and write nothing to it")
    call.arrays = {name: _to_numpy(tensor) for name, tensor in kept[0].items()}


def _to_numpy(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    host = tensor.detach().cpu()
    # numpy has no bfloat16.
    values: npt.NDArray[Any] = (host.float() if host.is_floating_point() and host.itemsize < 4 else host).numpy().copy()
    return values
