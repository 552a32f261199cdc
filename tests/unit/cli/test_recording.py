"""`trace --record`, `/record` and what `record` and `replay` refuse, without a fleet."""

import io
import json
import stat
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from recorded_rows import INFOS, begin
from recorded_rows import record as record_rows
from rich.console import Console

from moe_debugger import Recording, open_recording
from moe_debugger.cli.interactive import run_interactive
from moe_debugger.config import Config
from moe_debugger.errors import RecordingError
from moe_debugger.recording import ReplayProgress
from moe_debugger.recording.fleet import _append
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns
from moe_debugger.wire.ids import new_id

torch.set_num_threads(1)


class Run(Protocol):
    """Runs the command line and returns what it printed, and its errors."""

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]: ...


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return run


def test_trace_records_what_it_shows(run: Run, tmp_path: Path) -> None:
    out, _ = run("trace", "--prompt", "def add(", "--max-new-tokens", "4", "--json", "--record", "rec")
    answer = json.loads(out)
    recording = open_recording(tmp_path / "rec")
    assert recording.is_whole
    rows = recording.decisions()
    # The last token is generated and never routed.
    num_tokens = answer["num_prompt_tokens"] + answer["num_generated_tokens"] - 1
    assert len(rows) == num_tokens * len(answer["layers"])
    shown = {token["position"]: token["layers"] for token in answer["tokens"]}
    for row in range(len(rows)):
        experts = shown[int(rows.position[row])][str(int(rows.layer_index[row]))]["experts"]
        assert rows.expert_ids[row].tolist() == experts
    assert "is not empty" in run("trace", "--prompt", "x", "--record", "rec", code=1)[1]


def test_the_prompt_loop_records_between_two_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = iter(["/tokens 2", "one", "/record", f"/record {tmp_path / 'rec'}", "two", "/record", "three", "/quit"])
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(console, "input", lambda *_: next(lines))
    run_interactive(Config(), console=console)
    file = console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert "nothing is recorded; /record DIR begins" in text
    assert f"recording to {tmp_path / 'rec'}" in text
    recording = open_recording(tmp_path / "rec")
    assert recording.is_whole
    rows = recording.decisions()
    assert np.unique(rows.position[rows.layer_index == 0]).tolist() == list(range(len("two") + 1))
    assert f"{len(rows)} rows in" in text.replace(",", "")


def test_what_cannot_be_is_said_before_anything_is_asked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis").write_text("mine")
    assert "no fleet is running" in run("record", code=1)[1]
    assert "nothing in it is overwritten" in run("record", "--out", "full", code=1)[1]
    assert "--fetch needs --out" in run("record", "--fetch", new_id(), code=1)[1]
    assert "give one of them" in run("record", "--stop", "--list", code=1)[1]
    assert "give it with --stop or --fetch" in run("record", "--list", "--out", "new", code=1)[1]
    assert "is no recording" in run("replay", "full", code=1)[1]
    record_rows(tmp_path / "rec", num_forwards=1)
    assert "no fleet is running" in run("replay", "rec", code=1)[1]
    assert "speed 0" in run("replay", "rec", "--fleet", "nats://127.0.0.1:1", "--speed", "0", code=1)[1]


def test_replay_says_what_it_left_out(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fleet is left out: here it is what is said, not what is sent."""

    def play(recording: Recording, *_: object, **__: object) -> ReplayProgress:
        num_rows = sum(len(rows) for rows in recording.iter_decisions()) + sum(
            len(sums.layers) for sums in recording.iter_counts()
        )
        return ReplayProgress(num_rows=num_rows)

    monkeypatch.setattr("moe_debugger.recording.republish.replay_to_fleet", play)
    record_rows(tmp_path / "rec", num_forwards=3)
    part = tmp_path / "rec/rows/part-00000001.parquet"
    part.write_bytes(bytes(each ^ 1 for each in part.read_bytes()))
    assert "on the command line --damaged" in run("replay", "rec", "--fleet", "nats://x", code=1)[1]
    out, _ = run("replay", "rec", "--fleet", "nats://x", "--damaged")
    assert "36 rows of tiny" in out
    assert "played 24 rows" in out
    assert "part rows/part-00000001.parquet is damaged" in out
    assert "left out: 12 rows of damaged parts" in out
    layer = LayerCountColumns(0, 8, 0, num_tokens=0, num_padding=6, expert_counts=np.zeros(8, np.uint64))
    writer = RecordingWriter(make_folder(tmp_path / "sums"), begin("counts"), Limits(), lambda: INFOS, {})
    writer.add([CountsColumns(1, 1, 1, 1, [layer])])
    writer.finish(Ending())
    out, _ = run("replay", "sums", "--fleet", "nats://x")
    assert "1 sums of tiny" in out
    assert "played 1 sums" in out


@pytest.mark.parametrize(
    "path",
    [
        "../manifest.json",
        "/etc/passwd",
        "sources/../../x/manifest.json",
        "sources/x/manifest.json",
        "rows/part-1.parquet",
        "manifest.json\n",
        "run.sh",
        "",
    ],
)
def test_a_fleet_cannot_name_files_that_no_recording_has(tmp_path: Path, path: str) -> None:
    with pytest.raises(RecordingError, match="which no recording has"):
        _append(tmp_path, pb.DownloadRecordingResponse(path=path, data=b"x"))
    assert not list(tmp_path.iterdir())


def test_files_of_a_fleet_are_private_and_never_written_over(tmp_path: Path) -> None:
    name = f"sources/{new_id()}/manifest.json"
    _append(tmp_path, pb.DownloadRecordingResponse(path=name, data=b"ab"))
    _append(tmp_path, pb.DownloadRecordingResponse(path=name, offset=2, data=b"c"))
    assert (tmp_path / name).read_bytes() == b"abc"
    assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.rglob("*")} == {0o700, 0o600}
    with pytest.raises(FileExistsError):
        _append(tmp_path, pb.DownloadRecordingResponse(path=name, data=b"x"))
    with pytest.raises(RecordingError, match="bytes from 9 came at 3"):
        _append(tmp_path, pb.DownloadRecordingResponse(path=name, offset=9, data=b"x"))
