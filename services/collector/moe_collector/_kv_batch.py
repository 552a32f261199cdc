"""The key/value cache of the requests that share a forward: rows join, leave and stay left-padded.

Glossary:
    row      one request's place in the batch.
    column   one cached position; all rows have the same number of columns, ``num_columns``.
    padding  the columns before a row's first token. They are masked, hold zeros and are never read.

Two rows of 3 and 5 cached tokens have 5 columns; the first row's padding is 2. When the second row leaves, the two
columns that are padding in every row that is left are cut off.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

__all__ = ["KVBatch", "new_cache"]


def new_cache() -> "DynamicCache":
    """Return an empty cache that keeps every position of every layer.

    Without the model's config, sliding-window layers are kept whole too: the window is in the attention mask then, and
    all layers have the same number of columns, which merging rows needs. It costs memory, not exactness.
    """
    from transformers import DynamicCache

    return DynamicCache()


class KVBatch:
    """The running batch's cache and the number of cached tokens of each row."""

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []
        self._num_columns = 0

    @property
    def num_rows(self) -> int:
        """Requests in the batch."""
        return len(self._lengths)

    @property
    def num_columns(self) -> int:
        """Cached positions of each row, its padding included."""
        return self._num_columns

    @property
    def lengths(self) -> Sequence[int]:
        """Cached tokens of each row, without padding."""
        return tuple(self._lengths)

    @property
    def cache(self) -> "DynamicCache":
        """What the model takes as `past_key_values`; a forward of one token for each row appends to it."""
        if self._cache is None:
            self._cache = new_cache()
        return self._cache

    def attention_mask(self, num_new: int, device: "torch.device") -> "torch.Tensor":
        """Return the mask for a forward of `num_new` tokens for each row, [rows, columns + new] int64, 0 on padding."""
        import torch

        lengths = torch.tensor(self._lengths, device=device).unsqueeze(1)
        columns = torch.arange(self._num_columns + num_new, device=device).unsqueeze(0)
        return (columns >= self._num_columns - lengths).long()

    def appended(self, num_new: int) -> None:
        """Note that a forward has appended `num_new` tokens to every row."""
        self._lengths = [length + num_new for length in self._lengths]
        self._num_columns += num_new

    def join(self, cache: "DynamicCache", lengths: Sequence[int]) -> None:
        """Add the rows of a prefilled, left-padded `cache` behind the rows that are here.

        Args:
            cache: the result of a prefill; it is taken over.
            lengths: tokens of each row, without padding. The longest one is the cache's number of columns.
        """
        num_columns = max(lengths)
        if not self._lengths:
            self._cache, self._lengths, self._num_columns = cache, list(lengths), num_columns
            return
        import torch

        width = max(self._num_columns, num_columns)
        for layer, joining in zip(_layers(self.cache), _layers(cache), strict=True):
            if layer.is_initialized:  # layers that share another one's keys hold nothing
                layer.keys = torch.cat([_pad_left(layer.keys, width), _pad_left(joining.keys, width)])
                layer.values = torch.cat([_pad_left(layer.values, width), _pad_left(joining.values, width)])
        self._lengths += lengths
        self._num_columns = width

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only `rows`, in that order, and cut off the columns that are padding in all of them."""
        if list(rows) == list(range(len(self._lengths))):
            return
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._cache, self._num_columns = None, 0
            return
        import torch

        surplus = self._num_columns - max(self._lengths)
        for layer in _layers(self.cache):
            if layer.is_initialized:
                index = torch.tensor(rows, device=layer.keys.device)
                # A copy, so that the rows that left free their memory.
                layer.keys = layer.keys[..., surplus:, :].index_select(0, index)
                layer.values = layer.values[..., surplus:, :].index_select(0, index)
        self._num_columns -= surplus


def _layers(cache: "DynamicCache") -> list[Any]:
    # All are `DynamicLayer`s here; the type of `Cache.layers` allows for others.
    return list(cache.layers)


def _pad_left(tensor: "torch.Tensor", width: int) -> "torch.Tensor":
    import torch

    missing = width - tensor.shape[-2]
    return torch.nn.functional.pad(tensor, (0, 0, missing, 0)) if missing else tensor
