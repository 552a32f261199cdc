"""One session's live counts: a snapshot with deltas applied on top. Pure logic, no I/O.

Each partition numbers its flushes; a delta leads from flush - 1 to flush. An older one is in the snapshot already, a
hole means that one was lost and that only a new snapshot helps. The session's sequence is the sum over its partitions.

Example: a snapshot with flushes {3: 7} and count 10, then a delta of partition 3, flush 8, count 2: count 12,
sequence 8.
"""

from collections.abc import Mapping
from enum import Enum

import numpy as np
import numpy.typing as npt

from moe_debugger.v1 import control_pb2, gateway_pb2, session_pb2

__all__ = ["Applied", "LiveState"]


class Applied(Enum):
    """What became of a delta."""

    DONE = "done"
    OLD = "old"
    # A delta is missing, or it does not fit the snapshot's layers: take a new snapshot.
    HOLE = "hole"


class LiveState:
    """Counts of one session, advanced by deltas.

    Raises:
        ValueError: the snapshot contradicts itself.
    """

    def __init__(self, snapshot: session_pb2.SessionSnapshot, partition_flushes: Mapping[int, int]) -> None:
        self._snapshot = snapshot
        self._flushes = dict(partition_flushes)
        self._slices: dict[int, tuple[int, slice]] = {}
        parts = []
        start = 0
        for row, layer in enumerate(snapshot.layers):
            num_experts = layer.description.num_experts
            # An empty column is a layer that no token has reached yet.
            counts = np.frombuffer(layer.expert_counts, "<u8") if layer.expert_counts else np.zeros(num_experts, "<u8")
            if len(counts) != num_experts:
                raise ValueError(
                    f"layer {layer.description.layer_index} of the snapshot has {len(counts)} counts "
                    f"for {num_experts} experts"
                )
            self._slices[layer.description.layer_index] = (row, slice(start, start + num_experts))
            parts.append(counts)
            start += num_experts
        self._counts: npt.NDArray[np.uint64] = np.concatenate(parts) if parts else np.zeros(0, "<u8")
        self._num_tokens: npt.NDArray[np.uint64] = np.array([layer.num_tokens for layer in snapshot.layers], "<u8")
        self.last_step = snapshot.last_step
        self.sequence = sum(self._flushes.values())

    def apply(self, delta: control_pb2.LiveDelta) -> Applied:
        """Apply a delta wholly or not at all."""
        last = self._flushes.get(delta.partition, 0)
        if delta.flush <= last:
            return Applied.OLD
        if delta.flush != last + 1:
            return Applied.HOLE
        updates = []
        for layer in delta.layers:
            row, span = self._slices.get(layer.layer_index, (-1, slice(0, 0)))
            if row < 0 or len(layer.expert_counts) not in (0, 4 * (span.stop - span.start)):
                return Applied.HOLE
            updates.append((row, span, layer))
        for row, span, layer in updates:
            if layer.expert_counts:
                self._counts[span] += np.frombuffer(layer.expert_counts, "<u4")
            self._num_tokens[row] += np.uint64(layer.num_tokens)
        self._flushes[delta.partition] = delta.flush
        self.sequence += 1
        self.last_step = max(self.last_step, delta.last_step)
        return Applied.DONE

    def to_frame(self) -> gateway_pb2.WatchFrame:
        """Return the absolute counts of all layers."""
        return gateway_pb2.WatchFrame(
            sequence=self.sequence,
            expert_counts=self._counts.tobytes(),
            num_tokens=self._num_tokens.tobytes(),
            last_step=self.last_step,
        )

    def to_snapshot(self, *, with_counts: bool = True) -> session_pb2.SessionSnapshot:
        """Return the snapshot with today's counts, or with none for a client that has them."""
        snapshot = session_pb2.SessionSnapshot()
        snapshot.CopyFrom(self._snapshot)
        snapshot.sequence = self.sequence
        snapshot.last_step = self.last_step
        for layer in snapshot.layers:
            row, span = self._slices[layer.description.layer_index]
            layer.num_tokens = int(self._num_tokens[row])
            layer.expert_counts = self._counts[span].tobytes() if with_counts else b""
        return snapshot
