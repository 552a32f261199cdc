"""Detectors of others: what they see, what is taken from them, and that they break nothing."""

import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, Severity, Thresholds, fold_decisions, plugins
from moe_debugger.analysis.metrics import layer_metrics
from moe_debugger.analysis.plugins import Detector, DetectorView, detector_view, installed_detectors, run_detectors

EVIDENCE = (EvidenceRow("share", 0.5, "> 0.4"),)


def view_of(num_rows: int = 64) -> DetectorView:
    ids = np.random.default_rng(0).integers(0, 8, (num_rows, 1)).astype(np.int32)
    rows = {"layer_index": np.repeat([0, 2], num_rows // 2), "expert_ids": ids}
    state = fold_decisions(rows, num_experts=8, top_k=1)
    metrics = {index: layer_metrics(layer) for index, layer in state.layers.items()}
    return detector_view(state, metrics, thresholds=Thresholds(), baseline={0: metrics[0]})


class Scripted:
    """A detector that does what it is told."""

    version = "2.1"

    def __init__(self, result: Callable[[DetectorView], Any], name: str = "scripted") -> None:
        self.name = name
        self._result = result

    def detect(self, view: DetectorView) -> Iterable[Finding]:
        found: Iterable[Finding] = self._result(view)
        return found


def finding(**changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "kind": FindingKind.HOT_EXPERT,
        "severity": Severity.WARNING,
        "code": "too_hot",
        "layer_index": 2,
        "expert_id": 3,
        "evidence": EVIDENCE,
        "statistic": 4.0,
    }
    return Finding(**{**fields, **changes})


def test_findings_carry_the_name_of_their_plugin() -> None:
    outcome = run_detectors(view_of(), [Scripted(lambda view: [finding()])])
    assert outcome.problems == ()
    assert [(found.code, found.rule_id) for found in outcome.findings] == [
        ("scripted.too_hot", "scripted.too_hot.l2.e3")
    ]
    assert outcome.ran == ("scripted 2.1",)
    assert outcome.note == "findings of plug-ins (scripted 2.1) are not part of this rate"
    assert run_detectors(view_of(), []).note == ""
    bad = run_detectors(view_of(), [Scripted(lambda view: None, "none")])
    assert bad.note.endswith(
        "problems with plug-ins (1): detector plug-in 'none' failed: TypeError: 'NoneType' object is not iterable"
    )


def test_the_view_holds_the_state_and_cannot_be_written() -> None:
    view = view_of()
    layer = view.layers[2]
    assert int(layer.counts.sum()) == layer.metrics.num_assignments == 32
    assert layer.block_counts.sum(axis=0).tolist() == layer.counts.tolist()
    assert (view.layers[0].baseline is not None, layer.baseline) == (True, None)
    for array in (layer.counts, layer.block_counts, layer.block_tokens, layer.mean_probability):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(TypeError):
        view.layers[1] = layer  # type: ignore[index]
    with pytest.raises(AttributeError):
        view.num_requests = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("hello", "a str, expected a Finding"),
        (finding(kind="hot_expert"), "expected a FindingKind and a Severity"),
        (finding(severity="critical"), "expected a FindingKind and a Severity"),
        (finding(code="Not a code"), "code 'Not a code'"),
        (finding(code="a.b"), "code 'a.b'"),
        (finding(layer_index=1), r"layer 1, there are \[0, 2\]"),
        (finding(layer_index="2"), "layer '2'"),
        (finding(layer_index=None), "expert 3 of no layer"),
        (finding(expert_id=8), "expert 8 of layer 2, which has 8"),
        (finding(since_step="now"), "since_step 'now'"),
        (finding(statistic="high"), "statistic 'high'"),
        (finding(evidence=["x"]), "no tuple of EvidenceRow"),
        (finding(args={"a": 1}), "args that are no texts"),
        (finding(severity=Severity.CRITICAL, evidence=()), "critical without evidence"),
    ],
)
def test_nonsense_is_left_out_and_reported_and_the_rest_is_kept(bad: Any, problem: str) -> None:
    outcome = run_detectors(view_of(), [Scripted(lambda view: [bad, finding()])])
    assert [found.code for found in outcome.findings] == ["scripted.too_hot"]
    assert len(outcome.problems) == 1
    assert outcome.problems[0].startswith("detector plug-in 'scripted' returned a finding that was left out: ")
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(outcome.problems[0])


def test_a_detector_that_raises_breaks_neither_what_it_found_before_nor_the_others() -> None:
    def half(view: DetectorView) -> Iterable[Finding]:
        yield finding()
        raise KeyError("layer 7")

    detectors = [
        Scripted(half, "half"),
        Scripted(lambda view: None, "none"),
        Scripted(lambda view: [finding()], "good"),
    ]
    outcome = run_detectors(view_of(), detectors)
    assert [found.code for found in outcome.findings] == ["half.too_hot", "good.too_hot"]
    assert outcome.problems[0] == "detector plug-in 'half' failed: KeyError: 'layer 7'"
    assert outcome.problems[1].startswith("detector plug-in 'none' failed: TypeError")


def test_endless_and_slow_detectors_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(view: DetectorView) -> Iterable[Finding]:
        while True:
            yield finding()

    outcome = run_detectors(view_of(), [Scripted(endless)])
    assert len(outcome.findings) == 1000
    assert outcome.problems == ("detector plug-in 'scripted' returned more than 1000 findings; the rest was left out",)

    def idle(view: DetectorView) -> Iterable[Finding]:
        time.sleep(0.03)
        return []

    monkeypatch.setattr(plugins, "_SLOW_S", 0.01)
    slow = run_detectors(view_of(), [Scripted(idle)])
    assert "every analysis waits for it" in slow.problems[0]


class Entry:
    """What `importlib.metadata` gives for one entry point."""

    value = "somewhere:Thing"

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name = name
        self.load = load


class Good:
    name = "good"
    version = "1"

    def detect(self, view: DetectorView) -> Iterable[Finding]:
        return [finding()]


def missing() -> Any:
    raise ImportError("no module named 'somewhere'")


def test_detectors_are_found_by_entry_point_once_and_bad_ones_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    entries = [
        Entry("absent", missing),
        Entry("class", lambda: Good),
        Entry("copy", lambda: lambda: Good()),
        Entry("number", lambda: lambda: 3),
        Entry("odd", lambda: lambda: Scripted(lambda view: [], "Odd Name")),
        Entry("ready", lambda: Scripted(lambda view: [], "ready")),
    ]

    def entry_points(*, group: str) -> list[Entry]:
        asked.append(group)
        return entries

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    installed_detectors.cache_clear()
    try:
        detectors, problems = installed_detectors()
        outcome = run_detectors(view_of())
    finally:
        monkeypatch.undo()
        installed_detectors.cache_clear()
    assert asked == ["moe_debugger.detectors"]
    assert [detector.name for detector in detectors] == ["good", "ready"]
    assert all(isinstance(detector, Detector) for detector in detectors)
    assert [problem.split(" (")[0] for problem in problems] == [
        f"detector plug-in '{name}'" for name in ("absent", "copy", "number", "odd")
    ]
    assert "could not be loaded: ImportError: no module named 'somewhere'" in problems[0]
    assert "which another plug-in has" in problems[1]
    assert [found.code for found in outcome.findings] == ["good.too_hot"]
    assert outcome.problems == problems
