"""Damage is found and named, and what is whole is still read."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from recorded_rows import INFOS, assert_equal, record

from moe_debugger import Decisions, RecordingError, UnsupportedFormatError, open_recording

_PART = "rows/part-00000002.parquet"


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _to_link(path: Path) -> None:
    other = path.parents[2] / "elsewhere.parquet"
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize(
    ("damage", "text", "at_once"),
    [
        (Path.unlink, "is missing", True),
        (_truncate, "is truncated", True),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is not the file that was written", True),
        (_to_link, "is a link to elsewhere", True),
        (_flip, "is damaged", False),
    ],
    ids=["missing", "truncated", "longer", "link", "bit flip"],
)
def test_a_part_that_is_not_whole_is_named_and_can_be_skipped(
    tmp_path: Path, damage: Callable[[Path], None], text: str, at_once: bool
) -> None:
    folder, batches = record(tmp_path / "rec")
    damage(folder / _PART)
    with pytest.raises(RecordingError, match=f"{_PART} {text}") as caught:
        open_recording(folder).decisions()
    assert caught.value.part == _PART
    if at_once:
        with pytest.raises(RecordingError, match=text):
            open_recording(folder)
    recording = open_recording(folder, damaged="skip")
    assert_equal(recording.decisions(), Decisions([*batches[:2], *batches[3:]], INFOS))
    assert len(recording.problems) == 1
    assert recording.problems[0].startswith(f"part {_PART} {text}")
    assert not recording.is_whole
    verification = recording.verify()
    assert not verification.is_whole
    assert (verification.num_rows, verification.num_rows_lost) == (5 * 12, 12)
    assert verification.problems == recording.problems


def test_every_byte_of_a_part_counts(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    path = folder / "rows/part-00000000.parquet"
    whole = path.read_bytes()
    assert open_recording(folder).verify().is_whole
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        verification = open_recording(folder).verify()
        assert verification.num_rows_lost == 12, place
        with pytest.raises(RecordingError, match="part-00000000"):
            open_recording(folder).decisions()


def test_a_part_of_another_recording_is_found(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec")
    other, _ = record(tmp_path / "other")
    shutil.copy(other / _PART, folder / "rows/part-00000009.parquet")
    with pytest.raises(RecordingError, match=r"part-00000009\.parquet is foreign"):
        open_recording(folder)
    recording = open_recording(folder, damaged="skip")
    assert len(recording.decisions()) == 6 * 12
    assert recording.problems == ("part rows/part-00000009.parquet is foreign: the manifest does not name it",)
    assert recording.verify().problems == recording.problems
    # In the place of one of ours, even where the sizes agree.
    (folder / "rows/part-00000009.parquet").unlink()
    shutil.copy(other / _PART, folder / _PART)
    with pytest.raises(RecordingError, match=_PART):
        open_recording(folder).decisions()


@pytest.mark.parametrize("kind", ["missing", "truncated"])
def test_without_its_layers_the_rows_are_still_read(tmp_path: Path, kind: str) -> None:
    folder, batches = record(tmp_path / "rec")
    path = folder / "layers-00000000.parquet"
    path.unlink() if kind == "missing" else _truncate(path)
    with pytest.raises(RecordingError, match="layers-00000000"):
        open_recording(folder)
    recording = open_recording(folder, damaged="skip")
    assert recording.layers() == ()
    np.testing.assert_array_equal(recording.decisions().expert_ids, Decisions(batches, INFOS).expert_ids)


def _manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


def _seal(folder: Path, values: dict[str, Any]) -> None:
    """Write a manifest with the checksum that docs/recordings.md describes."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    sealed = {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(sealed))


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    values = _manifest(folder)
    _seal(folder, values)
    assert len(open_recording(folder).decisions()) == 12
    (folder / "manifest.json").write_text(json.dumps({**values, "num_requests": 1000}))
    with pytest.raises(RecordingError, match="checksum"):
        open_recording(folder, damaged="skip")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no JSON"),
        ('{"format": "moe-debug', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no manifest"),
        ('{"format": "other"}', "no manifest"),
        ('{"format": "moe-debugger-recording"}', "format_version"),
        ('{"format": "moe-debugger-recording", "format_version": "1.0", "x": NaN}', "checksum"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RecordingError, match=match):
        open_recording(tmp_path)


def test_a_manifest_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecordingError, match="more than"):
        open_recording(tmp_path)


def test_a_folder_without_a_manifest_is_no_recording(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RecordingError, match="is no recording"):
            open_recording(path)


@pytest.mark.parametrize(
    "path", ["../outside.parquet", "/etc/passwd", "rows/../../x.parquet", "rows/part-00000000.parquet\n", "rows/x"]
)
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path: Path, path: str) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    values = _manifest(folder)
    values["parts"][1]["path"] = path
    _seal(folder, values)
    with pytest.raises(RecordingError, match=r"parts\.1\.path"):
        open_recording(folder)


def test_versions(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    values = _manifest(folder)
    _seal(folder, {**values, "format_version": "1.7", "a_new_field": {"x": 1}})
    assert len(open_recording(folder).decisions()) == 12
    _seal(folder, {**values, "format_version": "2.0"})
    with pytest.raises(UnsupportedFormatError, match=r"2\.0"):
        open_recording(folder)


def test_a_sealed_part_with_other_columns_or_other_content_is_refused(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    path = folder / "rows/part-00000000.parquet"
    table = pyarrow.parquet.read_table(path)
    lists = pa.array([[1]] + [[1, 2]] * 11, pa.list_(pa.int32()))
    place = table.schema.get_field_index("expert_ids")
    changes = {
        "columns": table.drop_columns(["margin"]),
        "differ in length": table.set_column(place, "expert_ids", lists),
        "says 12": table.slice(0, 5),
        "differ in expert_ids|columns of rows": table.set_column(place, "expert_ids", pa.array(["x"] * 12)),
    }
    values = _manifest(folder)
    for match, changed in changes.items():
        pyarrow.parquet.write_table(changed, path)
        data = path.read_bytes()
        values["parts"][1] |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _seal(folder, values)
        with pytest.raises(RecordingError, match=match) as caught:
            open_recording(folder).decisions()
        assert caught.value.part == "rows/part-00000000.parquet"
        skipping = open_recording(folder, damaged="skip")
        assert len(skipping.decisions()) == 0
        assert len(skipping.problems) == 1


def test_a_part_that_lies_about_its_layout_is_refused(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    values = _manifest(folder)
    values["parts"][1]["layout"]["top_k"] = 1
    _seal(folder, values)
    with pytest.raises(RecordingError, match="not those that the manifest says"):
        open_recording(folder).decisions()


def test_an_empty_recording_is_whole(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=0)
    recording = open_recording(folder)
    assert (len(recording.decisions()), recording.manifest.first_step) == (0, None)
    assert list(recording.iter_decisions()) == []
    assert list(recording.replay()) == []
    assert recording.verify().is_whole
