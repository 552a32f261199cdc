"""Routes as an engine would return them, made without the product's code."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

LAYERS, EXPERTS, TOP_K = 3, 16, 2


@dataclass
class Truth:
    """Random routes, and what each expert got of those that were really routed."""

    seed: int = 0
    layers: int = LAYERS
    experts: int = EXPERTS
    top_k: int = TOP_K
    load: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def routes(self, tokens: int, *, not_routed: int = 0) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """Return [tokens, layers, k]; the first `not_routed` tokens are no load, whatever they hold."""
        ids = np.zeros((tokens, self.layers, self.top_k), np.int32)
        for token in range(tokens):
            for layer in range(self.layers):
                ids[token, layer] = self._random.permutation(self.experts)[: self.top_k]
                if token >= not_routed:
                    self.load.update((layer, int(expert)) for expert in ids[token, layer])
        return ids

    def expected(self) -> list[list[int]]:
        return [[self.load[layer, expert] for expert in range(self.experts)] for layer in range(self.layers)]


@pytest.fixture
def truth() -> Truth:
    return Truth()
