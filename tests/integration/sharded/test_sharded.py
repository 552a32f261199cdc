"""Ranks of a sharded model see what one process sees, with global ids, and what is replicated counts once."""

from typing import Any

import numpy as np
import pytest

# Sharded sums differ in the last bits of float32.
WEIGHT_TOLERANCE = 1e-5
TP = {"tp_plan": "auto"}
EP = {"tp_size": 2, "ep_size": 2}
ALL_TO_ALL = {**EP, "ep_implementation": "all_to_all"}


def assert_equal_to_one_process(rank: Any, reference: Any) -> None:
    """The rank's rows are those of the reference, at every layer that the rank has."""
    assert rank.report["problems"] == {}
    for index, module_name, num_experts, top_k in rank.report["layers"]:
        ids, weights = rank.layer(index)
        expected_ids, expected_weights = reference.layer(module_name)
        assert num_experts == 8
        assert ids.shape[1] == top_k
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(weights, expected_weights, atol=WEIGHT_TOLERANCE)
    assert (rank.columns["rank"] == rank.report["coordinates"]["global_rank"]).all()


def assert_rank_load(rank: Any, reference: Any, num_ranks: int) -> None:
    """Per-rank load is the load of the experts that the rank holds, and adds up to the total."""
    rows = rank.report["rank_load"]
    assert len(rows) == num_ranks * len(rank.report["layers"])
    for index, module_name, num_experts, top_k in rank.report["layers"]:
        counts = reference.counts(module_name, num_experts)
        assert counts.sum() == top_k * reference.is_valid.sum()
        here = [row for row in rows if row["layer_index"] == index]
        by_rank = [row["num_assignments"] for row in here]
        assert by_rank == counts.reshape(num_ranks, -1).sum(axis=1).tolist()
        assert [row["num_experts"] for row in here] == [num_experts // num_ranks] * num_ranks


def coordinates(rank: Any) -> tuple[int, ...]:
    place = rank.report["coordinates"]
    names = ("data_parallel_rank", "tensor_parallel_rank", "expert_parallel_rank", "pipeline_parallel_rank")
    return tuple(place[name] for name in names)


def test_tensor_and_expert_parallel_ranks_see_what_one_process_sees(torchrun: Any, reference: Any) -> None:
    ran = torchrun(
        2, [{"name": "tp", "model": "mixtral", "config": TP}, {"name": "ep", "model": "mixtral", "config": EP}]
    )
    one = reference("mixtral")
    for name in ("tp", "ep"):
        for rank in ran[name]:
            np.testing.assert_array_equal(rank.columns["tokens"], one.tokens)
            assert_equal_to_one_process(rank, one)
        assert [rank.report["is_replica"] for rank in ran[name]] == [False, True]
    assert [coordinates(rank) for rank in ran["tp"]] == [(0, 0, 0, 0), (0, 1, 0, 0)]
    assert [coordinates(rank) for rank in ran["ep"]] == [(0, 0, 0, 0), (0, 1, 1, 0)]
    assert ran["tp"][0].report["rank_load"] == []
    for rank in ran["ep"]:
        assert_rank_load(rank, one, 2)
        assert rank.report["owners"] == [0, 0, 0, 0, 1, 1, 1, 1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("plan", ["tp", "ep", "all_to_all"])
def test_a_shared_batch_is_recorded_by_the_lowest_rank(torchrun: Any, reference: Any, name: str, plan: str) -> None:
    config = {"tp": TP, "ep": EP, "all_to_all": ALL_TO_ALL}[plan]
    ranks = torchrun(2, [{"name": plan, "model": name, "config": config}])[plan]
    for rank in ranks:
        np.testing.assert_array_equal(rank.columns["tokens"], reference(name).tokens)
        assert_equal_to_one_process(rank, reference(name))
        if plan != "tp":
            assert_rank_load(rank, reference(name), 2)
    assert [rank.report["is_replica"] for rank in ranks] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_ranks_with_batches_of_their_own_all_record(torchrun: Any, reference: Any, name: str) -> None:
    config = {"fsdp_size": 2, "ep_size": 2}
    ranks = torchrun(2, [{"name": "dp", "model": name, "config": config, "own_batch": True}])["dp"]
    assert [rank.report["is_replica"] for rank in ranks] == [False, False]
    assert [coordinates(rank) for rank in ranks] == [(0, 0, 0, 0), (1, 0, 1, 0)]
    for batch, rank in enumerate(ranks):
        np.testing.assert_array_equal(rank.columns["tokens"], reference(name, batch).tokens)
        assert_equal_to_one_process(rank, reference(name, batch))
        assert_rank_load(rank, reference(name, batch), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_pipeline_stages_number_their_layers_globally(torchrun: Any, reference: Any, name: str) -> None:
    ranks = torchrun(2, [{"name": "pp", "model": name, "config": {"pp_size": 2}}])["pp"]
    assert [coordinates(rank) for rank in ranks] == [(0, 0, 0, 0), (0, 0, 0, 1)]
    assert_stages(ranks, reference(name, is_padded=False), num_dense=1 if name == "deepseek_v3" else 0)


@pytest.mark.slow
def test_four_stages_hold_one_layer_each(torchrun: Any, reference: Any) -> None:
    ranks = torchrun(4, [{"name": "pp", "model": "mixtral", "config": {"pp_size": 4}}], timeout_s=110)["pp"]
    assert [[layer[0] for layer in rank.report["layers"]] for rank in ranks] == [[0], [1], [2], [3]]
    assert_stages(ranks, reference("mixtral", is_padded=False), num_dense=0)


def assert_stages(ranks: Any, one: Any, num_dense: int) -> None:
    """The stages' layers are those of the whole model, each once; dense layers before them take no index."""
    assert [rank.report["is_replica"] for rank in ranks] == [False] * len(ranks)
    layers = [layer for rank in ranks for layer in rank.report["layers"]]
    assert [(index, module) for index, module, _, _ in layers] == [
        (index, f"model.layers.{index + num_dense}.mlp") for index in range(4 - num_dense)
    ]
    for rank in ranks:
        np.testing.assert_array_equal(rank.columns["tokens"], one.tokens)
        assert_equal_to_one_process(rank, one)
        here = rank.columns["layer_index"] == rank.report["layers"][0][0]
        # Two prompts of 7 tokens, then two rows per forward: told apart at every stage.
        assert rank.columns["phase"][here].tolist() == [1] * 14 + [2] * 4
        assert rank.columns["request_index"][here].tolist() == [0] * 7 + [1] * 7 + [0, 1] * 2
        assert rank.columns["position"][here].tolist() == [*range(7), *range(7), 7, 7, 8, 8]


@pytest.mark.slow
def test_four_ranks_of_data_and_tensor_parallelism_record_each_batch_once(torchrun: Any, reference: Any) -> None:
    config = {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}
    job = {"name": "four", "model": "mixtral", "config": config, "own_batch": True}
    ranks = torchrun(4, [job], timeout_s=110)["four"]
    assert [coordinates(rank) for rank in ranks] == [(0, 0, 0, 0), (0, 1, 1, 0), (1, 0, 2, 0), (1, 1, 3, 0)]
    assert [rank.report["coordinates"]["replica_of_rank"] for rank in ranks] == [0, 0, 2, 2]
    assert [rank.report["is_replica"] for rank in ranks] == [False, True, False, True]
    for rank in ranks:
        batch = rank.report["coordinates"]["data_parallel_rank"]
        assert_equal_to_one_process(rank, reference("mixtral", batch))
        assert_rank_load(rank, reference("mixtral", batch), 4)
