"""What a running profile sends to the fleet."""

import math

import numpy as np
import pytest
import torch
from timed_moe import FakeTime, ListModel

from moe_debugger import MoEDebugger
from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling import LayerProfiler, Peak, clocks
from moe_debugger.profiling.live import SERIES_PREFIX, LiveProfile
from moe_debugger.training.series import SeriesPoint


class Seconds:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _values(points: list[SeriesPoint]) -> dict[tuple[str, int], float]:
    return {
        (p.name.removeprefix(SERIES_PREFIX), p.layer_index): float(p.values[0]) for p in points if not p.is_per_expert
    }


def test_points_come_every_few_seconds_and_a_bottleneck_that_is_gone_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, seconds = FakeTime(), Seconds()
    monkeypatch.setattr(clocks.HostClock, "mark", clock.mark)
    model = ListModel(3, 4, 2, clock=clock, costs={(1, e): (50_000, 0) for e in range(4)}, default=(500, 10))
    profiler = LayerProfiler(model, find_sites(model).sites)
    profiler.attach()
    live = LiveProfile(profiler, layer_numbers={0: 4, 1: 5, 2: 6}, expert_owners={}, peak=Peak(100, 10), clock=seconds)
    assert live.points() == []

    def run(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                model(torch.arange(8)[None])

    run(40)
    assert live.points() == [], "not before the interval is over"
    seconds.now += 1000
    points = live.points()
    assert all(point.name.startswith("profile_") and len(point.name) <= 64 for point in points)
    assert {point.step for point in points} == {39}
    values = _values(points)
    assert values["router_ms", 4] == 1e-3
    assert values["layer_ms", 5] > 3 * values["layer_ms", 4]
    assert values["bottleneck_slow_layer", 5] > 2
    assert 2 < values["bottleneck_slow_layer_low", 5] <= values["bottleneck_slow_layer", 5]
    assert values["bottleneck_slow_layer_calls", 5] == 40
    assert (values["num_forwards", -1], values["layer_calls", 5]) == (40, 40)
    assert values["estimate_fitted", 5] + values["estimate_held_out", 5] == 38
    # All calls are alike: one cost alone.
    assert values["estimate_merged", 5] == 1
    assert values["estimate_worst", 5] < 1e-6
    assert (values["estimate_worst_rows", 5], values["estimate_unknown_rows", 5]) == (16, 0)
    assert values["peak_gflops", -1] == 100
    assert values["step_experts", -1] > 0
    assert ("wait_ms", 4) not in values, "nothing is sent for what has no number"
    experts = [point for point in points if point.is_per_expert]
    assert {point.name for point in experts} == {"profile_expert_ms"}
    assert {point.layer_index for point in experts} == {4, 5, 6}
    seconds.now += 1000
    assert live.points() == [], "nothing ran"

    for expert in model.layers[1]["mlp"].experts:  # type: ignore[index]
        expert.call_ns, expert.row_ns = 500, 10
    run(300)
    seconds.now += 1000
    later = _values(live.points())
    assert math.isnan(later["bottleneck_slow_layer", 5])
    seconds.now += 1000
    run(1)
    assert ("bottleneck_slow_layer", 5) not in _values(live.points())
    profiler.detach()


def test_every_slow_expert_of_a_layer_is_sent_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = FakeTime(), Seconds()
    monkeypatch.setattr(clocks.HostClock, "mark", clock.mark)
    model = ListModel(1, 6, 2, clock=clock, costs={(0, 1): (5_000, 0), (0, 4): (9_000, 0)}, default=(500, 10))
    profiler = LayerProfiler(model, find_sites(model).sites)
    profiler.attach()
    live = LiveProfile(profiler, layer_numbers={}, expert_owners={}, clock=seconds)

    def sent() -> dict[str, SeriesPoint]:
        with torch.no_grad():
            for _ in range(288):
                model(torch.arange(64)[None])
        seconds.now += 1000
        return {point.name.removeprefix(SERIES_PREFIX): point for point in live.points() if point.is_per_expert}

    points = sent()
    slow = points["bottleneck_slow_expert"].values
    assert np.flatnonzero(np.isfinite(slow)).tolist() == [1, 4]
    low = points["bottleneck_slow_expert_low"].values
    assert (low[[1, 4]] > 2).all()
    assert points["bottleneck_slow_expert_calls"].values[[1, 4]].tolist() == [256, 256]
    for expert in model.layers[0]["mlp"].experts:  # type: ignore[index]
        expert.call_ns, expert.row_ns = 500, 10
    points = sent()
    assert np.isnan(points["bottleneck_slow_expert"].values).tolist() == [True] * 6
    profiler.detach()


def test_a_session_sends_its_profile_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ListModel(2)
    with MoEDebugger(model, profiling=True) as debugger, torch.no_grad():
        session = debugger.session
        assert session is not None
        sent: list[SeriesPoint] = []
        monkeypatch.setattr(session, "_send_points", sent.extend)
        for _ in range(32):
            model(torch.arange(8)[None])
        session.health()
    assert {"profile_layer_ms", "profile_overhead_share", "profile_expert_ms"} <= {point.name for point in sent}
    message = sent[0].to_message()
    assert message.name.startswith("profile_")


def test_a_summary_that_takes_long_comes_less_often_and_counts_as_cost() -> None:
    seconds = Seconds()
    model = ListModel(1)
    profiler = LayerProfiler(model, find_sites(model).sites)
    profiler.attach()
    live = LiveProfile(profiler, layer_numbers={}, expert_owners={}, interval_s=1e-6, clock=seconds)
    with torch.no_grad():
        for _ in range(32):
            model(torch.arange(8)[None])
    before = profiler.own_ns
    assert live.points()
    took_s = (profiler.own_ns - before) / 1e9
    assert took_s > 0
    with torch.no_grad():
        for _ in range(32):
            model(torch.arange(8)[None])
    seconds.now += 99 * took_s
    assert live.points() == []
    seconds.now += 2 * took_s
    assert live.points()
    profiler.detach()
