"""What a report is made from: a recording, a session or an analysis, read once and in bounded memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from moe_debugger.analysis import Analysis, CaptureHealth, RoutingState, Thresholds, finish
from moe_debugger.analysis.explanation import ObservedSettings, PlacementOptions, explain_analysis
from moe_debugger.errors import InvalidInputError
from moe_debugger.reporting.step_series import LayerSteps
from moe_debugger.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from moe_debugger._session import Session
    from moe_debugger.capture import LayerInfo
    from moe_debugger.recording import Manifest, Recording, Verification

__all__ = ["DEFAULT_MAX_ROWS", "Material", "RowSizes", "gather", "layer_range", "row_sizes"]

# Pictures of pairs and tokens read so many rows at most: about 1 GB of columns at k = 8.
DEFAULT_MAX_ROWS = 4_000_000
# The most severe come first; as many are shown in full.
_MAX_EXPLAINED = 20
_LEVELS: dict[int, str] = {
    pb.CAPTURE_LEVEL_COUNTS: "counts",
    pb.CAPTURE_LEVEL_ROUTES: "routes",
    pb.CAPTURE_LEVEL_ROUTES_TOKENS: "routes+tokens",
    pb.CAPTURE_LEVEL_FULL: "full",
}


class RowSizes(TypedDict):
    """E, k and Z per layer index."""

    num_experts: list[int]
    top_k: list[int]
    num_identity_experts: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Everything that the parts of a report look at; None = not known or not captured.

    Attributes:
        source: "recording", "session" or "analysis".
        layers: what is known of each MoE layer, by layer index; empty of an analysis alone.
        steps: by layer index, loads over steps; empty where there are none.
        rows: columns of the first `len(rows)` of `num_rows` rows; None where there are none.
        baseline: the same model while it was healthy.
        verification: what reading every byte gave.
        num_sources: recorded processes.
    """

    source: Literal["recording", "session", "analysis"]
    name: str
    analysis: Analysis
    thresholds: Thresholds
    state: RoutingState | None = None
    layers: Mapping[int, "LayerInfo"] = field(default_factory=dict)
    steps: Mapping[int, LayerSteps] = field(default_factory=dict)
    rows: Mapping[str, Any] | None = None
    num_rows: int = 0
    level: str = ""
    health: CaptureHealth | None = None
    manifest: "Manifest | None" = None
    verification: "Verification | None" = None
    problems: tuple[str, ...] = ()
    baseline: Analysis | None = None
    baseline_name: str = ""
    num_sources: int = 1

    @property
    def num_rows_read(self) -> int:
        """Rows in `rows`."""
        return 0 if self.rows is None else len(self.rows["layer_index"])

    @property
    def is_empty(self) -> bool:
        """Whether no token was routed while it was captured; False where some were and are lost."""
        manifest = self.manifest
        if manifest is not None and (manifest.num_rows or manifest.num_rows_not_written):
            return False
        return not any(metrics.num_tokens for metrics in self.analysis.metrics.values())

    def sizes(self) -> RowSizes:
        """Return E, k and Z per layer index, as the functions over rows take them."""
        return row_sizes(self.layers)


def row_sizes(layers: Mapping[int, "LayerInfo"]) -> RowSizes:
    """Return E, k and Z per layer index; 1, 1 and 0 for indices without a layer."""
    indices = range(max(layers, default=-1) + 1)
    return {
        "num_experts": [layers[i].num_experts if i in layers else 1 for i in indices],
        "top_k": [max(1, layers[i].top_k) if i in layers else 1 for i in indices],
        "num_identity_experts": [layers[i].num_identity_experts if i in layers else 0 for i in indices],
    }


def gather(
    source: "Recording | Session | Analysis",
    *,
    baseline: "Recording | RoutingState | None" = None,
    thresholds: Thresholds | None = None,
    max_rows: int = DEFAULT_MAX_ROWS,
) -> Material:
    """Return what there is of `source`.

    Args:
        source: a recording, an open session or an analysis.
        baseline: healthy rows of the same model and workload; not with an analysis, which has its own.
        thresholds: of the rules; None = the defaults, or a session's own. With others a session's findings are not
            explained.
        max_rows: pictures that need rows look at the first ones, so many at most; metrics and findings at all.

    Raises:
        InvalidInputError: something else was given, or the baseline is another model's.
        RecordingError: a part of a recording is damaged, and it was not opened with ``damaged="skip"``.
        SessionClosedError: the session was closed.
    """
    from moe_debugger._session import Session
    from moe_debugger.recording import Recording

    if max_rows < 0:
        raise InvalidInputError(f"max_rows {max_rows}: expected 0 or more")
    if isinstance(source, Analysis):
        if baseline is not None:
            raise InvalidInputError("an analysis has its own baseline: give it to analyze(..., baseline=...)")
        return Material("analysis", "", source, thresholds or Thresholds())
    if not isinstance(source, Recording | Session):
        raise InvalidInputError(f"got {type(source).__name__}; expected a recording, a session or an analysis")
    before, before_name = _baseline(baseline)
    if isinstance(source, Recording):
        return _of_recording(source, before, before_name, thresholds or Thresholds(), max_rows)
    return _of_session(source, before, before_name, thresholds, max_rows)


def _baseline(baseline: "Recording | RoutingState | None") -> tuple[RoutingState | None, str]:
    if baseline is None or isinstance(baseline, RoutingState):
        return baseline, "" if baseline is None else "a state"
    return baseline.state(), str(baseline.path.name)


def _check_baseline(state: RoutingState, before: RoutingState | None, before_name: str) -> None:
    for index, layer in ({} if before is None else before.layers).items():
        own = state.layers.get(index)
        if own is not None and own.shape != layer.shape:
            raise InvalidInputError(
                f"layer {index} of the baseline ({before_name}) has {layer.shape}, and here it has "
                f"{own.shape}; a baseline must come from the same model"
            )


def _of_recording(
    recording: "Recording", before: RoutingState | None, before_name: str, limits: Thresholds, max_rows: int
) -> Material:
    manifest = recording.manifest
    layers = {info.layer_index: info for info in recording.layers()}
    state = recording.state()
    _check_baseline(state, before, before_name)
    has_rows = manifest.level != "counts" and state.num_tokens > 0
    rows = recording.decisions(max_rows=max_rows) if has_rows and max_rows else None
    health = recording.capture_health()
    ranks = manifest.topology.expert_parallel_size
    analysis = explain_analysis(
        finish(state, thresholds=limits, baseline=before, health=health),
        state=state,
        settings=ObservedSettings.from_columns(recording.series()),
        rows=rows,
        placement=PlacementOptions(num_ranks=ranks) if ranks > 1 else None,
        max_findings=_MAX_EXPLAINED,
    )
    return Material(
        source="recording",
        name=manifest.session_name,
        analysis=analysis,
        thresholds=limits,
        state=state,
        layers=layers,
        steps=_steps(state),
        rows=rows,
        num_rows=manifest.num_rows,
        level=manifest.level,
        health=health,
        manifest=manifest,
        verification=recording.verify(),
        problems=(*manifest.problems, *recording.problems),
        baseline=None if before is None else finish(before, thresholds=limits),
        baseline_name=before_name,
        num_sources=len(_members(recording)),
    )


def _members(recording: "Recording") -> Sequence["Recording"]:
    from moe_debugger.recording import JoinedRecording

    return recording.members if isinstance(recording, JoinedRecording) else (recording,)


def _steps(state: RoutingState) -> dict[int, LayerSteps]:
    """Return the loads over steps of the layers that have a history of one clock."""
    series = {index: layer.load_series for index, layer in state.layers.items()}
    return {
        index: LayerSteps.of(each)
        for index, each in series.items()
        if each is not None and len(each.num_tokens) and each.low_source == each.high_source
    }


def _of_session(
    session: "Session", before: RoutingState | None, before_name: str, limits: Thresholds | None, max_rows: int
) -> Material:
    layers = {info.layer_index: info for info in session.layers()}
    rows: Mapping[str, Any] | None = session.decisions(max_rows=max_rows) if max_rows else None
    if rows is not None and not len(rows["layer_index"]):
        rows = None
    state = session.state()
    _check_baseline(state, before, before_name)
    return Material(
        source="session",
        name=session.name,
        analysis=session.diagnose(baseline=before)
        if limits is None
        else finish(state, thresholds=limits, baseline=before, health=session.capture_health()),
        thresholds=limits or session.options.thresholds or Thresholds(),
        state=state,
        layers=layers,
        steps=_steps(state),
        rows=rows,
        num_rows=0 if rows is None else len(rows["layer_index"]),
        level=_LEVELS.get(session.options.level, ""),
        health=session.capture_health(),
        baseline=None if before is None else finish(before),
        baseline_name=before_name,
    )


def layer_range(indices: list[int]) -> str:
    """Return layer indices as people write them: [0, 1, 2, 5] is "0–2, 5"."""
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in _runs(sorted(indices)))


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    start = previous = None
    for index in [*indices, math.inf]:
        if previous is not None and index != previous + 1:
            yield int(start if start is not None else previous), int(previous)
            start = None
        if start is None:
            start = index
        previous = index
