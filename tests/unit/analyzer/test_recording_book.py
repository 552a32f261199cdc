"""Messages of sources as files: exactly what came, once, and everything else counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routing_ledger import LedgerSource
from routing_rows import forward

from moe_analyzer import recording_book
from moe_analyzer.recording_book import RecordingBook
from moe_debugger import JoinedRecording, open_recording
from moe_debugger.recording.manifest import GroupManifest
from moe_debugger.recording.writer import Limits
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns, encode_batch, encode_counts
from moe_debugger.wire.ids import new_id


def begin(path: Path, **options: Any) -> RecordingBook:
    group = GroupManifest(recording_id=new_id(), started_at_unix_ns=1, session_name="run", session_id=new_id())
    values: dict[str, Any] = {"max_bytes": 1 << 30, "limits": Limits(part_seconds=1e-9), **options}
    return RecordingBook(path, group, **values)


def counts(recording: Any, layers: int = 3, experts: int = 8) -> dict[int, list[int]]:
    rows = recording.decisions()
    valid = ~rows.is_padding
    return {
        layer: np.bincount(rows.expert_ids[valid & (rows.layer_index == layer)].reshape(-1), minlength=experts).tolist()
        for layer in range(layers)
    }


def test_several_sources_are_one_recording_that_equals_their_ledgers(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    sources = [LedgerSource(new_id(), seed=seed) for seed in range(3)]
    for source in sources:
        book.take(source.source_id, source.manifest()[1])
    for _ in range(10):
        for source in sources:
            book.take(source.source_id, source.batch()[1])
        book.tick()
    for source in sources:
        book.take(source.source_id, source.status()[1])
        book.take(source.source_id, source.goodbye()[1])
    statistics = book.finish()
    total = sum(source.num_decisions for source in sources)
    assert (statistics.num_rows, statistics.num_sources, statistics.not_written) == (total, 3, {})
    recording = open_recording(tmp_path / "rec")
    assert isinstance(recording, JoinedRecording)
    assert recording.is_whole
    assert recording.verify().num_rows == total
    summed = {
        layer: np.sum([source.expected_counts()[layer] for source in sources], axis=0).tolist() for layer in range(3)
    }
    assert counts(recording) == summed
    for member, source in zip(recording.members, sources, strict=True):
        assert member.manifest.source_id == source.source_id
        assert counts(member) == source.expected_counts()
        assert member.manifest.level == "routes+tokens"
        health = member.capture_health()
        assert health is not None
        assert (health.num_produced, health.is_healthy) == (source.num_decisions, True)
        assert member.series().value.tolist() == [0.5]
        # Each request's tokens, as the source counted them.
        rows = member.decisions()
        for name, number in source.request_tokens.items():
            chosen = (rows.request_id == name) & (rows.layer_index == 0) & ~rows.is_padding
            assert chosen.sum() == number


def test_duplicates_are_written_once_and_gaps_are_counted(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    messages = [source.manifest(), *(source.batch() for _ in range(8))]
    sent = [messages[index] for index in (0, 1, 2, 2, 4, 3, 1, 8)]
    for _, payload, _ in sent:
        book.take(source.source_id, payload)
    statistics = book.finish()
    assert statistics.num_missing_messages == 3
    recording = open_recording(tmp_path / "rec")
    assert np.unique(recording.decisions().step).tolist() == [1, 2, 3, 4, 8]
    assert recording.manifest.num_rows == 5 * 36
    assert recording.manifest.num_missing_messages == 3
    health = recording.capture_health()
    assert health is not None
    assert (health.num_missing_messages, health.is_healthy) == (3, False)


def test_a_recording_from_the_middle_misses_nothing_of_before(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    manifest = pb.SourceMessage.FromString(source.manifest()[1]).manifest
    for _ in range(5):
        source.batch()
    late = [source.batch() for _ in range(3)]
    # The order of retries: the second came before the first.
    for _, payload, _ in (late[1], late[0], late[2]):
        book.take(source.source_id, payload)
    assert book.unknown_sources() == [source.source_id]
    assert book.statistics().num_rows == 0
    book.add_manifest(source.source_id, manifest)
    book.add_manifest(source.source_id, manifest)
    statistics = book.finish()
    assert (statistics.num_rows, statistics.num_missing_messages) == (3 * 36, 0)
    assert np.unique(open_recording(tmp_path / "rec").decisions().step).tolist() == [6, 7, 8]


def test_the_probabilities_of_messages_are_recorded(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    book.take(source.source_id, source.manifest()[1])
    num_tokens = 0
    for index in range(3):
        columns = forward(index)
        num_tokens += int((~columns.is_padding).sum())
        columns.layers[0].probability_sum = np.arange(8.0)
        book.take(source.source_id, source.message(batch=encode_batch(columns))[1])
    book.finish()
    layers = open_recording(tmp_path / "rec").state().layers
    assert layers[0].mean_probability.tolist() == (3 * np.arange(8.0) / num_tokens).tolist()
    assert np.isnan(layers[1].mean_probability).all()


@pytest.mark.parametrize(("fingerprint", "digest"), [("0" * 64, "0" * 64), ("", None), ("../x", None)])
def test_what_a_source_says_of_its_model_is_kept(tmp_path: Path, fingerprint: str, digest: str | None) -> None:
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    manifest = pb.SourceMessage.FromString(source.manifest()[1]).manifest
    manifest.model_fingerprint, manifest.model_class_name = fingerprint, "MixtralForCausalLM"
    book.add_manifest(source.source_id, manifest)
    book.finish()
    model = open_recording(tmp_path / "rec").manifest.model
    assert (model.class_name, model.config_sha256) == ("MixtralForCausalLM", digest)


def test_drops_are_those_since_the_recording_began(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    manifest = pb.SourceMessage.FromString(source.manifest()[1]).manifest
    book.add_manifest(source.source_id, manifest)
    for produced, full, sampled in ((100, 10, 5), (200, 10, 9), (300, 25, 9)):
        counters = pb.SourceCounters(
            num_produced=produced,
            dropped=[
                pb.DropCounter(reason=pb.DROP_REASON_BUFFER_FULL, num_decisions=full),
                pb.DropCounter(reason=pb.DROP_REASON_SAMPLED_OUT, num_decisions=sampled),
            ],
        )
        book.take(source.source_id, source.message(status=pb.SourceStatus(counters=counters))[1])
    assert book.finish().num_decisions_dropped == 19
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.num_decisions_dropped == {"buffer_full": 15, "sampled_out": 4}
    health = recording.capture_health()
    assert health is not None
    assert health.dropped == {"buffer_full": 15}


def test_a_source_without_a_manifest_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_book, "_MAX_WAITING_BYTES", 5000)
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    source.manifest()
    for _ in range(6):
        book.take(source.source_id, source.batch()[1])
    statistics = book.finish()
    assert statistics.not_written == {"no_manifest": 6 * 36}
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.num_rows_not_written == {"no_manifest": 6 * 36}
    assert not recording.is_whole
    assert len(recording.decisions()) == 0
    assert recording.manifest.session_name == "run"


def test_bytes_that_are_no_message_end_nothing(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    source, stranger = LedgerSource(new_id()), LedgerSource(new_id())
    book.take(source.source_id, source.manifest()[1])
    book.take(source.source_id, b"\xff\xff\xff")
    book.take(source.source_id, stranger.batch()[1])
    _, payload, _ = source.batch()
    message = pb.SourceMessage.FromString(payload)
    message.batch.crc32 ^= 1
    book.take(source.source_id, message.SerializeToString())
    book.take(source.source_id, source.batch()[1])
    statistics = book.finish()
    assert (statistics.num_rows, statistics.num_sources) == (36, 1)
    assert statistics.not_written == {"invalid": 2 + 36}
    assert any("checksum" in text for text in statistics.problems)
    assert any("cannot be read" in text for text in statistics.problems)


def test_the_bound_of_bytes_holds_for_all_sources_together(tmp_path: Path) -> None:
    one = begin(tmp_path / "one")
    source = LedgerSource(new_id())
    one.take(source.source_id, source.manifest()[1])
    one.take(source.source_id, source.batch()[1])
    one.tick()
    size = one.statistics().size_bytes
    book = begin(tmp_path / "rec", max_bytes=2 * size)
    sources = [LedgerSource(new_id(), seed=seed) for seed in range(2)]
    for source in sources:
        book.take(source.source_id, source.manifest()[1])
    for _ in range(4):
        for source in sources:
            book.take(source.source_id, source.batch()[1])
            book.tick()
    statistics = book.finish()
    assert statistics.num_rows + statistics.not_written["max_bytes"] == 8 * 36
    assert 36 <= statistics.num_rows <= 3 * 36
    assert len(open_recording(tmp_path / "rec").decisions()) == statistics.num_rows


def test_no_rows_are_written_while_the_disk_has_too_little_room(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec", min_free_bytes=1 << 62)
    source = LedgerSource(new_id())
    book.take(source.source_id, source.manifest()[1])
    book.take(source.source_id, source.batch()[1])
    book.tick()
    book.take(source.source_id, source.batch()[1])
    assert book.finish().not_written == {"disk_full": 36}


def test_sums_of_level_counts_are_recorded(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    source = LedgerSource(new_id())
    message = pb.SourceMessage.FromString(source.manifest()[1])
    message.manifest.level = pb.CAPTURE_LEVEL_COUNTS
    book.take(source.source_id, message.SerializeToString())
    for step in range(4):
        sums = [LayerCountColumns(layer, 8, 0, 4, 1, np.full(8, layer, np.uint64)) for layer in (0, 1)]
        columns = CountsColumns(step, step, pb.PHASE_TRAIN, 0, sums)
        book.take(source.source_id, source.message(counts=encode_counts(columns))[1])
    assert book.finish().num_rows == 8
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.level == "counts"
    state = recording.state()
    assert state.layers[1].counts.tolist() == [4] * 8
    assert (state.layers[0].num_tokens, state.layers[0].num_padding) == (16, 4)


def test_rows_of_many_sources_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_book, "_MAX_PENDING_BYTES", 20_000)
    book = begin(tmp_path / "rec", limits=Limits())
    sources = [LedgerSource(new_id(), seed=seed) for seed in range(4)]
    for source in sources:
        book.take(source.source_id, source.manifest()[1])
    for _ in range(20):
        for source in sources:
            book.take(source.source_id, source.batch(tokens=40)[1])
            pending = sum(one.writer.pending_bytes for one in book._sources.values() if one.writer)
            assert pending <= 20_000
    assert book.finish().num_rows == sum(source.num_decisions for source in sources)
    assert open_recording(tmp_path / "rec").verify().is_whole


def test_a_recording_that_is_cut_off_can_be_read(tmp_path: Path) -> None:
    book = begin(tmp_path / "rec")
    sources = [LedgerSource(new_id(), seed=seed) for seed in range(2)]
    for source in sources:
        book.take(source.source_id, source.manifest()[1])
        for _ in range(3):
            book.take(source.source_id, source.batch()[1])
            book.tick()
    # Nobody ends it.
    recording = open_recording(tmp_path / "rec")
    assert recording.manifest.status == "recording"
    assert not recording.is_whole
    assert len(recording.decisions()) == 2 * 3 * 36
    assert recording.capture_health() is None


def test_a_long_recording_has_longer_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_book, "_YOUNG_PART_S", 1e-9)
    monkeypatch.setattr(recording_book, "_YOUNG_S", 1e9)
    book = begin(tmp_path / "rec", limits=None)
    source = LedgerSource(new_id())
    book.take(source.source_id, source.manifest()[1])
    for _ in range(4):
        book.take(source.source_id, source.batch()[1])
        book.tick()
    book._grows_old_at = 0.0
    for _ in range(6):
        book.take(source.source_id, source.batch()[1])
        book.tick()
    book.finish()
    recording = open_recording(tmp_path / "rec")
    assert isinstance(recording, JoinedRecording)
    parts = [entry.num_rows for entry in recording.members[0].manifest.parts if entry.kind == "rows"]
    assert parts == [36, 36, 36, 36, 6 * 36]
    assert counts(recording) == source.expected_counts()
