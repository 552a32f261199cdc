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
from recorded_rows import INFOS, assert_equal, begin, record

from moe_debugger import Decisions, RecordingError, UnsupportedFormatError, open_recording
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

_PART = "rows/part-00000002.parquet"
_LAYERS = "layers-00000000.parquet"


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


@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _flip], ids=["missing", "truncated", "bit flip"])
def test_layers_have_a_second_copy_in_the_manifest(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder, batches = record(tmp_path / "rec")
    whole = open_recording(folder)
    damage(folder / _LAYERS)
    with pytest.raises(RecordingError, match=f"part {_LAYERS} is .* --damaged"):
        open_recording(folder)
    recording = open_recording(folder, damaged="skip")
    assert [problem.split()[1] for problem in recording.problems] == [_LAYERS]
    assert recording.layers() == whole.layers()
    assert_equal(recording.decisions(), Decisions(batches, INFOS))
    np.testing.assert_equal(recording.analyze().to_dict(), whole.analyze().to_dict())
    assert recording.query("experts limit 3").num_matched == 16


def test_without_any_copy_of_the_layers_one_error_says_it(tmp_path: Path) -> None:
    folder, batches = record(tmp_path / "rec")
    _seal(folder, {**_manifest(folder), "layers": [], "format_version": "1.1"})
    (folder / _LAYERS).unlink()
    recording = open_recording(folder, damaged="skip")
    np.testing.assert_array_equal(recording.decisions().expert_ids, Decisions(batches, INFOS).expert_ids)
    assert not recording.verify().is_whole
    for ask in (recording.layers, recording.analyze, recording.state, lambda: recording.query("experts")):
        with pytest.raises(RecordingError, match=f"{_LAYERS} is missing; .* from another copy") as caught:
            ask()
        assert caught.value.part == _LAYERS


def test_counts_have_their_layers_without_the_file(tmp_path: Path) -> None:
    layer = LayerCountColumns(0, 8, 0, num_tokens=14, num_padding=0, expert_counts=np.arange(8, dtype=np.uint64))
    writer = RecordingWriter(make_folder(tmp_path / "rec"), begin("counts"), Limits(), lambda: INFOS, {})
    writer.add([CountsColumns(1, 2, 3, 4, [layer])])
    writer.finish(Ending())
    (tmp_path / "rec" / _LAYERS).unlink()
    recording = open_recording(tmp_path / "rec", damaged="skip")
    assert recording.state().layers[0].counts.tolist() == list(range(8))


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


def _first_part(values: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = values["parts"][1]
    return part


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda values: values["parts"].append(_first_part(values)), "a part is named twice"),
        (lambda values: values.update(num_rows=5), "num_rows is 5, the parts have 12"),
        (lambda values: _first_part(values).update(num_rows=5), "num_rows is 12, the parts have 5"),
        (lambda values: _first_part(values).update(kind="series"), "in the folder of another table"),
        (lambda values: _first_part(values)["layout"].update(top_k=2**19), r"layout\.top_k"),
        (lambda values: values["topology"].update(global_rank=2**63), "global_rank"),
        (lambda values: values["layers"][1].update(layer_index=4_000_000_000), "layer_index"),
        (lambda values: values["layers"][1].update(layer_index=0), "the same layer_index"),
        (lambda values: values["layers"][1].update(top_k=2**31), "top_k"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_goes_past_all_bounds_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    values = _manifest(folder)
    change(values)
    _seal(folder, values)
    with pytest.raises(RecordingError, match=f"is damaged: .*{match}.*; take it from another copy"):
        open_recording(folder, damaged="skip")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_manifest_is_a_plain_file(tmp_path: Path, kind: str) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=1)
    path = folder / "manifest.json"
    path.rename(tmp_path / "manifest.json")
    if kind == "link":
        path.symlink_to(tmp_path / "manifest.json")
    else:
        os.mkfifo(path)
    with pytest.raises(RecordingError, match="is a link to elsewhere" if kind == "link" else "is no plain file"):
        open_recording(folder)


@pytest.mark.parametrize(
    "layout", [{"top_k": 1}, {"top_k": 1000}, {"num_logits": 2**15}], ids=["narrow", "wide", "logits"]
)
def test_a_part_that_lies_about_its_layout_is_refused(tmp_path: Path, layout: dict[str, int]) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=2)
    values = _manifest(folder)
    _first_part(values)["layout"].update(layout)
    _seal(folder, values)
    with pytest.raises(RecordingError, match=r"not those that the manifest says|at most 8 experts"):
        open_recording(folder).decisions()
    recording = open_recording(folder, damaged="skip")
    assert len(recording.decisions()) == 12
    assert recording.num_rows_lost == recording.verify().num_rows_lost == 12


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("layer_index", 4_000_000_000, "rows of layer 4000000000"),
        ("slot_status", [77, 1], "slot_status is 77"),
        ("expert_ids", [2_000_000_000, 1], "expert ids reach"),
        ("step", 2**64 - 1, "step is 18446744073709551615"),
    ],
)
def test_values_that_cannot_be_are_damage(tmp_path: Path, column: str, value: object, match: str) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=2)
    path = folder / "rows/part-00000000.parquet"
    table = pyarrow.parquet.read_table(path, read_dictionary=["request_id", "module_name", "source_id"])
    place = table.schema.get_field_index(column)
    changed = table.set_column(place, column, pa.array([value] * 12, table.schema.field(place).type))
    pyarrow.parquet.write_table(changed, path)
    values = _manifest(folder)
    data = path.read_bytes()
    _first_part(values).update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    _seal(folder, values)
    with pytest.raises(RecordingError, match=match):
        open_recording(folder).analyze()
    recording = open_recording(folder, damaged="skip")
    assert (len(recording.decisions()), recording.num_rows_lost) == (12, 12)
    recording.analyze()
    recording.query("experts limit 2")


def test_what_a_part_claims_to_hold_costs_nothing_where_it_is_skipped(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=2)
    values = _manifest(folder)
    _first_part(values).update(num_rows=10**12)
    _seal(folder, {**values, "num_rows": 10**12 + 12})
    recording = open_recording(folder, damaged="skip")
    assert len(recording.decisions()) == 12
    assert recording.query("tokens limit 100").num_matched == 6


def test_an_empty_recording_is_whole(tmp_path: Path) -> None:
    folder, _ = record(tmp_path / "rec", num_forwards=0)
    recording = open_recording(folder)
    assert (len(recording.decisions()), recording.manifest.first_step) == (0, None)
    assert list(recording.iter_decisions()) == []
    assert list(recording.replay()) == []
    assert recording.verify().is_whole
