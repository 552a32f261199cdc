"""The early warning of collapse: loads in, a report and findings out."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from small_counts import SmallCounts

from moe_debugger.analysis import (
    PAGE_RUN_LENGTH,
    ChartSettings,
    FindingKind,
    LayerSeries,
    Severity,
    WarningStatus,
    analyze,
    collapse_warnings,
    warning_findings,
)
from moe_debugger.analysis.early_warning import min_slots
from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import render_finding

_Counts = npt.NDArray[np.int64]


def loads(seed: int, num_steps: int, *, falls_from: int | None = None, num_tokens: int = 512) -> _Counts:
    """Return [num_steps, 8] loads of top-2 tokens whose preferred experts change a little from step to step.

    From `falls_from` on two experts win more and more.
    """
    rng = np.random.default_rng(seed)
    preference, out = np.zeros(8), np.zeros((num_steps, 8), np.int64)
    for step in range(num_steps):
        preference = 0.5 * preference + rng.normal(0, 0.15, 8)
        logits = preference.copy()
        if falls_from is not None and step >= falls_from:
            logits[:2] += 0.25 * (step - falls_from + 1)
        scores = logits + rng.gumbel(size=(num_tokens, 8))
        out[step] = np.bincount(np.argsort(-scores, axis=1)[:, :2].ravel(), minlength=8)
    return out


def series(counts: _Counts, *, width: int = 1, first_step: int = 0) -> LayerSeries:
    num = len(counts) // width
    points = counts[: num * width].reshape(num, width, 8).sum(axis=1)
    steps = first_step + width * np.arange(num)
    return LayerSeries.from_loads(steps.astype(np.uint64), points, points.sum(axis=1) // 2, width=width)


def test_loads_become_corrected_entropies_by_hand() -> None:
    counts = 10 * np.array([[6, 2, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 0, 4]])
    layer = LayerSeries.from_loads(np.arange(4, dtype=np.uint64), counts, np.array([40, 40, 9, 40]))
    # H = -(.75 ln .75 + .25 ln .25) = 0.5623 nats, and (E - 1) / (2 N) = 3 / 160 is added; the second is at ln 4.
    assert layer.first_steps.tolist() == layer.last_steps.tolist() == [0, 1, 3]
    assert layer.log_effective[0] == pytest.approx(0.5623351 + 3 / 160)
    assert layer.log_effective[1] == pytest.approx(math.log(4))
    assert layer.max_over_mean is not None
    assert layer.max_over_mean.tolist() == [3.0, 1.0, 2.0]


def test_small_steps_are_summed_until_a_point_holds_enough_slots() -> None:
    assert [min_slots(experts) for experts in (8, 64, 256)] == [96, 320, 1088]
    # 40 + 0 + 50 + 6 slots are 96 on 8 experts; 95 and then 200; 96 at once; 95 at the end are too few.
    slots = np.array([40, 0, 50, 6, 95, 200, 96, 95])
    counts = np.zeros((8, 8), np.int64)
    counts[np.arange(8), [0, 0, 1, 2, 3, 4, 5, 6]] = slots
    entropy = np.array([1.0, 9.0, np.nan, 3.0, 0.5, 0.5, np.nan, 1.0])
    steps = np.array([10, 12, 14, 16, 18, 30, 32, 34], np.uint64)
    layer = LayerSeries.from_loads(steps, counts, slots // 2, width=2, router_entropy=entropy)
    assert layer.first_steps.tolist() == [10, 18, 32]
    assert layer.last_steps.tolist() == [17, 31, 33]
    assert layer.num_tokens.tolist() == [48, 147, 48]
    share = np.array([40, 50, 6]) / 96
    assert layer.log_effective[0] == pytest.approx(-(share * np.log(share)).sum() + 7 / 192)
    assert layer.router_entropy is not None
    assert layer.router_entropy.tolist() == pytest.approx([(20 * 1.0 + 3 * 3.0) / 23, 0.5, math.nan], nan_ok=True)
    few = LayerSeries.from_loads(steps[:1], counts[:1], slots[:1])
    assert (len(few.first_steps), collapse_warnings({0: few}).layers[0].status) == (0, WarningStatus.LEARNING)


# With a point a step each of these alarms.
@pytest.mark.parametrize(("num_experts", "top_k", "tokens"), [(8, 2, 8), (8, 2, 16), (16, 2, 16), (8, 1, 32)])
def test_balanced_routing_of_few_tokens_a_step_is_not_warned_of(num_experts: int, top_k: int, tokens: int) -> None:
    noise = SmallCounts(num_experts, top_k, tokens)
    sizes = np.full(6000, tokens)
    loads = noise.loads(np.random.default_rng(1), sizes, 4)
    steps = np.arange(len(sizes), dtype=np.uint64)
    report = collapse_warnings({index: LayerSeries.from_loads(steps, loads[:, index], sizes) for index in range(4)})
    assert {layer.status for layer in report.layers.values()} == {WarningStatus.WATCHING}
    assert [layer.earlier for layer in report.layers.values()] == [()] * 4


@pytest.mark.parametrize("phase", [None, 3])
def test_balanced_routing_of_a_batch_that_shrinks_is_not_warned_of(phase: int | None) -> None:
    rng = np.random.default_rng(1)
    sizes = np.maximum(256 * 2.0 ** (-np.arange(900) / 120), 2).astype(int)
    step = np.repeat(np.arange(len(sizes)), sizes)
    rows = {
        "layer_index": np.repeat(np.arange(4), len(step)),
        "expert_ids": np.argpartition(rng.random((4 * len(step), 8)), 1, axis=1)[:, :2],
        "step": np.tile(step, 4),
    }
    if phase is not None:
        rows["phase"] = np.full(4 * len(step), phase)
    found = analyze(rows, num_experts=8, top_k=2)
    assert found.early_warning is not None
    assert {layer.status for layer in found.early_warning.layers.values()} == {WarningStatus.WATCHING}
    assert [layer.earlier for layer in found.early_warning.layers.values()] == [()] * 4


def test_a_fall_in_small_steps_is_warned_of_in_time() -> None:
    # 16 tokens a step: three steps a point. Half is lost after 10 to 20 steps of the fall.
    counts = {index: loads(index, 500, num_tokens=16, falls_from=400 if index == 2 else None) for index in range(4)}
    report = collapse_warnings({index: series(table) for index, table in counts.items()})
    warned = report.layers[2].warned_at_step
    assert report.warned == (2,)
    assert warned is not None
    assert 400 < warned <= 412


def test_a_fall_in_one_layer_is_warned_of_there_and_nowhere_else() -> None:
    layers = {index: series(loads(index, 300)) for index in range(4)}
    layers[2] = series(loads(2, 300, falls_from=220), first_step=1000)
    report = collapse_warnings(layers)
    assert report.warned == (2,)
    warned = report.layers[2]
    assert warned.since_step is not None
    assert warned.warned_at_step is not None
    assert warned.baseline is not None
    assert warned.effective_experts is not None
    assert abs(warned.since_step - 1220) <= 5
    assert 1220 < warned.warned_at_step < 1240
    assert warned.statistic > warned.threshold
    assert 7 < warned.baseline <= 8
    assert warned.effective_experts < 0.85 * warned.baseline
    for index in (0, 1, 3):
        assert report.layers[index].status is WarningStatus.WATCHING
        assert report.layers[index].since_step is None
        assert report.layers[index].num_points == 300


@pytest.mark.parametrize("width", [2, 4])
def test_wide_points_are_warned_of_at_their_last_step(width: int) -> None:
    report = collapse_warnings({0: series(loads(3, 400, falls_from=300), width=width)})
    warned = report.layers[0].warned_at_step
    assert warned is not None
    assert warned % width == width - 1
    assert 300 < warned < 330


def test_a_look_after_each_step_says_what_the_last_look_says() -> None:
    counts = loads(5, 300, falls_from=210)
    final = collapse_warnings({0: series(counts)}).layers[0]
    assert final.warned_at_step is not None
    for length in range(140, 300, 4):
        now = collapse_warnings({0: series(counts[:length])}).layers[0]
        if length <= 150:
            assert now.status is (WarningStatus.LEARNING if length < 150 else WarningStatus.WATCHING)
        if length > final.warned_at_step:
            assert (now.warned_at_step, now.since_step) == (final.warned_at_step, final.since_step)
            assert now.statistic == final.statistic
        else:
            assert now.warned_at_step is None


def test_the_first_steps_are_reported_as_learning_and_are_no_finding() -> None:
    report = collapse_warnings({0: series(loads(0, 149, falls_from=100))})
    layer = report.layers[0]
    assert layer.status is WarningStatus.LEARNING
    assert (layer.baseline, layer.since_step) == (None, None)
    assert math.isnan(layer.statistic)
    assert warning_findings(report) == []


def test_missing_steps_are_gaps() -> None:
    counts = loads(6, 400, falls_from=300)
    kept = np.random.default_rng(0).random(400) < 0.7
    steps = np.flatnonzero(kept).astype(np.uint64)
    layer = LayerSeries.from_loads(steps, counts[kept], counts[kept].sum(axis=1) // 2)
    report = collapse_warnings({0: layer})
    warned = report.layers[0].warned_at_step
    assert warned is not None
    assert 300 < warned < 325
    healthy = loads(6, 400)[kept]
    fine = collapse_warnings({0: LayerSeries.from_loads(steps, healthy, healthy.sum(axis=1) // 2)})
    assert fine.warned == ()


def test_every_sixteenth_step_is_a_series_as_well() -> None:
    counts = loads(7, 200, falls_from=150)
    layer = LayerSeries.from_loads(16 * np.arange(200, dtype=np.uint64), counts, counts.sum(axis=1) // 2)
    warned = collapse_warnings({0: layer}).layers[0].warned_at_step
    assert warned is not None
    assert 150 * 16 < warned < 165 * 16


def test_layers_of_different_steps_are_charted_side_by_side() -> None:
    short, whole = series(loads(1, 120)), series(loads(2, 300, falls_from=220))
    report = collapse_warnings({0: short, 1: whole, 2: series(loads(4, 0))})
    assert [report.layers[index].status for index in range(3)] == [
        WarningStatus.LEARNING,
        WarningStatus.WARNED,
        WarningStatus.LEARNING,
    ]


def test_the_threshold_is_that_of_the_whole_page() -> None:
    whole, short = series(loads(2, 300, falls_from=220)), series(loads(1, 120))
    alone = collapse_warnings({0: whole}).layers[0].threshold
    assert collapse_warnings({0: whole, **dict.fromkeys(range(1, 4), short)}).layers[0].threshold == alone
    of_32 = collapse_warnings({0: whole, **dict.fromkeys(range(1, 32), short)}).layers[0].threshold
    assert of_32 == pytest.approx(alone + math.log(8))


def test_one_expert_has_no_balance_to_lose() -> None:
    layer = LayerSeries.from_loads(np.arange(300, dtype=np.uint64), np.ones((300, 1), np.int64), np.ones(300, np.int64))
    assert collapse_warnings({0: layer}).layers[0].status is WarningStatus.NOT_APPLICABLE


def test_the_run_length_is_stated_for_the_settings_that_were_measured() -> None:
    layers = {index: series(loads(index, 160)) for index in range(3)}
    report = collapse_warnings(layers)
    assert report.in_control_run_length == PAGE_RUN_LENGTH == 1e5
    assert report.false_alarms_per_1000_windows(10) == pytest.approx(0.1)
    # A higher effect floor only makes alarms rarer; another threshold is another rate.
    assert collapse_warnings(layers, settings=ChartSettings(min_fall=0.2)).in_control_run_length == 1e5
    for settings in (ChartSettings(threshold=3.0), ChartSettings(min_fall=0.1)):
        other = collapse_warnings(layers, settings=settings)
        assert other.in_control_run_length is None
        assert other.false_alarms_per_1000_windows(10) is None


def test_a_warning_becomes_a_finding_with_its_evidence_and_words() -> None:
    counts = loads(8, 300, falls_from=220)
    entropy = np.linspace(1.0, 0.5, 300)
    layer = LayerSeries.from_loads(
        np.arange(300, dtype=np.uint64), counts, counts.sum(axis=1) // 2, router_entropy=entropy
    )
    report = collapse_warnings({5: layer})
    (finding,) = warning_findings(report)
    assert (finding.kind, finding.severity, finding.code) == (
        FindingKind.COLLAPSE_WARNING,
        Severity.WARNING,
        "collapse_warning",
    )
    assert (finding.layer_index, finding.expert_id) == (5, None)
    assert finding.since_step == report.layers[5].since_step
    assert finding.statistic == report.layers[5].statistic
    rows = {row.metric: row for row in finding.evidence}
    assert set(rows) == {
        "collapse_statistic",
        "effective_experts",
        "effective_experts_fall",
        "max_over_mean",
        "mean_token_entropy",
        "in_control_run_length",
    }
    assert rows["effective_experts"].baseline == report.layers[5].baseline
    assert rows["max_over_mean"].baseline is not None
    assert rows["max_over_mean"].value > rows["max_over_mean"].baseline
    assert rows["in_control_run_length"].value == 1e5
    for part in ("title", "summary", "remedy"):
        text = render_finding(finding.code, finding.args, part)
        assert "{{" not in text
        assert "finding." not in text


@pytest.mark.parametrize(
    ("first", "last", "num_tokens"),
    [([0, 1, 1], [0, 1, 1], 3), ([2, 1, 3], [2, 1, 3], 3), ([0, 1, 2], [0, 1, 2], 2), ([0, 2, 4], [2, 3, 4], 3)],
)
def test_a_series_that_does_not_fit_together_is_refused(first: list[int], last: list[int], num_tokens: int) -> None:
    with pytest.raises(InvalidInputError):
        LayerSeries(np.array(first, np.uint64), np.array(last, np.uint64), np.zeros(3), np.ones(num_tokens))


@pytest.mark.parametrize(("num_steps", "num_tokens", "width"), [(2, 3, 1), (3, 2, 1), (3, 3, 0)])
def test_loads_that_do_not_fit_together_are_refused(num_steps: int, num_tokens: int, width: int) -> None:
    with pytest.raises(InvalidInputError, match="equal lengths"):
        LayerSeries.from_loads(
            np.arange(num_steps, dtype=np.uint64), np.ones((3, 8), np.int64), np.ones(num_tokens, int), width=width
        )
