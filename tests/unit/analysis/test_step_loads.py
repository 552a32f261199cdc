"""Loads over steps and samples of steps and tokens: against loops, and the same for any split and order."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis.step_loads import LoadSeries, StepSample, sample_capacity, series_capacity
from moe_debugger.analysis.token_sample import SAMPLE_TOKENS, TokenSample

EXPERTS, TOP_K = 256, 2  # wide, so that the capacities are small: 256 buckets, 16 steps


def draw(seed: int, num_rows: int, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = int(rng.integers(0, 10_000))
    steps = (first + rng.integers(0, num_steps, num_rows)).astype(np.uint64)
    ids = rng.integers(0, EXPERTS, (num_rows, TOP_K)).astype(np.int32)
    return steps, ids, rng.random((num_rows, TOP_K)) < 0.9


def loads_by_step(steps: np.ndarray, ids: np.ndarray, is_load: np.ndarray) -> dict[int, list[int]]:
    loads: dict[int, list[int]] = defaultdict(lambda: [0] * EXPERTS)
    for row, step in enumerate(steps.tolist()):
        mine = loads[step]
        for slot in range(TOP_K):
            if is_load[row, slot]:
                mine[int(ids[row, slot])] += 1
    return loads


@pytest.mark.parametrize("num_steps", [1, 100, 255, 256, 257, 5000])
def test_the_series_holds_the_loads_of_equal_buckets_of_steps(num_steps: int) -> None:
    steps, ids, is_load = draw(num_steps, 800, num_steps)
    series = LoadSeries.empty(EXPERTS)
    series.fold(steps, ids, is_load)
    first, last = int(steps.min()), int(steps.max())
    width = 1
    while last // width - first // width >= series_capacity(EXPERTS):
        width *= 2
    assert (series.width, series.first, series.last) == (width, first, last)
    expected: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(EXPERTS, int))
    tokens: dict[int, int] = defaultdict(int)
    for step, load in loads_by_step(steps, ids, is_load).items():
        expected[step // width * width] += load
        tokens[step // width * width] += int((steps == step).sum())
    assert series.first_steps.tolist() == sorted(expected)
    assert series.counts.tolist() == [expected[start].tolist() for start in sorted(expected)]
    assert series.num_tokens.tolist() == [tokens[start] for start in sorted(expected)]


def test_the_step_sample_holds_all_loads_of_a_few_single_steps() -> None:
    steps, ids, is_load = draw(5, 3000, 400)
    sample = StepSample.empty(EXPERTS)
    for part in np.array_split(np.arange(3000), 7):
        sample.fold(steps[part], ids[part], is_load[part])
    assert len(sample.steps) == sample_capacity(EXPERTS) == 16
    assert not sample.is_whole
    loads = loads_by_step(steps, ids, is_load)
    assert [row.tolist() for row in sample.counts] == [loads[step] for step in sample.steps.tolist()]
    assert sample.num_tokens.tolist() == [int((steps == step).sum()) for step in sample.steps.tolist()]


def test_equal_steps_of_independent_sources_are_two_steps() -> None:
    steps, ids, is_load = draw(1, 50, 3)
    sample, series = StepSample.empty(EXPERTS), LoadSeries.empty(EXPERTS)
    for source in (7, 8):
        sample.fold(steps, ids, is_load, source)
        series.fold(steps, ids, is_load, source)
    assert sorted(sample.steps.tolist()) == sorted(np.unique(steps).tolist() * 2)
    assert not series.has_one_clock


def test_the_draw_of_steps_does_not_prefer_early_or_late_ones() -> None:
    firsts = []
    for start in range(0, 20_000, 1000):
        sample = StepSample.empty(EXPERTS)
        steps = np.arange(start, start + 1000, dtype=np.uint64)
        sample.fold(steps, np.zeros((1000, 1), np.int32), np.ones((1000, 1), bool))
        firsts.append(float((sample.steps - np.uint64(start)).mean()))
    # The mean of 16 of 1000 has a standard deviation of 72; of twenty such, 16.
    assert np.mean(firsts) == pytest.approx(500, abs=80)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_steps=st.sampled_from([1, 20, 300, 3000]),
    num_parts=st.integers(1, 5),
    num_rows=st.sampled_from([1, 200, 1500]),
)
def test_any_split_and_order_gives_the_same(seed: int, num_steps: int, num_parts: int, num_rows: int) -> None:
    steps, ids, is_load = draw(seed, num_rows, num_steps)
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**63, num_rows).astype(np.uint64)
    keys[rng.random(num_rows) < 0.2] = keys[0]

    def folded(parts: list[np.ndarray]) -> tuple[LoadSeries, StepSample, TokenSample]:
        states = LoadSeries.empty(EXPERTS), StepSample.empty(EXPERTS), TokenSample.empty(TOP_K)
        for part in parts:
            states[0].fold(steps[part], ids[part], is_load[part])
            states[1].fold(steps[part], ids[part], is_load[part])
            states[2].fold(keys[part], ids[part], is_load[part])
        return states

    def plain(states: tuple[LoadSeries, StepSample, TokenSample]) -> list[object]:
        series, sample, tokens = states
        return [
            (series.shift, series.first, series.last, series.buckets.tolist(), series.counts.tolist()),
            (series.num_tokens.tolist(), sample.hashes.tolist(), sample.steps.tolist(), sample.counts.tolist()),
            (sample.num_tokens.tolist(), tokens.keys.tolist(), tokens.expert_ids.tolist()),
        ]

    whole = plain(folded([np.arange(num_rows)]))
    group = rng.integers(0, num_parts, num_rows)
    parts = [np.flatnonzero(group == part) for part in range(num_parts)]
    assert plain(folded(parts[::-1])) == whole
    merged = LoadSeries.empty(EXPERTS), StepSample.empty(EXPERTS), TokenSample.empty(TOP_K)
    for part in rng.permutation(num_parts):
        one = folded([parts[part]])
        merged = merged[0].merge(one[0]), one[1].merge(merged[1]), merged[2].merge(one[2])
    assert plain(merged) == whole


def test_the_token_sample_keeps_the_same_tokens_of_two_runs() -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 2**63, 10_000).astype(np.uint64)
    first, second = TokenSample.empty(2), TokenSample.empty(2)
    ids = np.tile(np.array([[3, 1]], np.int32), (10_000, 1))
    first.fold(keys, ids, np.ones((10_000, 2), bool))
    order = rng.permutation(10_000)
    for part in np.array_split(order, 13):
        second.fold(keys[part], ids[part], np.ones((len(part), 2), bool))
    assert first.keys.tolist() == second.keys.tolist() == np.sort(keys)[:SAMPLE_TOKENS].tolist()
    assert first.expert_ids[0].tolist() == [1, 3]
