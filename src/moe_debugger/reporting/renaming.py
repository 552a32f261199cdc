"""Do the experts of two recordings look renumbered? Equal loads and an overlap at chance are what that looks like."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import Alignment

__all__ = ["Renaming", "best_renaming"]


@dataclass(frozen=True, slots=True)
class Renaming:
    """The renaming of one layer under which most choices agree.

    Attributes:
        new_id: by expert of the first recording, the expert of the second.
        overlap: overlap under it, 0..1.
        num_renamed: experts that change their id.
    """

    new_id: dict[int, int]
    overlap: float
    num_renamed: int


def best_renaming(alignment: Alignment, layer_index: int) -> Renaming | None:
    """Return the renaming that agrees on most choices, found greedily by pairs; None without choices.

    Greedy finds a real renumbering, whose pairs are each other's most frequent partner, and a lower bound otherwise.
    O(m k^2 + E^2 log E) for m matched tokens.
    """
    layer = alignment.layers[layer_index]
    experts = layer.shape.num_experts
    ids_a, ids_b = alignment.a.expert_ids[layer.rows_a], alignment.b.expert_ids[layer.rows_b]
    load_a, load_b = alignment.a.is_load[layer.rows_a], alignment.b.is_load[layer.rows_b]
    together = np.zeros(experts * experts, np.int64)
    for i in range(ids_a.shape[1]):
        for j in range(ids_b.shape[1]):
            both = load_a[:, i] & load_b[:, j]
            together += np.bincount(ids_a[both, i] * experts + ids_b[both, j], minlength=experts * experts)
    slots = max(int(load_a.sum()), int(load_b.sum()))
    if not slots:
        return None
    pairs = _greedy(together.reshape(experts, experts))
    agreed = sum(int(together[a * experts + b]) for a, b in pairs.items())
    return Renaming(pairs, agreed / slots, sum(a != b for a, b in pairs.items()))


def _greedy(table: npt.NDArray[np.int64]) -> dict[int, int]:
    experts = len(table)
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    # Where counts tie an expert keeps its id: identity comes first in a stable order.
    order = np.lexsort((~np.eye(experts, dtype=np.bool_).reshape(-1), -table.reshape(-1)))
    for cell in order.tolist():
        a, b = divmod(cell, experts)
        if a in pairs or b in taken or not table[a, b]:
            continue
        pairs[a] = b
        taken.add(b)
    return dict(sorted(pairs.items()))
