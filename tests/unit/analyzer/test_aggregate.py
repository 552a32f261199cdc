"""SessionPart: pure folding, for any split, order and reload."""

import zlib

import numpy as np
import pytest
from routing_ledger import LedgerSource

from moe_analyzer._wire import routes_message, source_message
from moe_analyzer.aggregate import Limits, SessionPart
from moe_analyzer.requests import RequestEntry, RowChunk, decode_counts
from moe_debugger.capture_health import CheckStatus, HealthCheck
from moe_debugger.errors import WireFormatError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.codec import LayerColumns, RoutingColumns, encode_batch, format_version
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


def test_a_layer_without_router_statistics_is_counted_like_any_other() -> None:
    """`unavailable_reason` says why a router's statistics are missing, not that the layer has no routes."""
    source = LedgerSource(new_id())
    part = SessionPart(source.session_id, Limits())
    message = pb.SourceMessage.FromString(source.manifest()[1])
    message.manifest.layers[1].unavailable_reason = "the layer has no module named gate or router"
    part.apply(message, SECOND)
    apply(part, source.batch(), SECOND)
    part.take_writes()
    assert counts(part) == source.expected_counts()


def _stack_batch(stack_layers: list[int], positions: list[int], *, name: str = "r") -> RoutingColumns:
    n = len(positions)
    return RoutingColumns(
        step=np.ones(n, np.uint64),
        forward_index=np.ones(n, np.uint64),
        request_ids=[name],
        request_index=np.zeros(n, np.uint32),
        position=np.array(positions, np.uint32),
        phase=np.full(n, pb.PHASE_PREFILL, np.uint8),
        is_padding=np.zeros(n, bool),
        layers=[
            LayerColumns(
                index, 8, np.array([[index, one % 8] for one in positions], np.int32), np.full((n, 2), 0.5, np.float32)
            )
            for index in stack_layers
        ],
    )


def _part_with_stacks(stacks: list[str]) -> tuple[LedgerSource, SessionPart]:
    source = LedgerSource(new_id(), layers=len(stacks))
    part = SessionPart(source.session_id, Limits())
    message = pb.SourceMessage.FromString(source.manifest()[1])
    for layer, stack in zip(message.manifest.layers, stacks, strict=True):
        layer.stack = stack
    part.apply(message, SECOND)
    return source, part


def _request(part: SessionPart, stored: Stored, name: str = "r") -> session_pb2.RequestRoutes:
    stored.flush(part)
    entry = RequestEntry.decode_summary(name, stored.hashes["requests"][name])
    rows = stored.hashes["rows"]
    entry.counts = decode_counts(rows[f"{name}:counts"])
    return routes_message([entry], [RowChunk.decode(rows[f"{name}:{one}"]) for one in range(entry.num_chunks)])


def test_an_encoders_tokens_are_rows_of_their_own_and_no_part_of_a_requests_tokens() -> None:
    source, part = _part_with_stacks(["encoder", "decoder"])
    apply(part, source.message(batch=encode_batch(_stack_batch([0], [0, 1, 2, 3, 4]))), SECOND)
    apply(part, source.message(batch=encode_batch(_stack_batch([1], [0, 1]))), SECOND)
    apply(part, source.message(batch=encode_batch(_stack_batch([1], [2]))), SECOND)
    routes = _request(part, Stored())
    assert part.totals.layers[0].num_tokens == 5
    assert (routes.summary.num_tokens, routes.summary.num_prefill_tokens) == (3, 3)
    assert list(routes.stacks) == ["decoder", "encoder"]
    assert routes.stack_index == bytes([0, 0, 0, 1, 1, 1, 1, 1])
    assert np.frombuffer(routes.position, "<u4").tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    encoder, decoder = (np.frombuffer(layer.expert_ids, "<u2").reshape(8, 2).tolist() for layer in routes.layers)
    none = [0xFFFF, 0xFFFF]
    assert decoder == [[1, 0], [1, 1], [1, 2]] + [none] * 5
    assert encoder == [none] * 3 + [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert np.frombuffer(routes.layers[1].gate_weights, "<f2").reshape(8, 2)[:, 0].tolist() == [0.5] * 3 + [0.0] * 5


def test_a_request_that_only_an_encoder_saw_has_the_encoders_tokens() -> None:
    source, part = _part_with_stacks(["encoder", "decoder"])
    apply(part, source.message(batch=encode_batch(_stack_batch([0], [0, 1, 2]))), SECOND)
    routes = _request(part, Stored())
    assert (routes.summary.num_tokens, list(routes.stacks), routes.stack_index) == (3, ["encoder"], b"")


def test_stages_of_a_pipeline_make_one_row_a_token_and_beams_several() -> None:
    source, part = _part_with_stacks(["decoder", "decoder"])
    # Two beams at position 2; the second stage's rows come later, in batches of their own.
    for stage in (0, 1):
        apply(part, source.message(batch=encode_batch(_stack_batch([stage], [0, 1]))), SECOND)
        apply(part, source.message(batch=encode_batch(_stack_batch([stage], [2, 2]))), SECOND)
    routes = _request(part, Stored())
    assert routes.summary.num_tokens == routes.num_tokens == 4
    assert np.frombuffer(routes.position, "<u4").tolist() == [0, 1, 2, 2]
    for layer in routes.layers:
        ids = np.frombuffer(layer.expert_ids, "<u2").reshape(4, 2)
        assert ids.tolist() == [[layer.layer_index, position] for position in (0, 1, 2, 2)]


def test_a_sources_checks_are_kept_and_told() -> None:
    source, stored = LedgerSource(new_id()), Stored()
    part = SessionPart(source.session_id, Limits())
    check = HealthCheck("layers", CheckStatus.FAILED, 12, 3, "layer forwards", "layer 2: lost").to_proto()
    apply(part, source.message(status=pb.SourceStatus(is_healthy=False, checks=[check])), SECOND)
    stored.flush(part)
    again = stored.load(source.session_id, Limits()).sources[source.source_id]
    assert list(source_message(again, is_live=True).checks) == [check]


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
