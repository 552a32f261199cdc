"""Files of SGLang's expert distribution recorder: their counts by replica and rank, and clear words for others."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_debugger
from moe_debugger import InvalidInputError
from moe_debugger.engines import read_expert_distribution

torch = pytest.importorskip("torch")

LAYERS, EXPERTS, TOP_K = 4, 8, 2
# The first layer is dense; 10 replicas of 8 experts, placed differently in each layer.
MOE_LAYERS = [1, 2, 3]
REPLICAS = np.stack([np.random.default_rng(layer).permutation([*range(EXPERTS), 1, 6]) for layer in range(LAYERS)])


def _counts(seed: int, tokens: int = 12) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return assignments of `tokens` tokens, [layers, experts]."""
    random, counts = np.random.default_rng(seed), np.zeros((LAYERS, EXPERTS), np.int64)
    for layer in MOE_LAYERS:
        for _ in range(tokens):
            for expert in random.permutation(EXPERTS)[:TOP_K]:
                counts[layer, expert] += 1
    return counts


def _physical(logical: "np.ndarray[Any, Any]", seed: int) -> Any:
    """Split each logical expert's count over its replicas, at random."""
    random = np.random.default_rng(seed)
    physical = np.zeros(REPLICAS.shape, np.int32)
    for (layer, expert), number in np.ndenumerate(logical):
        replicas = np.flatnonzero(REPLICAS[layer] == expert)
        for _ in range(int(number)):
            physical[layer, random.choice(replicas)] += 1
    return torch.from_numpy(physical)


def _record(number: int, rank: int, logical: "np.ndarray[Any, Any]", **fields: Any) -> dict[str, Any]:
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": _physical(logical, number),
        **fields,
    }


def _save(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"expert_distribution_recorder_{name}.pt"
    torch.save(content, path)
    return path


def _per_pass(folder: Path, rank: int, counts: list[Any], **fields: Any) -> Path:
    records = [_record(number, rank, one, **fields) for number, one in enumerate(counts)]
    return _save(
        folder, f"1.5_{rank}", {"records": records, "last_physical_to_logical_map": torch.from_numpy(REPLICAS)}
    )


def test_counts_of_the_stat_mode(tmp_path: Path) -> None:
    passes = [_counts(seed) for seed in range(3)]
    # A ring buffer of 5 places of which 3 were filled.
    buffered = np.stack([*passes, np.zeros_like(passes[0]), np.zeros_like(passes[0])])
    path = _save(
        tmp_path,
        "1.0",
        {
            "rank": 0,
            "logical_count": torch.from_numpy(buffered.astype(np.int32)),
            "average_utilization_rate_over_window": None,
        },
    )
    distribution = read_expert_distribution(path)
    assert (distribution.mode, distribution.num_experts, distribution.num_model_layers) == ("stat", EXPERTS, LAYERS)
    assert distribution.model_layer_indices == (1, 2, 3)
    assert distribution.problems == ("layers [0] have no counts: dense layers, or not recorded",)
    assert np.array_equal(distribution.counts, np.stack(passes)[:, MOE_LAYERS])
    assert distribution.top_k_problems(TOP_K) == ()
    state = distribution.state(TOP_K)
    for place, layer in enumerate(MOE_LAYERS):
        assert state.layers[place].counts.tolist() == sum(passes)[layer].tolist()  # type: ignore[index]
        assert state.layers[place].num_tokens == 36
    analysis = distribution.analyze(TOP_K)
    load = sum(passes)[1]  # type: ignore[index]
    share = load / load.sum()
    assert analysis.metrics[0].load_entropy == pytest.approx(float(-(share * np.log(share)).sum()), abs=1e-6)


def test_ranks_of_the_per_pass_mode_are_added_and_replicas_mapped(tmp_path: Path) -> None:
    by_rank = {rank: [_counts(10 * rank + number) for number in range(3)] for rank in range(2)}
    paths = [_per_pass(tmp_path, rank, counts) for rank, counts in by_rank.items()]
    expected = np.stack([by_rank[0][number] + by_rank[1][number] for number in range(3)])[:, MOE_LAYERS]
    for given in (tmp_path, str(tmp_path), paths, paths[::-1]):
        distribution = read_expert_distribution(given)
        assert (distribution.mode, distribution.forward_pass_ids) == ("per_pass", (0, 1, 2))
        assert np.array_equal(distribution.counts, expected)


def test_equal_ranks_are_not_added_unless_told(tmp_path: Path) -> None:
    counts = [_counts(number) for number in range(3)]
    for rank in range(2):
        _per_pass(tmp_path, rank, counts)
    with pytest.raises(InvalidInputError, match=r"ranks \[0, 1\] have equal counts in all 3 passes"):
        read_expert_distribution(tmp_path)
    once = np.stack(counts)[:, MOE_LAYERS]
    assert np.array_equal(read_expert_distribution(tmp_path, ranks="first").counts, once)
    assert np.array_equal(read_expert_distribution(tmp_path, ranks="sum").counts, 2 * once)


def test_the_per_token_mode_gives_its_counts(tmp_path: Path) -> None:
    fields = {
        "input_ids": [1, 2, 3],
        "positions": [0, 1, 2],
        "extend_seq_lens": [3],
        "forward_mode": 1,
        "topk_ids_of_layer": torch.full((LAYERS, 3, 8), -1, dtype=torch.int32),
        "misc_objects": [],
    }
    counts = [_counts(1), _counts(2)]
    distribution = read_expert_distribution(_per_pass(tmp_path, 0, counts, **fields))
    assert distribution.mode == "per_token"
    assert np.array_equal(distribution.counts, np.stack(counts)[:, MOE_LAYERS])


def test_a_recording_is_pushed_into_a_source(tmp_path: Path) -> None:
    counts = [_counts(number) for number in range(4)]
    distribution = read_expert_distribution(_per_pass(tmp_path, 0, counts))
    with moe_debugger.open_source(distribution.layers(TOP_K)) as source:
        assert distribution.publish(source) == 4
        stats = source.get_routing_stats()
        assert [layer.expert_counts.tolist() for layer in stats.layers] == [
            sum(counts)[layer].tolist()  # type: ignore[index]
            for layer in MOE_LAYERS
        ]
        assert [layer.num_tokens for layer in stats.layers] == [48] * 3
        assert source.account().num_decisions == 48 * 3
        assert np.isnan(source.get_expert_metrics().experts[0].mean_gate_weight)
    with (
        moe_debugger.open_source(num_layers=2, num_experts=EXPERTS, top_k=TOP_K) as other,
        pytest.raises(InvalidInputError, match="3 MoE layers with 8 experts, the source 2 layers"),
    ):
        distribution.publish(other)


def test_a_wrong_top_k_and_unequal_layers_are_said(tmp_path: Path) -> None:
    counts = _counts(1, tokens=11)
    counts[2, 0] += 2
    distribution = read_expert_distribution(_per_pass(tmp_path, 0, [counts]))
    assert [text.partition(":")[0] for text in distribution.top_k_problems(TOP_K)] == ["pass 0"]
    assert "22 to 24 assignments" in distribution.top_k_problems(TOP_K)[0]
    assert "no multiple of k = 5" in distribution.top_k_problems(5)[0]
    with pytest.raises(InvalidInputError, match="top_k is 9"):
        distribution.state(9)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/moe-debugger-was-executed"),))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"logical_count": torch.zeros((2, 3))}, "shape .* and dtype float"),
        ({"logical_count": torch.zeros((2, 3), dtype=torch.int32)}, "expected integers with 3 axes"),
        ({"logical_count": torch.zeros((0, 3, 4), dtype=torch.int32)}, "none of them empty"),
        ({"logical_count": torch.zeros((2, 3, 4), dtype=torch.int32)}, "all counts are 0"),
        ({"logical_count": torch.full((2, 3, 4), -1)}, "a counter of SGLang overflowed"),
        ({"records": [], "last_physical_to_logical_map": torch.zeros((1, 1))}, "has no records"),
        ({"records": [{"rank": 0}], "last_physical_to_logical_map": torch.zeros((1, 1))}, "no global_physical_count"),
        (
            {
                "records": [{"forward_pass_id": 0, "rank": 0, "global_physical_count": torch.ones((2, 3)).int()}],
                "last_physical_to_logical_map": torch.zeros((2, 4)).int(),
            },
            r"counts \(2, 3\) layers x replicas, but the map of replicas has \(2, 4\)",
        ),
        ({"state_dict": {}}, r"has the keys \['state_dict'\]; expected logical_count"),
        ([1, 2], "holds a list"),
        ({"logical_count": _Harmful()}, "cannot be read as tensors and plain values"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        read_expert_distribution(_save(tmp_path, "0", content))
    assert not Path("/tmp/moe-debugger-was-executed").exists()


def test_files_that_are_none_and_places_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no expert_distribution_recorder"):
        read_expert_distribution(tmp_path)
    with pytest.raises(InvalidInputError, match="is no file"):
        read_expert_distribution(tmp_path / "missing.pt")
    with pytest.raises(InvalidInputError, match="no file is given"):
        read_expert_distribution([])
    text = tmp_path / "a.pt"
    text.write_text("not a dump")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_expert_distribution(text)
    text.write_bytes(pickle.dumps({"logical_count": [1]}))
    with pytest.raises(InvalidInputError):
        read_expert_distribution(text)


def test_files_of_several_recordings_are_refused(tmp_path: Path) -> None:
    stat = _save(tmp_path, "1.0", {"rank": 0, "logical_count": torch.ones((1, 2, 4), dtype=torch.int32)})
    per_pass = _per_pass(tmp_path, 0, [_counts(1)])
    with pytest.raises(InvalidInputError, match="files of modes per_pass and stat"):
        read_expert_distribution(tmp_path)
    with pytest.raises(InvalidInputError, match="pass 0 of rank 0 is there twice"):
        read_expert_distribution([per_pass, per_pass])
    other = _save(tmp_path, "2.0", {"rank": 0, "logical_count": torch.ones((1, 3, 4), dtype=torch.int32)})
    with pytest.raises(InvalidInputError, match="layers x experts"):
        read_expert_distribution([stat, other])
