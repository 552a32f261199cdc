"""The routes of a sample of tokens, drawn by hash: what pairs of experts and a comparison of tokens need.

A token is kept where its key is among the R smallest. The key is a hash of its request and position, of its token
id where captured, and in training of the step, so the same token is drawn at every layer, in every split of the rows,
and in every run that names its requests alike: two samples of the same text hold the same tokens, and their routes can
be compared token by token. Without token ids, two samples of other text under the same names do so as well.

Up to R tokens all are there; of more it is a random sample.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["SAMPLE_TOKENS", "TokenSample"]

# 1024 tokens tell an overlap of routes to within 3 %, and take 16 kB a layer with k = 8.
SAMPLE_TOKENS = 1024

_U64 = npt.NDArray[np.uint64]


@dataclass(slots=True)
class TokenSample:
    """Routes of sampled tokens at one layer.

    Attributes:
        keys: [r] uint64, ascending.
        expert_ids: [r, k] int32, ascending in a row: the order of slots is no part of a route. -1 = no load.
    """

    keys: _U64
    expert_ids: npt.NDArray[np.int32]

    @classmethod
    def empty(cls, top_k: int) -> Self:
        """Return the sample of a layer that has seen nothing."""
        return cls(np.zeros(0, np.uint64), np.zeros((0, top_k), np.int32))

    @property
    def is_whole(self) -> bool:
        """True where it holds every token that the layer has seen."""
        return len(self.keys) < SAMPLE_TOKENS

    def fold(self, keys: _U64, ids: npt.NDArray[np.int32], is_load: npt.NDArray[np.bool_]) -> None:
        """Add rows, in place.

        Args:
            keys: [n], see the module's text.
            ids: [n, k] expert ids.
            is_load: [n, k], slots that are load.
        """
        if len(self.keys) >= SAMPLE_TOKENS:
            chosen = np.flatnonzero(keys <= self.keys[-1])
        elif len(keys) > 4 * SAMPLE_TOKENS:
            limit = np.partition(keys, SAMPLE_TOKENS)[SAMPLE_TOKENS]
            chosen = np.flatnonzero(keys <= limit)
        else:
            chosen = np.arange(len(keys))
        if len(chosen):
            self._add(keys[chosen], np.where(is_load[chosen], ids[chosen], np.int32(-1)))

    def _add(self, keys: _U64, ids: npt.NDArray[np.int32]) -> None:
        all_keys = np.concatenate([self.keys, keys])
        all_ids = np.sort(np.concatenate([self.expert_ids, ids]), axis=1)
        # Rows of one key (a token that was sent twice) are in order of their experts, so that ties have one order, too.
        columns = [all_ids[:, slot] for slot in range(all_ids.shape[1] - 1, -1, -1)]
        order = np.lexsort([*columns, all_keys])[:SAMPLE_TOKENS]
        self.keys, self.expert_ids = all_keys[order], np.ascontiguousarray(all_ids[order])

    def merge(self, other: "TokenSample") -> "TokenSample":
        """Return the sample of both sets of rows."""
        merged = TokenSample(self.keys, self.expert_ids)
        merged._add(other.keys, other.expert_ids)
        return merged
