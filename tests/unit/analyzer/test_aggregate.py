"""SessionPart: pure folding, for any split, order and reload."""

import zlib

import numpy as np
import pytest
from routing_ledger import LedgerSource

from moe_analyzer.aggregate import Limits, SessionPart
from moe_analyzer.requests import RequestEntry, RowChunk, decode_counts
from moe_debugger.errors import WireFormatError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.ids import new_id

SECOND = 1_000_000_000


class Stored:
    """A dict in place of the hashes of Redis."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[str, bytes]] = {"state": {}, "sources": {}, "requests": {}, "rows": {}}

    def flush(self, part: SessionPart) -> None:
        writes = part.take_writes()
        for kind, fields in self.hashes.items():
            for name, value in getattr(writes, kind).items():
                if value is None:
                    fields.pop(name, None)
                else:
                    fields[name] = value

    def load(self, session_id: str, limits: Limits) -> SessionPart:
        part = SessionPart(session_id, limits)
        part.load(self.hashes["state"], self.hashes["sources"], self.hashes["requests"])
        for name, entry in part.requests.entries.items():
            assert part.requests.needs_counts([name]) == [name]
            part.requests.set_counts(entry.request_id, decode_counts(self.hashes["rows"][f"{name}:counts"]))
        return part


def apply(part: SessionPart, message: tuple[str, bytes, str], stored_ns: int, *, is_late: bool = False) -> None:
    part.apply(pb.SourceMessage.FromString(message[1]), stored_ns, is_late=is_late)


def counts(part: SessionPart) -> dict[int, list[int]]:
    return {index: layer.counts.tolist() for index, layer in part.totals.layers.items()}


@pytest.mark.parametrize("reload_every", [0, 1, 3])
def test_part_counts_as_the_ledger_with_and_without_reloads(reload_every: int) -> None:
    source, stored, limits = LedgerSource(new_id()), Stored(), Limits()
    part = SessionPart(source.session_id, limits)
    apply(part, source.manifest(), SECOND)
    for number in range(9):
        apply(part, source.batch(tokens=40), SECOND + number * SECOND // 2)
        stored.flush(part)
        if reload_every and number % reload_every == 0:
            part = stored.load(source.session_id, limits)
    assert counts(part) == source.expected_counts()
    assert part.sources[source.source_id].num_counted == source.num_decisions
    for resolution in (1, 10, 60):
        assert sum(state.num_tokens for state in part.rollups[resolution].values()) == part.totals.num_tokens
    assert sorted(part.rollups[1]) == [1, 2, 3, 4, 5]
    for name in source.request_tokens:
        entry = RequestEntry.decode_summary(name, stored.hashes["requests"][name])
        assert entry.num_tokens() == source.request_tokens[name]
        load = decode_counts(stored.hashes["rows"][f"{name}:counts"])
        for layer in range(source.layers):
            assert load[layer].tolist() == [source.request_load[name, layer, e] for e in range(source.experts)]
        rows = [RowChunk.decode(stored.hashes["rows"][f"{name}:{one}"]) for one in range(entry.num_chunks)]
        assert sum(chunk.num_rows for chunk in rows) == source.request_tokens[name]


def test_flush_numbers_rise_by_one_and_deltas_add_up_to_the_totals() -> None:
    source = LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    apply(part, source.manifest(), SECOND)
    flushes, summed = [], np.zeros(source.experts, np.uint64)
    for _ in range(4):
        apply(part, source.batch(), SECOND)
        writes = part.take_writes()
        flushes.append(writes.flush)
        summed += writes.delta.layers[0].counts
    assert np.diff(flushes).tolist() == [1, 1, 1]
    assert summed.tolist() == part.totals.layers[0].counts.tolist()
    assert not part.is_dirty


def test_batches_before_their_manifest_wait_for_it_also_over_a_reload() -> None:
    source, stored = LedgerSource(new_id()), Stored()
    part = SessionPart(source.session_id, Limits())
    manifest, *batches = source.manifest(), source.batch(), source.batch()
    for message in batches:
        apply(part, message, SECOND)
    stored.flush(part)
    assert part.totals.num_tokens == 0
    part = stored.load(source.session_id, Limits())
    apply(part, manifest, 2 * SECOND)
    stored.flush(part)
    assert counts(part) == source.expected_counts()
    assert not [name for name in stored.hashes["state"] if name.startswith("wait")]


def test_late_batches_are_counted_as_late_and_merged_nowhere() -> None:
    source = LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    apply(part, source.manifest(), SECOND)
    apply(part, source.batch(), 2 * SECOND, is_late=True)
    part.take_writes()
    assert part.totals.num_tokens == 0
    assert part.sources[source.source_id].num_late == source.num_decisions == part.head.num_late
    assert part.is_duplicate(source.source_id, 2)


def test_a_second_source_with_another_model_is_refused() -> None:
    first = LedgerSource(new_id())
    other = LedgerSource(first.session_id, experts=16)
    part = SessionPart(first.session_id, Limits())
    apply(part, first.manifest(), SECOND)
    with pytest.raises(WireFormatError, match="another model"):
        apply(part, other.manifest(), SECOND)


def test_a_damaged_batch_changes_no_count() -> None:
    source = LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    apply(part, source.manifest(), SECOND)
    message = pb.SourceMessage.FromString(source.batch()[1])
    message.batch.layers[1].expert_ids = b"\x20" * len(message.batch.layers[1].expert_ids)
    with pytest.raises(WireFormatError):
        part.apply(message, SECOND)
    part.reject(source.source_id, message.sequence, SECOND)
    part.take_writes()
    assert part.totals.num_tokens == 0
    assert part.head.num_dead_lettered == 1
    assert part.is_duplicate(source.source_id, message.sequence)


def test_the_counts_level_is_folded_without_rows() -> None:
    source = LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    apply(part, source.manifest(), SECOND)
    load = np.arange(8, dtype="<u8").tobytes()
    layer = pb.LayerCounts(layer_index=1, num_tokens=14, expert_counts=load)
    batch = pb.CountsBatch(format_version=format_version(), first_step=3, last_step=5, layers=[layer])
    with pytest.raises(WireFormatError, match="checksum"):
        apply(part, source.message(counts=batch), SECOND)
    batch.crc32 = zlib.crc32(load)
    apply(part, source.message(counts=batch), SECOND)
    part.take_writes()
    assert part.totals.layers[1].counts.tolist() == list(range(8))
    assert part.totals.last_step == 5
    assert part.sources[source.source_id].num_counted == 14


def test_rows_keep_to_their_budget_and_the_oldest_requests_go_first() -> None:
    source, stored, limits = LedgerSource(new_id()), Stored(), Limits(max_requests=5, rows_budget_bytes=6000)
    part = SessionPart(source.session_id, limits)
    apply(part, source.manifest(), SECOND)
    for number in range(12):
        apply(part, source.batch([f"r{number}"], tokens=50), SECOND)
        stored.flush(part)
    assert sorted(part.requests.entries) == sorted(f"r{number}" for number in range(7, 12))
    assert sorted(stored.hashes["requests"]) == sorted(part.requests.entries)
    assert {name.split(":")[0] for name in stored.hashes["rows"]} == set(part.requests.entries)
    chunks = [value for name, value in stored.hashes["rows"].items() if not name.endswith(":counts")]
    assert 0 < sum(RowChunk.decode(value).size_bytes for value in chunks) <= 6000
    dropped = RequestEntry.decode_summary("r7", stored.hashes["requests"]["r7"])
    assert (dropped.num_rows_kept, dropped.num_rows_not_kept) == (0, source.request_tokens["r7"])
    assert counts(part) == source.expected_counts()


def test_old_rollups_leave_and_the_totals_stay() -> None:
    source, stored = LedgerSource(new_id()), Stored()
    part = SessionPart(source.session_id, Limits())
    apply(part, source.manifest(), SECOND)
    for second in (1, 100, 400):
        apply(part, source.batch(), second * SECOND)
        stored.flush(part)
    assert sorted(part.rollups[1]) == [400]
    assert sorted(part.rollups[10]) == [0, 100, 400]
    assert [name for name in stored.hashes["state"] if name.startswith("r1:")] == ["r1:400"]
    assert counts(part) == source.expected_counts()
