"""Load per expert-parallel rank: what the experts that each rank computes were given to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._tables import bar, html_table, text_table, to_data_frame
from moe_debugger.capture import LayerInfo

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RankLoad", "RankLoadRow", "rank_load"]

_HEADERS = ("layer", "ep rank", "experts", "assignments", "share", "load / fair", "load")


@dataclass(frozen=True, slots=True)
class RankLoadRow:
    """One expert-parallel rank at one MoE layer.

    Attributes:
        num_experts: experts that the rank computes there.
        num_assignments: slots of valid tokens that those experts were given.
        share: of the layer's assignments; NaN before the first.
        load_ratio: share over the fair share 1/ranks; the layer waits for the rank where it is highest.
    """

    layer_index: int
    expert_parallel_rank: int
    num_experts: int
    num_assignments: int
    share: float
    load_ratio: float


@dataclass(frozen=True, slots=True)
class RankLoad:
    """Load of every expert-parallel rank at every MoE layer; no rows where each rank computes all experts.

    It is the load that the tokens of this process put on the ranks. Where the ranks have batches of their own (fsdp
    with ep), that is one part of it, and the fleet has the sum.
    """

    session_name: str
    rows: tuple[RankLoadRow, ...]

    def layer(self, layer_index: int) -> tuple[RankLoadRow, ...]:
        """Return the ranks of one layer, in order."""
        return tuple(row for row in self.rows if row.layer_index == layer_index)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        names = RankLoadRow.__dataclass_fields__
        return {
            "session_name": self.session_name,
            "rows": [{name: getattr(row, name) for name in names} for row in self.rows],
        }

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row per layer and rank.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        names = RankLoadRow.__dataclass_fields__
        return to_data_frame({name: [getattr(row, name) for row in self.rows] for name in names})

    def _table(self) -> list[list[object]]:
        peak = max((row.load_ratio for row in self.rows if row.num_assignments), default=1.0)
        return [
            [
                row.layer_index,
                row.expert_parallel_rank,
                row.num_experts,
                row.num_assignments,
                row.share,
                row.load_ratio,
                bar(row.load_ratio / peak if row.num_assignments else 0.0, 16),
            ]
            for row in self.rows
        ]

    @property
    def _title(self) -> str:
        note = "" if self.rows else ": every rank computes all experts"
        return f"Ranks of {self.session_name}{note}"

    def __str__(self) -> str:
        return f"{self._title}\n{text_table(_HEADERS, self._table())}" if self.rows else self._title

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEADERS, self._table())


def rank_load(
    session_name: str,
    layers: Sequence[LayerInfo],
    counts: Mapping[int, npt.NDArray[np.uint64]],
    owners: Mapping[int, Sequence[int]],
) -> RankLoad:
    """Return the load per rank.

    Args:
        counts: by layer index, [E] assignments per expert.
        owners: by layer index, [E] the expert-parallel rank of each expert; a layer without is left out.
    """
    rows: list[RankLoadRow] = []
    for info in layers:
        layer_owners = np.asarray(owners.get(info.layer_index, ()), np.int64)
        if not len(layer_owners):
            continue
        layer_counts = counts.get(info.layer_index, np.zeros(len(layer_owners), np.uint64))
        num_ranks = int(layer_owners.max()) + 1
        experts = np.bincount(layer_owners, minlength=num_ranks)
        total = int(layer_counts.sum())
        for rank in range(num_ranks):
            count = int(layer_counts[layer_owners == rank].sum())
            share = count / total if total else float("nan")
            rows.append(RankLoadRow(info.layer_index, rank, int(experts[rank]), count, share, share * num_ranks))
    return RankLoad(session_name, tuple(rows))
