"""Drift: the divergence by its definition, its noise floor, and what loads alone would hide."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import RowSet, jensen_shannon_bits, routing_drift
from moe_debugger.errors import InvalidInputError

LOADS = st.lists(st.integers(0, 1000), min_size=5, max_size=5)


def documents_of(
    rng: np.random.Generator,
    *,
    names: list[str],
    preference: npt.NDArray[np.float64],
    num_tokens: int = 40,
    topic: float = 1.0,
    top_k: int = 2,
) -> dict[str, Any]:
    """Return rows of one layer: documents that each prefer some experts, for each of its tokens anew."""
    experts, num = len(preference), len(names)
    taste = preference + rng.normal(0, topic, (num, experts))
    scores = np.repeat(taste, num_tokens, axis=0) + rng.gumbel(size=(num * num_tokens, experts))
    return {
        "layer_index": np.zeros(num * num_tokens, np.int64),
        "expert_ids": np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32),
        "request_id": np.repeat(np.array(names, object), num_tokens),
        "position": np.tile(np.arange(num_tokens), num),
    }


def rows_of(columns: dict[str, Any]) -> RowSet:
    return RowSet.of(columns, num_experts=8, top_k=2)


def test_jensen_shannon_equals_the_hand_worked_example() -> None:
    assert jensen_shannon_bits([1, 0], [0, 1]) == 1
    assert jensen_shannon_bits([3, 1], [6, 2]) == 0
    # (3/4 log2(3/2) + 1/4 log2(1/2)) on either side.
    assert jensen_shannon_bits([3, 1], [1, 3]) == pytest.approx(0.75 * math.log2(1.5) - 0.25)
    assert np.isnan(jensen_shannon_bits([0, 0], [1, 3]))
    for wrong in ([1, 2, 3], [-1, 3]):
        with pytest.raises(InvalidInputError, match="loads of the same experts"):
            jensen_shannon_bits([1, 3], wrong)


@settings(max_examples=200, deadline=None)
@given(a=LOADS, b=LOADS)
def test_jensen_shannon_equals_entropies(a: list[int], b: list[int]) -> None:
    if not sum(a) or not sum(b):
        assert np.isnan(jensen_shannon_bits(a, b))
        return

    def entropy(shares: list[float]) -> float:
        return -sum(p * math.log2(p) for p in shares if p > 0)

    p, q = [x / sum(a) for x in a], [x / sum(b) for x in b]
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    expected = entropy(middle) - (entropy(p) + entropy(q)) / 2
    assert jensen_shannon_bits([a, b], [b, a]) == pytest.approx([expected, expected], abs=1e-12)


def test_drift_is_zero_on_average_between_groups_of_one_population_though_loads_differ() -> None:
    rng = np.random.default_rng(3)
    preference = rng.normal(0, 0.5, 8)
    drifts, whole = [], []
    for _ in range(60):
        # Groups of other sizes: their noise differs.
        a, b = (
            rows_of(documents_of(rng, names=[f"{side} {i}" for i in range(num)], preference=preference))
            for side, num in (("a", 12), ("b", 30))
        )
        layer = routing_drift(a, b, num_splits=16).layers[0]
        drifts.append(layer.drift_bits)
        whole.append(layer.js_bits)
    error = np.std(drifts) / math.sqrt(len(drifts))
    assert abs(np.mean(drifts)) < 3 * error
    # Without the floor the same groups seem to have drifted.
    assert np.mean(whole) > 10 * error


def test_drift_is_zero_on_average_for_other_samples_of_the_same_documents() -> None:
    rng = np.random.default_rng(4)
    names = [f"d{i}" for i in range(16)]
    drifts, floors = [], []
    for _ in range(60):
        columns = documents_of(rng, names=names, preference=np.zeros(8), topic=2.0)
        noise = documents_of(rng, names=names, preference=np.zeros(8), topic=2.0)
        # The second recording chose otherwise for a twentieth of the tokens.
        keep = rng.random(len(columns["layer_index"]))[:, None] < 0.95
        other = columns | {"expert_ids": np.where(keep, columns["expert_ids"], noise["expert_ids"])}
        layer = routing_drift(rows_of(columns), rows_of(other), num_splits=16).layers[0]
        drifts.append(layer.drift_bits)
        floors.append(layer.noise_floor_bits)
    assert abs(np.mean(drifts)) < np.mean(floors) / 10


def test_drift_of_a_changed_preference_is_the_divergence_of_the_populations() -> None:
    rng = np.random.default_rng(5)
    preference = np.zeros(8)
    changed = preference + np.array([1.5, 0, 0, 0, 0, 0, 0, -1.5])
    big = [rows_of(documents_of(rng, names=[f"{i}" for i in range(3000)], preference=p)) for p in (preference, changed)]
    truth = float(jensen_shannon_bits(*(rows.unit_loads(0).sum(axis=0) for rows in big)))
    found = []
    for _ in range(40):
        a, b = (
            rows_of(documents_of(rng, names=[f"{side} {i}" for i in range(12)], preference=p))
            for side, p in (("a", preference), ("b", changed))
        )
        found.append(routing_drift(a, b, num_splits=16).layers[0].drift_bits)
    assert np.mean(found) == pytest.approx(truth, rel=0.15)


def test_drift_shows_permuted_experts_by_overlap_where_loads_hide_them() -> None:
    rng = np.random.default_rng(6)
    names = [f"d{i}" for i in range(30)]
    columns = documents_of(rng, names=names, preference=np.zeros(8), topic=0.3)
    permuted = columns | {"expert_ids": np.roll(np.arange(8), 3)[columns["expert_ids"]]}
    same, other = (routing_drift(rows_of(columns), rows_of(c)).layers[0] for c in (columns, permuted))
    assert same.overlap == 1
    assert other.drift_bits < 0.01
    assert other.overlap < 0.4
    assert other.overlap_interval.upper < 0.4
    assert (other.num_tokens, other.chance_overlap) == (1200, 0.25)


def test_drift_says_what_it_could_not_compare_and_is_the_same_for_any_order_of_rows() -> None:
    rng = np.random.default_rng(7)
    a = documents_of(rng, names=["a", "b", "c", "d"], preference=np.zeros(8))
    b = documents_of(rng, names=["e", "f", "g", "h"], preference=np.zeros(8))
    drift = routing_drift(rows_of(a), rows_of(b), seed=3)
    assert np.isnan(drift.layers[0].overlap)
    assert "no token by token comparison (no row matched)" in drift.notes[-1]
    order = rng.permutation(160)
    shuffled = {name: column[order] for name, column in a.items()}
    assert repr(routing_drift(rows_of(shuffled), rows_of(b), seed=3)) == repr(drift)
    few = documents_of(rng, names=["a", "b", "c"], preference=np.zeros(8))
    drift = routing_drift(rows_of(few), rows_of(b))
    assert np.isnan([drift.layers[0].noise_floor_bits, drift.layers[0].drift_bits]).all()
    assert drift.layers[0].js_bits > 0
    assert "there are 3 and 4 documents" in drift.notes[-1]
    no_position = {name: column for name, column in b.items() if name != "position"}
    assert "`position` is missing" in routing_drift(rows_of(a), rows_of(no_position)).notes[0]


def test_noise_floor_is_the_mean_over_halves_of_whole_documents() -> None:
    # Four documents that agree with no other: any halves are two documents against the other two, JS = 1 bit.
    columns = {
        "layer_index": [0] * 8,
        "expert_ids": [[2 * d, 2 * d + 1] for d in range(4) for _ in range(2)],
        "request_id": [f"d{d}" for d in range(4) for _ in range(2)],
        "position": [0, 1] * 4,
    }
    layer = routing_drift(rows_of(columns), rows_of(columns)).layers[0]
    assert (layer.noise_floor_bits, layer.across_bits, layer.drift_bits, layer.js_bits) == (1, 1, 0, 0)
    assert (layer.num_documents_a, layer.num_assignments_b, layer.num_splits) == (4, 16, 32)
