"""Chrome trace JSON of a profile, as ui.perfetto.dev and chrome://tracing read it.

Written in the JSON Array/Object form of the Trace Event Format: complete events (ph X) that nest on the track of their
thread, counter events (ph C) for distinct experts and bytes of active weights, metadata (ph M) for names. What lies
between the measured parts of a block (dispatch, combine, rest) has events too, one for each stretch. Estimated times
never were a stretch of time, so they are arguments of their layer's experts, and are called estimated there.
"""

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_debugger.errors import InvalidInputError

from .places import Part

if TYPE_CHECKING:
    from .layers import LayerSummary
    from .report import LayerProfile

__all__ = ["trace_events", "write_trace"]

_PROCESS = 1
_MAX_ESTIMATES = 8


def write_trace(profile: "LayerProfile", path: str | os.PathLike[str], *, max_forwards: int | None = None) -> int:
    """Write the events to a file; see `LayerProfile.to_perfetto`."""
    number = 0
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit":"ms","otherData":')
            json.dump({"tool": "moe-debugger", "model": profile.model_name}, file)
            file.write(',"traceEvents":[\n')
            for event in trace_events(profile, max_forwards=max_forwards):
                file.write(("" if number == 0 else ",\n") + json.dumps(event, allow_nan=False))
                number += 1
            file.write("\n]}\n")
    except OSError as error:
        raise InvalidInputError(f"{os.fspath(path)!r} cannot be written: {error.strerror}") from error
    return number


def trace_events(profile: "LayerProfile", *, max_forwards: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events; times are microseconds since the first forward's begin."""
    records, spans = profile.records, profile.spans
    first = 0 if max_forwards is None else max(0, len(records) - max_forwards)
    yield _meta("process_name", 0, {"name": f"moe-debugger: {profile.model_name}"})
    for lane in sorted({record.lane for record in records[first:]}):
        yield _meta("thread_name", lane + 1, {"name": f"forwards of thread {lane}"})
    if first >= len(records):
        return
    origin = min(record.start_ns for record in records[first:])
    summaries = profile.summaries
    calls = [_call_places(summary) for summary in summaries]
    for index in np.flatnonzero(spans.record >= first):
        record = records[spans.record[index]]
        part, layer = Part(int(spans.part[index])), int(spans.layer[index])
        event = {
            "name": _name(part, summaries[layer].times.layer_index if layer >= 0 else -1, int(spans.expert[index])),
            "cat": part.label,
            "ph": "X",
            "ts": (record.start_ns - origin + int(spans.start[index])) / 1e3,
            "dur": int(spans.duration[index]) / 1e3,
            "pid": _PROCESS,
            "tid": record.lane + 1,
            "args": {"step": record.step, "forward_index": record.forward_index},
        }
        # 0 is also what is noted where rows are not seen, as of a whole forward.
        if spans.rows[index] > 0:
            event["args"]["rows"] = int(spans.rows[index])
        if layer >= 0:
            event["args"]["layer_index"] = summaries[layer].times.layer_index
        if part is Part.EXPERTS and layer >= 0:
            call = calls[layer].get((int(spans.record[index]), int(spans.call[index])))
            event["args"] |= {} if call is None else _estimated(summaries[layer], call)
        yield event
    for summary in summaries:
        yield from _between(profile, summary, first, origin)
    yield from _counters(profile, first, origin)


def _between(profile: "LayerProfile", summary: "LayerSummary", first: int, origin: int) -> Iterator[dict[str, Any]]:
    """Yield what lies between the measured parts of a layer's blocks."""
    layer, gaps = summary.times.layer_index, summary.calls.gaps
    positions = summary.calls.record[gaps.call]
    columns = (positions, gaps.part, gaps.start, gaps.duration)
    for position, number, start, duration in zip(*(each[positions >= first].tolist() for each in columns), strict=True):
        record, part = profile.records[position], Part(number)
        yield {
            "name": _name(part, layer, -1),
            "cat": part.label,
            "ph": "X",
            "ts": (record.start_ns - origin + start) / 1e3,
            "dur": duration / 1e3,
            "pid": _PROCESS,
            "tid": record.lane + 1,
            "args": {"step": record.step, "forward_index": record.forward_index, "layer_index": layer},
        }


def _meta(name: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "ts": 0, "pid": _PROCESS, "tid": thread, "args": args}


def _name(part: Part, layer: int, expert: int) -> str:
    if part is Part.FORWARD:
        return "forward"
    place = "" if layer < 0 else f"layer {layer} "
    return f"{place}expert {expert}" if part is Part.EXPERT else f"{place}{part.label}"


def _call_places(summary: "LayerSummary") -> dict[tuple[int, int], int]:
    calls = summary.calls
    return {key: at for at, key in enumerate(zip(calls.record.tolist(), calls.call.tolist(), strict=True))}


def _estimated(summary: "LayerSummary", call: int) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if summary.calls.expert_rows is not None:
        args["distinct_experts"] = int((summary.calls.expert_rows[call] > 0).sum())
    if summary.estimates is not None:
        own = summary.estimates[call]
        args["estimated_us_of_experts"] = {
            str(expert): round(float(own[expert]) / 1e3, 3)
            for expert in np.argsort(-own, kind="stable")[:_MAX_ESTIMATES].tolist()
            if own[expert] > 0
        }
    return args


def _counters(profile: "LayerProfile", first: int, origin: int) -> Iterator[dict[str, Any]]:
    """Yield counters at the begin of each forward, and back to 0 at its end; each thread has its own."""
    points = profile.roofline.points
    place = {int(position): at for at, position in enumerate(points.record)}
    has_threads = len({record.lane for record in profile.records[first:]}) > 1
    for number, record in enumerate(profile.records[first:], start=first):
        at = place.get(number)
        if at is None:
            continue
        begin, mark = (record.start_ns - origin) / 1e3, f" of thread {record.lane}" if has_threads else ""
        values = {
            f"distinct experts{mark}": float(points.distinct_experts[at]),
            f"active weight MB{mark}": float(points.active_bytes[at]) / 1e6,
        }
        for name, value in values.items():
            for ts, shown in ((begin, value), (begin + int(profile.forward_ns[number]) / 1e3, 0.0)):
                yield {"name": name, "ph": "C", "ts": ts, "pid": _PROCESS, "tid": 0, "args": {"sum": shown}}
