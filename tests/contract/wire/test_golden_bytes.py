"""Messages written by an earlier build of each format version still read the same.

A file is added with a release, never changed. `python tests/contract/wire/test_golden_bytes.py` writes a new one.
"""

from pathlib import Path

import numpy as np

from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns, decode_batch, encode_batch, format_version

GOLDEN = Path(__file__).parent / "v1" / "routing_batch.binpb"


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
                gate_weights=np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], np.float16),
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


def golden_message() -> pb.SourceMessage:
    return pb.SourceMessage(
        format_version=format_version(),
        source_id="01jdabcdefghjkmnpqrstvwxyz",
        sequence=2,
        sent_at_unix_ns=1_700_000_000_000_000_001,
        batch=encode_batch(golden_columns()),
    )


def test_the_golden_batch_of_format_1_reads_as_it_was_written() -> None:
    message = pb.SourceMessage.FromString(GOLDEN.read_bytes())
    assert (message.source_id, message.sequence) == ("01jdabcdefghjkmnpqrstvwxyz", 2)
    read, wanted = decode_batch(message.batch, {0: 8, 1: 300}), golden_columns()
    for name in ("step", "forward_index", "request_index", "position", "phase", "is_padding", "token_id"):
        np.testing.assert_array_equal(getattr(read, name), getattr(wanted, name), err_msg=name)
    for layer, expected in zip(read.layers, wanted.layers, strict=True):
        for name in ("expert_ids", "gate_weights", "slot_status", "router_entropy", "row_index", "probability_sum"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(expected, name), err_msg=name)


if __name__ == "__main__":
    GOLDEN.write_bytes(golden_message().SerializeToString(deterministic=True))
