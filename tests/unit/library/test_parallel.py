"""A rank's place in a sharded model, without ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import build
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_debugger import InvalidInputError, ModelNotSupportedError, MoEDebugger, ParallelCoordinates
from moe_debugger._rank_load import rank_load
from moe_debugger.parallel import detect_coordinates, expert_owners, layer_numbers


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def test_a_process_on_its_own_has_the_first_place(model: Any) -> None:
    place = detect_coordinates(model)
    assert place == ParallelCoordinates()
    assert not place.is_replica
    assert str(place) == "single process"


@contextmanager
def ranks(rank: int, world_size: int) -> Iterator[None]:
    """Make this process one of `world_size` ranks; the others are not there, and nothing may be sent to them."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_ranks_without_a_mesh_have_batches_of_their_own(model: Any) -> None:
    with ranks(3, 4):
        assert detect_coordinates(model) == ParallelCoordinates(
            global_rank=3, world_size=4, data_parallel_rank=3, replica_of_rank=3
        )


def test_a_mesh_of_the_model_gives_the_place() -> None:
    class Sharded(nn.Module):
        device_mesh: Any

    with ranks(5, 8):
        sharded = Sharded()
        sharded.device_mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
        assert detect_coordinates(sharded) == ParallelCoordinates(
            global_rank=5, world_size=8, data_parallel_rank=2, tensor_parallel_rank=1, replica_of_rank=4
        )


def test_the_mesh_of_a_parameter_gives_the_place_and_the_experts_owners() -> None:
    with ranks(7, 8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "ep"))
        block = nn.Module()
        block.w = nn.Parameter(DTensor.from_local(torch.zeros(2, 4, 4), mesh["ep"], [Shard(0)], run_check=False))
        place = detect_coordinates(block)
        assert place == ParallelCoordinates(
            global_rank=7,
            world_size=8,
            data_parallel_rank=7,
            expert_parallel_rank=3,
            expert_parallel_size=4,
            replica_of_rank=7,
        )
        assert expert_owners(block, "", 8, place) == (0, 0, 1, 1, 2, 2, 3, 3)


def test_a_layer_whose_experts_are_whole_has_no_owners() -> None:
    with ranks(1, 2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        block = nn.Module()
        block.w = nn.Parameter(DTensor.from_local(torch.zeros(8, 2, 4), mesh, [Shard(1)], run_check=False))
        place = detect_coordinates(block)
        assert (place.tensor_parallel_rank, place.recording_rank) == (1, 0)
        assert expert_owners(block, "", 8, place) == ()


def test_a_tensor_parallel_rank_is_a_replica_of_the_first_of_its_group() -> None:
    place = ParallelCoordinates(global_rank=5, world_size=8, tensor_parallel_rank=1, data_parallel_rank=2)
    assert (place.is_replica, place.recording_rank) == (True, 4)
    assert str(place) == "rank 5 of 8 (dp 2 tp 1 ep 0 pp 0), replica of rank 4"
    assert place.to_message().replica_of_rank == 4


def test_a_rank_that_names_itself_records() -> None:
    place = ParallelCoordinates(global_rank=5, world_size=8, tensor_parallel_rank=1, replica_of_rank=5)
    assert not place.is_replica
    assert not place.to_message().HasField("replica_of_rank")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"global_rank": 2, "world_size": 2}, "global_rank 2: expected less than world_size, which is 2"),
        ({"tensor_parallel_rank": -1}, "tensor_parallel_rank -1: expected an integer, 0 or more"),
        ({"expert_parallel_rank": 1}, "expert_parallel_rank 1: expected less than expert_parallel_size, which is 1"),
        ({"tensor_parallel_rank": 1}, "global_rank 0 would be a replica of rank -1"),
        ({"world_size": 2, "replica_of_rank": 1}, "global_rank 0 would be a replica of rank 1"),
    ],
)
def test_an_impossible_place_is_refused(values: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        ParallelCoordinates(**values)


def test_experts_belong_to_ranks_in_equal_contiguous_shares(model: Any) -> None:
    place = ParallelCoordinates(world_size=4, expert_parallel_size=4)
    assert expert_owners(model, "model.layers.0.mlp", 8, place) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert expert_owners(model, "model.layers.0.mlp", 8, ParallelCoordinates()) == ()


def test_a_stage_of_an_unknown_pipeline_has_to_say_where_it_begins(model: Any) -> None:
    names = ("layers.0.mlp", "layers.1.mlp")
    place = ParallelCoordinates(global_rank=1, world_size=2, pipeline_parallel_rank=1)
    with pytest.raises(InvalidInputError, match="first_layer_index"):
        layer_numbers(model, names, place)
    place = ParallelCoordinates(global_rank=1, world_size=2, pipeline_parallel_rank=1, first_layer_index=5)
    assert layer_numbers(model, names, place) == (5, 6)


def test_a_stage_of_transformers_counts_the_layers_of_the_whole_model() -> None:
    stage = build("deepseek_v3", num_hidden_layers=6)
    for index in (0, 1, 2, 3):
        stage.model.layers[index] = nn.Identity()
    stage._pp_stage = object()
    place = ParallelCoordinates(global_rank=1, world_size=2, pipeline_parallel_rank=1)
    before = torch.get_rng_state()
    # Layer 0 of 6 is dense, so layers 4 and 5 are MoE layers 3 and 4.
    assert layer_numbers(stage, ("model.layers.4.mlp", "model.layers.5.mlp"), place) == (3, 4)
    assert torch.equal(before, torch.get_rng_state())


def test_a_stage_without_moe_layers_says_so() -> None:
    stage = build("deepseek_v3", num_hidden_layers=2)
    stage.model.layers[1] = nn.Identity()
    stage._pp_stage = object()
    with pytest.raises(ModelNotSupportedError, match="this pipeline stage holds no MoE layer"):
        MoEDebugger(stage)


def test_a_session_numbers_layers_and_rows_by_the_whole_model() -> None:
    model = build("mixtral")
    place = ParallelCoordinates(
        global_rank=3, world_size=4, pipeline_parallel_rank=1, expert_parallel_size=2, first_layer_index=4
    )
    with MoEDebugger(model, coordinates=place) as debugger, torch.no_grad():
        model(torch.randint(3, 96, (2, 5)))
        session = debugger.session
        assert session is not None
        decisions = session.decisions()
        assert sorted(set(decisions.layer_index.tolist())) == [4, 5, 6]
        assert set(decisions.rank.tolist()) == {3}
        assert [info.layer_index for info in debugger.layers()] == [4, 5, 6]
        assert [layer.info.layer_index for layer in session.get_routing_stats().layers] == [4, 5, 6]
        for layer_index in (4, 5, 6):
            ids = decisions.expert_ids[decisions.layer_index == layer_index]
            by_rank = [row.num_assignments for row in session.rank_load().layer(layer_index)]
            assert by_rank == [int((ids < 4).sum()), int((ids >= 4).sum())]
        owners = [row.expert_parallel_rank for row in session.get_expert_metrics().layer(4)]
        assert owners == [0, 0, 0, 0, 1, 1, 1, 1]


def test_rank_load_sums_the_experts_of_each_rank(model: Any) -> None:
    with MoEDebugger(model) as debugger:
        layers = debugger.layers()
    counts = {0: np.array([4, 0, 1, 3, 8, 0, 0, 0], np.uint64)}
    load = rank_load("s", layers[:2], counts, {0: (0, 0, 0, 0, 1, 1, 1, 1)})
    assert [(row.expert_parallel_rank, row.num_experts, row.num_assignments) for row in load.rows] == [
        (0, 4, 8),
        (1, 4, 8),
    ]
    assert [row.load_ratio for row in load.rows] == [1.0, 1.0]
    assert "ep rank" in str(load)
    assert "every rank computes all experts" in str(rank_load("s", layers, counts, {}))
