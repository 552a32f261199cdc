"""Batches of text with images or audio in them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from zoo.build import SEED, batch

__all__ = ["Padding", "dtype_of", "first_column", "noise", "written"]

Padding = Literal["left", "right"]


def written(padding: Padding, tokens: Mapping[int, Sequence[int]], *, after: int = 1) -> dict[str, Any]:
    """Return `zoo.build.batch` where row r has `tokens[r]` over its words, from its token number `after` on."""
    inputs = batch(padding)
    for row, ids in tokens.items():
        start = first_column(inputs["attention_mask"], row) + after
        assert start + len(ids) <= inputs["input_ids"].shape[1]
        assert inputs["attention_mask"][row, start : start + len(ids)].all()
        inputs["input_ids"][row, start : start + len(ids)] = torch.tensor(ids)
    return inputs


def first_column(attention_mask: torch.Tensor, row: int) -> int:
    """Return the column of a row's first token that is not padding."""
    return int(attention_mask[row].argmax())


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values of a picture or a spectrogram: normal, drawn in float32 with a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)
