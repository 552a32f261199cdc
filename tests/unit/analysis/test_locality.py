"""Locality against hand-worked examples and slow, independent references."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import Case, Token, cases, shuffled, tokens_of

from moe_debugger.analysis.locality import routing_locality
from moe_debugger.analysis.token_rows import chance_of_common_expert
from moe_debugger.errors import InvalidInputError

TRAIN, EVAL = 3, 4


def one_text(ids: list[list[int]]) -> dict[str, Any]:
    return {
        "layer_index": [0] * len(ids),
        "expert_ids": np.array(ids, np.int32),
        "request_id": ["r"] * len(ids),
        "position": list(range(len(ids))),
    }


def test_locality_equals_the_hand_worked_example() -> None:
    rows = one_text([[0, 1], [2, 1], [3, 2]])
    result = routing_locality(rows, num_experts=4, top_k=2, max_n=3, segment_length=3, cache_ratio=1)[0]
    assert [(each.n, each.num_windows, each.share) for each in result.ngrams] == [(2, 2, 1.0), (3, 1, 0.0)]
    assert result.previous_token is result.ngrams[0]
    assert result.ngrams[0].chance == pytest.approx(5 / 6)
    # Three pairs of 4: 4 experts in common at (1/2)^3 each, less the 6 pairs of experts at (1/6)^3.
    assert result.ngrams[1].chance == pytest.approx(4 / 8 - 6 / 216)
    assert (result.mean_overlap, result.chance_overlap) == (1, 1)
    segments = result.segments
    assert segments is not None
    assert (segments.length, segments.num_segments, segments.cache_size) == (3, 1, 2)
    # f = [1, 2, 2, 1]. On from 1: 2 * 6 / (12 + 6). On from 2: 2 * 4 / (6 + 6). Equal, so the higher threshold.
    assert segments.srp == pytest.approx(2 / 3)
    assert (segments.threshold, segments.size_ratio) == (2, 1)
    assert segments.hit_rate == pytest.approx(4 / 6)
    assert math.isnan(segments.srp_interval.lower)
    json.dumps(result.to_dict())


def test_chance_equals_the_published_figure_and_a_count_of_all_choices() -> None:
    assert chance_of_common_expert(8, [2, 2]) == pytest.approx(1 - math.comb(6, 2) / math.comb(8, 2))
    assert chance_of_common_expert(8, [2, 2]) == pytest.approx(0.464, abs=5e-4)
    assert chance_of_common_expert(4, [3, 2]) == 1.0
    assert 0 < chance_of_common_expert(512, [10, 10, 10, 10]) < 1e-3


@settings(max_examples=40, deadline=None)
@given(num=st.integers(2, 5), sizes=st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_chance_equals_a_count_of_all_choices(num: int, sizes: list[int]) -> None:
    sizes = [min(size, num) for size in sizes]
    choices = list(itertools.product(*(itertools.combinations(range(num), size) for size in sizes)))
    common = sum(bool(set.intersection(*map(set, choice))) for choice in choices)
    assert chance_of_common_expert(num, sizes) == pytest.approx(common / len(choices))


def _texts(tokens: list[Token]) -> Iterator[list[Token]]:
    """Yield runs of tokens at consecutive positions of one text."""
    texts: dict[tuple[str, int], dict[int, list[Token]]] = {}
    for token in tokens:
        is_apart = token.phase in (TRAIN, EVAL) or not token.request
        key = (token.request, token.forward if is_apart else -1)
        texts.setdefault(key, {}).setdefault(token.position, []).append(token)
    for text in texts.values():
        run: list[Token] = []
        for position in range(max(text) + 2):
            here = text.get(position, [])
            if len(here) == 1:
                run.append(here[0])
            elif run:
                yield run
                run = []


@settings(max_examples=80, deadline=None)
@given(case=cases(max_layers=2), length=st.integers(2, 5), ratio=st.sampled_from([0.5, 1.0, 2.0]))
def test_locality_equals_a_slow_reference(case: Case, length: int, ratio: float) -> None:
    results = routing_locality(case.columns, **case.sizes, max_n=4, segment_length=length, cache_ratio=ratio)
    for layer, result in results.items():
        tokens, num = tokens_of(case, layer), case.num_experts[layer]
        runs = list(_texts(tokens))
        assert result.num_tokens == sum(map(len, runs))
        assert result.num_ambiguous == len(tokens) - result.num_tokens
        windows = {n: list(_windows(runs, n)) for n in range(2, 5)}
        assert bool(result.not_applicable) == (not windows[2])
        if result.not_applicable:
            continue
        for each in result.ngrams:
            own = windows[each.n]
            common = [frozenset.intersection(*window) for window in own]
            chances = [chance_of_common_expert(num, [len(experts) for experts in window]) for window in own]
            assert each.num_windows == len(own)
            assert each.share == pytest.approx(_mean([bool(experts) for experts in common]), nan_ok=True)
            assert each.chance == pytest.approx(_mean(chances), nan_ok=True)
        assert result.mean_overlap == pytest.approx(_mean([len(a & b) for a, b in windows[2]]))
        assert result.chance_overlap == pytest.approx(_mean([len(a) * len(b) / num for a, b in windows[2]]))
        segments = result.segments
        assert segments is not None
        _check_segments(segments, runs, num, length, max(1, min(num, round(ratio * case.top_k[layer]))))


def _windows(runs: list[list[Token]], n: int) -> Iterator[list[frozenset[int]]]:
    for run in runs:
        for start in range(len(run) - n + 1):
            window = [token.experts for token in run[start : start + n]]
            if all(window):
                yield window


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else math.nan


def _check_segments(segments: Any, runs: list[list[Token]], num: int, length: int, cache_size: int) -> None:
    frequencies = []
    for run in runs:
        for start in range(len(run) - length + 1):
            used = Counter(expert for token in run[start : start + length] for expert in token.experts)
            frequencies.append([used[expert] for expert in range(num)])
    assert segments.num_segments == len(frequencies)
    assert segments.cache_size == cache_size
    actual = sum(map(sum, frequencies))
    if not actual:
        assert math.isnan(segments.srp)
        assert math.isnan(segments.hit_rate)
        return
    scores = []
    for threshold in range(length + 1):
        # The confusion table of the segment router, cell by cell.
        true_positive = sum(f for row in frequencies for f in row if f >= threshold)
        false_positive = sum(length - f for row in frequencies for f in row if f >= threshold)
        false_negative = sum(f for row in frequencies for f in row if f < threshold)
        scores.append(2 * true_positive / (2 * true_positive + false_positive + false_negative))
    assert segments.srp == pytest.approx(max(scores))
    assert segments.srp == pytest.approx(scores[segments.threshold])
    is_on = sum(f >= segments.threshold for row in frequencies for f in row)
    assert segments.size_ratio == pytest.approx(is_on * length / actual)
    hits = sum(sum(sorted(row)[-cache_size:]) for row in frequencies)
    assert segments.hit_rate == pytest.approx(hits / actual)


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_locality_does_not_depend_on_the_order_of_rows(case: Case) -> None:
    once, again = (routing_locality(each.columns, **each.sizes, segment_length=3) for each in (case, shuffled(case)))
    assert str({i: result.to_dict() for i, result in once.items()}) == str(
        {i: result.to_dict() for i, result in again.items()}
    )


def _random_text(rng: np.random.Generator, stay: float, num_requests: int = 100, length: int = 50) -> dict[str, Any]:
    """Return tokens that keep their predecessor's pair of 8 experts with probability `stay`."""
    n = num_requests * length
    ids = np.argsort(rng.random((n, 8)), axis=1)[:, :2]
    is_kept = (rng.random(n) < stay) & (np.arange(n) % length > 0)
    ids = ids[np.maximum.accumulate(np.where(is_kept, 0, np.arange(n)))]
    return {
        "layer_index": np.zeros(n, np.int64),
        "expert_ids": ids,
        "request_id": [f"r{i // length}" for i in range(n)],
        "position": np.arange(n) % length,
    }


def test_independent_tokens_meet_the_chance_level_and_sticky_ones_exceed_it() -> None:
    rng = np.random.default_rng(11)
    free = routing_locality(_random_text(rng, 0.0), num_experts=8, top_k=2)[0]
    for each in free.ngrams:
        # Twice the interval's half width, so about four standard errors.
        assert abs(each.share - each.chance) < each.interval.upper - each.interval.lower
        assert each.shuffled_share == pytest.approx(each.chance, abs=0.03)
    assert free.mean_overlap == pytest.approx(free.chance_overlap, abs=0.03)
    assert free.segments is not None
    assert free.segments.srp == pytest.approx(free.segments.shuffled_srp, abs=0.02)
    sticky = routing_locality(_random_text(rng, 0.8), num_experts=8, top_k=2)[0]
    pair = sticky.ngrams[0]
    # By hand: 0.8 keep their pair, the others share one by chance.
    assert pair.interval.lower < 0.8 + 0.2 * pair.chance < pair.interval.upper
    assert pair.interval.lower > pair.chance
    assert pair.shuffled_share == pytest.approx(pair.chance, abs=0.05)
    assert sticky.segments is not None
    assert sticky.segments.srp > sticky.segments.shuffled_srp + 0.1
    assert sticky.segments.srp_interval.lower < sticky.segments.srp < sticky.segments.srp_interval.upper
    assert sticky.segments.hit_rate > sticky.segments.shuffled_hit_rate


def test_skewed_loads_alone_raise_the_share_and_the_shuffled_share_says_so() -> None:
    rng = np.random.default_rng(12)
    rows = _random_text(rng, 0.0)
    # Expert 0 is in every set, whatever the order.
    rows["expert_ids"] = np.column_stack([np.zeros(5000, int), rng.integers(1, 8, 5000)])
    pair = routing_locality(rows, num_experts=8, top_k=2)[0].ngrams[0]
    assert (pair.share, pair.shuffled_share) == (1, 1)
    assert pair.chance < 0.5
    assert pair.interval.lower < 1  # all that was seen is not all that there is


def test_large_texts_are_done_in_parts_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _random_text(np.random.default_rng(13), 0.5, num_requests=20)
    whole = routing_locality(rows, num_experts=8, top_k=2, segment_length=4)[0]
    monkeypatch.setattr("moe_debugger.analysis.locality._MAX_CELLS", 45)
    assert routing_locality(rows, num_experts=8, top_k=2, segment_length=4)[0] == whole


def test_training_batches_that_repeat_names_are_texts_of_their_own() -> None:
    rows = one_text([[0], [1], [0], [1]]) | {
        "position": [0, 1, 0, 1],
        "forward_index": np.array([4, 4, 5, 5], np.uint64),
        "phase": np.full(4, TRAIN, np.uint8),
    }
    train = routing_locality(rows, num_experts=2, top_k=1, max_n=2)[0]
    assert (train.num_ambiguous, train.ngrams[0].num_windows, train.ngrams[0].share) == (0, 2, 0)
    # A generation goes on in the next forward, so there the same rows are one text given twice.
    decode = routing_locality(rows | {"phase": np.full(4, 2, np.uint8)}, num_experts=2, top_k=1, max_n=2)[0]
    assert (decode.num_ambiguous, decode.ngrams) == (4, ())
    assert "no two valid tokens" in decode.not_applicable
    steps = rows | {"position": [0, 1, 2, 3], "phase": np.full(4, 2, np.uint8)}
    assert routing_locality(steps, num_experts=2, top_k=1, max_n=2)[0].ngrams[0].num_windows == 3


def test_one_expert_and_texts_shorter_than_a_segment_are_not_applicable() -> None:
    assert "one routed expert" in routing_locality(one_text([[0], [0]]), num_experts=1, top_k=1)[0].not_applicable
    short = routing_locality(one_text([[0], [0]]), num_experts=2, top_k=1, segment_length=3)[0]
    assert short.segments is not None
    assert (short.segments.num_segments, short.segments.threshold) == (0, 0)
    assert math.isnan(short.segments.srp)
    assert math.isnan(short.ngrams[2].share)
    assert routing_locality(one_text([[0], [0]]), num_experts=2, top_k=1, segment_length=None)[0].segments is None


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"max_n": 1}, "max_n"),
        ({"segment_length": 1}, "segment_length is 1"),
        ({"segment_length": 2000}, "2 to 1024"),
        ({"cache_ratio": 0}, "cache"),
    ],
)
def test_arguments_out_of_range_are_refused(argument: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        routing_locality(one_text([[0], [0]]), num_experts=2, top_k=1, **argument)


@settings(max_examples=15, deadline=None)
@given(case=cases(max_layers=1))
def test_numbers_too_large_to_be_packed_make_the_same_texts(case: Case) -> None:
    once = routing_locality(case.columns, **case.sizes, segment_length=3)
    case.columns["forward_index"] = case.columns["forward_index"] * np.uint64(2**60)
    case.columns["position"] = case.columns["position"] + np.uint32(2**32 - 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_debugger.analysis.token_rows._LARGEST_CODE", 1)
        again = routing_locality(case.columns, **case.sizes, segment_length=3)
    # Blocks of rows without a request go by the forward's number, so only what rests on no block is the same.
    assert str([_without_blocks(each.to_dict()) for each in once.values()]) == str(
        [_without_blocks(each.to_dict()) for each in again.values()]
    )


def _without_blocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_blocks(item) for name, item in value.items() if "interval" not in name}
    return [_without_blocks(item) for item in value] if isinstance(value, tuple) else value
