"""Scores against hand-worked values, and never one without enough behind it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import forwards, infos, material, sampled

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, Severity, Thresholds
from moe_debugger.capture_health import CaptureHealth, CheckStatus, HealthCheck
from moe_debugger.planning import StepLoads
from moe_debugger.reporting.audit import audit, overall_score
from moe_debugger.reporting.content import Category, say
from moe_debugger.reporting.load_scores import load_balance_points, steadiness
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.scoring import interpolate
from moe_debugger.reporting.step_series import LayerSteps


def _scores(found: Material, num_ranks: int = 1, loads: dict[int, StepLoads] | None = None) -> dict[str, Category]:
    return {category.key: category for category in audit(found, num_ranks, loads or {})}


def _requests(num: int, tokens: int, shape: tuple[int, int], preference: Sequence[float] = (0.0,)) -> Material:
    layers = infos(shape, shape)
    weights = np.resize(np.asarray(preference), shape[0])
    choices = [[sampled(7 * r + i, tokens, shape, preference=weights) for i in range(2)] for r in range(num)]
    nats = 0.9 * math.log(shape[0])
    batches = forwards(choices, [shape[0]] * 2, router_entropy=lambda ids: np.full(len(ids), nats, np.float32))
    return material(batches, layers)


def test_load_balance_is_anchored_at_the_lines_of_the_rules() -> None:
    points = load_balance_points(8, 2, Thresholds())
    assert points == [(2.0, 0.0), (3.0, 25.0), (pytest.approx(5.6), 75.0), (8.0, 100.0)]
    worked = {8.0: 100, 5.6: 75, 4.3: 50, 3.0: 25, 2.5: 12.5, 2.0: 0, 1.0: 0, 6.8: 87.5}
    for value, score in worked.items():
        assert interpolate(value, points) == pytest.approx(score)


@pytest.mark.parametrize("shape", [(4, 2), (2, 1), (8, 8), (4, 3), (60, 4), (256, 8), (1, 1)])
def test_points_ascend_whatever_the_shape(shape: tuple[int, int]) -> None:
    points = load_balance_points(*shape, Thresholds())
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == [0.0, 25.0, 75.0, 100.0]
    assert interpolate(shape[0], points) == 100


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6, unique=True), st.floats(-60, 60), st.integers(0, 99))
def test_interpolate_is_that_of_numpy(xs: list[float], value: float, seed: int) -> None:
    ys = np.random.default_rng(seed).random(len(xs)).tolist()
    points = list(zip(sorted(xs), ys, strict=True))
    expected = np.interp(value, [x for x, _ in points], [y for _, y in points])
    assert interpolate(value, points) == pytest.approx(expected, abs=1e-6)


def test_a_healthy_router_scores_high_and_every_number_has_its_sample() -> None:
    found = _requests(30, 64, (8, 2))
    scores = _scores(found)
    assert scores["load_balance"].score is not None
    assert scores["load_balance"].score > 95
    assert scores["expert_use"].score == 100
    # Confidence is 1 - 0.9 = 0.1, five times the line.
    assert scores["router_confidence"].score == pytest.approx(100, abs=0.1)
    line = next(line for line in scores["load_balance"].evidence if line.layer_index == 1)
    assert (line.metric, line.sample_size) == ("effective_experts", 30 * 64)
    assert line.now == pytest.approx(found.analysis.metrics[1].effective_experts)
    interval = found.analysis.metrics[1].effective_experts_interval
    assert [line.lower, line.upper] == pytest.approx([interval.lower, interval.upper])


def test_the_lowest_layer_is_the_score() -> None:
    layers = infos((8, 2), (8, 2))
    skewed = np.array([9.0, 9.0, 9.0, 0, 0, 0, 0, 0])
    choices = [[sampled(r, 64, (8, 2)), sampled(r + 99, 64, (8, 2), preference=skewed)] for r in range(30)]
    category = _scores(material(forwards(choices, [8, 8]), layers))["load_balance"]
    assert category.layer_index == 1
    first, second = category.layer_scores[0], category.layer_scores[1]
    assert first is not None
    assert second is not None
    assert category.score == pytest.approx(second, abs=0.06)
    assert second < 30 < 95 < first


@pytest.mark.parametrize(
    ("num", "tokens", "missing"), [(30, 8, "240 tokens, it takes 1,000"), (4, 600, "requests, it takes 20")]
)
def test_there_is_no_score_on_too_little(num: int, tokens: int, missing: str) -> None:
    scores = _scores(_requests(num, tokens, (8, 2)))
    for key in ("load_balance", "expert_use", "router_confidence"):
        assert scores[key].score is None
        assert missing in scores[key].why.text
    score, why = overall_score(list(scores.values()), [])
    assert score is None
    assert why.code == "overall.too_little"


def test_sums_have_no_score_of_load_and_say_why() -> None:
    found = _requests(30, 64, (8, 2))
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    counts = Material(**{**values, "level": "counts", "rows": None})
    scores = _scores(counts)
    assert scores["load_balance"].score is None
    assert "level counts" in scores["load_balance"].why.text


def test_dead_cold_and_hot_experts_take_their_share_of_the_score() -> None:
    found = _requests(30, 64, (8, 2))
    marks = [
        Finding(FindingKind.DEAD_EXPERT, Severity.INFO, "dead_expert", 0, 3),
        Finding(FindingKind.HOT_EXPERT, Severity.INFO, "hot_expert", 0, 5),
        Finding(FindingKind.HOT_EXPERT, Severity.INFO, "hot_expert", 1, 5),
    ]
    object.__setattr__(found.analysis, "findings", tuple(marks))
    category = _scores(found)["expert_use"]
    assert category.layer_scores == {0: 75.0, 1: 87.5}
    assert (category.score, category.layer_index) == (75.0, 0)


def test_a_collapsed_layer_is_scored_by_its_effective_experts() -> None:
    only_two = np.array([30.0, 30.0, 0, 0, 0, 0, 0, 0])
    found = _requests(30, 64, (8, 2), only_two.tolist())
    assert {finding.kind for finding in found.analysis.findings} >= {FindingKind.ROUTER_COLLAPSE}
    scores = _scores(found)
    assert scores["expert_use"].score == pytest.approx(25, abs=0.1)
    assert scores["load_balance"].score == pytest.approx(0, abs=0.1)


def test_findings_of_single_steps_bound_what_sums_dilute() -> None:
    found = _requests(30, 64, (8, 2))
    row = EvidenceRow("effective_experts", 2.0)
    marks = [
        Finding(FindingKind.ROUTER_COLLAPSE, Severity.CRITICAL, "router_collapse", 0, evidence=(row,)),
        Finding(FindingKind.LOAD_IMBALANCE, Severity.WARNING, "load_imbalance_steps", 1),
    ]
    object.__setattr__(found.analysis, "findings", tuple(marks))
    scores = _scores(found)
    assert scores["load_balance"].layer_scores == {0: 25.0, 1: 74.0}
    assert scores["expert_use"].layer_scores == {0: 25.0, 1: 100.0}
    object.__setattr__(found.analysis, "findings", (replace(marks[1], severity=Severity.INFO),))
    score = _scores(found)["load_balance"].layer_scores[1]
    assert score is not None
    assert score > 95


def test_capacity_is_not_applicable_where_nothing_can_drop_and_scored_where_it_did() -> None:
    shape = (8, 2)
    found = _requests(30, 64, shape)
    category = _scores(found)["capacity"]
    assert category.score is None
    assert "not applicable" in category.why.text
    choices = [[sampled(r, 64, shape)] for r in range(30)]
    status = np.ones((64, 2), np.uint8)
    batches = forwards(choices, [8])
    for number, batch in enumerate(batches):
        own = status.copy()
        if number < 3:
            own[:, 1] = 2
            batch.layers[0].expert_ids[:, 1] = -1
        batch.layers[0].slot_status = own
    dropped = _scores(material(batches, infos(shape)))["capacity"]
    # 3 of 30 requests drop half of their slots: 5 %. 75 at 1 %, 0 at 20 %.
    assert dropped.score == pytest.approx(75 * (0.20 - 0.05) / 0.19, abs=0.1)
    assert dropped.evidence[0].sample_size == 30 * 64 * 2


def test_ranks_are_scored_by_the_time_that_they_wait() -> None:
    found = _requests(30, 64, (8, 2))
    assert "all experts are on one rank" in _scores(found)["rank_balance"].why.text
    # Two ranks of 4 experts; in every step one of them has 6 of 8 assignments: mean 4, most 6.
    counts = np.zeros((40, 1, 8))
    counts[::2, 0, :4], counts[::2, 0, 4:] = 1.5, 0.5
    counts[1::2, 0, :4], counts[1::2, 0, 4:] = 0.5, 1.5
    loads = StepLoads(counts, np.arange(40, dtype=np.uint64))
    category = _scores(found, 2, {8: loads})["rank_balance"]
    assert category.score == pytest.approx(100 * 4 / 6, abs=0.06)
    by_name = {line.metric: line for line in category.evidence}
    assert by_name["rank_waste_share"].now == pytest.approx(1 / 3)
    # Summed over the window it looks even.
    assert by_name["rank_window_imbalance"].now == pytest.approx(1)
    few = _scores(found, 2, {8: StepLoads(counts[:31], loads.steps[:31])})["rank_balance"]
    assert (few.score, "31 steps" in few.why.text) == (None, True)
    assert "do not divide" in _scores(found, 3, {8: loads})["rank_balance"].why.text


def _steps(values: Sequence[Sequence[int]], tokens: int = 1000) -> LayerSteps:
    counts = np.asarray(values, np.int64)
    return LayerSteps(np.arange(len(counts)), len(counts) - 1, counts, np.full(len(counts), tokens))


def test_a_fall_along_the_steps_is_seen_and_one_odd_step_is_not() -> None:
    even, half = [100] * 4, [200, 200, 0, 0]
    assert list(steadiness(_steps([even] * 9 + [half] * 3)) or []) == pytest.approx([0.5, 2, 4, 12])
    assert list(steadiness(_steps([even] * 6 + [half] + [even] * 5)) or []) == pytest.approx([1, 4, 4, 12])
    assert steadiness(_steps([even] * 7)) is None
    # 500 tokens each: two make one, and eight are left of sixteen.
    joined = steadiness(_steps([even] * 16, tokens=500))
    assert joined is not None
    assert joined[3] == 8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 3000))
def test_neighbours_are_joined_as_one_by_one(seed: int, num: int, least: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (num, 3))
    tokens = rng.integers(1, 1500, num)
    steps = LayerSteps(np.arange(num) * 2, 2 * num, counts, tokens)
    expected, own, total, first = [], np.zeros(3, int), 0, None
    for at in range(num):
        first = 2 * at if first is None else first
        own, total = own + counts[at], total + int(tokens[at])
        if total >= least:
            expected.append((first, own.tolist(), total))
            own, total, first = np.zeros(3, int), 0, None
    found = steps.at_least(least)
    actual = list(zip(found.first_steps.tolist(), found.counts.tolist(), found.num_tokens.tolist(), strict=True))
    assert actual == expected


def _checked(status: CheckStatus, **values: int) -> CaptureHealth:
    return CaptureHealth(
        num_produced=100, checks=(HealthCheck("range", status, 10, 1, "slots"),), dropped=values or None
    )


@pytest.mark.parametrize(
    ("health", "score"),
    [
        (_checked(CheckStatus.OK), 100.0),
        (_checked(CheckStatus.OK, buffer_full=1), 74.0),
        (_checked(CheckStatus.OK, buffer_full=60), 40.0),
        (_checked(CheckStatus.FAILED), 49.0),
        (CaptureHealth(num_produced=100, problems=("late",)), 74.0),
    ],
)
def test_capture_quality_is_bounded_by_what_went_wrong(health: CaptureHealth, score: float) -> None:
    found = _requests(4, 8, (8, 2))
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    category = _scores(Material(**{**values, "source": "session", "health": health}))["capture_quality"]
    assert category.score == pytest.approx(score)


def _category(score: float | None, weight: int) -> Category:
    text = say("score.whole")
    return Category(key="k", title=text, score=score, why=text, formula=text, weight=weight)


def test_overall_is_the_weighted_mean_and_bounded_by_findings() -> None:
    categories = [_category(90, 3), _category(60, 2), _category(None, 2)]
    assert overall_score(categories, [])[0] == 78.0
    warning = Finding(FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 0, 1)
    critical = Finding(FindingKind.ROUTER_COLLAPSE, Severity.CRITICAL, "router_collapse", 0)
    info = Finding(FindingKind.HOT_EXPERT, Severity.INFO, "hot_expert", 0, 1)
    assert overall_score(categories, [info])[0] == 78.0
    assert overall_score(categories, [warning])[0] == 74.0
    assert overall_score(categories, [info, critical, warning])[0] == 49.0
    assert overall_score([_category(20, 5)], [critical])[0] == 20.0
    assert overall_score([_category(90, 4), _category(None, 9)], [])[0] is None


def test_load_metrics_stand_beside_what_balance_gives_on_as_few_tokens() -> None:
    evidence = _scores(_requests(30, 64, (8, 2)))["load_balance"].evidence
    rules = {line.metric: line.rule for line in evidence if line.layer_index == 0}
    low, _, high, *_ = rules["max_over_mean"].split()
    assert rules["max_over_mean"].endswith("at balance")
    value = next(line.now for line in evidence if line.layer_index == 0 and line.metric == "max_over_mean")
    assert value is not None
    # A healthy router lies inside, or hardly above: its requests differ.
    assert 1 <= float(low) < float(high)
    assert value < 1.1 * float(high)
    assert rules["cv_debiased"] == ""
