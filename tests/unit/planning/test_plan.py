"""Plans: fitted on one window, judged on another, and honest where nothing is to be gained."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning import (
    Candidate,
    GainInterval,
    Placement,
    PlacementPlan,
    Verdict,
    contiguous_placement,
    gain_interval,
    judge,
    plan_placement,
)
from moe_debugger.planning.evaluation import student_quantile

NUM_EXPERTS, NUM_LAYERS = 16, 2


def _steps(shares: Any, num_steps: int, seed: int, num_assignments: int = 1024) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    rows = np.broadcast_to(np.asarray(shares, np.float64), (NUM_LAYERS, NUM_EXPERTS))
    return np.stack([rng.multinomial(num_assignments, row / row.sum(), size=num_steps) for row in rows], axis=1)


def _skewed(first: int) -> list[float]:
    """Four hot experts next to each other, so that the contiguous placement has them on one rank of four."""
    shares = [1.0] * NUM_EXPERTS
    shares[first : first + 4] = [4.0] * 4
    return shares


def _plan(loads: Any, **options: Any) -> PlacementPlan:
    return plan_placement(loads, top_k=2, num_ranks=4, **options)


def _only(plan: PlacementPlan) -> Candidate:
    assert len(plan.candidates) == 1
    return plan.candidates[0]


def test_a_lasting_skew_is_helped_by_about_what_it_costs() -> None:
    plan = _plan(_steps(_skewed(0), 128, 0), expert_bytes=1000, seconds_per_assignment=1e-6, link_bytes_per_s=1e6)
    found = _only(plan)
    assert plan.recommended is found
    assert found.verdict is Verdict.HELPS
    # The hot rank has 16 of 28 parts now; even ranks have 7 of 28: the bound falls by 1 - 7/16 less the steps' noise.
    assert found.held_out.gain.lower > 0.45
    assert found.held_out.gain.upper < 1 - 7 / 16
    assert found.held_out.current.imbalance == pytest.approx(16 / 7, rel=0.02)
    assert found.held_out.planned.imbalance < 1.15
    assert found.migration.bytes_moved == found.migration.num_experts_moved * 1000 > 0
    saved = found.held_out.current.step_bound - found.held_out.planned.step_bound
    assert found.gain_s == pytest.approx(saved * 1e-6)
    assert found.break_even_steps == pytest.approx(found.migration.max_received * 1e-3 / (saved * 1e-6))
    assert plan.tokens_per_step == 512


def test_even_ranks_are_left_as_they_are() -> None:
    loads = np.full((128, NUM_LAYERS, NUM_EXPERTS), 64)
    plan = _plan(loads, num_redundant=4)
    assert plan.recommended is None
    for candidate in plan.candidates:
        assert candidate.verdict is Verdict.WOULD_NOT_HELP
        assert "even already" in candidate.reason
        assert candidate.migration.num_experts_moved == 0


def test_a_hot_expert_that_rotates_is_not_helped_by_any_fixed_placement() -> None:
    loads = np.full((128, NUM_LAYERS, NUM_EXPERTS), 32)
    loads[np.arange(128), :, np.arange(128) % NUM_EXPERTS] = 320
    found = _only(_plan(loads))
    assert found.verdict is Verdict.WOULD_NOT_HELP
    assert "changes from step to step" in found.reason
    assert found.held_out.current.imbalance > 1.5
    assert found.held_out.current.window_imbalance == pytest.approx(1, abs=0.01)


def test_a_skew_that_moves_on_after_the_fitting_window_is_judged_by_where_it_went() -> None:
    # One hot expert on each rank now; the plan has put some of them together.
    moved = [1.0] * NUM_EXPERTS
    for expert in (0, 5, 10, 15):
        moved[expert] = 5.0
    found = _only(_plan(np.concatenate([_steps(_skewed(0), 64, 2), _steps(moved, 64, 3)])))
    assert found.fitted_gain > 0.4
    assert found.verdict is Verdict.WOULD_HARM
    assert found.held_out.gain.upper < 0


def test_a_fitted_gain_that_does_not_carry_over_is_said_so() -> None:
    # Afterwards rank 0 still waits a little for one expert that no placement can split.
    after = [1.0] * NUM_EXPERTS
    after[7] = 8.0
    found = _only(_plan(np.concatenate([_steps(_skewed(0), 64, 2), _steps(after, 64, 3)])))
    assert found.fitted_gain > 0.4
    assert found.verdict in {Verdict.WOULD_NOT_HELP, Verdict.WOULD_HARM}
    assert abs(found.held_out.gain.gain) < 0.1


def test_a_workload_for_which_the_current_placement_is_right_is_named_as_harmed() -> None:
    fitted = _steps(_skewed(0), 128, 0)
    alone = _only(_plan(fitted))
    # Hot experts of the other workload: four that the plan put on one rank, which are on different ranks now.
    rank = alone.placement.physical_to_logical[0].reshape(4, 4)[0]
    shares = np.ones((NUM_LAYERS, NUM_EXPERTS))
    for layer in range(NUM_LAYERS):
        shares[layer, alone.placement.physical_to_logical[layer].reshape(4, 4)[0]] = 4.0
    assert len(set(rank // 4)) > 1
    found = _only(_plan(fitted, other_workloads={"code": _steps(shares, 64, 5)}))
    assert found.verdict is Verdict.ONLY_THIS_WORKLOAD
    assert "code" in found.reason
    assert found.others[0].gain.upper < 0
    same = _plan(fitted, other_workloads={"more": _steps(_skewed(0), 64, 6), "few": _steps(_skewed(0), 5, 7)})
    assert _only(same).verdict is Verdict.HELPS
    assert any("too few steps of few" in note for note in same.notes)


def test_few_steps_are_not_enough() -> None:
    assert _only(_plan(_steps(_skewed(0), 40, 0))).verdict is Verdict.NOT_ENOUGH_STEPS
    short_fit = _only(_plan(_steps(_skewed(0), 60, 0), held_out_share=0.9))
    assert short_fit.verdict is Verdict.NOT_ENOUGH_STEPS
    assert "6 steps to fit" in short_fit.reason
    nothing = _plan(np.zeros((100, NUM_LAYERS, NUM_EXPERTS)))
    assert _only(nothing).verdict is Verdict.NOT_ENOUGH_STEPS
    assert json.loads(nothing.to_json())["tokens_per_step"] is None


def test_loads_that_change_as_slowly_as_the_window_is_long_are_not_enough() -> None:
    half = _steps(_skewed(0), 64, 0)
    slow = np.concatenate([half, _steps(_skewed(0), 32, 1), _steps(_skewed(8), 32, 2)])
    found = _only(_plan(slow))
    assert found.verdict is Verdict.NOT_ENOUGH_STEPS
    assert "change slowly" in found.reason
    assert found.held_out.gain.lower > 0  # which alone would have been called a help


def test_spare_slots_help_where_one_expert_is_too_heavy_for_any_rank() -> None:
    shares = [1.0] * NUM_EXPERTS
    shares[3] = 15.0  # half of all load: no placement without copies is below 2 x the mean
    plan = _plan(_steps(shares, 128, 0), num_redundant=4, num_nodes=2, num_groups=4, expert_bytes=10)
    by_name = {candidate.placement.strategy: candidate for candidate in plan.candidates}
    assert list(by_name) == ["greedy", "eplb", "hierarchical"]
    assert by_name["greedy"].held_out.planned.imbalance >= 1.9
    assert by_name["eplb"].held_out.planned.imbalance < 1.25
    assert plan.recommended is by_name["eplb"]
    assert by_name["eplb"].migration.extra_bytes_per_rank == NUM_LAYERS * 10
    # Copies stay on one of two nodes: half of the load is 1 of 4 ranks' twice over.
    assert 1.2 < by_name["hierarchical"].held_out.planned.imbalance < 1.9
    confidence = by_name["eplb"].held_out.gain.confidence
    assert confidence == pytest.approx(1 - 0.05 / 3)


def test_a_plan_is_json_and_its_placements_can_be_read_back() -> None:
    plan = _plan(_steps(_skewed(0), 128, 0))
    values = json.loads(plan.to_json())
    assert (values["format"], values["version"], values["recommended"]) == ("moe-debugger-placement-plan", 1, 0)
    candidate = values["candidates"][0]
    assert candidate["verdict"] == "helps"
    placement = Placement.from_dict(candidate["placement"])
    assert placement.physical_to_logical.tolist() == _only(plan).placement.physical_to_logical.tolist()
    assert len(candidate["held_out"]["planned"]["layer_imbalance"]) == NUM_LAYERS
    assert "use greedy" in str(plan)
    assert "<table>" in plan._repr_html_()


def test_a_placement_that_already_runs_is_what_plans_are_compared_with() -> None:
    loads = _steps(_skewed(0), 128, 0)
    running = _only(_plan(loads)).placement
    again = _only(_plan(loads, current=running))
    assert again.verdict is Verdict.WOULD_NOT_HELP
    assert again.migration.num_experts_moved == 0
    spare = contiguous_placement(NUM_LAYERS, NUM_EXPERTS, 4, num_slots=20)
    assert _only(_plan(loads, current=spare)).placement.num_slots == 20


def test_intervals_equal_a_plain_jackknife() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(90, 110, 160)
    after = rng.uniform(80, 100, 160) + 8 * np.sin(np.arange(160) / 16)  # slower than a block
    found = gain_interval(before, after)
    assert found.num_blocks == 10
    left_out = [
        1
        - sum(after[i] for i in range(160) if i // 16 != block) / sum(before[i] for i in range(160) if i // 16 != block)
        for block in range(10)
    ]
    mean = sum(left_out) / 10
    error = math.sqrt(9 / 10 * sum((value - mean) ** 2 for value in left_out))
    ratio = sum(after) / sum(before)
    rest = [sum(after[b * 16 + i] - ratio * before[b * 16 + i] for i in range(16)) for b in range(10)]
    correlation = sum(rest[b] * rest[b + 1] for b in range(9)) / sum(value**2 for value in rest)
    assert found.block_correlation == pytest.approx(correlation)
    assert correlation > 0.3
    widening = math.sqrt((1 + correlation) / (1 - correlation))
    assert found.gain == pytest.approx(1 - after.sum() / before.sum())
    # 2.2622 is the 97.5 % quantile of Student's t with 9 degrees of freedom.
    assert found.upper - found.gain == pytest.approx(2.2622 * error * widening, rel=0.001)
    assert found.gain - found.lower == pytest.approx(found.upper - found.gain)
    assert math.isnan(gain_interval(before[:31], after[:31]).lower)


@pytest.mark.parametrize(
    ("lower", "upper", "correlation", "verdict"),
    [
        (0.02, 0.08, 0.0, Verdict.HELPS),
        (0.005, 0.095, 0.0, Verdict.WOULD_NOT_HELP),  # above nothing, but not above the least gain that counts
        (-0.01, 0.11, 0.0, Verdict.WOULD_NOT_HELP),
        (-0.2, -0.1, 0.0, Verdict.WOULD_HARM),
        (0.02, 0.08, 0.6, Verdict.NOT_ENOUGH_STEPS),
        (math.nan, math.nan, math.nan, Verdict.NOT_ENOUGH_STEPS),
    ],
)
def test_verdicts_follow_the_interval_not_the_estimate(
    lower: float, upper: float, correlation: float, verdict: Verdict
) -> None:
    measured = _only(_plan(_steps(_skewed(0), 128, 0))).held_out
    gain = GainInterval((lower + upper) / 2, lower, upper, 0.95, 8, correlation)
    found, reason = judge(replace(measured, gain=gain), (), fitted_gain=0.05, min_gain=0.01)
    assert found is verdict
    assert reason


@pytest.mark.parametrize(("probability", "degrees"), [(0.975, 7), (0.995, 7), (0.999, 7), (0.99, 19)])
def test_student_quantiles_leave_the_right_tail(probability: float, degrees: int) -> None:
    at = np.linspace(-80, student_quantile(probability, degrees), 400_001)
    density = (1 + at**2 / degrees) ** (-(degrees + 1) / 2)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    below = scale * float((density[1:] + density[:-1]).sum() / 2 * (at[1] - at[0]))
    assert 1 - below == pytest.approx(1 - probability, rel=0.05)


def test_plans_on_independent_even_routing_seldom_claim_a_help() -> None:
    helped = 0
    for seed in range(60):
        loads = _steps([1.0] * NUM_EXPERTS, 96, seed, num_assignments=256)
        helped += _plan(loads).recommended is not None
    assert helped <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 17}, "top_k 17"),
        ({"num_ranks": 5}, "add 4 redundant"),
        ({"num_redundant": -1}, "num_redundant -1"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"min_gain": -0.1}, "min_gain"),
        ({"confidence": 1.0}, "confidence"),
        ({"current": contiguous_placement(2, 16, 2)}, "on 2 ranks"),
        ({"expert_bytes": -1}, "expert_bytes"),
        ({"num_ranks": 0}, "num_ranks 0: expected a whole number, 1 or more"),
        ({"num_ranks": "4"}, "num_ranks '4'"),
        ({"num_ranks": 100_000_000, "num_redundant": 99_999_984}, "100,000,000 ranks: expected 4,096 at most"),
        ({"num_ranks": 4096, "num_redundant": 4096 * 17 - 16}, "num_redundant 69,616: with 65,520"),
        ({"num_redundant": 50}, "num_redundant 50: with 48 each of the 4 ranks holds all 16 experts"),
        ({"num_nodes": 2, "num_groups": 0}, "num_groups 0"),
        ({"link_bytes_per_s": 0}, "link_bytes_per_s 0"),
        ({"seconds_per_assignment": -1}, "seconds_per_assignment -1"),
    ],
)
def test_options_that_make_no_plan_are_refused(options: dict[str, Any], message: str) -> None:
    all_options: dict[str, Any] = {"top_k": 2, "num_ranks": 4} | options
    with pytest.raises(InvalidInputError, match=message):
        plan_placement(_steps(_skewed(0), 64, 0), **all_options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "not a placement: a list"),
        ({"num_experts": "q"}, "num_experts 'q'"),
        ({"num_nodes": None}, "num_nodes None"),
    ],
)
def test_what_is_no_placement_is_refused(values: Any, message: str) -> None:
    if isinstance(values, dict):
        values = contiguous_placement(1, 4, 2).to_dict() | values
    with pytest.raises(InvalidInputError, match=message):
        Placement.from_dict(values)


def test_ragged_loads_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="rows of different lengths"):
        _plan([[[1, 2]], [[1, 2, 3]]])


def test_an_expert_too_heavy_for_any_rank_is_named() -> None:
    shares = [1.0] * NUM_EXPERTS
    shares[5] = 20.0
    loads = _steps(shares, 128, 0)
    packed = _plan(loads, current=_only(_plan(loads)).placement)
    assert "; expert 5 of layer" in _only(packed).reason
    assert "only copies of it" in _only(packed).reason
    copied = [each for each in _plan(loads, num_redundant=4).candidates if each.placement.strategy == "eplb"]
    assert "alone" not in copied[0].reason


def test_groups_that_do_not_fit_the_nodes_are_said() -> None:
    loads = _steps(_skewed(0), 128, 0)
    said = [
        any("hierarchical was not tried" in note for note in _plan(loads, num_nodes=2, num_groups=n).notes)
        for n in (1, 2, 3, 6)
    ]
    assert said == [False, False, True, True]
