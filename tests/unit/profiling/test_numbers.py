"""The cost model, the roofline and the bottlenecks: by hand, against plain loops, and on data without a fault."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import catalogue, render_finding
from moe_debugger.profiling import (
    BottleneckKind,
    Peak,
    Roofline,
    RooflinePoints,
    estimate_experts,
    find_bottlenecks,
    fit_cost_model,
    imbalance_cost,
    lower_median,
    roofline_of,
)
from moe_debugger.profiling.bottlenecks import LayerTimesInput
from moe_debugger.profiling.cost_model import MergedCost, expert_call_model, held_out, relative_error

# -- the cost model ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(base=st.floats(0, 1e6), per_row=st.floats(1, 1e4), per_expert=st.floats(0, 1e5), seed=st.integers(0, 2**16))
def test_costs_without_noise_are_found_again(base: float, per_row: float, per_expert: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    active = rng.integers(1, 9, 60).astype(float)
    rows = active * rng.integers(1, 40, 60)
    model = fit_cost_model(rows, active, base + per_row * rows + per_expert * active)
    assert model.is_fitted
    assert model.num_fitted + model.num_held_out == 58
    assert 6 <= model.num_held_out <= 15
    assert model.held_out_error < 1e-6
    np.testing.assert_allclose(
        [model.base, model.per_row, model.per_expert], [base, per_row, per_expert], rtol=1e-4, atol=1e-2
    )


def test_the_held_out_error_is_by_size_of_the_calls_and_weighted_by_their_time() -> None:
    # Calls with 64 rows take what nothing of the form a + b x rows says together with the others.
    took = {4: 1_000.0, 64: 500_000.0, 1024: 1_000_000.0}
    rows = np.array([4] * 52 + [64] * 10 + [1024] * 10)
    model = fit_cost_model(rows, np.full(72, 2), np.vectorize(took.get)(rows))
    said = model.base + model.per_row * np.array([4, 64, 1024])
    expected = np.abs(said / list(took.values()) - 1)
    time = np.array([52, 10, 10]) * list(took.values())
    assert [(size.min_rows, size.num_calls, size.num_held_out) for size in model.sizes] == [
        (4, 52, 10),
        (64, 10, 2),
        (1024, 10, 2),
    ]
    np.testing.assert_allclose([size.error for size in model.sizes], expected)
    np.testing.assert_allclose([size.time_share for size in model.sizes], time / time.sum())
    assert expected[0] < 0.05 < 0.3 < model.held_out_error
    assert model.held_out_error == pytest.approx(np.average(expected, weights=time))
    assert model.worst is model.sizes[int(expected.argmax())]


@pytest.mark.parametrize("num_before", range(5))
@pytest.mark.parametrize("num_new", [4, 5, 20, 25])
def test_prefills_that_come_in_a_rhythm_are_fitted_and_held_out(num_before: int, num_new: int) -> None:
    rng = np.random.default_rng(0)
    rows = np.r_[[8] * num_before, np.tile(np.r_[1200, [8] * (num_new - 1)], 12)].astype(float)
    active = np.r_[[5] * num_before, np.tile(np.r_[6, [5] * (num_new - 1)], 12)]
    model = fit_cost_model(rows, active, (2e6 + 5e3 * rows + 2e4 * active) * rng.normal(1, 0.01, len(rows)))
    decode, prefill = model.sizes
    assert 1 <= prefill.num_held_out < 6
    assert max(decode.error, prefill.error) < 0.03
    assert model.time(np.array([1200.0]), np.array([6.0]))[0] == pytest.approx(8.12e6, rel=0.03)
    # Two kinds of calls are no evidence for three costs.
    assert model.per_expert == 0
    assert "only changed together" in model.note


def test_a_size_of_which_none_could_be_held_out_is_said() -> None:
    rows = np.array([9000.0, 8] + [8.0, 12, 15] * 20 + [1200])
    model = fit_cost_model(rows, np.arange(63) % 4 + 1, 100 + rows)
    assert [size.rows for size in model.sizes] == ["8 to 15 rows", "1,200 rows", "9,000 rows"]
    assert "1,200 rows, 9,000 rows is not known" in model.note
    assert math.isnan(model.sizes[1].error)
    assert model.held_out_error < 1e-6


def _loss(calls: list[tuple[float, float, float]], base: float, per_row: float, per_expert: float) -> float:
    alike: dict[tuple[float, float], list[float]] = {}
    for rows, active, took in calls:
        alike.setdefault((rows, active), []).append(took)
    return sum(
        len(took) * ((base + per_row * rows + per_expert * active) / statistics.median(took) - 1) ** 2
        for (rows, active), took in alike.items()
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16))
def test_no_grid_of_costs_above_zero_fits_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, active = rng.integers(1, 50, 40).astype(float), rng.integers(1, 9, 40).astype(float)
    times = 50 + 3 * rows + 8 * active + rng.normal(0, 15, 40).clip(-40, None)
    model = fit_cost_model(np.r_[1, 1, rows], np.r_[1, 1, active], np.r_[1, 1, times])
    kept = ~held_out(rows, active)
    calls = list(zip(rows[kept], active[kept], times[kept], strict=True))
    ours = _loss(calls, model.base, model.per_row, model.per_expert)
    for grid in itertools.product(range(0, 121, 20), np.linspace(0, 6, 7).tolist(), range(0, 21, 4)):
        assert ours <= _loss(calls, *grid) + 1e-9


def test_calls_that_something_disturbed_do_not_move_the_costs() -> None:
    rng = np.random.default_rng(5)
    rows = rng.choice([8.0, 64.0, 256.0], 200)
    times = 1000 + 20 * rows
    times[rng.random(200) < 0.2] *= 8
    model = fit_cost_model(rows, np.full(200, 8.0), times)
    assert model.per_row == pytest.approx(20, rel=1e-6)
    assert model.base == pytest.approx(1000, rel=1e-6)
    assert model.held_out_error < 1e-6


def test_what_cannot_be_told_apart_is_said() -> None:
    alike = fit_cost_model(np.full(30, 8.0), np.full(30, 4.0), np.full(30, 2000.0))
    assert alike.per_expert == pytest.approx(500.0)
    assert (alike.base, alike.per_row) == (0.0, 0.0)
    assert "the fixed cost too" in alike.note
    changing, alternating = np.arange(4.0, 34.0), np.arange(30) % 5 + 1.0
    for rows, active, merged, none in (
        (np.full(30, 8.0), alternating, MergedCost.ROWS, "per_row"),
        (changing, np.full(30, 4.0), MergedCost.ACTIVE, "per_expert"),
        (2 * alternating, alternating, MergedCost.ROWS_AND_ACTIVE, "per_expert"),
        (changing, alternating, MergedCost.NOTHING, ""),
    ):
        model = fit_cost_model(rows, active, 1000 + 10 * rows + 5 * active)
        assert model.merged is merged
        assert bool(model.note) == bool(none)
        assert model.held_out_error < 1e-6
        assert [name for name in ("base", "per_row", "per_expert") if getattr(model, name) == 0] == [none][: len(none)]
    assert "are needed" in fit_cost_model([1.0] * 5, [1.0] * 5, [1.0] * 5).reason
    assert fit_cost_model([0.0] * 30, [0.0] * 30, [5.0] * 30).reason == "no expert had any row"
    assert not fit_cost_model([], [], []).is_fitted


def test_an_estimate_is_what_an_expert_adds_to_its_call() -> None:
    rows, active = np.arange(2.0, 42.0), np.arange(40.0) % 7 + 1
    model = fit_cost_model(rows, active, 100 + 10 * rows + 5 * active)
    np.testing.assert_allclose(estimate_experts(model, [[0, 1, 6]]), [[0.0, 15.0, 65.0]], rtol=1e-6)
    assert relative_error([11, 18, 7], [10, 20, 0]) == pytest.approx(0.1)
    assert math.isnan(relative_error([1], [0]))
    assert expert_call_model([1.0] * 5, [1.0] * 5) is None


# -- the roofline ------------------------------------------------------------------------------------------------------


def test_a_roofline_by_hand() -> None:
    # 2 experts of 100 bytes and 40 operations a row: 3 rows take 1 µs, then one expert with 1 row takes 2 µs.
    points = roofline_of(
        step=[4, 5],
        record=[0, 1],
        forward_index=[0, 1],
        expert_rows=[[2, 1, 0], [0, 0, 1]],
        seconds=[1e-6, 2e-6],
        expert_bytes=100,
        flops_per_row=40,
    )
    assert points.distinct_experts.tolist() == [2, 1]
    assert points.active_bytes.tolist() == [200, 100]
    assert points.flops.tolist() == [120, 40]
    np.testing.assert_allclose(points.intensity, [0.6, 0.4])
    np.testing.assert_allclose(points.gbps, [0.2, 0.05])
    np.testing.assert_allclose(points.gflops, [0.12, 0.02])
    peak = Peak(gflops=10, gbps=1)
    roofline = Roofline(0, points, peak)
    assert peak.ridge == 10
    assert roofline.side == "memory"
    # Attainable: 0.6 and 0.4 GFLOP/s.
    assert roofline.attained_share == pytest.approx((0.12 / 0.6 + 0.02 / 0.4) / 2)
    assert Roofline(0, points, Peak(0.1, 1)).side == "compute"
    assert Roofline(0, points).side == ""
    assert math.isnan(Roofline(0, points).attained_share)


@pytest.mark.parametrize(("gflops", "gbps"), [(0, 1), (1, -1), (math.nan, 1), (math.inf, 1), (1, math.inf)])
def test_a_peak_is_finite_and_above_zero(gflops: float, gbps: float) -> None:
    with pytest.raises(InvalidInputError, match="finite numbers above 0"):
        Peak(gflops, gbps)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_the_lower_bound_holds_with_the_stated_confidence() -> None:
    rng = np.random.default_rng(3)
    # Log-normal: the true median is 1. Neighbours hang together within the 20 blocks of 10.
    missed = 0
    for _ in range(400):
        level = np.repeat(rng.normal(0, 0.3, 20), 10)
        _, low = lower_median(np.exp(level + rng.normal(0, 0.3, 200)), 0.05)
        missed += low > 1
    # Binomial(400, 0.05): more than 33 has a probability below 0.001.
    assert missed <= 33


def test_a_bound_by_hand() -> None:
    middle, low = lower_median(np.arange(1.0, 21.0), 0.05)
    assert middle == 10.5
    # P(fewer than 6 of 20 below the median) = 0.0207, fewer than 7: 0.0577.
    assert low == 6.0
    assert lower_median([1.0, 2.0], 0.05)[1] == -math.inf
    assert math.isnan(lower_median([])[0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_cost_of_imbalance_agrees_with_a_loop(times: list[list[float]]) -> None:
    mean = sum(sum(row) / 3 for row in times)
    slowest = sum(max(row) for row in times)
    if slowest == 0:
        assert math.isnan(imbalance_cost(times))
    else:
        assert imbalance_cost(times) == pytest.approx(1 - mean / slowest, abs=1e-9)


def test_the_maxima_are_taken_before_the_sum() -> None:
    # Each rank is the slowest one once: over both calls they did the same, and still half of the time was waited.
    assert imbalance_cost([[2.0, 0.0], [0.0, 2.0]]) == 0.5


def _layer(rng: np.random.Generator, scale: float = 1.0, router: float = 0.1, **fields: object) -> LayerTimesInput:
    block = scale * 1e6 * np.exp(rng.normal(0, 0.2, 100))
    nan = np.full(100, np.nan)
    given_fields = {"num_experts": 0, "first_step": 7} | fields
    return LayerTimesInput(np.arange(100), block, router * block, 0.2 * block, nan, **given_fields)  # type: ignore[arg-type]


def test_a_slow_layer_is_found_at_its_place_with_its_evidence() -> None:
    rng = np.random.default_rng(0)
    found = find_bottlenecks({n: _layer(rng, 3.0 if n == 2 else 1.0) for n in range(5)})
    assert [(each.kind, each.layer_index, each.since_step) for each in found] == [("slow_layer", 2, 7)]
    assert found[0].statistic == pytest.approx(3.0, rel=0.15)
    assert 2 < found[0].lower_bound < found[0].statistic
    assert found[0].code == "profile_slow_layer"
    assert [row.metric for row in found[0].evidence] == ["profile_slow_layer", "profile_slow_layer_low"]
    assert found[0].evidence[0].sample_size == 100


def test_layers_alike_and_a_layer_inside_of_the_floor_are_nothing() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert find_bottlenecks({n: _layer(rng, 1.6 if n == 1 else 1.0) for n in range(6)}) == ()


def test_few_calls_are_no_evidence() -> None:
    nan = np.full(10, np.nan)
    slow = LayerTimesInput(np.arange(10), np.full(10, 1e7), nan, nan, nan, 0)
    fast = LayerTimesInput(np.arange(10), np.full(10, 1e6), nan, nan, nan, 0)
    assert find_bottlenecks({0: slow, 1: fast, 2: fast}) == ()


def test_a_router_that_takes_half_of_its_block() -> None:
    rng = np.random.default_rng(1)
    found = find_bottlenecks({0: _layer(rng, router=0.5), 1: _layer(rng)})
    assert [(each.kind, each.layer_index) for each in found] == [("router_share", 0)]
    assert found[0].args["value"] == "50%"


def test_a_slow_expert_is_judged_by_what_the_others_take() -> None:
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 30, (100, 4))
    times = np.where(rows > 0, 5000 + 100.0 * rows, 0) * np.exp(rng.normal(0, 0.1, (100, 4)))
    # Three times as slow, but with few rows: by its time alone it would not stand out.
    rows[:, 3] = np.minimum(rows[:, 3], 2)
    times[:, 3] = np.where(rows[:, 3] > 0, 3 * (5000 + 100 * rows[:, 3]), 0)
    found = find_bottlenecks({0: _layer(rng, expert_times=times, expert_rows=rows, num_experts=4)})
    assert [(each.kind, each.layer_index, each.expert_id) for each in found] == [("slow_expert", 0, 3)]
    assert found[0].statistic == pytest.approx(3.0, rel=0.1)


def test_ranks_that_wait_for_the_slowest_one() -> None:
    rng = np.random.default_rng(4)
    ranks = np.stack([np.full(100, 3e5), np.full(100, 1e5)], axis=1)
    found = find_bottlenecks({0: _layer(rng, rank_times=ranks, is_estimated=True)})
    assert [(each.kind, each.is_estimated) for each in found] == [("expert_imbalance", True)]
    assert found[0].statistic == pytest.approx(1 / 3)


def _step_points(seconds: object) -> RooflinePoints:
    # 800 bytes and 400 operations a step: 0.5 FLOP/byte.
    rows = np.tile([[1, 1, 0, 0]], (30, 1))
    return roofline_of(
        step=np.arange(30), record=np.arange(30), forward_index=np.arange(30), expert_rows=rows,
        seconds=np.broadcast_to(np.asarray(seconds), 30), expert_bytes=400.0, flops_per_row=200.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nanoseconds", "peak", "kind", "share"),
    [
        # The roof: 800 bytes take 80 ns at 10 GB/s, 400 operations take 400 ns at 1 GFLOP/s.
        (100, Peak(100, 10), "memory_bound", 0.8),
        (500, Peak(1, 10), "compute_bound", 0.8),
        (1000, Peak(100, 10), "below_roof", 0.08),
        (4_000_000, Peak(1, 10), "below_roof", 1e-4),
        # Half of the steps above and half below the floor: neither is shown.
        ([100, 1000] * 15, Peak(100, 10), "", 0.0),
        (100, None, "", 0.0),
    ],
)
def test_the_limit_of_the_experts_is_said_where_they_come_near_it(
    nanoseconds: object, peak: Peak | None, kind: str, share: float
) -> None:
    roofline = Roofline(-1, _step_points(np.asarray(nanoseconds) * 1e-9), peak)
    found = find_bottlenecks({}, [roofline])
    if not kind:
        assert found == ()
        return
    assert [(each.kind, each.severity, each.layer_index, each.num_calls) for each in found] == [
        (kind, "info", None, 30)
    ]
    expected = 1 - share if kind == "below_roof" else share
    assert (found[0].statistic, found[0].lower_bound) == pytest.approx((expected, expected))
    text = render_finding(found[0].code, found[0].args)
    assert ("Neither reading weights nor computing is the limit" in text) == (kind == "below_roof")
    assert "{{" not in text + render_finding(found[0].code, found[0].args, "remedy")


def test_every_bottleneck_has_its_words() -> None:
    for kind in BottleneckKind:
        for part in ("title", "summary", "remedy"):
            assert f"finding.profile_{kind.value}.{part}" in catalogue()
