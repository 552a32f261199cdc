"""Detectors of others: found by entry point, given a read-only view, and never able to break the analysis.

A package registers a detector in its pyproject.toml::

    [project.entry-points."moe_debugger.detectors"]
    quiet_half = "my_package:QuietHalf"

The value is a class without arguments, a function that returns a detector, or a detector itself. docs/detectors.md has
a worked example. Whatever a detector does wrong (raises, returns something else than findings, names a layer that is
not there) ends in `DetectorOutcome.problems`; its good findings are kept, and so are those of the other detectors.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from moe_debugger._plain_text import plain_text
from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity, Thresholds, finding_to_proto
from moe_debugger.analysis.metrics import LayerMetrics
from moe_debugger.analysis.state import LayerShape, LayerState, RoutingState
from moe_debugger.capture_health import CaptureHealth

__all__ = [
    "DETECTOR_GROUP",
    "Detector",
    "DetectorOutcome",
    "DetectorView",
    "LayerView",
    "StepSeries",
    "detector_view",
    "installed_detectors",
    "installed_findings",
    "run_detectors",
]

DETECTOR_GROUP = "moe_debugger.detectors"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_CODE = re.compile(r"[a-z][a-z0-9_]{0,79}")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_MAX_FINDINGS, _MAX_PROBLEMS = 1000, 10
_MAX_EVIDENCE, _MAX_ARGS = 50, 20
# Letters of a text; whatever is longer is cut. `_MAX_WORD` is for titles, versions and the texts of evidence.
_MAX_TEXT, _MAX_WORD, _MAX_PROBLEM = 2000, 200, 500
# Texts of several lines.
_LONG_ARGS = ("summary", "remedy")
# An analysis of a live session runs every second or so.
_SLOW_S = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class StepSeries:
    """Load over time: [n, E] counts, each row the sum of `width` steps from `first_steps` on."""

    width: int
    first_steps: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.uint64]
    num_tokens: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerView:
    """What a detector sees of one layer; arrays are copies that cannot be written.

    Attributes:
        shape: layer index, E, k and Z.
        metrics: as `Analysis.metrics` gives them.
        baseline: metrics of the layer while it was healthy, None where no baseline was given.
        counts: [E] uint64, load.
        block_counts: [B, E] uint64, load by block of whole requests: every variance comes from here.
        block_tokens: [B] uint64.
        mean_probability: [E] float64, NaN where not captured.
        series: load over steps, None where rows have no steps or the state keeps none.
        first_step, last_step: None before the first token.
    """

    shape: LayerShape
    metrics: LayerMetrics
    baseline: LayerMetrics | None
    counts: npt.NDArray[np.uint64]
    block_counts: npt.NDArray[np.uint64]
    block_tokens: npt.NDArray[np.uint64]
    mean_probability: npt.NDArray[np.float64]
    series: StepSeries | None
    first_step: int | None
    last_step: int | None


@dataclass(frozen=True, slots=True, eq=False)
class DetectorView:
    """Everything that a detector may look at.

    Attributes:
        layers: by layer index.
        thresholds: as the caller set them.
        num_requests: about how many different requests the rows came from.
        num_workloads: clearly different kinds of text, as far as known.
        health: what is known of the capture, None = nothing.
    """

    layers: Mapping[int, LayerView]
    thresholds: Thresholds
    num_requests: int
    num_workloads: int
    health: CaptureHealth | None


@runtime_checkable
class Detector(Protocol):
    """What a plug-in provides.

    Attributes:
        name: lower-case letters, digits, "-" and "_"; the codes of its findings begin with it.
        version: of its rules, as text.
    """

    name: str
    version: str

    def detect(self, view: DetectorView) -> Iterable[Finding]:
        """Return what it finds. Called again for every analysis, in several threads: keep nothing between calls."""
        ...


@dataclass(frozen=True, slots=True)
class DetectorOutcome:
    """What the detectors of others found.

    Attributes:
        findings: good ones; their codes are ``<plugin>.<code>``.
        problems: what was wrong with plug-ins, one sentence each, with the plug-in's name.
        ran: name and version of each detector that ran.
    """

    findings: tuple[Finding, ...] = ()
    problems: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What this means for a stated rate of false alarms, problems too; empty where there is no plug-in."""
        parts = [f"findings of plug-ins ({', '.join(self.ran)}) are not part of this rate"] if self.ran else []
        # The note is shown wherever findings are, so that a broken plug-in is seen there, too.
        parts += [f"problems with plug-ins ({len(self.problems)}): {self.problems[0]}"] if self.problems else []
        return "; ".join(parts)


def detector_view(
    state: RoutingState,
    metrics: Mapping[int, LayerMetrics],
    *,
    thresholds: Thresholds,
    baseline: Mapping[int, LayerMetrics],
    num_workloads: int = 1,
    health: CaptureHealth | None = None,
) -> DetectorView:
    """Return the read-only view of a state and its metrics; O(blocks * E)."""
    layers = {
        index: LayerView(
            shape=layer.shape,
            metrics=replace(metrics[index]),
            baseline=replace(baseline[index]) if index in baseline else None,
            counts=_locked(layer.counts),
            block_counts=_locked(layer.block_counts),
            block_tokens=_locked(layer.block_tokens),
            mean_probability=_locked(layer.mean_probability),
            series=_series(layer),
            first_step=layer.first_step,
            last_step=layer.last_step,
        )
        for index, layer in state.layers.items()
    }
    return DetectorView(MappingProxyType(layers), replace(thresholds), state.num_requests, num_workloads, health)


def _locked(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _series(layer: LayerState) -> StepSeries | None:
    series = getattr(layer, "load_series", None)
    if series is None or not len(series.first_steps):
        return None
    return StepSeries(
        int(series.width), _locked(series.first_steps), _locked(series.counts), _locked(series.num_tokens)
    )


@lru_cache(maxsize=1)
def installed_detectors() -> tuple[tuple[Detector, ...], tuple[str, ...]]:
    """Return the detectors of all installed packages, by name, and what was wrong with others.

    Loaded on the first call, once in a process; `installed_detectors.cache_clear()` looks again.
    """
    detectors: dict[str, Detector] = {}
    kept: dict[str, str] = {}
    problems = []
    for entry in sorted(metadata.entry_points(group=DETECTOR_GROUP), key=lambda entry: (entry.name, entry.value)):
        distribution = getattr(entry, "dist", None)
        package = f", of {distribution.name} {distribution.version}" if distribution is not None else ""
        where = f"{entry.name!r} ({entry.value}{package})"
        try:
            loaded = entry.load()
            detector = loaded if _is_ready(loaded) else loaded()
            name, problem = _contract(detector)
        # The code of others may fail in any way; what it breaks must be itself alone.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            problems.append(_problem(f"detector plug-in {where} could not be loaded: {_error_text(error)}"))
            continue
        if not problem and name in detectors:
            problem = f"has the name {name!r}, which {kept[name]} has, too; that one is kept, this one is left out"
        if problem:
            problems.append(_problem(f"detector plug-in {where} {problem}"))
        else:
            detectors[name], kept[name] = detector, where
    return tuple(detectors[name] for name in sorted(detectors)), tuple(problems)


def _is_ready(loaded: Any) -> bool:
    return not isinstance(loaded, type) and isinstance(loaded, Detector)


def _contract(detector: Any) -> tuple[str, str]:
    """Return the name of a detector, and what is wrong with it."""
    if not isinstance(detector, Detector) or not callable(detector.detect):
        return "", f"gives a {type(detector).__name__}, which has no name, version and detect(view)"
    name, version = detector.name, detector.version
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "", f"has the name {name!r}, expected up to 40 lower-case letters, digits, '-' and '_'"
    if not isinstance(version, str):
        return name, f"has the version {version!r}, expected a text"
    return name, ""


def _error_text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the error, too, is the code of others
        return type(error).__name__


def _text(text: str, limit: int, *, keeps_lines: bool = False) -> str:
    """Return `text` without control characters, cut at `limit`."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return plain_text(cut, "\n" if keeps_lines else "")


def _problem(text: str) -> str:
    return _text(text, _MAX_PROBLEM)


def run_detectors(view: DetectorView, detectors: Iterable[Detector] | None = None) -> DetectorOutcome:
    """Return what the detectors find in `view`; never raises for what they do.

    Args:
        view: what they may look at.
        detectors: None = the installed ones.
    """
    problems: list[str] = []
    if detectors is None:
        installed, found_problems = installed_detectors()
        detectors = installed
        problems.extend(found_problems)
    findings: list[Finding] = []
    ran = []
    for detector in detectors:
        where = f"detector plug-in of type {type(detector).__name__!r}"
        own_problems: dict[str, None] = {}
        start = time.perf_counter()
        try:
            name, problem = _contract(detector)
            where = f"detector plug-in {name!r}" if name else where
            if problem:
                problems.append(_problem(f"{where} {problem}"))
                continue
            ran.append(f"{name} {_text(detector.version, _MAX_WORD)}")
            for number, found in enumerate(detector.detect(view)):
                if number >= _MAX_FINDINGS:
                    own_problems[f"{where} returned more than {_MAX_FINDINGS} findings; the rest was left out"] = None
                    break
                finding, problem = _taken(found, view, name)
                if finding is None:
                    own_problems[_problem(f"{where} returned a finding that was left out: {problem}")] = None
                else:
                    findings.append(finding)
        # As above: a plug-in breaks nothing but itself.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            own_problems[_problem(f"{where} failed: {_error_text(error)}")] = None
        taken = time.perf_counter() - start
        if taken > _SLOW_S:
            own_problems[f"{where} took {taken:.1f} s; every analysis waits for it"] = None
        problems.extend([*own_problems][:_MAX_PROBLEMS])
        if len(own_problems) > _MAX_PROBLEMS:
            problems.append(f"{where} has {len(own_problems) - _MAX_PROBLEMS} more problems")
    return DetectorOutcome(tuple(findings), tuple(dict.fromkeys(problems)), tuple(ran))


def installed_findings(view: Callable[[], DetectorView]) -> DetectorOutcome:
    """Return what the installed detectors find; `view` is asked for only where there is one."""
    detectors, problems = installed_detectors()
    return run_detectors(view()) if detectors else DetectorOutcome(problems=problems)


def _taken(found: Any, view: DetectorView, name: str) -> tuple[Finding | None, str]:
    """Return a plug-in's finding as it is shown and sent, or what is wrong with it."""
    try:
        problem = _finding_problem(found, view)
        if problem:
            return None, problem
        finding = _cleaned(found, name)
        # Whatever the checks let through: it has to fit into the message that carries it.
        finding_to_proto(finding)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return None, _error_text(error)
    return finding, ""


def _finding_problem(finding: Any, view: DetectorView) -> str:
    if not isinstance(finding, Finding):
        return f"a {type(finding).__name__}, expected a Finding"
    if not isinstance(finding.kind, FindingKind) or not isinstance(finding.severity, Severity):
        return f"kind {finding.kind!r} and severity {finding.severity!r}, expected a FindingKind and a Severity"
    if not isinstance(finding.code, str) or not _CODE.fullmatch(finding.code):
        return f"code {finding.code!r}, expected lower-case letters, digits and '_'"
    place = _place_problem(finding, view)
    if place:
        return place
    if finding.since_step is not None and not _is_whole(finding.since_step):
        return f"{finding.code}: since_step {finding.since_step!r}, expected a step or None"
    if not _is_number(finding.statistic):
        return f"{finding.code}: statistic {finding.statistic!r}, expected a number"
    if not isinstance(finding.evidence, tuple) or not all(isinstance(row, EvidenceRow) for row in finding.evidence):
        return f"{finding.code}: evidence that is no tuple of EvidenceRow"
    if len(finding.evidence) > _MAX_EVIDENCE:
        return f"{finding.code}: {len(finding.evidence)} rows of evidence, expected {_MAX_EVIDENCE} at most"
    rows = (_row_problem(row) for row in finding.evidence)
    problem = next((problem for problem in rows if problem), "") or _args_problem(finding)
    if problem:
        return f"{finding.code}: {problem}"
    if finding.explanation is not None:
        return f"{finding.code}: an explanation, expected None: what was observed explains it"
    if finding.severity is Severity.CRITICAL and not finding.evidence:
        return f"{finding.code}: critical without evidence"
    return ""


def _is_whole(value: Any, below: int = 1 << 64) -> bool:
    # True is an int to Python.
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < below


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _row_problem(row: EvidenceRow) -> str:
    if not all(isinstance(text, str) for text in (row.metric, row.rule, row.unit)):
        return f"evidence of metric {row.metric!r}, rule {row.rule!r}, unit {row.unit!r}, expected texts"
    if not _is_number(row.value):
        return f"evidence {row.metric!r}: value {row.value!r}, expected a number"
    if row.baseline is not None and not _is_number(row.baseline):
        return f"evidence {row.metric!r}: baseline {row.baseline!r}, expected a number or None"
    if not _is_whole(row.sample_size):
        return f"evidence {row.metric!r}: sample_size {row.sample_size!r}, expected a whole number, 0 or more"
    return ""


def _args_problem(finding: Finding) -> str:
    args = dict(finding.args)
    if len(args) > _MAX_ARGS:
        return f"{len(args)} args, expected {_MAX_ARGS} at most"
    for key, value in args.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            return f"an arg named {key!r}, expected up to 40 letters, digits and '_'"
        if not isinstance(value, str):
            return f"args that are no texts: {key} is {value!r}"
    return ""


def _cleaned(finding: Finding, name: str) -> Finding:
    return Finding(
        kind=finding.kind,
        severity=finding.severity,
        code=f"{name}.{finding.code}",
        layer_index=_int(finding.layer_index),
        expert_id=_int(finding.expert_id),
        since_step=_int(finding.since_step),
        args={
            key: _text(text, _MAX_WORD if key == "title" else _MAX_TEXT, keeps_lines=key in _LONG_ARGS)
            for key, text in finding.args.items()
        },
        evidence=tuple(
            EvidenceRow(
                metric=_text(row.metric, _MAX_WORD),
                value=float(row.value),
                rule=_text(row.rule, _MAX_WORD),
                baseline=None if row.baseline is None else float(row.baseline),
                sample_size=int(row.sample_size),
                unit=_text(row.unit, _MAX_WORD),
            )
            for row in finding.evidence
        ),
        statistic=float(finding.statistic),
    )


def _int(value: int | None) -> int | None:
    return None if value is None else int(value)


def _place_problem(finding: Finding, view: DetectorView) -> str:
    layer, expert = finding.layer_index, finding.expert_id
    if layer is None:
        return f"{finding.code}: expert {expert!r} of no layer" if expert is not None else ""
    if not _is_whole(layer) or layer not in view.layers:
        return f"{finding.code}: layer {layer!r}, there are {sorted(view.layers)}"
    num_experts = view.layers[layer].shape.num_experts
    if expert is not None and not _is_whole(expert, num_experts):
        return f"{finding.code}: expert {expert!r} of layer {layer}, which has {num_experts}"
    return ""
