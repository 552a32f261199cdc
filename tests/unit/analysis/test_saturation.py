"""Router saturation against sets, and on planted truth."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import RowSet, align, router_saturation
from moe_debugger.analysis.document_means import document_mean
from moe_debugger.errors import InvalidInputError


def rows_of(ids: Any, *, num_experts: int, documents: Any = None, identity: int = 0) -> RowSet:
    ids = np.asarray(ids, np.int32)
    num = len(ids)
    columns = {
        "layer_index": np.zeros(num, np.int64),
        "expert_ids": ids,
        "request_id": np.asarray(["d"] * num if documents is None else documents),
        "position": np.arange(num),
        "token_id": np.arange(num),
    }
    return RowSet.of(columns, num_experts=num_experts, top_k=ids.shape[1], num_identity_experts=identity)


def test_saturation_equals_the_hand_worked_example() -> None:
    layer = router_saturation(
        align(rows_of([[0, 1], [2, 3]], num_experts=8), rows_of([[1, 0], [3, 4]], num_experts=8))
    )[0]
    assert (layer.num_tokens, layer.num_documents, layer.num_without_expert) == (2, 1, 0)
    assert layer.overlap == 0.75
    assert layer.jaccard == pytest.approx(2 / 3)
    assert layer.chance == 0.25
    assert layer.chance_corrected == pytest.approx(2 / 3)
    assert np.isnan(layer.overlap_interval.lower)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.tuples(*[st.lists(st.integers(-1, 5), min_size=3, max_size=3)] * 2), min_size=1, max_size=30))
def test_saturation_equals_sets(tokens: list[tuple[list[int], list[int]]]) -> None:
    a, b = ([pair[side] for pair in tokens] for side in (0, 1))
    # Ids 4 and 5 are identity experts: choices as well.
    layer = router_saturation(align(rows_of(a, num_experts=4, identity=2), rows_of(b, num_experts=4, identity=2)))[0]
    overlaps, jaccards, chances = [], [], []
    for x, y in tokens:
        chosen_a, chosen_b = {e for e in x if e >= 0}, {e for e in y if e >= 0}
        if chosen_a | chosen_b:
            overlaps.append(len(chosen_a & chosen_b) / max(len(chosen_a), len(chosen_b)))
            jaccards.append(len(chosen_a & chosen_b) / len(chosen_a | chosen_b))
            chances.append(min(len(chosen_a), len(chosen_b)) / 6)
    assert layer.num_tokens == len(overlaps)
    assert layer.num_without_expert == len(tokens) - len(overlaps)
    if not overlaps:
        assert np.isnan([layer.overlap, layer.jaccard, layer.chance, layer.chance_corrected]).all()
        return
    assert layer.overlap == pytest.approx(np.mean(overlaps))
    assert layer.jaccard == pytest.approx(np.mean(jaccards))
    assert layer.chance == pytest.approx(np.mean(chances))
    assert layer.chance_corrected == pytest.approx((np.mean(overlaps) - np.mean(chances)) / (1 - np.mean(chances)))


def test_saturation_is_at_chance_for_unrelated_routers_and_not_applicable_where_all_experts_run() -> None:
    rng = np.random.default_rng(0)
    ids = [np.argsort(rng.random((4000, 64)), axis=1)[:, :8] for _ in range(2)]
    documents = np.repeat(np.arange(40), 100)
    layer = router_saturation(align(*(rows_of(x, num_experts=64, documents=documents) for x in ids)))[0]
    assert layer.chance == 0.125
    assert layer.overlap_interval.lower < 0.125 < layer.overlap_interval.upper
    assert layer.overlap_interval.upper - layer.overlap_interval.lower < 0.02
    # Of sets of 8 from 64 one expert in 8 is shared on average: 1 of 15.
    assert layer.jaccard_interval.lower < layer.jaccard < layer.jaccard_interval.upper < 1 / 13
    everything = rows_of([[0, 1]], num_experts=2)
    assert np.isnan(router_saturation(align(everything, everything))[0].chance_corrected)


def test_saturation_refuses_recordings_of_other_text() -> None:
    a, b = (rows_of([[0, 1]], num_experts=4, documents=[name]) for name in ("x", "y"))
    with pytest.raises(InvalidInputError, match="no row has a counterpart"):
        router_saturation(align(a, b))


def test_document_mean_covers_the_truth_where_tokens_of_a_document_are_alike() -> None:
    rng = np.random.default_rng(1)
    document = np.repeat(np.arange(30), 50)
    covered = naive = 0
    for _ in range(300):
        rate = rng.beta(2, 6, 30)  # mean .25
        values = (rng.random(1500) < rate[document]).astype(float)
        result = document_mean(values, document)
        covered += result.interval.lower <= 0.25 <= result.interval.upper
        half = 1.96 * np.sqrt(result.value * (1 - result.value) / 1500)
        naive += abs(result.value - 0.25) <= half
    # 95 % nominal; the ratio estimator with 30 skewed documents covers a little less.
    assert covered >= 273
    assert naive < 200


def test_document_mean_of_no_difference_is_wilsons_with_documents_as_observations() -> None:
    result = document_mean(np.zeros(1000), np.repeat(np.arange(20), 50))
    assert (result.value, result.num_documents) == (0, 20)
    # z^2 / (n + z^2)
    assert result.interval.upper == pytest.approx(3.841459 / 23.841459, rel=1e-6)
    assert result.interval.lower == 0
    assert np.isnan(document_mean(np.empty(0), np.empty(0, np.int64)).value)
