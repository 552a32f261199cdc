"""The early warning of collapse: loads in, a report and findings out."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from moe_debugger.analysis import (
    PAGE_RUN_LENGTH,
    ChartSettings,
    FindingKind,
    LayerSeries,
    Severity,
    WarningStatus,
    collapse_warnings,
    warning_findings,
)
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
    counts = np.array([[6, 2, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    layer = LayerSeries.from_loads(np.arange(3, dtype=np.uint64), counts, np.array([4, 4, 0]))
    # H = -(.75 ln .75 + .25 ln .25) = 0.5623 nats, and (E - 1) / (2 N) = 3 / 16 is added; the second is at ln 4.
    assert layer.log_effective[0] == pytest.approx(0.5623351 + 3 / 16)
    assert layer.log_effective[1] == pytest.approx(math.log(4))
    assert math.isnan(layer.log_effective[2])
    assert layer.max_over_mean is not None
    assert layer.max_over_mean[:2].tolist() == [3.0, 1.0]


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
    other = collapse_warnings(layers, settings=ChartSettings(threshold=3.0))
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
    ("steps", "num_tokens", "width"), [([0, 1, 1], 3, 1), ([2, 1, 3], 3, 1), ([0, 1, 2], 2, 1), ([0, 1, 2], 3, 0)]
)
def test_a_series_that_does_not_fit_together_is_refused(steps: list[int], num_tokens: int, width: int) -> None:
    with pytest.raises(InvalidInputError):
        LayerSeries(np.array(steps, np.uint64), np.zeros(3), np.ones(num_tokens), width=width)
