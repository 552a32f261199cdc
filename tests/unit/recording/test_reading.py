"""What is written is read again, column by column, by this library and by others."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_rows import INFOS, assert_equal, begin, record, write
from routing_rows import forward

from moe_debugger import Decisions, InvalidInputError, analyze, open_recording
from moe_debugger._layers import Layers
from moe_debugger._row_blocks import COLUMNS
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.training.series import NO_INDEX, SeriesPoint, SeriesTable


@pytest.mark.parametrize(
    "options",
    [{}, {"has_tokens": True, "has_logits": True}, {"has_statistics": False}],
    ids=["routes", "full", "no router statistics"],
)
def test_the_columns_are_those_of_the_session(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, batches = record(tmp_path / "rec", **options)
    expected = Decisions(batches, INFOS)
    recording = open_recording(folder)
    assert_equal(recording.decisions(), expected)
    assert recording.layers() == Layers(INFOS)
    assert recording.is_whole
    assert recording.problems == ()
    assert len([entry for entry in recording.manifest.parts if entry.kind == "rows"]) == len(batches)


def test_forwards_of_other_shapes_and_without_ids_are_filled_as_in_the_session(tmp_path: Path) -> None:
    batches = [
        forward(0, has_tokens=True, has_logits=True),
        forward(1, shapes=((8, 3), (4, 1))),
        forward(2, num_tokens=3),
    ]
    batches[1].layers[1].row_index = np.array([1, 4], np.uint32)
    for name in ("expert_ids", "gate_weights", "margin", "router_entropy", "router_logsumexp", "top1_probability"):
        setattr(batches[1].layers[1], name, getattr(batches[1].layers[1], name)[[1, 4]])
    batches[2].layers[0].intended_expert_ids = batches[2].layers[0].expert_ids[:, ::-1].copy()
    batches[2].layers[0].expert_ids = np.where([[True, False]], batches[2].layers[0].expert_ids, -1).astype(np.int32)
    batches[2].layers[0].slot_status = np.full((3, 2), [1, 2], np.uint8)
    expected = Decisions(batches, INFOS)
    assert expected.intended_expert_ids is not None
    for name, part_seconds in (("one part", 1e3), ("three parts", 1e-9)):
        write(tmp_path / name, batches, part_seconds=part_seconds)
        assert_equal(open_recording(tmp_path / name).decisions(), expected)


def test_row_groups_and_parts_end_where_they_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_debugger.recording.writer._GROUP_ROWS", 50)
    batches = [forward(index, num_tokens=20) for index in range(12)]
    writer = RecordingWriter(make_folder(tmp_path / "rec"), begin(), Limits(part_rows=150), lambda: INFOS, {})
    for batch in batches:
        writer.add([batch])
    writer.finish(Ending())
    parts = [entry for entry in writer.manifest.parts if entry.kind == "rows"]
    assert [entry.num_rows for entry in parts] == [160, 160, 160]
    metadata = pyarrow.parquet.read_metadata(tmp_path / "rec" / parts[0].path)
    assert [metadata.row_group(each).num_rows for each in range(metadata.num_row_groups)] == [50, 30, 50, 30]
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert [(entry.first_forward_index, entry.last_forward_index) for entry in parts] == [(0, 3), (4, 7), (8, 11)]
    assert_equal(open_recording(tmp_path / "rec").decisions(), Decisions(batches, INFOS))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_however_it_is_cut_the_rows_are_the_same(data: st.DataObject) -> None:
    batches = [
        forward(
            index,
            num_tokens=data.draw(st.integers(1, 9)),
            shapes=data.draw(st.sampled_from([((8, 2), (8, 2)), ((8, 3), (4, 1)), ((8, 1),)])),
            has_tokens=data.draw(st.booleans()),
            has_logits=data.draw(st.booleans()),
            has_statistics=data.draw(st.booleans()),
        )
        for index in range(data.draw(st.integers(1, 6)))
    ]
    expected = Decisions(batches, INFOS)
    limits = Limits(part_rows=data.draw(st.integers(1, 60)), part_seconds=data.draw(st.sampled_from([1e-9, 1e3])))
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_debugger.recording.writer._GROUP_ROWS", data.draw(st.integers(1, 60)))
        writer = RecordingWriter(make_folder(Path(parent) / "rec"), begin(), limits, lambda: INFOS, {})
        rest = list(batches)
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            writer.add(rest[:size])
            writer.tick()
            rest = rest[size:]
        writer.finish(Ending())
        recording = open_recording(Path(parent) / "rec")
        assert_equal(recording.decisions(), expected)
        assert recording.verify().is_whole
        assert sum(len(part) for part in recording.iter_decisions(7)) == len(expected)
        assert recording.manifest.num_requests == len(expected.request_ids)


def test_parts_of_rows_are_whole_forwards(tmp_path: Path) -> None:
    folder, batches = record(tmp_path / "rec")
    expected = Decisions(batches, INFOS)
    parts = list(open_recording(folder).iter_decisions(batch_rows=30))
    assert [len(part) for part in parts] == [24, 24, 24]
    for name in ("forward_index", "request_id", "expert_ids", "margin"):
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined, expected[name], err_msg=name)
    first = open_recording(folder).decisions(max_rows=30)
    np.testing.assert_array_equal(first.gate_weights, expected.gate_weights[:30])


def test_the_analysis_is_that_of_the_rows_themselves(tmp_path: Path) -> None:
    folder, batches = record(tmp_path / "rec", num_forwards=12, num_tokens=64)
    sizes: dict[str, Any] = {"num_experts": 8, "top_k": 2}
    expected = analyze(Decisions(batches, INFOS), **sizes).to_dict()
    recording = open_recording(folder)
    np.testing.assert_equal(analyze(recording.decisions(), **sizes).to_dict(), expected)
    np.testing.assert_equal(recording.analyze().to_dict()["metrics"], expected["metrics"])


def test_others_read_the_files(tmp_path: Path) -> None:
    folder, batches = record(tmp_path / "rec", has_tokens=True, has_logits=True)
    expected = Decisions(batches, INFOS)
    dataset = pyarrow.dataset.dataset(folder / "rows", format="parquet")
    table = dataset.to_table(filter=pyarrow.dataset.field("layer_index") == 1)
    of_layer = expected.layer_index == 1
    assert table["expert_ids"].to_pylist() == expected.expert_ids[of_layer].tolist()
    assert table["request_id"].to_pylist() == expected.request_id[of_layer].tolist()
    frame = pd.read_parquet(folder / "rows")
    assert set(frame.columns) == {*COLUMNS, "captured_at_unix_ns", "source_id"} - {"request_index"}
    np.testing.assert_array_equal(frame["margin"], expected.margin)
    np.testing.assert_array_equal(np.stack(list(frame["logits"])), expected.logits)
    assert frame["module_name"].tolist() == expected.module_name.tolist()


def test_replay_waits_as_the_session_did(tmp_path: Path) -> None:
    batches = [forward(index) for index in range(4)]
    for batch, second in zip(batches, (100.0, 100.0, 101.0, 103.0), strict=True):
        batch.captured_at_unix_ns = int(second * 1e9)
    write(tmp_path / "rec", batches)
    recording = open_recording(tmp_path / "rec")
    waits: list[float] = []
    replayed = list(recording.replay(speed=10, sleep=waits.append))
    assert [each.offset_s for each in replayed] == [0.0, 1.0, 3.0]
    # The clock goes on by itself meanwhile, and `sleep` here does not.
    assert waits == pytest.approx([0.1, 0.3], abs=0.09)
    assert [np.unique(each.decisions.forward_index).tolist() for each in replayed] == [[0, 1], [2], [3]]
    assert [each.offset_s for each in recording.replay(sleep=waits.append)] == [0.0, 1.0, 3.0]
    assert len(waits) == 2
    for speed in (0, -1.0, math.nan):
        with pytest.raises(InvalidInputError, match="speed"):
            recording.replay(speed=speed)


def test_series_and_their_notes_are_kept(tmp_path: Path) -> None:
    points = [
        SeriesPoint(1, "loss", NO_INDEX, False, np.array([2.5])),
        SeriesPoint(1, "expert_gradient_norm", 0, True, np.array([0.5, np.nan])),
    ]
    series = SeriesTable(points, notes={"no gradient": 3}, num_not_kept=7)
    writer = write(tmp_path / "rec", [forward(0)], finishes=False)
    writer.finish(Ending(series=series))
    read = open_recording(tmp_path / "rec").series()
    for name in series:
        np.testing.assert_array_equal(read[name], series[name], err_msg=name)
        assert read[name].dtype.kind == series[name].dtype.kind
    assert (read.notes, read.num_not_kept) == (series.notes, 7)
    record(tmp_path / "without")
    assert len(open_recording(tmp_path / "without").series()) == 0


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    recording = open_recording(folder)
    with pytest.raises(InvalidInputError, match="max_rows -1"):
        recording.decisions(max_rows=-1)
    with pytest.raises(InvalidInputError, match="batch_rows 0"):
        recording.iter_decisions(0)
    with pytest.raises(InvalidInputError, match="damaged"):
        open_recording(folder, damaged="ignore")  # type: ignore[arg-type]


def test_rows_that_do_not_fit_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, batches = record(tmp_path / "rec")
    monkeypatch.setattr("moe_debugger.recording.reader.available_bytes", lambda: 1000)
    recording = open_recording(folder)
    with pytest.raises(InvalidInputError, match="iter_decisions"):
        recording.decisions()
    assert sum(len(part) for part in recording.iter_decisions()) == sum(batch.num_decisions for batch in batches)
