"""What can be asked of a session in this process and of a recording, and how their rows are read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._counted import layer_shape
from moe_debugger.analysis import Analysis, RoutingState, findings_to_proto
from moe_debugger.query.binding import Capabilities, Plan, Scope
from moe_debugger.query.columnar import read_columns
from moe_debugger.query.rows import LayerFacts, RowBatch
from moe_debugger.query.tables import Table, expert_table, finding_table, layer_table, metrics_table, series_table
from moe_debugger.query.vocabulary import vocabulary_of
from moe_debugger.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from moe_debugger._session import Session
    from moe_debugger.capture import LayerInfo
    from moe_debugger.recording import Recording
    from moe_debugger.recording.manifest import PartEntry
    from moe_debugger.training.series import SeriesTable

__all__ = ["RecordingSource", "SessionSource", "token_absences"]

Array = npt.NDArray[Any]
_BATCH_ROWS = 131_072
_NOT_FLEET = "only the fleet keeps it"
_OF_FLEET = ("state", "is_acknowledged", "is_silenced", "occurrences", "first_seen", "last_seen")
_UNKNOWN_TEXT = (
    "the tokenizer is not known here; give it (`tokenizer=...`, or `--model PATH` on the command line), or ask for "
    "`token_id`"
)


def token_absences(
    *, has_rows: bool, has_token_ids: bool, has_vocabulary: bool, no_rows: str
) -> dict[str, dict[str, str]]:
    """Return why columns of tokens are not there, by subject."""
    if not has_rows:
        names = ("token_id", "token", "position", "request", "phase", "step", "expert", "layer")
        no_tokens = dict.fromkeys(names, no_rows)
        chosen = {name: no_rows for name in names if name not in ("expert", "layer")}
        return {
            "tokens": {"*": no_rows, **no_tokens},
            "requests": {"*": no_rows},
            "steps": {"*": no_rows},
            "experts": chosen,
            "layers": chosen,
        }
    absent: dict[str, str] = {}
    if not has_token_ids:
        absent = dict.fromkeys(("token_id", "token"), 'token ids are captured from level "routes+tokens" on')
    elif not has_vocabulary:
        absent = {"token": _UNKNOWN_TEXT}
    return {subject: dict(absent) for subject in ("tokens", "experts", "layers", "steps", "requests")}


def _facts(layers: "Iterable[LayerInfo]", owners: "dict[int, tuple[int, ...]] | None" = None) -> list[LayerFacts]:
    return [
        LayerFacts(
            info.layer_index,
            info.num_experts,
            max(1, info.top_k),
            info.num_identity_experts,
            info.module_name,
            info.stack,
            tuple((owners or {}).get(info.layer_index, ())),
        )
        for info in layers
    ]


def _series(series: "SeriesTable") -> Table:
    names = [str(name) for name in series.name]
    return series_table(series.step, names, series.layer_index, series.expert_id, series.value)


def _findings(analysis: Analysis) -> Table:
    return finding_table(findings_to_proto(analysis.findings))


class SessionSource:
    """A session of this process.

    Args:
        tokenizer: gives the texts of tokens; None = only those of the demo model are known.
    """

    def __init__(self, session: "Session", tokenizer: Any = None) -> None:
        self._session = session
        self._statistics = session.row_statistics()
        self._experts = session.get_expert_metrics()
        owners: dict[int, list[int]] = {}
        for row in self._experts.experts:
            if row.expert_parallel_rank is not None:
                owners.setdefault(row.layer_index, []).append(row.expert_parallel_rank)
        self.layers: Sequence[LayerFacts] = _facts(session.layers(), {i: tuple(each) for i, each in owners.items()})
        options = session.options
        vocabulary = vocabulary_of(tokenizer, options.model_name)
        absent = token_absences(
            has_rows=options.level > pb.CAPTURE_LEVEL_COUNTS,
            has_token_ids=options.level >= pb.CAPTURE_LEVEL_ROUTES_TOKENS,
            has_vocabulary=vocabulary is not None,
            no_rows='at level "counts" no rows are kept',
        )
        absent.setdefault("requests", {}).update(dict.fromkeys(("first_seen", "last_seen"), _NOT_FLEET))
        absent["findings"] = dict.fromkeys(_OF_FLEET, _NOT_FLEET)
        absent["series"] = dict.fromkeys(("rank", "source"), _NOT_FLEET)
        self.capabilities = Capabilities("this session", absent, vocabulary)

    def num_rows(self, scope: Scope) -> int:
        """Return the rows that are kept."""
        return self._statistics.num_kept

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        """Yield the kept rows, those in files part by part."""
        for rows in self._session.iter_decisions(_BATCH_ROWS):
            columns = {name: getattr(rows, name) for name in raw if getattr(rows, name) is not None}
            yield RowBatch(columns, rows.request_ids)

    def table(self, plan: Plan) -> Table | None:
        """Return what sums answer."""
        match plan.subject.name:
            case "findings":
                return _findings(self._session.analyze())
            case "series":
                return _series(self._session.series())
            case "experts" if plan.row_condition is None:
                return self._expert_table()
            case "layers" if plan.row_condition is None:
                return metrics_table(self.layers, self._session.analyze().metrics)
            case _:
                return None

    def _expert_table(self) -> Table:
        counts: dict[int, list[int]] = {}
        weights: dict[int, list[float]] = {}
        probability: dict[int, list[float]] = {}
        for row in self._experts.experts:
            counts.setdefault(row.layer_index, []).append(row.num_assignments)
            weights.setdefault(row.layer_index, []).append(row.mean_gate_weight * row.num_assignments)
            probability.setdefault(row.layer_index, []).append(row.mean_probability)
        return expert_table(
            self.layers,
            {index: np.array(values) for index, values in counts.items()},
            weight_sums={index: np.array(values) for index, values in weights.items()},
            mean_probability={index: np.array(values) for index, values in probability.items()},
        )

    def notes(self, plan: Plan) -> Sequence[str]:
        """Return what the rows do not cover."""
        notes = []
        needs_rows = plan.row_condition is not None or plan.subject.name in ("tokens", "requests", "steps")
        if needs_rows and self._statistics.num_not_kept:
            notes.append(
                f"{self._statistics.num_not_kept:,} older rows are not kept (max_rows_bytes, max_disk_bytes) and are "
                "not counted"
            )
        return notes + _sampling(self._session.options.sampling_rate)


def _sampling(rate: float) -> list[str]:
    return [f"{rate:.3g} of the requests were captured; counts are of those"] if rate < 1 else []


class RecordingSource:
    """A recording; its parts are read batch by batch, and only the columns and row groups that a query needs.

    Args:
        tokenizer: gives the texts of tokens; None = only those of the demo model are known.
    """

    def __init__(self, recording: "Recording", tokenizer: Any = None) -> None:
        self._recording = recording
        self._is_joined = hasattr(recording, "members")
        manifest = recording.manifest
        self._parts = recording.whole_parts("rows")
        self.layers: Sequence[LayerFacts] = _facts(recording.layers(), recording.expert_owners())
        self._has_rows = manifest.level != "counts"
        vocabulary = vocabulary_of(tokenizer, manifest.model.name)
        absent = token_absences(
            has_rows=self._has_rows,
            has_token_ids=any(entry.layout is not None and entry.layout.has_token_id for entry in self._parts),
            has_vocabulary=vocabulary is not None,
            no_rows='it was made at level "counts", which has no rows',
        )
        absent.setdefault("requests", {}).update(dict.fromkeys(("first_seen", "last_seen"), _NOT_FLEET))
        absent["findings"] = dict.fromkeys(_OF_FLEET, _NOT_FLEET)
        absent["series"] = dict.fromkeys(("rank", "source"), _NOT_FLEET)
        if not self._has_rows:
            absent["experts"] = {**absent["experts"], "mean_gate_weight": 'sums at level "counts" hold no weights'}
        self.capabilities = Capabilities("this recording", absent, vocabulary, self._probabilities)

    def _probabilities(self) -> RoutingState:
        state = RoutingState.empty(layer_shape(info) for info in self._recording.layers())
        self._recording._add_probabilities(state)
        return state

    def num_rows(self, scope: Scope) -> int:
        """Return the rows of the parts that have steps of the scope, by the manifest."""
        return sum(entry.num_rows for entry in self._chosen(scope))

    def _chosen(self, scope: Scope) -> "list[PartEntry]":
        return [
            entry
            for entry in self._parts
            if entry.first_step is None or entry.last_step is None or scope.has_step(entry.first_step, entry.last_step)
        ]

    def batches(self, raw: frozenset[str], scope: Scope) -> Iterator[RowBatch]:
        """Yield the rows of the row groups that can have some of the scope, with the columns `raw` alone."""
        if self._is_joined:
            # Its members' steps are moved, and their rows stand in an order that only it knows.
            for rows in self._recording.iter_decisions(_BATCH_ROWS):
                columns = {name: getattr(rows, name) for name in raw if getattr(rows, name) is not None}
                yield RowBatch(columns, rows.request_ids)
            return
        for entry in self._chosen(scope):
            yield from read_columns(self._recording, entry, raw, lambda group: _may_have(group, scope))

    def table(self, plan: Plan) -> Table | None:
        """Return what the recording's other tables answer."""
        recording = self._recording
        match plan.subject.name:
            case "findings":
                return _findings(recording.analyze())
            case "series":
                return _series(recording.series())
            case "experts" if not self._has_rows or (self._is_joined and plan.row_condition is None):
                state = recording.state()
                return expert_table(
                    self.layers,
                    {index: layer.counts for index, layer in state.layers.items()},
                    mean_probability={index: layer.mean_probability for index, layer in state.layers.items()},
                )
            case "layers" if not self._has_rows or (self._is_joined and plan.row_condition is None):
                return layer_table(self.layers, recording.state())
            case _:
                return None

    def notes(self, plan: Plan) -> Sequence[str]:
        """Return what the rows do not cover."""
        manifest = self._recording.manifest
        notes = list(self._recording.problems)
        if lost := sum(manifest.num_rows_not_written.values()):
            notes.append(f"{lost:,} rows were captured and not written")
        if manifest.status != "finished":
            notes.append("the recording was not stopped in order: rows of its last part may be missing")
        return notes + _sampling(manifest.sampling_rate)


def _may_have(group: Mapping[str, tuple[int, int]], scope: Scope) -> bool:
    """Return whether a row group can have rows of the scope, given the least and greatest of its columns."""
    layers, steps = group.get("layer_index"), group.get("step")
    return (layers is None or scope.has_layer(*layers)) and (steps is None or scope.has_step(*steps))
