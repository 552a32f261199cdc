"""Parts of what was captured and of what the oracle saw, so that each part is compared by itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle.causal import SiteCall

from moe_debugger import Decisions
from moe_debugger.capture import LayerInfo

__all__ = ["Part", "keep_rows", "part_of"]

Bools = npt.NDArray[np.bool_]


@dataclass
class Part:
    """Some rows of a `Decisions`, with the columns that `compare` reads."""

    layer_index: npt.NDArray[Any]
    expert_ids: npt.NDArray[Any]
    gate_weights: npt.NDArray[Any]
    slot_status: npt.NDArray[Any]
    module_names: Mapping[int, str]
    layers: Mapping[int, LayerInfo]


def part_of(decisions: Decisions, rows: Bools) -> Part:
    """Return the rows that `rows` [n] names."""
    return Part(
        decisions.layer_index[rows],
        decisions.expert_ids[rows],
        decisions.gate_weights[rows],
        decisions.slot_status[rows],
        decisions.module_names,
        decisions.layers,
    )


def keep_rows(
    calls: Mapping[str, Sequence[SiteCall]], keep: Callable[[int, SiteCall], Bools]
) -> dict[str, list[SiteCall]]:
    """Return the calls with the rows [T] that `keep` names for the n-th call of a site."""
    kept: dict[str, list[SiteCall]] = {}
    for site, those in calls.items():
        kept[site] = []
        for number, call in enumerate(those):
            rows = keep(number, call)
            kept[site].append(
                replace(
                    call,
                    used=call.used[rows],
                    weights=call.weights[rows],
                    identity_weights=call.identity_weights[rows],
                )
            )
    return kept
