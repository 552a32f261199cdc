"""A layer's load per expert-parallel rank in the snapshot."""

import numpy as np

from moe_analyzer._wire import layer_snapshot, source_message
from moe_analyzer.aggregate import SourceState
from moe_debugger.analysis import LayerShape, LayerState
from moe_debugger.v1 import routing_pb2 as pb


def test_a_snapshot_sums_the_assignments_of_each_ranks_experts() -> None:
    layer = LayerState.empty(LayerShape(0, 4, 2))
    layer.counts[:] = np.array([1, 2, 30, 4], np.uint64)
    description = pb.LayerDescription(num_experts=4, top_k=2, expert_parallel_ranks=[0, 1, 1, 0])
    assert list(layer_snapshot(description, layer, None).expert_parallel_counts) == [5, 32]
    description.ClearField("expert_parallel_ranks")
    assert list(layer_snapshot(description, layer, None).expert_parallel_counts) == []


def test_a_source_has_the_coordinates_of_its_manifest() -> None:
    coordinates = pb.ParallelCoordinates(global_rank=1, world_size=2, tensor_parallel_rank=1, replica_of_rank=0)
    source = SourceState("a", manifest=pb.SourceManifest(coordinates=coordinates))
    assert source_message(source, is_live=True).coordinates == coordinates
