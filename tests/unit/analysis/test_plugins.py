"""Detectors of others: what they see, what is taken from them, and that they break nothing."""

import time
from collections.abc import Callable, Iterable
from importlib import metadata
from types import SimpleNamespace
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


def test_what_a_detector_forces_into_the_view_changes_nothing_outside() -> None:
    def force(view: DetectorView) -> Iterable[Finding]:
        object.__setattr__(view.thresholds, "min_tokens", 10**9)
        for layer in view.layers.values():
            object.__setattr__(layer.metrics, "num_tokens", 0)
        return []

    state = fold_decisions({"layer_index": [0] * 8, "expert_ids": [[0]] * 8}, num_experts=8, top_k=1)
    metrics, thresholds = {0: layer_metrics(state.layers[0])}, Thresholds()
    run_detectors(detector_view(state, metrics, thresholds=thresholds, baseline=metrics), [Scripted(force)])
    assert (thresholds, metrics[0].num_tokens) == (Thresholds(), 8)


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
        (finding(layer_index=True), "layer True"),
        (finding(layer_index=0.0), r"layer 0\.0"),
        (finding(layer_index=[1]), r"layer \[1\]"),
        (finding(expert_id=True), "expert True"),
        (finding(since_step=-5), "since_step -5"),
        (finding(since_step=2**70), "since_step 1180591620717411303424"),
        (finding(statistic=True), "statistic True"),
        (finding(statistic=10**400), "OverflowError"),
        (finding(evidence=(EvidenceRow("m", "str"),)), "value 'str'"),  # type: ignore[arg-type]
        (finding(evidence=(EvidenceRow(5, 1.0),)), "metric 5"),  # type: ignore[arg-type]
        (finding(evidence=(EvidenceRow("m", 1.0, baseline="low"),)), "baseline 'low'"),  # type: ignore[arg-type]
        (finding(evidence=(EvidenceRow("m", 1.0, sample_size=-1),)), "sample_size -1"),
        (finding(evidence=(EvidenceRow("m", 1.0, sample_size=2.5),)), r"sample_size 2\.5"),  # type: ignore[arg-type]
        (finding(evidence=EVIDENCE * 51), "51 rows of evidence"),
        (finding(args={"two words": "x"}), "an arg named 'two words'"),
        (finding(args={f"a{i}": "x" for i in range(21)}), "21 args"),
        (finding(explanation="because"), "an explanation, expected None"),
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


class Unnamed:
    version = "1"

    @property
    def name(self) -> str:
        raise KeyError("name")

    def detect(self, view: DetectorView) -> Iterable[Finding]:
        return [finding()]


class Unsayable(Exception):
    def __str__(self) -> str:
        raise ValueError


def raising(error: BaseException) -> Callable[[DetectorView], Any]:
    def detect(view: DetectorView) -> Iterable[Finding]:
        raise error

    return detect


def test_a_detector_ends_neither_the_analysis_nor_the_process() -> None:
    detectors: list[Detector] = [
        Unnamed(),  # type: ignore[list-item]
        Scripted(raising(SystemExit(3)), "exits"),
        Scripted(raising(Unsayable()), "unsayable"),
        Scripted(raising(ValueError("a\x1b[31m\nb" + "c" * 10_000)), "shouts"),
        Scripted(lambda view: [finding()], "good"),
    ]
    outcome = run_detectors(view_of(), detectors)
    assert [found.code for found in outcome.findings] == ["good.too_hot"]
    assert outcome.problems[:3] == (
        "detector plug-in of type 'Unnamed' failed: KeyError: 'name'",
        "detector plug-in 'exits' failed: SystemExit: 3",
        "detector plug-in 'unsayable' failed: Unsayable",
    )
    assert outcome.problems[3].startswith("detector plug-in 'shouts' failed: ValueError: a [31m bccc")
    assert len(outcome.problems[3]) == 500
    with pytest.raises(KeyboardInterrupt):
        run_detectors(view_of(), [Scripted(raising(KeyboardInterrupt()))])


def test_texts_are_cleaned_and_cut_and_numbers_become_plain() -> None:
    args = {"title": "T" * 10_000, "summary": "a\x1b[31m\x00\nb\ud800", "place": "x\ny\u202e"}
    row = EvidenceRow("m\x07" * 500, np.float32(0.5), sample_size=np.int64(7))  # type: ignore[arg-type]
    given = finding(args=args, evidence=(row,), layer_index=np.int64(2), since_step=np.uint64(9))
    found = run_detectors(view_of(), [Scripted(lambda view: [given])]).findings[0]
    assert found.args == {"title": "T" * 199 + "…", "summary": "a [31m \nb ", "place": "x y "}
    assert found.evidence[0].metric == "m " * 99 + "m…"
    assert [type(value) for value in (found.evidence[0].value, found.evidence[0].sample_size)] == [float, int]
    assert [type(value) for value in (found.layer_index, found.since_step)] == [int, int]


def test_many_problems_of_one_detector_are_counted() -> None:
    outcome = run_detectors(view_of(), [Scripted(lambda view: [finding(expert_id=100 + i) for i in range(30)])])
    assert len(outcome.problems) == 11
    assert outcome.problems[-1] == "detector plug-in 'scripted' has 20 more problems"


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
        self.dist = SimpleNamespace(name=f"{name}-package", version="2")


class Good:
    name = "good"
    version = "1"

    def detect(self, view: DetectorView) -> Iterable[Finding]:
        return [finding()]


def unwilling() -> Any:
    raise SystemExit(3)


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
        Entry("unnamed", lambda: Unnamed),
        Entry("unwilling", unwilling),
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
        f"detector plug-in '{name}'" for name in ("absent", "copy", "number", "odd", "unnamed", "unwilling")
    ]
    assert "could not be loaded: ImportError: no module named 'somewhere'" in problems[0]
    assert problems[1].endswith(
        "has the name 'good', which 'class' (somewhere:Thing, of class-package 2) has, too; that one is kept, this one "
        "is left out"
    )
    assert "could not be loaded: KeyError: 'name'" in problems[4]
    assert "could not be loaded: SystemExit: 3" in problems[5]
    assert [found.code for found in outcome.findings] == ["good.too_hot"]
    assert outcome.problems == problems
