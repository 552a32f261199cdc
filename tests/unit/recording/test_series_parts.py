"""Series are on the disk as they come, and a later point replaces the one before."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_rows import write
from routing_rows import forward
from zoo.build import ALL

from moe_debugger import MoEDebugger, open_recording
from moe_debugger.recording import writer as writing
from moe_debugger.recording.tables import merge_series
from moe_debugger.recording.writer import Ending
from moe_debugger.training.series import NO_INDEX, SeriesPoint, SeriesStore, SeriesTable


def _loss(step: int, value: float) -> SeriesPoint:
    return SeriesPoint(step, "loss", NO_INDEX, False, np.array([value]))


def test_points_are_readable_before_the_recording_ends(tmp_path: Path) -> None:
    writer = write(tmp_path / "rec", [forward(0)], finishes=False, part_seconds=1e-9)
    for step in range(3):
        writer.add_series([_loss(step, step / 2)])
        writer.tick()
        recording = open_recording(tmp_path / "rec")
        assert recording.series().value.tolist() == [each / 2 for each in range(step + 1)]
    manifest = open_recording(tmp_path / "rec").manifest
    assert manifest.status == "recording"
    assert len([entry for entry in manifest.parts if entry.kind == "series"]) == 3


def test_a_killed_process_leaves_the_points_of_its_last_flush(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from recorded_rows import write
from routing_rows import forward
from moe_debugger.training.series import NO_INDEX, SeriesPoint
writer = write(Path({str(tmp_path / "rec")!r}), [forward(0)], finishes=False, part_seconds=1e-9)
for step in range(5):
    writer.add_series([SeriesPoint(step, "loss", NO_INDEX, False, np.array([step / 2]))])
    if step < 4:
        writer.tick()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    recording = open_recording(tmp_path / "rec")
    assert recording.series().value.tolist() == [0, 0.5, 1, 1.5]
    assert recording.verify().is_whole


def test_small_parts_become_one(tmp_path: Path) -> None:
    writer = write(tmp_path / "rec", [forward(0)], finishes=False, part_seconds=1e-9)
    for step in range(40):
        # Each step also says the one before anew.
        writer.add_series([_loss(step, -1.0), _loss(max(0, step - 1), step / 2)])
        writer.tick()
    writer.finish(Ending())
    recording = open_recording(tmp_path / "rec")
    parts = [entry for entry in recording.manifest.parts if entry.kind == "series"]
    assert len(parts) < 16
    assert sorted(os.listdir(tmp_path / "rec")) == sorted(
        {"manifest.json", "rows", *(e.path for e in recording.manifest.parts if e.kind != "rows")}
    )
    series = recording.series()
    assert series.step.tolist() == list(range(40))
    assert series.value.tolist() == [*((step + 1) / 2 for step in range(39)), -1.0]


_POINTS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["loss", "lr"]), st.sampled_from([NO_INDEX, 0, 1]), st.floats(-9, 9)),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(points=_POINTS, cuts=st.sets(st.integers(0, 30), max_size=4))
def test_merged_parts_are_what_the_session_keeps(points: list[tuple[int, str, int, float]], cuts: set[int]) -> None:
    store = SeriesStore(1 << 20)
    made = [SeriesPoint(step, name, layer, False, np.array([value])) for step, name, layer, value in points]
    for point in made:
        store.add(point)
    edges = [0, *sorted(cut for cut in cuts if cut < len(made)), len(made)]
    tables = [SeriesTable(made[start:stop]) for start, stop in itertools.pairwise(edges)]
    merged, kept = merge_series(tables, {}, 0), SeriesTable(store.points())
    for name in kept:
        np.testing.assert_array_equal(merged[name], kept[name], err_msg=name)


def test_a_session_writes_what_it_no_longer_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_debugger.training.recorder._LIMIT_BYTES", 1)
    model = ALL["mixtral"].make()
    ids = torch.randint(3, 80, (2, 7), generator=torch.Generator().manual_seed(0))
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        session._series._store.limit_bytes = 1
        with debugger.step(1, loss=8.0):
            pass
        with session.record(tmp_path / "rec"):
            for step in range(2, 6):
                with debugger.step(step, loss=step / 2), torch.no_grad():
                    model(input_ids=ids)
        assert len(session.series()) == 1
    series = open_recording(tmp_path / "rec").series()
    assert series.step.tolist() == [1, 2, 3, 4, 5]
    assert series.value.tolist() == [8, 1, 1.5, 2, 2.5]
    assert series.num_not_kept == 0


def test_a_disk_that_refuses_series_ends_the_recording_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path / "rec", [forward(0)], finishes=False, part_seconds=1e-9)
    writer.add_series([_loss(0, 1.0)])
    writer.tick()
    writer.add_series([_loss(1, 1.0), _loss(2, 1.0)])
    with monkeypatch.context() as patch:

        def full(self: object, data: object) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(writing._HashingFile, "write", full)
        writer.tick()
    writer.finish(Ending())
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.status == "failed"
    assert recording.series().step.tolist() == [0]
    assert len(recording.decisions()) == 12
