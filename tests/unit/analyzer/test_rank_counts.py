"""A layer's load per expert-parallel rank in the snapshot."""

import numpy as np
import pytest

from moe_analyzer._wire import layer_snapshot, source_message
from moe_analyzer.aggregate import SourceState
from moe_debugger.analysis import LayerShape, LayerState
from moe_debugger.analysis.step_loads import StepSample
from moe_debugger.v1 import routing_pb2 as pb


def test_a_snapshot_sums_the_assignments_of_each_ranks_experts() -> None:
    layer = LayerState.empty(LayerShape(0, 4, 2))
    layer.counts[:] = np.array([1, 2, 30, 4], np.uint64)
    description = pb.LayerDescription(num_experts=4, top_k=2, expert_parallel_ranks=[0, 1, 1, 0])
    assert list(layer_snapshot(description, layer, None).expert_parallel_counts) == [5, 32]
    description.ClearField("expert_parallel_ranks")
    assert list(layer_snapshot(description, layer, None).expert_parallel_counts) == []


def test_a_snapshot_says_how_uneven_the_ranks_are_in_single_steps() -> None:
    layer = LayerState.empty(LayerShape(0, 4, 2))
    # Each rank is the fuller one in its turn: even in the sum, and yet each step waits for 1.5 times the mean.
    turns, steps = np.array([[3, 1, 0, 0], [0, 1, 2, 1]], np.uint64), np.arange(2, dtype=np.uint64)
    layer.counts[:] = turns.sum(axis=0)
    layer.step_sample = StepSample(steps, steps, turns, turns.sum(axis=1) // 2)
    description = pb.LayerDescription(num_experts=4, top_k=2, expert_parallel_ranks=[0, 1, 1, 0])
    snapshot = layer_snapshot(description, layer, None)
    assert list(snapshot.expert_parallel_counts) == [4, 4]
    assert snapshot.num_rank_steps == 2
    assert snapshot.rank_step_imbalance == pytest.approx(1.5)
    assert snapshot.rank_waste_share == pytest.approx(1 / 3)
    layer.step_sample = StepSample.empty(4)
    for nothing in (layer_snapshot(description, layer, None), layer_snapshot(None, layer, None)):
        assert not nothing.num_rank_steps
        assert not nothing.HasField("rank_step_imbalance")
        assert not nothing.HasField("rank_waste_share")


def test_a_source_has_the_coordinates_of_its_manifest() -> None:
    coordinates = pb.ParallelCoordinates(global_rank=1, world_size=2, tensor_parallel_rank=1, replica_of_rank=0)
    source = SourceState("a", manifest=pb.SourceManifest(coordinates=coordinates))
    assert source_message(source, is_live=True).coordinates == coordinates
