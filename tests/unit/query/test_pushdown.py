"""However a recording is cut into parts and row groups, a query gives what reading every row gives."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from query_reference import Row, evaluate
from recorded_rows import INFOS, begin
from routing_rows import forward, rows_one_by_one

from moe_debugger import open_recording
from moe_debugger.query import parse
from moe_debugger.query.binding import Capabilities, Scope, bind
from moe_debugger.query.limits import LOCAL_LIMITS
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.wire.codec import RoutingColumns

_PHASES = ("unspecified", "prefill", "decode", "train", "eval")
_BOUNDS = st.one_of(
    st.tuples(st.sampled_from(["=", "<", "<=", ">", ">=", "!="]), st.integers(-1, 4)).map(
        lambda t: f"step {t[0]} {t[1]}"
    ),
    st.tuples(st.integers(-1, 4), st.integers(-1, 4)).map(lambda t: f"step between {t[0]} and {t[1]}"),
    st.sampled_from(["step > 0.5", "step <= 1.5", "step between 0.5 and 2.5", "step in (0, 2)"]),
    st.sampled_from(["layer = 0", "layer = 1", "layer in (1, 5)", "layer between 0 and 3", "layer = 7", "layer = 0.5"]),
    st.sampled_from(['request = "request-0-1"', 'request in ("request-0-0", "nobody")', "position < 3", "expert = 3"]),
)
_CONDITIONS = st.recursive(
    _BOUNDS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"not {text}"),
    ),
    max_leaves=4,
)


def _row(row: dict[str, Any]) -> Row:
    reached = tuple(each for each in row["expert_ids"] if each >= 0)
    return {
        "step": row["step"],
        "layer": row["layer_index"],
        "position": row["position"],
        "request": row["request_id"],
        "phase": _PHASES[row["phase"]],
        "expert": reached,
        "experts": reached,
    }


def _write(path: Path, batches: list[RoutingColumns], part_rows: int, group_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_debugger.recording.writer._GROUP_ROWS", group_rows)
        writer = RecordingWriter(make_folder(path), begin(), Limits(part_rows=part_rows), lambda: INFOS, {})
        for batch in batches:
            writer.add([batch])
        writer.finish(Ending())


@settings(max_examples=25, deadline=None)
@given(
    conditions=st.lists(_CONDITIONS, min_size=1, max_size=3),
    num_forwards=st.integers(1, 8),
    part_rows=st.integers(5, 60),
    group_rows=st.integers(1, 40),
)
def test_every_cut_gives_the_same_rows(
    conditions: list[str], num_forwards: int, part_rows: int, group_rows: int
) -> None:
    batches = [forward(index, num_tokens=4 + index % 3) for index in range(num_forwards)]
    rows = [_row(row) for row in rows_one_by_one(batches) if not row["is_padding"]]
    where = " and ".join(conditions)
    text = f"tokens where {where} show step, layer, request, position, experts limit 9999"
    with tempfile.TemporaryDirectory() as parent:
        _write(Path(parent) / "rec", batches, part_rows, group_rows)
        result = open_recording(Path(parent) / "rec").query(text)
    assert result.rows == evaluate(parse(text), rows, 9999)[1], where
    assert result.num_rows_scanned <= len(list(rows_one_by_one(batches)))


@given(
    conditions=st.lists(_CONDITIONS, min_size=1, max_size=3),
    step=st.integers(0, 5),
    layer=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_the_scope_never_leaves_out_what_matches(conditions: list[str], step: int, layer: int) -> None:
    text = f"tokens where {' and '.join(conditions)}"
    scope: Scope = bind(parse(text), text, Capabilities("a test"), LOCAL_LIMITS).scope
    row: Row = {"step": step, "layer": layer, "position": 1, "request": "request-0-1", "expert": (3,), "phase": "eval"}
    _, found = evaluate(parse(f"{text} show step"), [row])
    if found:
        assert scope.has_step(step, step)
        assert scope.has_layer(layer, layer)
        assert scope.requests is None or "request-0-1" in scope.requests


def test_recordings_of_ranks_are_asked_as_one(tmp_path: Path) -> None:
    batches = [[forward(index, seed=rank) for index in range(4)] for rank in range(2)]
    for rank, own in enumerate(batches):
        _write(tmp_path / f"rank{rank}", own, 30, 20)
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    joined = open_recording(folders)
    alone = [open_recording(folder) for folder in folders]
    for text in (
        "experts show layer, expert, assignments order by layer, expert",
        "experts where phase = decode show layer, expert, assignments order by layer, expert",
    ):
        sums = np.sum([each.query(text)["assignments"] for each in alone], axis=0)
        assert joined.query(text)["assignments"] == tuple(sums.tolist())
    assert joined.query("tokens show count")["count"] == (
        sum(each.query("tokens show count")["count"][0] for each in alone),
    )
