"""The rows of a `ProfileTable`: what was measured, what follows from it, and what was estimated. Pure numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .layers import LayerSummary
from .places import Part
from .spans import Spans
from .store import ForwardRecord
from .table import ProfileTable

__all__ = ["profile_table"]

_MAX_ESTIMATED_ROWS = 200_000


def profile_table(
    records: Sequence[ForwardRecord],
    spans: Spans,
    summaries: Sequence[LayerSummary],
    layer_indices: Sequence[int],
    *,
    num_forwards_dropped: int,
) -> ProfileTable:
    """Return every time as a table.

    Args:
        records: the forwards.
        spans: that were measured in them.
        summaries: of each layer, with what was derived and estimated.
        layer_indices: in the whole model, of each layer.
        num_forwards_dropped: forwards that were timed and are not among the records.
    """
    numbers = np.array([*layer_indices, -1], np.int32)
    starts = np.array([record.start_ns for record in records], np.int64)
    labels = np.array([part.label for part in Part])
    rows: list[dict[str, npt.NDArray[Any]]] = [
        {
            "record": spans.record,
            "layer_index": numbers[spans.layer],
            "part": labels[spans.part],
            "expert_id": spans.expert,
            "start_ns": starts[spans.record] + spans.start,
            "duration_ns": spans.duration,
            "num_tokens": spans.rows,
            "is_estimated": np.zeros(len(spans), bool),
        }
    ]
    left, left_out = _MAX_ESTIMATED_ROWS, 0
    for summary in reversed(summaries):
        rows += _derived_rows(summary, starts)
        estimated, missed = _estimated_rows(summary, left)
        rows.append(estimated)
        left, left_out = left - len(estimated["record"]), left_out + missed
    columns = {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
    order = np.lexsort((columns["start_ns"], columns["layer_index"], columns["record"]))
    record = columns.pop("record")[order]
    table = {name: column[order] for name, column in columns.items()}
    steps = np.array([record.step for record in records], np.int64)
    indices = np.array([record.forward_index for record in records], np.int64)
    return ProfileTable(
        {"step": steps[record], "forward_index": indices[record], **table},
        num_forwards_dropped=num_forwards_dropped,
        num_estimates_left_out=left_out,
    )


def _derived_rows(summary: LayerSummary, starts: npt.NDArray[np.int64]) -> list[dict[str, npt.NDArray[Any]]]:
    calls, layer = summary.calls, summary.times.layer_index
    found = []
    for name, begin in (("dispatch", calls.dispatch_start), ("combine", calls.combine_start), ("rest", None)):
        values = getattr(calls, name)
        known = np.isfinite(values)
        number = int(known.sum())
        at = np.full(number, -1) if begin is None else starts[calls.record[known]] + begin[known].astype(np.int64)
        found.append(
            {
                "record": calls.record[known],
                "layer_index": np.full(number, layer),
                "part": np.full(number, name),
                "expert_id": np.full(number, -1),
                "start_ns": at,
                "duration_ns": np.round(values[known]),
                "num_tokens": calls.rows[known],
                "is_estimated": np.zeros(number, bool),
            }
        )
    return found


def _estimated_rows(summary: LayerSummary, limit: int) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """Return a row for each estimated expert with rows, of the newest calls within the limit, and how many are not."""
    calls, estimates = summary.calls, summary.estimates
    if estimates is None or calls.expert_rows is None:
        call = expert = num_tokens = np.zeros(0, np.int64)
        duration, missed = np.zeros(0), 0
    else:
        call, expert = np.nonzero(calls.expert_rows)
        missed = max(0, len(call) - max(0, limit))
        call, expert = call[missed:], expert[missed:]
        duration, num_tokens = np.round(estimates[call, expert]), calls.expert_rows[call, expert]
    number = len(call)
    rows: dict[str, npt.NDArray[Any]] = {
        "record": calls.record[call],
        "layer_index": np.full(number, summary.times.layer_index),
        "part": np.full(number, "expert"),
        "expert_id": expert,
        "start_ns": np.full(number, -1),
        "duration_ns": duration,
        "num_tokens": num_tokens,
        "is_estimated": np.ones(number, bool),
    }
    return rows, missed
