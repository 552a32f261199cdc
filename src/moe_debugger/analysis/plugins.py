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

from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity, Thresholds
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
_MAX_FINDINGS = 1000
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
            metrics=metrics[index],
            baseline=baseline.get(index),
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
    return DetectorView(MappingProxyType(layers), thresholds, state.num_requests, num_workloads, health)


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
    problems = []
    for entry in sorted(metadata.entry_points(group=DETECTOR_GROUP), key=lambda entry: (entry.name, entry.value)):
        where = f"detector plug-in {entry.name!r} ({entry.value})"
        try:
            loaded = entry.load()
            detector = loaded if _is_ready(loaded) else loaded()
        # The code of others may fail in any way; what it breaks must be itself alone.
        except Exception as error:  # noqa: BLE001
            problems.append(f"{where} could not be loaded: {type(error).__name__}: {error}")
            continue
        problem = _contract_problem(detector, detectors)
        if problem:
            problems.append(f"{where} {problem}")
        else:
            detectors[detector.name] = detector
    return tuple(detectors[name] for name in sorted(detectors)), tuple(problems)


def _is_ready(loaded: Any) -> bool:
    return not isinstance(loaded, type) and isinstance(loaded, Detector)


def _contract_problem(detector: Any, others: Mapping[str, Detector]) -> str:
    if not isinstance(detector, Detector) or not callable(detector.detect):
        return f"gives a {type(detector).__name__}, which has no name, version and detect(view)"
    if not isinstance(detector.name, str) or not _NAME.fullmatch(detector.name):
        return f"has the name {detector.name!r}, expected up to 40 lower-case letters, digits, '-' and '_'"
    if not isinstance(detector.version, str):
        return f"has the version {detector.version!r}, expected a text"
    if detector.name in others:
        return f"has the name {detector.name!r}, which another plug-in has; this one is left out"
    return ""


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
        where = f"detector plug-in {detector.name!r}"
        ran.append(f"{detector.name} {detector.version}")
        start = time.perf_counter()
        try:
            for number, finding in enumerate(detector.detect(view)):
                if number >= _MAX_FINDINGS:
                    problems.append(f"{where} returned more than {_MAX_FINDINGS} findings; the rest was left out")
                    break
                problem = _finding_problem(finding, view)
                if problem:
                    problems.append(f"{where} returned a finding that was left out: {problem}")
                else:
                    findings.append(replace(finding, code=f"{detector.name}.{finding.code}"))
        # As above: a plug-in breaks nothing but itself.
        except Exception as error:  # noqa: BLE001
            problems.append(f"{where} failed: {type(error).__name__}: {error}")
        taken = time.perf_counter() - start
        if taken > _SLOW_S:
            problems.append(f"{where} took {taken:.1f} s; every analysis waits for it")
    return DetectorOutcome(tuple(findings), tuple(dict.fromkeys(problems)), tuple(ran))


def installed_findings(view: Callable[[], DetectorView]) -> DetectorOutcome:
    """Return what the installed detectors find; `view` is asked for only where there is one."""
    detectors, problems = installed_detectors()
    return run_detectors(view()) if detectors else DetectorOutcome(problems=problems)


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
    if not isinstance(finding.since_step, int | np.integer | None):
        return f"{finding.code}: since_step {finding.since_step!r}, expected a step or None"
    if not isinstance(finding.statistic, int | float | np.number):
        return f"{finding.code}: statistic {finding.statistic!r}, expected a number"
    if not isinstance(finding.evidence, tuple) or not all(isinstance(row, EvidenceRow) for row in finding.evidence):
        return f"{finding.code}: evidence that is no tuple of EvidenceRow"
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in dict(finding.args).items()):
        return f"{finding.code}: args that are no texts"
    if finding.severity is Severity.CRITICAL and not finding.evidence:
        return f"{finding.code}: critical without evidence"
    return ""


def _place_problem(finding: Finding, view: DetectorView) -> str:
    layer, expert = finding.layer_index, finding.expert_id
    if layer is None:
        return f"{finding.code}: expert {expert} of no layer" if expert is not None else ""
    if layer not in view.layers:
        return f"{finding.code}: layer {layer!r}, there are {sorted(view.layers)}"
    if expert is not None and not (
        isinstance(expert, int | np.integer) and 0 <= expert < view.layers[layer].shape.num_experts
    ):
        return f"{finding.code}: expert {expert!r} of layer {layer}, which has {view.layers[layer].shape.num_experts}"
    return ""
