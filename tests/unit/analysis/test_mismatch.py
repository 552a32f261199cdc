"""Train-inference mismatch against loops over tokens, and on planted truth."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import Mismatch, RowSet, align, routing_mismatch
from moe_debugger.errors import InvalidInputError

NAN = float("nan")


def compare(
    layers_a: Any, layers_b: Any, *, margin: Any = None, tokens_per_document: int = 1000, edges: Any = None
) -> Mismatch:
    """Return the mismatch of ids [L, T, k]; layers may have another number of tokens in `layers_b`."""

    def rows(layers: Any, margin: Any) -> RowSet:
        sizes = [len(ids) for ids in layers]
        positions = np.concatenate([np.arange(size) for size in sizes])
        columns = {
            "layer_index": np.repeat(np.arange(len(layers)), sizes),
            "expert_ids": np.concatenate([np.asarray(ids, np.int32) for ids in layers]),
            "request_id": positions // tokens_per_document,
            "position": positions,
        }
        if margin is not None:
            columns["margin"] = np.concatenate(margin)
        return RowSet.of(columns, num_experts=8, top_k=len(layers[0][0]))

    return routing_mismatch(align(rows(layers_a, margin), rows(layers_b, None)), margin_edges=edges)


def test_mismatch_equals_the_hand_worked_example() -> None:
    a = [[[0, 1], [0, 2]], [[4, 5], [6, 7]]]
    b = [[[1, 0], [0, 3]], [[5, 4], [6, 7]]]
    mismatch = compare(a, b)
    assert [mismatch.layers[i].router_rate for i in (0, 1)] == [0.5, 0]
    assert [mismatch.layers[i].slot_rate for i in (0, 1)] == [0.25, 0]
    assert (mismatch.num_tokens, mismatch.num_layers, mismatch.num_incomplete_tokens) == (2, 2, 0)
    assert (mismatch.token_rate, mismatch.router_rate, mismatch.independent_token_rate) == (0.5, 0.25, 0.4375)
    assert mismatch.layers[0].by_margin == ()


IDS = st.lists(st.integers(-1, 3), min_size=2, max_size=2)
TOKEN = st.tuples(
    st.tuples(IDS, IDS), st.tuples(IDS, IDS), st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 2.0, NAN])] * 2)
)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(TOKEN, min_size=1, max_size=25), missing=st.integers(0, 3))
def test_mismatch_equals_loops(tokens: list[Any], missing: int) -> None:
    a = [[token[0][layer] for token in tokens] for layer in (0, 1)]
    b = [[token[1][layer] for token in tokens] for layer in (0, 1)]
    margin = [[token[2][layer] for token in tokens] for layer in (0, 1)]
    # The second recording lacks the last tokens at layer 1.
    whole = max(len(tokens) - missing, 1)
    b[1] = b[1][:whole]
    mismatch = compare(a, b, margin=margin, edges=[0.1, 1.0])
    any_differs, routers = 0, 0
    for layer in (0, 1):
        slots, buckets = [], [[] for _ in range(4)]  # type: ignore[var-annotated]
        for t in range(len(b[layer])):
            x, y = {e for e in a[layer][t] if e >= 0}, {e for e in b[layer][t] if e >= 0}
            slots.append((max(len(x), len(y)) - len(x & y)) / 2)
            m = margin[layer][t]
            buckets[3 if m != m else 0 if m < 0.1 else 1 if m < 1 else 2].append(slots[-1])
        result = mismatch.layers[layer]
        assert result.num_tokens == len(slots)
        assert result.slot_rate == pytest.approx(np.mean(slots))
        assert result.router_rate == pytest.approx(np.mean([s > 0 for s in slots]))
        assert [bucket.num_tokens for bucket in result.by_margin] == [len(bucket) for bucket in buckets]
        for bucket, values in zip(result.by_margin, buckets, strict=True):
            if values:
                assert bucket.slot_rate == pytest.approx(np.mean(values))
                assert bucket.router_rate == pytest.approx(np.mean([s > 0 for s in values]))
            else:
                assert np.isnan([bucket.router_rate, bucket.slot_rate]).all()
        bounds = [(bucket.lower, bucket.upper) for bucket in result.by_margin[:3]]
        assert bounds == [(-np.inf, 0.1), (0.1, 1.0), (1.0, np.inf)]
    for t in range(whole):
        differs = [{*a[layer][t]} - {-1} != {*b[layer][t]} - {-1} for layer in (0, 1)]
        any_differs += any(differs)
        routers += sum(differs)
    q = routers / whole / 2
    assert (mismatch.num_tokens, mismatch.num_incomplete_tokens) == (whole, len(tokens) - whole)
    assert mismatch.token_rate == pytest.approx(any_differs / whole)
    assert mismatch.router_rate == pytest.approx(q)
    assert mismatch.independent_token_rate == pytest.approx(1 - (1 - q) ** 2)


def test_mismatch_meets_the_prediction_where_routers_differ_independently_and_lies_below_where_they_do_not() -> None:
    rng = np.random.default_rng(0)
    num_layers, num = 12, 4000
    a = np.broadcast_to(np.array([0, 1]), (num_layers, num, 2))
    alone = rng.random((num_layers, num)) < 0.1
    together = np.broadcast_to(rng.random(num) < 0.1, (num_layers, num))
    independent, correlated = (
        compare(a, np.where(differs[..., None], [0, 2], a), tokens_per_document=100) for differs in (alone, together)
    )
    assert independent.independent_token_rate == pytest.approx(1 - 0.9**12, abs=0.02)
    assert all(layer.slot_interval.lower < 0.05 < layer.slot_interval.upper for layer in correlated.layers.values())
    interval = independent.token_interval
    assert interval.lower < independent.independent_token_rate < interval.upper
    assert correlated.router_rate == pytest.approx(0.1, abs=0.02)
    assert correlated.token_rate == pytest.approx(correlated.router_rate)
    assert correlated.token_interval.upper < correlated.independent_token_rate / 4
    assert correlated.num_documents == 40


def test_mismatch_by_margin_finds_a_numeric_wobble_at_small_margins() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(5000, 8))
    ordered = -np.sort(-scores, axis=1)
    a, b = (np.argsort(-s, axis=1)[:, :2] for s in (scores, scores + rng.normal(0, 0.02, scores.shape)))
    layer = compare([a], [b], margin=[ordered[:, 1] - ordered[:, 2]], tokens_per_document=50).layers[0]
    rates = [bucket.router_rate for bucket in layer.by_margin[:-1]]
    assert [bucket.num_tokens for bucket in layer.by_margin] == [250, 1000, 1250, 1250, 1250, 0]
    assert rates[0] > 0.3
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0
    for bucket in layer.by_margin[:-1]:
        # Every differing token differs in one of two slots, but for very few.
        assert bucket.router_interval.lower <= bucket.router_rate <= bucket.router_interval.upper
        assert bucket.slot_interval.upper == pytest.approx(bucket.router_interval.upper / 2, rel=0.1, abs=0.03)
    assert layer.by_margin[0].router_interval.lower > layer.by_margin[1].router_interval.upper
    assert np.isnan(layer.by_margin[-1].router_interval.lower)


def test_mismatch_refuses_edges_that_do_not_ascend() -> None:
    with pytest.raises(InvalidInputError, match="expected ascending"):
        compare([[[0, 1]]], [[[0, 1]]], edges=[1, 0])
