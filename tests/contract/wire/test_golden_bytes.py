"""Messages written by an earlier build of each format version still read the same.

A file is added with a release, never changed. `python tests/contract/wire/test_golden_bytes.py` writes a new one.
"""

from pathlib import Path
from typing import Any

import numpy as np

from moe_debugger.capture_health import CheckStatus, HealthCheck
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import (
    CountsColumns,
    LayerColumns,
    LayerCountColumns,
    RoutingColumns,
    decode_batch,
    decode_counts,
    encode_batch,
    encode_counts,
    format_version,
)

FOLDER = Path(__file__).parent / "v1"
GOLDEN = FOLDER / "routing_batch.binpb"
# Identity experts, dropped slots without an id, an encoder's and a decoder's rows: what version 1.0 could not say.
GOLDEN_SLOTS = FOLDER / "routing_batch_slots.binpb"
GOLDEN_COUNTS = FOLDER / "counts_batch.binpb"
GOLDEN_STATUS = FOLDER / "source_status.binpb"


def golden_columns() -> RoutingColumns:
    return RoutingColumns(
        step=np.array([7, 7, 8], np.uint64),
        forward_index=np.array([70, 70, 71], np.uint64),
        request_ids=["01jdabcdefghjkmnpqrstvwxyz", "01jdabcdefghjkmnpqrstvwxy0"],
        request_index=np.array([0, 1, 1], np.uint32),
        position=np.array([0, 3, 4], np.uint32),
        phase=np.array([pb.PHASE_PREFILL, pb.PHASE_DECODE, pb.PHASE_DECODE], np.uint8),
        is_padding=np.array([True, False, False]),
        token_id=np.array([0, 104, 105], np.uint32),
        layers=[
            LayerColumns(
                layer_index=0,
                num_experts=8,
                expert_ids=np.array([[0, 1], [7, 2], [3, -1]], np.int32),
                gate_weights=np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], np.float32),
                slot_status=np.array([[1, 1], [1, 1], [1, 2]], np.uint8),
                router_entropy=np.array([2.0, 1.0, 0.5], np.float32),
            ),
            LayerColumns(
                layer_index=1,
                num_experts=300,
                expert_ids=np.array([[299], [0]], np.int32),
                row_index=np.array([0, 2], np.uint32),
                probability_sum=np.arange(300, dtype=np.float64),
            ),
        ],
        captured_at_unix_ns=1_700_000_000_000_000_000,
    )


def golden_slots() -> RoutingColumns:
    columns = golden_columns()
    columns.layers = [
        LayerColumns(
            layer_index=0,
            num_experts=254,
            num_identity_experts=2,
            expert_ids=np.array([[253, 254], [255, 0], [3, -1]], np.int32),
            gate_weights=np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], np.float32),
            slot_status=np.array([[1, 4], [4, 1], [1, 2]], np.uint8),
            intended_expert_ids=np.array([[253, 254], [255, 0], [3, 9]], np.int32),
        ),
        LayerColumns(
            layer_index=1,
            num_experts=8,
            expert_ids=np.zeros((0, 2), np.int32),
            row_index=np.zeros(0, np.uint32),
        ),
    ]
    return columns


def golden_counts() -> CountsColumns:
    counts = np.array([3, 0, 1, 0], np.uint64)
    layers = [LayerCountColumns(0, 4, 2, 5, 1, counts, 3, 2, 1, np.array([2.0, 1.0, 1.0, 1.0]))]
    return CountsColumns(7, 9, pb.PHASE_TRAIN, 1_700_000_000_000_000_000, layers)


def golden_status() -> pb.SourceStatus:
    check = HealthCheck("range", CheckStatus.FAILED, 48, 1, "slots", "expert 9 of a layer whose ids are 0 to 7")
    return pb.SourceStatus(last_step=7, is_healthy=False, checks=[check.to_proto()])


def golden_message() -> pb.SourceMessage:
    return _message(batch=encode_batch(golden_columns()))


def _message(**payload: Any) -> pb.SourceMessage:
    return pb.SourceMessage(
        format_version=format_version(),
        source_id="01jdabcdefghjkmnpqrstvwxyz",
        sequence=2,
        sent_at_unix_ns=1_700_000_000_000_000_001,
        **payload,
    )


def _read(path: Path) -> pb.SourceMessage:
    return pb.SourceMessage.FromString(path.read_bytes())


def test_the_golden_batch_of_format_1_reads_as_it_was_written() -> None:
    message = _read(GOLDEN)
    assert (message.source_id, message.sequence) == ("01jdabcdefghjkmnpqrstvwxyz", 2)
    read, wanted = decode_batch(message.batch, {0: 8, 1: 300}), golden_columns()
    for name in ("step", "forward_index", "request_index", "position", "phase", "is_padding", "token_id"):
        np.testing.assert_array_equal(getattr(read, name), getattr(wanted, name), err_msg=name)
    for layer, expected in zip(read.layers, wanted.layers, strict=True):
        for name in ("expert_ids", "gate_weights", "slot_status", "router_entropy", "row_index", "probability_sum"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(expected, name), err_msg=name)


def test_the_golden_batch_with_identity_experts_reads_as_it_was_written() -> None:
    read = decode_batch(_read(GOLDEN_SLOTS).batch, {0: 254, 1: 8}, {0: 2})
    for layer, expected in zip(read.layers, golden_slots().layers, strict=True):
        for name in ("expert_ids", "gate_weights", "slot_status", "intended_expert_ids", "row_index"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(expected, name), err_msg=name)
        assert layer.num_identity_experts == expected.num_identity_experts


def test_the_golden_counts_read_as_they_were_written() -> None:
    read, wanted = decode_counts(_read(GOLDEN_COUNTS).counts, {0: 4}, {0: 2}), golden_counts()
    assert (read.first_step, read.last_step, read.phase) == (wanted.first_step, wanted.last_step, wanted.phase)
    for name in LayerCountColumns.__slots__:
        np.testing.assert_array_equal(getattr(read.layers[0], name), getattr(wanted.layers[0], name), err_msg=name)


def test_the_golden_status_reads_its_checks() -> None:
    (check,) = _read(GOLDEN_STATUS).status.checks
    assert HealthCheck.from_proto(check) == HealthCheck.from_proto(golden_status().checks[0])
    assert HealthCheck.from_proto(check).status is CheckStatus.FAILED


if __name__ == "__main__":
    for path, message in (
        (GOLDEN, golden_message()),
        (GOLDEN_SLOTS, _message(batch=encode_batch(golden_slots()))),
        (GOLDEN_COUNTS, _message(counts=encode_counts(golden_counts()))),
        (GOLDEN_STATUS, _message(status=golden_status())),
    ):
        if not path.exists():
            path.write_bytes(message.SerializeToString(deterministic=True))
