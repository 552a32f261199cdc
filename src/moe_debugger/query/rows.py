"""Token rows as the language sees them: which captured columns each name needs, and the columns made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.query.columns import PHASES
from moe_debugger.query.table import Column, Labels
from moe_debugger.query.vocabulary import TokenTexts
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["RAW_BYTES", "LayerFacts", "RowBatch", "RowColumns", "raw_columns", "row_bytes"]

Array = npt.NDArray[Any]
_PHASE_LABELS = Labels(PHASES)

# Captured columns (names of `Decisions`) that a column of the language needs.
_RAW: dict[str, tuple[str, ...]] = {
    "request": ("request_index",),
    "position": ("position",),
    "phase": ("phase",),
    "step": ("step",),
    "token_id": ("token_id",),
    "token": ("token_id",),
    "layer": (),
    "module": (),
    "experts": ("expert_ids",),
    "expert": ("expert_ids",),
    "num_experts_reached": ("expert_ids",),
    "weights": ("expert_ids", "gate_weights"),
    "dropped_slots": ("slot_status",),
    "margin": ("margin",),
    "router_entropy": ("router_entropy",),
    "router_logsumexp": ("router_logsumexp",),
    "top1_probability": ("top1_probability",),
}
_ALWAYS = frozenset({"layer_index", "is_padding"})
_SLOTS = frozenset({"expert_ids", "gate_weights", "slot_status"})

RAW_BYTES = {
    "step": 8,
    "phase": 1,
    "request_index": 4,
    "position": 4,
    "token_id": 4,
    "is_padding": 1,
    "layer_index": 4,
    "expert_ids": 4,
    "gate_weights": 4,
    "slot_status": 1,
    "margin": 4,
    "router_entropy": 4,
    "router_logsumexp": 4,
    "top1_probability": 4,
    "forward_index": 8,
}
"""Bytes of one value of each captured column in memory; the columns of slots have top-k values a row."""


def row_bytes(raw: frozenset[str], top_k: int) -> int:
    """Return the bytes of one row with the columns `raw`."""
    return sum(RAW_BYTES[name] * (top_k if name in _SLOTS else 1) for name in raw)


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What is known of a layer without its rows."""

    layer_index: int
    num_experts: int
    top_k: int
    num_identity_experts: int = 0
    module: str = ""
    stack: str = ""
    owners: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """Token rows that were read together.

    Attributes:
        raw: captured columns of equal length, by their names in `Decisions`; those that the source has and that were
            asked for. `request_index` points into `request_ids`.
    """

    raw: Mapping[str, Array]
    request_ids: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.raw["layer_index"])


class RowColumns:
    """The columns of the language of one batch, each made when it is asked for."""

    def __init__(self, batch: RowBatch, modules: Labels, token_texts: TokenTexts | None) -> None:
        self._batch = batch
        self._modules = modules
        self._token_texts = token_texts
        self._made: dict[str, Column] = {}

    def __call__(self, name: str) -> Column:
        """Return a column."""
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Column:
        raw = self._batch.raw
        match name:
            case "layer":
                return Column(raw["layer_index"])
            case "module":
                return Column(raw["layer_index"], labels=self._modules)
            case "request":
                return Column(raw["request_index"].astype(np.int64), labels=Labels(self._batch.request_ids))
            case "phase":
                return Column(np.minimum(raw["phase"], len(PHASES) - 1).astype(np.int64), labels=_PHASE_LABELS)
            case "token_id" | "token":
                ids = raw.get("token_id")
                if ids is None:
                    return Column(np.full(len(self._batch), -1, np.int64), np.ones(len(self._batch), np.bool_), None)
                missing = ids < 0
                found = missing if missing.any() else None
                if name == "token_id" or self._token_texts is None:
                    return Column(ids, found)
                labels = self._token_texts.upto(int(ids.max(initial=-1)))
                return Column(ids.astype(np.int64), found, labels)
            case "expert" | "experts":
                ids = raw["expert_ids"]
                return Column(ids, ids < 0)
            case "weights":
                return Column(raw["gate_weights"], raw["expert_ids"] < 0)
            case "num_experts_reached":
                return Column(np.count_nonzero(raw["expert_ids"] >= 0, axis=1))
            case "dropped_slots":
                return Column(np.count_nonzero(raw["slot_status"] == pb.SLOT_STATUS_DROPPED, axis=1))
            case _ if name in raw:
                return Column(raw[name])
            case _:
                n = len(self._batch)
                return Column(np.zeros(n, np.int64), np.ones(n, np.bool_))


def raw_columns(names: frozenset[str]) -> frozenset[str]:
    """Return the captured columns that columns of the language need, with those that every reader needs."""
    return _ALWAYS.union(*(_RAW[name] for name in names))
