"""Sessions of real (tiny) models that are recorded while they run."""

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_rows import assert_equal
from zoo.build import ALL

from moe_debugger import (
    DependencyMissingError,
    InvalidInputError,
    MoEDebugger,
    Recorder,
    SessionClosedError,
    analyze,
    open_recording,
)
from moe_debugger.recording import writer as writing


@pytest.fixture(scope="module")
def model() -> Any:
    return ALL["mixtral"].make()


def _ids(seed: int = 0, rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 80, (rows, 7), generator=torch.Generator().manual_seed(seed))


def _run(model: Any, num_forwards: int = 3) -> None:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        for seed in range(num_forwards):
            model(input_ids=_ids(seed), attention_mask=mask)


@pytest.fixture
def recordings() -> Iterator[list[Recorder]]:
    """Recorders that are stopped whatever happens."""
    kept: list[Recorder] = []
    yield kept
    for recorder in kept:
        recorder.stop()


@pytest.mark.parametrize("level", ["routes", "routes+tokens", "full"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_recording_says_what_the_session_says(tmp_path: Path, name: str, level: Any) -> None:
    model = ALL[name].make()
    with MoEDebugger(model, level=level) as debugger:
        session = debugger.session
        assert session is not None
        recorder = session.record(tmp_path / "rec")
        _run(model)
        manifest = recorder.stop()
        recording = open_recording(tmp_path / "rec")
        rows, layers = session.decisions(), session.layers()
        assert_equal(recording.decisions(), rows)
        assert recording.layers() == layers
        sizes: dict[str, Any] = {
            "num_experts": [info.num_experts for info in layers],
            "top_k": [info.top_k for info in layers],
        }
        np.testing.assert_equal(analyze(recording.decisions(), **sizes).to_dict(), analyze(rows, **sizes).to_dict())
        # The router's mean probabilities too, which no row has.
        np.testing.assert_equal(recording.analyze().to_dict(), session.analyze().to_dict())
        assert np.isfinite(recording.analyze().metrics[0].switch_balancing_loss)
        assert recording.capture_health() == session.capture_health()
    assert recording.manifest == manifest
    assert (manifest.status, manifest.level, manifest.num_rows) == ("finished", level, len(rows))
    assert manifest.num_requests == len(rows.request_ids)
    assert (manifest.first_step, manifest.last_step) == (0, 2)
    assert manifest.model.model_type == name
    assert manifest.model.versions["torch"] == torch.__version__
    assert recording.is_whole


@pytest.mark.parametrize("level", ["routes", "counts"])
def test_both_stacks_of_a_model_are_recorded(tmp_path: Path, level: Any) -> None:
    build = ALL["switch_transformers"]
    model = build.make()
    with MoEDebugger(model, level=level) as debugger:
        session = debugger.session
        assert session is not None
        with session.record(tmp_path / "rec"), torch.no_grad():
            for _ in range(2):
                model(**build.inputs(model))
        recording = open_recording(tmp_path / "rec")
        assert {info.stack for info in recording.layers()} == {"encoder", "decoder"}
        assert_equal(recording.decisions(), session.decisions())
        np.testing.assert_equal(recording.analyze().to_dict(), session.analyze().to_dict())
        np.testing.assert_array_equal(recording.state().phase_tokens, session.state().phase_tokens)


def test_the_configuration_names_the_model(tmp_path: Path, recordings: list[Recorder]) -> None:
    digests = []
    for number, name in enumerate(("mixtral", "mixtral", "deepseek_v3")):
        with MoEDebugger(ALL[name].make(), model_name="mine") as debugger:
            assert debugger.session is not None
            manifest = debugger.session.record(tmp_path / str(number)).stop()
        assert manifest.model.name == "mine"
        digests.append(manifest.model.config_sha256)
        # A fleet is told the same.
        debugger = MoEDebugger(ALL[name].make(), fleet="nats://127.0.0.1:1")
        publisher = debugger._make_publisher("mine")
        publisher.start()
        sent = publisher._manifest()
        publisher.stop(0.1)
        debugger.close()
        assert (sent.model_fingerprint, sent.model_class_name) == (digests[-1], manifest.model.class_name)
    assert digests[0] == digests[1] != digests[2]
    assert None not in digests


def test_rows_are_those_between_start_and_stop(tmp_path: Path, model: Any) -> None:
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        _run(model, 2)
        with session.record(tmp_path / "rec") as recorder:
            assert recorder.is_recording
            _run(model, 3)
        assert not recorder.is_recording
        _run(model, 1)
        rows = session.decisions_since(2)
        recorded = open_recording(tmp_path / "rec").decisions()
        assert np.unique(recorded.forward_index).tolist() == np.unique(rows.forward_index).tolist()[:3]
        # One after another.
        with session.record(tmp_path / "next"):
            _run(model, 1)
        assert len(open_recording(tmp_path / "next").decisions()) * 3 == len(recorded)


def test_rows_that_the_session_does_not_keep_are_recorded(tmp_path: Path, model: Any) -> None:
    with MoEDebugger(model, max_rows_bytes=0) as debugger:
        session = debugger.session
        assert session is not None
        with session.record(tmp_path / "rec"):
            _run(model)
        assert len(session.decisions()) == 0
        counts = [each.expert_counts.tolist() for each in session.get_routing_stats().layers]
    rows = open_recording(tmp_path / "rec").decisions()
    valid = ~rows.is_padding
    for layer, expected in enumerate(counts):
        ids = rows.expert_ids[valid & (rows.layer_index == layer)]
        assert np.bincount(ids.reshape(-1), minlength=len(expected)).tolist() == expected


def test_at_level_counts_the_sums_are_recorded(tmp_path: Path, model: Any) -> None:
    with MoEDebugger(model, level="counts") as debugger:
        session = debugger.session
        assert session is not None
        with session.record(tmp_path / "rec"):
            _run(model)
        expected = session.analyze()
        stats = session.get_routing_stats()
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.level == "counts"
    assert (recording.manifest.num_rows, len(recording.decisions())) == (0, 0)
    state = recording.state()
    for index, each in enumerate(stats.layers):
        assert state.layers[index].counts.tolist() == each.expert_counts.tolist()
        assert state.layers[index].counts.sum() > 0
    np.testing.assert_equal(recording.analyze().to_dict(), expected.to_dict())
    assert recording.verify().is_whole
    with pytest.raises(InvalidInputError, match="no rows to replay"):
        recording.replay()


def test_the_end_of_the_session_ends_its_recording(tmp_path: Path, model: Any) -> None:
    with MoEDebugger(model) as debugger:
        assert debugger.session is not None
        recorder = debugger.session.record(tmp_path / "rec")
        with debugger.step(7, loss=1.5):
            _run(model, 1)
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.is_finished
    assert recording.manifest.capture_health is not None
    assert recorder.stop() == recording.manifest
    assert np.unique(recording.decisions().step).tolist() == [7]
    assert recording.series().select("loss").value.tolist() == [1.5]
    assert debugger.session is None


def test_one_recording_at_a_time_and_none_of_a_closed_session(tmp_path: Path, model: Any) -> None:
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        with session.record(tmp_path / "rec"):
            with pytest.raises(InvalidInputError, match="is recorded to"):
                session.record(tmp_path / "other")
            assert not (tmp_path / "other").exists()
    with pytest.raises(SessionClosedError):
        session.record(tmp_path / "late")


def test_a_slow_disk_costs_rows_that_are_counted(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    add = writing.RecordingWriter.add

    def slow(self: Any, parts: Any) -> None:
        gate.wait(30)
        add(self, parts)

    monkeypatch.setattr(writing.RecordingWriter, "add", slow)
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        recorder = session.record(tmp_path / "rec", buffer_bytes=1)
        for _ in range(4):
            _run(model, 1)
            assert session.flush()
        waited = recorder.statistics().waiting_bytes
        gate.set()
        manifest = recorder.stop()
        produced = len(session.decisions())
        is_healthy = session.capture_health().is_healthy
    assert waited > 0
    # The first is taken whatever its size, or nothing ever would be.
    assert manifest.num_rows == produced // 4
    assert manifest.num_rows_not_written == {"buffer_full": produced * 3 // 4}
    assert is_healthy, "the capture does not wait for the disk"
    assert not open_recording(tmp_path / "rec").is_whole


def test_a_recorder_that_is_lost_leaves_what_it_has(tmp_path: Path, model: Any) -> None:
    debugger = MoEDebugger(model)
    session = debugger.start_session()
    session.record(tmp_path / "rec")
    _run(model, 2)
    num_rows = len(session.decisions())
    threads = [each for each in threading.enumerate() if each.name == "moe-debugger-recording"]
    assert len(threads) == 1
    del session, debugger
    gc.collect()
    threads[0].join(10)
    assert not threads[0].is_alive()
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.status == "recording"
    assert len(recording.decisions()) == num_rows


@pytest.mark.parametrize("missing", ["pyarrow", "pyarrow.parquet"])
def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with MoEDebugger(model) as debugger:
        assert debugger.session is not None
        with pytest.raises(DependencyMissingError, match="pip install"):
            debugger.session.record(tmp_path / "rec")
        _run(model, 1)
        assert len(debugger.session.decisions())
    assert not (tmp_path / "rec").exists()
    with pytest.raises(DependencyMissingError, match="pip install"):
        open_recording(tmp_path / "rec")


@pytest.mark.parametrize(
    "options", [{"buffer_bytes": 0}, {"part_bytes": 0}, {"part_seconds": 0}, {"max_bytes": -1}], ids=str
)
def test_wrong_bounds_are_refused(tmp_path: Path, model: Any, options: dict[str, Any]) -> None:
    with MoEDebugger(model) as debugger:
        assert debugger.session is not None
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            debugger.session.record(tmp_path / "rec", **options)
    assert not (tmp_path / "rec").exists()
