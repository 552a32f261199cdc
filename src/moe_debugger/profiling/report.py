"""`LayerProfile`: what a profiled session gives back."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._tables import text_table
from moe_debugger.messages import render_finding

from .bottlenecks import LayerTimesInput, ProfileBottleneck, ProfileRules, find_bottlenecks
from .layers import PARTS, LayerSummary, LayerTimes, summarise_layer, whole_roofline
from .places import Part
from .roofline import Peak, Roofline
from .spans import Spans, block_calls, spans_of
from .store import ForwardRecord
from .table import ProfileTable
from .table_rows import profile_table

if TYPE_CHECKING:
    from .profiler import LayerProfiler

__all__ = ["LayerProfile", "ProfileOverhead"]

# How long a reader asks a device for the times of its newest forwards.
_DEVICE_S = 1.0


@dataclass(frozen=True, slots=True)
class ProfileOverhead:
    """What profiling cost by its own clock.

    Attributes:
        own_s: time inside the profiler's hooks and at the end of forwards. What torch spends on calling hooks is not in
            it; docs/profiling.md has both, measured by running with and without.
        share: of the profiled forwards' time.
        num_forwards: that were timed.
        num_dropped: timed forwards that made room for newer ones.
        num_given_up: forwards that raised, were interrupted, or whose device never answered.
        num_pending: forwards whose times the device has not given yet.
        num_outside: calls of blocks outside of a forward (recomputed by a checkpoint, or called alone): not measured.
        used_bytes, limit_bytes: of what is kept.
    """

    own_s: float
    share: float
    num_forwards: int
    num_dropped: int
    num_given_up: int
    num_pending: int
    num_outside: int
    used_bytes: int
    limit_bytes: int


class LayerProfile:
    """Times of a model's MoE layers, as they were when this was made.

    Attributes:
        overhead: what profiling cost.
        notes: what could not be measured, with how often.
        peak: for the rooflines; None where none was given.
        rules: of the bottlenecks.
    """

    def __init__(
        self,
        profiler: "LayerProfiler",
        *,
        layer_numbers: Mapping[int, int] | None = None,
        expert_owners: Mapping[int, Sequence[int]] | None = None,
        peak: Peak | None = None,
        rules: ProfileRules | None = None,
        records: Sequence[ForwardRecord] | None = None,
        model_name: str = "model",
    ) -> None:
        store = profiler.store
        profiler.settle(timeout_s=_DEVICE_S if records is None else 0.0)
        self._records = list(store.records() if records is None else records)
        self._plans, self._places = profiler.plans, profiler.places
        self._numbers = dict(layer_numbers or {})
        self._owners = dict(expert_owners or {})
        self._wait_reason = profiler.wait_reason
        self.model_name = model_name
        self.peak = peak
        self.rules = rules or ProfileRules()
        profiler.look_for_compiled()
        self.notes: dict[str, int] = profiler.all_notes
        self.overhead = ProfileOverhead(
            own_s=profiler.own_ns / 1e9,
            share=profiler.own_ns / profiler.forward_ns if profiler.forward_ns else 0.0,
            num_forwards=profiler.num_forwards,
            num_dropped=store.num_dropped,
            num_given_up=profiler.num_given_up,
            num_pending=profiler.num_pending,
            num_outside=profiler.num_outside,
            used_bytes=store.used_bytes,
            limit_bytes=store.limit_bytes,
        )

    @cached_property
    def spans(self) -> Spans:
        """All measured spans."""
        return spans_of(self._records, self._places)

    @cached_property
    def summaries(self) -> tuple[LayerSummary, ...]:
        """For each MoE layer its times, calls and estimates."""
        found = []
        for position, plan in enumerate(self._plans):
            calls = block_calls(self.spans, self._records, position, plan.layout, plan.info.num_experts)
            found.append(
                summarise_layer(
                    plan,
                    self._numbers.get(plan.info.layer_index, plan.info.layer_index),
                    calls,
                    forward_ns=float(self.forward_ns.sum()),
                    steps=self._steps[calls.record],
                    forward_indices=self._forward_indices[calls.record],
                    wait_reason=self._wait_reason,
                    peak=self.peak,
                )
            )
        return tuple(found)

    @cached_property
    def layers(self) -> tuple[LayerTimes, ...]:
        """The times of each MoE layer."""
        return tuple(each.times for each in self.summaries)

    @cached_property
    def roofline(self) -> Roofline:
        """The roofline of whole steps: sums over the layers of each forward."""
        return whole_roofline([each.roofline for each in self.layers], self.peak)

    @cached_property
    def bottlenecks(self) -> tuple[ProfileBottleneck, ...]:
        """What makes it slow, the strongest first; docs/profiling.md has the rules."""
        return find_bottlenecks(
            {each.times.layer_index: self._input(each) for each in self.summaries if len(each.calls)},
            [self.roofline],
            self.rules,
        )

    @cached_property
    def table(self) -> ProfileTable:
        """Every time, as numpy columns."""
        numbers = [self._numbers.get(plan.info.layer_index, plan.info.layer_index) for plan in self._plans]
        return profile_table(
            self._records,
            self.spans,
            self.summaries,
            numbers,
            num_forwards_dropped=self.overhead.num_dropped + self.overhead.num_given_up,
        )

    @property
    def num_forwards(self) -> int:
        """Forwards that are in this profile."""
        return len(self._records)

    @cached_property
    def forward_ns(self) -> npt.NDArray[np.int64]:
        """[f] time of each forward."""
        rows = self.spans.part == Part.FORWARD
        found = np.zeros(len(self._records), np.int64)
        found[self.spans.record[rows]] = self.spans.duration[rows]
        return found

    @property
    def records(self) -> list[ForwardRecord]:
        """What was kept of each forward."""
        return self._records

    def to_perfetto(self, path: str | os.PathLike[str], *, max_forwards: int | None = None) -> int:
        """Write Chrome trace JSON, which ui.perfetto.dev and chrome://tracing open.

        Args:
            path: a file; an existing one is replaced.
            max_forwards: write the newest ones alone; None = all that are kept.

        Returns:
            The number of events.

        Raises:
            InvalidInputError: the file cannot be written.
        """
        from .perfetto import write_trace

        return write_trace(self, path, max_forwards=max_forwards)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values; NaN where there is no number."""
        return {
            "num_forwards": self.num_forwards,
            "forward_median_ms": self.forward_median_ms,
            "layers": [layer.to_dict() for layer in self.layers],
            "roofline": self.roofline.to_dict(),
            "bottlenecks": [each.to_dict() for each in self.bottlenecks],
            "overhead": asdict(self.overhead),
            "notes": self.notes,
        }

    @property
    def nothing_ran(self) -> str:
        """Why there are no times, in words; empty where there are."""
        if self.num_forwards:
            return ""
        counts = (
            ("was given up", self.overhead.num_given_up),
            ("is not over on its device", self.overhead.num_pending),
        )
        others = [f"{number} {what}" for what, number in counts if number]
        return (
            "nothing was timed: no forward of the model ran while it was profiled"
            if not others
            else (f"nothing was timed: of the model's forwards {' and '.join(others)}")
        )

    @property
    def forward_median_ms(self) -> float:
        """Median time of a forward."""
        return float(np.median(self.forward_ns)) / 1e6 if len(self.forward_ns) else math.nan

    def __str__(self) -> str:
        notes = [f"note ({number}x): {text}" for text, number in self.notes.items()]
        if not self.num_forwards:
            return "\n".join([self.nothing_ran, *notes])
        lines = [
            f"{self.num_forwards:,} forwards, median {self.forward_median_ms:.3f} ms; profiling took "
            f"{self.overhead.share:.2%} of it by its own clock"
        ]
        headers = ["layer", "calls", "block ms", "p95 ms", "of forward", *PARTS]
        rows: list[list[object]] = [
            [
                layer.layer_index,
                layer.num_calls,
                *("–" if math.isnan(ms) else ms for ms in (layer.median_ms, layer.p95_ms)),
                *(
                    "–" if math.isnan(share) else f"{share:.1%}"
                    for share in (layer.share_of_forward, *(part.share for part in layer.parts.values()))
                ),
            ]
            for layer in self.layers
        ]
        lines.append(text_table(headers, rows))
        parts = [item for layer in self.layers for item in layer.parts.items()]
        lines += sorted({f"– {name}: {part.reason}" for name, part in parts if part.reason})
        lines += [render_finding(each.code, each.args) for each in self.bottlenecks]
        return "\n".join(lines + notes)

    __repr__ = __str__

    @cached_property
    def _steps(self) -> npt.NDArray[np.int64]:
        return np.array([record.step for record in self._records], np.int64)

    @cached_property
    def _forward_indices(self) -> npt.NDArray[np.int64]:
        return np.array([record.forward_index for record in self._records], np.int64)

    def _input(self, summary: LayerSummary) -> LayerTimesInput:
        calls, times = summary.calls, summary.times
        nan = np.full(len(calls), np.nan)
        glue = calls.rest + np.nan_to_num(calls.dispatch) + np.nan_to_num(calls.combine)
        by_expert = calls.expert_times if calls.expert_times is not None else summary.estimates
        return LayerTimesInput(
            record=calls.record,
            block=calls.block,
            router=nan if times.parts["router"].reason else calls.router,
            glue=nan if times.layout == "whole" else glue,
            wait=nan if times.parts["wait"].reason else calls.wait,
            num_experts=0 if by_expert is None else by_expert.shape[1],
            first_step=int(self._steps[calls.record[0]]),
            expert_times=calls.expert_times,
            expert_rows=calls.expert_rows,
            rank_times=_by_rank(by_expert, self._owners.get(times.layer_index, ())),
            is_estimated=calls.expert_times is None,
        )


def _by_rank(times: npt.NDArray[np.float64] | None, owners: Sequence[int]) -> npt.NDArray[np.float64] | None:
    """Return [c, R] the time of each rank's experts; None where there are no ranks, or only one is seen."""
    ranks = sorted(set(owners))
    if times is None or len(ranks) < 2 or len(owners) != times.shape[1]:
        return None
    by_rank = np.stack([times[:, np.asarray(owners) == rank].sum(axis=1) for rank in ranks], axis=1)
    # A rank that was handed its own rows alone knows nothing of the others.
    return by_rank if (by_rank.sum(axis=0) > 0).sum() > 1 else None
