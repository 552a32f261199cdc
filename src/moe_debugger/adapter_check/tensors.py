"""Tensors inside the arguments and results of a module: found, copied and compared."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["copied", "first_rows", "is_same", "moved_rows", "tensors_in"]


def tensors_in(value: Any) -> "Iterator[torch.Tensor]":
    """Yield the tensors of nested tuples, lists and mappings, in order."""
    if hasattr(value, "detach") and hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)


def copied(value: Any) -> Any:
    """Return `value` with every tensor copied; what is neither a tensor nor a tuple, list or dict stays the same."""
    if hasattr(value, "detach") and hasattr(value, "untyped_storage"):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(each) for each in value))
    if type(value) in (tuple, list):
        return type(value)(copied(each) for each in value)
    if type(value) is dict:
        return {key: copied(each) for key, each in value.items()}
    return value


def first_rows(value: Any, num_rows: int | None = None) -> "torch.Tensor | None":
    """Return the first floating tensor with two or more dimensions as rows [n, H]; of `num_rows` where that is given.

    A loss or another tensor beside the hidden states has another number of rows.
    """
    for tensor in tensors_in(value):
        if tensor.ndim >= 2 and tensor.is_floating_point():
            rows = tensor.detach().reshape(-1, tensor.shape[-1])
            if num_rows is None or rows.shape[0] == num_rows:
                return rows
    return None


def is_same(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    """Return whether two tensors are equal in every bit that matters: NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def moved_rows(one: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    """Return [n] bool, which rows of two [n, H] tensors differ."""
    return ~((one == other) | ((one != one) & (other != other))).all(dim=-1)
