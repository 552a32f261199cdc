"""Where the files go, and what is there when writing ends badly."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_rows import INFOS, assert_equal, begin, record, write
from routing_rows import forward

from moe_debugger import Decisions, InvalidInputError, open_recording
from moe_debugger.recording import writer as writing
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder


def test_only_this_user_can_read_a_recording(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert {path: mode for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}
    assert not [path for path in modes if path.name.startswith(".")], "files that are not whole are gone"


def test_nothing_is_written_where_something_is(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    for path, match in (
        (full, "not empty"),
        (full / "thesis.txt", "is no folder"),
        (tmp_path / "link", "is no folder"),
        (tmp_path / "no" / "parent", "cannot be made"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            make_folder(path)
    assert os.listdir(full) == ["thesis.txt"]
    assert os.listdir(tmp_path / "empty") == []
    assert make_folder(tmp_path / "empty") == tmp_path / "empty"


def test_a_recording_is_not_written_over(tmp_path: Path) -> None:
    folder, batches = record(tmp_path / "rec")
    with pytest.raises(InvalidInputError, match="not empty"):
        write(folder, [forward(9)])
    assert_equal(open_recording(folder).decisions(), Decisions(batches, INFOS))


def test_a_killed_process_leaves_its_whole_parts(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from recorded_rows import write
from routing_rows import forward
from moe_debugger.recording.tables import block_to_batch
writer = write(Path({str(tmp_path / "rec")!r}), [forward(i) for i in range(3)], finishes=False, part_seconds=1e-9)
writer.limits = type(writer.limits)()
for index in range(3, 5):
    writer.add([forward(index)])
writer._write_pending()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "rec/rows/.part-00000003.parquet.open").exists()
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.status == "recording"
    assert not recording.is_whole
    assert recording.capture_health() is None
    assert_equal(recording.decisions(), Decisions([forward(index) for index in range(3)], INFOS))
    assert recording.layers() == tuple(INFOS)
    assert recording.verify().is_whole


def test_a_crash_between_a_part_and_its_manifest_is_no_damage(tmp_path: Path) -> None:
    folder = tmp_path / "rec"
    write(folder, [forward(0), forward(1)], finishes=False, part_seconds=1e-9)
    older = (folder / "manifest.json").read_bytes()
    record(tmp_path / "other", num_forwards=3)
    (tmp_path / "other/rows/part-00000002.parquet").rename(folder / "rows/part-00000002.parquet")
    recording = open_recording(folder)
    assert len(recording.decisions()) == 24
    assert "part-00000002.parquet is foreign" in recording.problems[0]
    assert (folder / "manifest.json").read_bytes() == older


@pytest.mark.parametrize("nth", range(8))
def test_wherever_the_disk_refuses_the_recording_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Each part is two renames, its own and the manifest's; layers and the first manifest are the first two."""
    calls = 0
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == nth + 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    batches = [forward(index) for index in range(3)]
    writer = write(tmp_path / "rec", batches, part_seconds=1e-9)
    monkeypatch.undo()
    if calls < nth + 3:
        assert writer.manifest.status == "finished"
        return
    assert writer.manifest.status == "failed"
    recording = open_recording(tmp_path / "rec", damaged="skip")
    rows = recording.decisions()
    assert len(rows) % 12 == 0
    if len(rows):
        assert_equal(rows, Decisions(batches[: len(rows) // 12], INFOS))
    assert "No space left" in recording.manifest.problems[0]
    assert len(rows) + sum(recording.manifest.num_rows_not_written.values()) == 36


def test_a_full_disk_ends_the_recording_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write(tmp_path / "rec", [forward(0), forward(1)], finishes=False, part_seconds=1e-9)

    def full(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing._HashingFile, "write", full)
        writer.add([forward(2)])
        writer.tick()
    writer.add([forward(3)])
    writer.finish(Ending())
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.status == "failed"
    assert recording.manifest.num_rows_not_written == {"write_failed": 24}
    assert "No space left on device" in recording.manifest.problems[0]
    assert_equal(recording.decisions(), Decisions([forward(0), forward(1)], INFOS))


def test_the_bound_of_bytes_is_kept_and_said(tmp_path: Path) -> None:
    batches = [forward(index) for index in range(6)]
    one = write(tmp_path / "one", batches[:1]).manifest
    size = sum(entry.size_bytes for entry in one.parts if entry.kind == "rows")
    writer = write(tmp_path / "rec", batches, part_seconds=1e-9, max_bytes=size + 1)
    manifest = writer.manifest
    assert manifest.status == "finished"
    assert manifest.num_rows + manifest.num_rows_not_written["max_bytes"] == 72
    assert 12 <= manifest.num_rows <= 24
    assert_equal(open_recording(tmp_path / "rec").decisions(), Decisions(batches[: manifest.num_rows // 12], INFOS))


def test_the_bound_of_parts_is_kept_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_PARTS", 7)
    manifest = write(tmp_path / "rec", [forward(index) for index in range(6)], part_seconds=1e-9).manifest
    # One of those parts is the table of layers.
    assert (manifest.status, manifest.num_rows) == ("finished", 24)
    assert manifest.num_rows_not_written == {"max_parts": 48}


def test_a_forward_that_fits_no_table_is_counted_and_the_others_are_there(tmp_path: Path) -> None:
    batches = [forward(index) for index in range(3)]
    margin = batches[1].layers[0].margin
    assert margin is not None
    batches[1].layers[0].margin = margin[:-1]
    manifest = write(tmp_path / "rec", batches).manifest
    assert manifest.num_rows_not_written == {"invalid": 12}
    assert "margin" in manifest.problems[0]
    assert_equal(open_recording(tmp_path / "rec").decisions(), Decisions([batches[0], batches[2]], INFOS))


def test_layers_that_change_replace_those_before(tmp_path: Path) -> None:
    infos = list(INFOS)
    writer = RecordingWriter(make_folder(tmp_path / "rec"), begin(), Limits(), lambda: infos[:1], {0: (0, 1)})
    writer.add([forward(0, shapes=((8, 2),))])
    writer._layers = lambda: infos
    writer.finish(Ending())
    assert [entry.path for entry in writer.manifest.parts if entry.kind == "layers"] == ["layers-00000001.parquet"]
    assert not (tmp_path / "rec/layers-00000000.parquet").exists()
    assert open_recording(tmp_path / "rec").layers() == tuple(infos)


def test_requests_are_counted_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [forward(index) for index in range(12)]
    names = {name for batch in batches for name in np.array(batch.request_ids)[batch.request_index]}
    manifest = write(tmp_path / "rec", batches).manifest
    assert (manifest.num_requests, manifest.is_num_requests_exact) == (len(names), True)
    monkeypatch.setattr(writing, "_MAX_REQUESTS", 2)
    manifest = write(tmp_path / "few", batches).manifest
    assert (manifest.num_requests, manifest.is_num_requests_exact) == (2, False)


def test_the_package_is_imported_without_torch_and_pyarrow() -> None:
    code = "import sys, moe_debugger.recording; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rows_with_a_status_that_does_not_exist_are_counted_and_the_others_written(tmp_path: Path) -> None:
    batches = [forward(index) for index in range(3)]
    batches[1].layers[0].slot_status = np.full((6, 2), 77, np.uint8)
    writer = write(tmp_path / "rec", batches)
    assert writer.manifest.num_rows_not_written == {"invalid": 12}
    assert_equal(open_recording(tmp_path / "rec").decisions(), Decisions([batches[0], batches[2]], INFOS))
