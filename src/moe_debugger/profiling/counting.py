"""Counts the rows of each expert when a forward has ended, on the device of the ids and without waiting for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.training.readout import Readout

__all__ = ["ExpertCounts"]

Counts = npt.NDArray[np.int32]


class ExpertCounts:
    """Rows by expert of the calls of one forward.

    Args:
        calls: plan, and expert ids [n, k] or a list of rows by expert, of each call.
        num_experts: E by plan.
    """

    def __init__(self, calls: Sequence[tuple[int, Any]], num_experts: Sequence[int]) -> None:
        self._num_experts = num_experts
        self._host = [(plan, ids) for plan, ids in calls if isinstance(ids, list) or ids.device.type == "cpu"]
        self.num_held = sum(len(ids) if isinstance(ids, list) else ids.numel() for _, ids in self._host)
        on_device: dict[tuple[Any, ...], list[tuple[int, Any]]] = {}
        for plan, ids in calls:
            if not isinstance(ids, list) and ids.device.type != "cpu":
                key = (tuple(ids.shape), num_experts[plan], ids.device)
                on_device.setdefault(key, []).append((plan, ids))
        self._groups = [[plan for plan, _ in group] for group in on_device.values()]
        vectors = [_device_counts([ids for _, ids in group], key[1]) for key, group in on_device.items()]
        self._readout = Readout(vectors) if vectors else None

    def is_ready(self) -> bool:
        """Return at once whether `values` would not wait."""
        return self._readout is None or self._readout.is_ready()

    def values(self) -> tuple[npt.NDArray[np.int32], Counts]:
        """Return the plans [c] and the counts [c, E], padded with 0; to be called once they are ready."""
        plans = [plan for plan, _ in self._host]
        rows: list[npt.NDArray[Any]] = [self._host_counts(plan, ids) for plan, ids in self._host]
        for group, vector in zip(self._groups, [] if self._readout is None else self._readout.values(), strict=True):
            plans += group
            rows += list(vector.reshape(len(group), -1)[:, :-1])
        counts = np.zeros((len(plans), max((len(row) for row in rows), default=0)), np.int32)
        for place, row in enumerate(rows):
            counts[place, : len(row)] = row
        return np.asarray(plans, np.int32), counts

    def _host_counts(self, plan: int, ids: Any) -> npt.NDArray[np.int64]:
        num_experts = self._num_experts[plan]
        if isinstance(ids, list):
            return np.asarray(ids[:num_experts], np.int64)
        values = ids.detach().reshape(-1).numpy()
        # Slots that reached no expert of this rank have an id outside; they are counted past the end.
        values = np.where((values >= 0) & (values < num_experts), values, num_experts)
        return np.bincount(values, minlength=num_experts + 1)[:num_experts]


def _device_counts(ids: Sequence[Any], num_experts: int) -> Any:
    """Return [len(ids) * (E + 1)] counts; the last of each is of ids outside. No step needs a number on the host."""
    import torch

    flat = torch.stack([each.detach().reshape(-1) for each in ids]).long()
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    offsets = torch.arange(len(ids), device=flat.device)[:, None] * (num_experts + 1)
    counts = torch.zeros(len(ids) * (num_experts + 1), dtype=torch.int32, device=flat.device)
    places = (flat + offsets).reshape(-1)
    return counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
