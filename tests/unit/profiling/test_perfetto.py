"""The trace file: checked against the rules of the Trace Event Format by a reader of the test's."""

import json
import math
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from timed_moe import ListModel

from moe_debugger import InvalidInputError, MoEDebugger
from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling import LayerProfile, LayerProfiler

_METADATA = {"process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index"}


def problems_of(document: Any) -> list[str]:
    """Return what the Trace Event Format does not allow, or viewers drop.

    Source: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: an object
    with traceEvents; ph X needs ts and dur; events of one thread nest; C has numbers as args; M names things.
    """
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        return ["no object with a list traceEvents"]
    found = []
    if document.get("displayTimeUnit", "ms") not in ("ms", "ns"):
        found.append("displayTimeUnit")
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for number, event in enumerate(document["traceEvents"]):
        where = f"event {number} ({event.get('name')})"
        if not isinstance(event.get("name"), str) or not event["name"]:
            found.append(f"{where}: name")
        if not all(isinstance(event.get(key), int) for key in ("pid", "tid")):
            found.append(f"{where}: pid or tid")
        ts = event.get("ts")
        if not isinstance(ts, int | float) or not math.isfinite(ts) or ts < 0:
            found.append(f"{where}: ts {ts}")
            continue
        kind, args = event.get("ph"), event.get("args", {})
        if not isinstance(args, dict):
            found.append(f"{where}: args")
        elif kind == "X":
            duration = event.get("dur")
            if not isinstance(duration, int | float) or not math.isfinite(duration) or duration < 0:
                found.append(f"{where}: dur {duration}")
            else:
                by_thread[event["pid"], event["tid"]].append((ts, ts + duration))
        elif kind == "C":
            if not args or not all(isinstance(v, int | float) and math.isfinite(v) for v in args.values()):
                found.append(f"{where}: a counter needs numbers")
        elif kind == "M":
            if event["name"] not in _METADATA or ("name" in event["name"] and not isinstance(args.get("name"), str)):
                found.append(f"{where}: metadata")
        else:
            found.append(f"{where}: ph {kind}")
    for thread, spans in by_thread.items():
        open_ends: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start + 1e-6:
                open_ends.pop()
            if open_ends and end > open_ends[-1] + 1e-3:
                found.append(f"thread {thread}: {start}..{end} reaches beyond the event around it")
            open_ends.append(end)
    return found


def _profile(model: Any, num_forwards: int = 24, num_threads: int = 1) -> LayerProfile:
    profiler = LayerProfiler(model, find_sites(model).sites)
    profiler.attach()
    # Threads that wait for each other have different idents.
    ready = threading.Barrier(num_threads)

    def run() -> None:
        ready.wait()
        with torch.no_grad():
            for index in range(num_forwards // num_threads):
                model(torch.randint(3, 60, (1, 1 + index % 5)))

    threads = [threading.Thread(target=run) for _ in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    run()
    for thread in threads:
        thread.join()
    profile = LayerProfile(profiler, model_name="tiny")
    profiler.detach()
    return profile


@pytest.mark.parametrize("build", [lambda: tiny_moe.build("deepseek_v3"), lambda: ListModel(2)], ids=["fused", "list"])
def test_a_trace_follows_the_format_and_has_every_span(build: Any, tmp_path: Path) -> None:
    profile = _profile(build())
    path = tmp_path / "trace.json"
    number = profile.to_perfetto(path)
    document = json.loads(path.read_text())
    assert problems_of(document) == []
    events = document["traceEvents"]
    assert len(events) == number
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(profile.spans) + sum(len(summary.calls.gaps) for summary in profile.summaries)
    for part in ("dispatch", "combine", "rest"):
        shown_us = sum(event["dur"] for event in complete if event["cat"] == part)
        assert shown_us == pytest.approx(sum(np.nansum(getattr(s.calls, part)) for s in profile.summaries) / 1e3)
    forwards = [event for event in complete if event["name"] == "forward"]
    assert len(forwards) == 24
    # How many rows a whole forward was given is not seen, and is no 0.
    assert not any("rows" in event["args"] for event in forwards)
    assert sum(event["args"]["rows"] for event in complete if event["cat"] == "block") == sum(
        int(summary.calls.rows.sum()) for summary in profile.summaries
    )
    total_us = sum(event["dur"] for event in complete if event["cat"] == "block")
    assert total_us == pytest.approx(sum(s.calls.block.sum() for s in profile.summaries) / 1e3)
    counters = [event for event in events if event["ph"] == "C" and event["name"] == "distinct experts"]
    assert sorted(e["args"]["sum"] for e in counters if e["args"]["sum"]) == sorted(
        profile.roofline.points.distinct_experts.tolist()
    )
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"moe-debugger: tiny", "forwards of thread 0"}


def test_forwards_of_several_threads_have_tracks_and_counters_of_their_own(tmp_path: Path) -> None:
    profile = _profile(ListModel(2), num_threads=3)
    assert len(profile.roofline.points) == 24
    path = tmp_path / "trace.json"
    profile.to_perfetto(path)
    document = json.loads(path.read_text())
    assert problems_of(document) == []
    counters = {event["name"] for event in document["traceEvents"] if event["ph"] == "C"}
    tracks = {event["tid"] for event in document["traceEvents"] if event["ph"] == "X"}
    assert {f"distinct experts of thread {track - 1}" for track in tracks} <= counters


def test_estimates_are_arguments_and_no_events(tmp_path: Path) -> None:
    profile = _profile(tiny_moe.build("olmoe"), 40)
    path = tmp_path / "trace.json"
    profile.to_perfetto(path)
    events = json.loads(path.read_text())["traceEvents"]
    assert not any(event.get("cat") == "expert" for event in events)
    experts = [event for event in events if event.get("cat") == "experts"]
    assert all(event["args"]["distinct_experts"] >= 1 for event in experts)
    assert any("estimated_us_of_experts" in event["args"] for event in experts)


def test_the_newest_forwards_alone(tmp_path: Path) -> None:
    profile = _profile(ListModel(1))
    path = tmp_path / "trace.json"
    profile.to_perfetto(path, max_forwards=2)
    document = json.loads(path.read_text())
    assert problems_of(document) == []
    indices = {e["args"]["forward_index"] for e in document["traceEvents"] if e["ph"] == "X"}
    assert indices == {22, 23}
    profile.to_perfetto(path, max_forwards=0)
    assert problems_of(json.loads(path.read_text())) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be written"):
        _profile(ListModel(1), 1).to_perfetto(tmp_path / "no" / "trace.json")


def test_a_session_names_its_model(tmp_path: Path) -> None:
    model = tiny_moe.build("olmoe")
    with MoEDebugger(model, profiling=True, model_name="mine") as debugger, torch.no_grad():
        model(torch.tensor([[3, 4]]))
        debugger.layer_profile().to_perfetto(tmp_path / "t.json")
    assert "moe-debugger: mine" in (tmp_path / "t.json").read_text()


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"name": "a", "ph": "X", "ts": 1, "pid": 1, "tid": 1}, "dur"),
        ({"name": "a", "ph": "X", "ts": -1, "dur": 1, "pid": 1, "tid": 1}, "ts"),
        ({"name": "", "ph": "X", "ts": 1, "dur": 1, "pid": 1, "tid": 1}, "name"),
        ({"name": "a", "ph": "C", "ts": 1, "pid": 1, "tid": 1, "args": {"v": "3"}}, "numbers"),
        ({"name": "a", "ph": "Z", "ts": 1, "pid": 1, "tid": 1}, "ph"),
        ({"name": "label", "ph": "M", "ts": 1, "pid": 1, "tid": 1, "args": {}}, "metadata"),
        ({"name": "a", "ph": "X", "ts": 1, "dur": 9, "pid": 1, "tid": 1}, "beyond"),
    ],
)
def test_the_reader_finds_what_is_wrong(event: dict[str, Any], problem: str) -> None:
    around = {"name": "b", "ph": "X", "ts": 0, "dur": 5, "pid": 1, "tid": 1}
    assert any(problem in text for text in problems_of({"traceEvents": [around, event]}))
