"""Nearly equal experts, and experts that are always chosen together."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import FindingKind, Severity, aligned_similarity, expert_coactivation
from moe_debugger.analysis.duplicates import always_together, duplicate_weights, near_duplicate_experts
from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import render_finding


def table_of(num: int, level: float, pairs: dict[tuple[int, int], float], *, noise: float = 0.0) -> Any:
    rng = np.random.default_rng(0)
    table = np.eye(num)
    for i, j in itertools.combinations(range(num), 2):
        table[i, j] = table[j, i] = pairs.get((i, j), level + noise * rng.normal())
    return table


def test_the_one_pair_that_stands_out_is_found() -> None:
    found = near_duplicate_experts(table_of(4, 0.2, {(1, 3): 0.98}))
    assert [(pair.expert_a, pair.expert_b, pair.similarity) for pair in found.pairs] == [(1, 3, 0.98)]
    # (0.98 - 0.2) / 0.01: the other pairs have no spread, and 0.01 is the least that counts.
    assert found.pairs[0].excess == pytest.approx(78)
    assert (found.num_pairs, found.median, found.is_uniformly_alike) == (6, 0.2, False)


def test_copies_of_one_dense_layer_are_no_duplicates_of_each_other() -> None:
    found = near_duplicate_experts(table_of(8, 0.98, {}, noise=0.002))
    assert found.pairs == ()
    assert found.is_uniformly_alike
    # All rather alike, and one pair a little more: above the threshold, but it does not stand out.
    crowd = near_duplicate_experts(table_of(8, 0.85, {(0, 1): 0.91}, noise=0.02))
    assert crowd.pairs == ()
    assert not crowd.is_uniformly_alike


def test_unknown_and_too_few_pairs_are_said() -> None:
    few = near_duplicate_experts(table_of(2, 0.95, {}))
    assert few.pairs == ()
    assert "0 other pairs" in few.not_applicable
    unknown = np.full((3, 3), np.nan)
    assert "fewer than two experts" in near_duplicate_experts(unknown).not_applicable
    with pytest.raises(InvalidInputError, match="symmetric"):
        near_duplicate_experts([[1, 0.5], [0.4, 1]])
    with pytest.raises(InvalidInputError, match="threshold"):
        near_duplicate_experts(np.eye(4), threshold=0)
    assert found_dict(few)["threshold"] == 0.9


def found_dict(found: Any) -> dict[str, Any]:
    values: dict[str, Any] = found.to_dict()
    return values


def test_healthy_layers_have_no_near_duplicates() -> None:
    # 200 layers of 16 experts with similarities as unrelated random weights have them.
    rng = np.random.default_rng(1)
    for _ in range(200):
        weights = rng.normal(size=(16, 64)) + 0.5 * rng.normal(size=64)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        cosine = np.clip(weights @ weights.T, -1, 1)
        assert near_duplicate_experts((cosine + cosine.T) / 2).pairs == ()


def rows_of(ids: Any) -> dict[str, Any]:
    return {"layer_index": np.zeros(len(ids), np.int64), "expert_ids": np.asarray(ids, np.int32)}


def test_two_experts_that_share_their_tokens_are_found() -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2000, 6)), axis=1)[:, :2] + 2  # Experts 2..7.
    ids[:400] = [0, 1]
    table = expert_coactivation(rows_of(ids), num_experts=8, top_k=2)[0]
    found = always_together(table.counts, table.expert_tokens, num_tokens=2000)  # type: ignore[arg-type]
    assert [(pair.expert_a, pair.expert_b) for pair in found] == [(0, 1)]
    assert (found[0].num_together, found[0].num_either, found[0].jaccard) == (400, 400, 1)
    # Wilson with 400 of 400: 1 / (1 + z^2 / 400).
    assert found[0].lower == pytest.approx(400 / (400 + 1.6448536269514722**2))
    assert found[0].expected == pytest.approx(0.2 * 0.2 / 0.36)
    # With tokens as alike as 40 at a time there are 10 trials: not enough for 0.9.
    counts = table.counts
    assert counts is not None
    assert always_together(counts, table.expert_tokens, num_tokens=2000, design_effect=40) == ()
    assert always_together(counts, table.expert_tokens, num_tokens=2000, design_effect=math.nan) == ()


def test_experts_that_every_token_uses_are_not_called_together() -> None:
    counts = np.array([[0, 990], [990, 0]])
    assert always_together(counts, [995, 995], num_tokens=1000) == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=60))
def test_pairs_equal_a_slow_reference(tokens: list[set[int]]) -> None:
    table = expert_coactivation(rows_of([sorted(token) for token in tokens]), num_experts=5, top_k=2)[0]
    assert table.counts is not None
    found = always_together(table.counts, table.expert_tokens, num_tokens=len(tokens), threshold=0.5)
    expected = {}
    for a, b in itertools.combinations(range(5), 2):
        both = sum({a, b} <= token for token in tokens)
        either = sum(bool({a, b} & token) for token in tokens)
        n_a, n_b = (sum(e in token for token in tokens) / len(tokens) for e in (a, b))
        if not either or both / either < 0.5:
            continue
        share, z = both / either, 1.6448536269514722
        width = z * math.sqrt(share * (1 - share) / either + z * z / (4 * either**2))
        lower = (share + z * z / (2 * either) - width) / (1 + z * z / either)
        unrelated = n_a * n_b / (n_a + n_b - n_a * n_b)
        if lower >= 0.5 and unrelated < 0.25:
            expected[(a, b)] = lower
    assert {(pair.expert_a, pair.expert_b): pytest.approx(pair.lower) for pair in found} == expected


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="same tokens"):
        always_together([[0, 5], [5, 0]], [4, 9], num_tokens=10)
    with pytest.raises(InvalidInputError, match="pair_tokens has shape"):
        always_together([[0, 5]], [4, 9], num_tokens=10)


def test_experts_with_the_same_weights_are_a_finding_with_its_evidence() -> None:
    rng = np.random.default_rng(0)
    experts = rng.normal(size=(6, 24, 60))
    experts[4] = experts[1][::-1]
    similarity = aligned_similarity(experts.__getitem__, [0, 1, 2, 3, 5, 4], layer_index=7)
    (finding,) = duplicate_weights(similarity)
    assert (finding.kind, finding.severity) == (FindingKind.DUPLICATE_EXPERTS, Severity.WARNING)
    assert (finding.layer_index, finding.expert_id, finding.args["other"]) == (7, 1, "4")
    assert finding.statistic == pytest.approx(1)
    assert [row.metric for row in finding.evidence] == ["aligned_cosine", "excess"]
    assert finding.evidence[0].sample_size == 24
    assert "experts 1 and 4 of layer 7 have a cosine of 1.000" in render_finding(finding.code, finding.args)
    with_outputs = replace(similarity, output_cosine=similarity.aligned_cosine, num_tokens=9)
    assert [row.metric for row in duplicate_weights(with_outputs)[0].evidence][-1] == "output_cosine"
    assert duplicate_weights(aligned_similarity(rng.normal(size=(6, 24, 60)).__getitem__, range(6))) == []
