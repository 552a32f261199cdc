"""One session: what was captured from `start_session` to `close`."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from moe_debugger._counted import CountedRoutes
from moe_debugger._decisions import Decisions
from moe_debugger._health_monitor import HealthMonitor, forwards_seen
from moe_debugger._layers import Layers
from moe_debugger._rank_load import RankLoad, rank_load
from moe_debugger._row_blocks import RowBlock, RowSource
from moe_debugger._row_groups import available_bytes, regroup
from moe_debugger._rows import RowStatistics, RowStore
from moe_debugger._stats import ExpertMetrics, PerformanceMetrics, RoutingStats, layer_routing_stats
from moe_debugger.analysis import Analysis, CaptureHealth, RoutingState, Thresholds, finish
from moe_debugger.capture import Assembled, Assembler, Capture, Intake, LayerInfo, RawForward
from moe_debugger.errors import InvalidInputError, SessionClosedError
from moe_debugger.parallel import ParallelCoordinates
from moe_debugger.profiling.sessions import LayerProfiling
from moe_debugger.publish import Health, Publisher, PublisherStatistics
from moe_debugger.publish.account import reason_name
from moe_debugger.training.gradients import GradientProbe
from moe_debugger.training.recorder import SeriesRecorder
from moe_debugger.training.series import NO_INDEX, SeriesPoint, SeriesTable
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import RoutingColumns
from moe_debugger.wire.ids import new_id

if TYPE_CHECKING:
    from moe_debugger.profiling import LayerProfile, Peak
    from moe_debugger.query import QueryResult
    from moe_debugger.recording import Recorder

__all__ = ["Profile", "Session", "SessionOptions"]

_FLUSH_TIMEOUT_S = 60.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a session keeps and where it sends it."""

    level: int
    sampling_rate: float = 1.0
    buffer_bytes: int = 64 * 1024 * 1024
    max_rows_bytes: int = 512 * 1024 * 1024
    max_disk_bytes: int = 4 * 1024**3
    rows_dir: str | os.PathLike[str] | None = None
    thresholds: Thresholds | None = None
    eos_token_ids: tuple[int, ...] = ()
    coordinates: ParallelCoordinates = field(default_factory=ParallelCoordinates)
    # Index of a layer in the whole model by its index in this rank's part; empty = the same.
    layer_numbers: Mapping[int, int] = field(default_factory=dict)
    # By index in the whole model.
    expert_owners: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    model_name: str = ""
    step_domain: int = pb.STEP_DOMAIN_SOURCE
    profiling: bool = False
    # For the roofline of a profile.
    peak: "Peak | None" = None


@dataclass(slots=True)
class Profile:
    """What ran inside a `profile()` block; complete when the block has ended.

    Attributes:
        performance: of the block alone.
        wall_s: wall time of the block.
        layers: where its time went by layer and expert; None where layers were not profiled.
    """

    wall_s: float = 0.0
    performance: PerformanceMetrics = field(default_factory=PerformanceMetrics)
    layers: "LayerProfile | None" = None

    def __str__(self) -> str:
        layers = "" if self.layers is None else f"\n{self.layers}"
        return f"{self.performance}\nblock: {self.wall_s:.3f} s{layers}"


@dataclass(slots=True)
class _Totals:
    """Cumulative numbers, of which a profile is a difference."""

    num_forwards: int = 0
    num_tokens: int = 0
    num_decisions: int = 0
    forward_ns: int = 0
    hook_ns: int = 0
    capture_ns: int = 0


class Session:
    """Captures one model's routing until it is closed; made by `MoEDebugger.start_session`.

    Attributes:
        name: the name that the fleet shows.
        publisher: None where the session is local.
    """

    def __init__(
        self,
        name: str,
        capture: Capture,
        options: SessionOptions,
        publisher: Publisher | None = None,
    ) -> None:
        self.name = name
        self.publisher = publisher
        self._capture = capture
        self._options = options
        self._local_id = new_id()
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_stopped = False
        self._counted: CountedRoutes | None = None
        self._rows = RowStore(
            options.max_rows_bytes,
            max_disk_bytes=options.max_disk_bytes,
            rows_dir=options.rows_dir,
            module_names={
                options.layer_numbers.get(site.info.layer_index, site.info.layer_index): site.info.module_name
                for site in capture.discovery.sites
            },
            rank=options.coordinates.global_rank,
        )
        self._assembler = Assembler(
            capture.discovery.sites,
            with_tokens=options.level >= pb.CAPTURE_LEVEL_ROUTES_TOKENS,
            with_logits=options.level >= pb.CAPTURE_LEVEL_FULL,
            sums_only=options.level == pb.CAPTURE_LEVEL_COUNTS,
            sampling_rate=options.sampling_rate,
            eos_token_ids=options.eos_token_ids,
        )
        capture.keeps_token_ids = options.level >= pb.CAPTURE_LEVEL_ROUTES_TOKENS
        capture.reduce_rows_with(self._assembler.known_scoring if options.level == pb.CAPTURE_LEVEL_COUNTS else None)
        self._monitor = HealthMonitor(self._layers(), first_forward=capture.next_forward_index)
        self._recorder: Recorder | None = None
        self._totals = _Totals()
        self._base = (capture.next_forward_index, capture.forward_ns, capture.hook_ns, capture.num_lost_decisions)
        self._dropped: dict[int, int] = {}
        self._failures: dict[str, int] = {}
        self._last_step = 0
        self._status_mark = (time.monotonic_ns(), capture.hook_ns)
        self._lost_reported = 0
        self._series = SeriesRecorder(self._make_probe, self._send_series)
        self._profiling = LayerProfiling(capture, options) if options.profiling else None
        # The threads that serve a session do not keep it, and with it the model, alive where everyone has lost it.
        self._intake = Intake(_weakly(self._process), _weakly(self._failed), options.buffer_bytes)
        self._if_lost = weakref.finalize(self, _end_lost_session, self._intake, publisher)
        self._if_lost.atexit = False

    @property
    def session_id(self) -> str | None:
        """The fleet's id of the session, None until it answered; a local session has its own."""
        return self._local_id if self.publisher is None else self.publisher.session_id

    @property
    def source_id(self) -> str:
        """The id of this process's capture."""
        return self._local_id if self.publisher is None else self.publisher.source_id

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._is_closed

    def decisions(self, *, max_rows: int | None = None) -> Decisions:
        """Return the kept rows as columns, those in files too; at level "counts" there are none.

        Args:
            max_rows: give the newest rows alone, at most so many.

        Raises:
            InvalidInputError: `max_rows` is negative, or the rows do not fit the machine's free memory.
            SessionClosedError: the session was closed.
        """
        if max_rows is not None and max_rows < 0:
            raise InvalidInputError(f"max_rows {max_rows}: expected 0 or more")
        self._settle()
        source, free = self._rows.source(max_rows=max_rows), available_bytes()
        needed = source.num_rows * source.layout.row_bytes
        if free is not None and needed > free:
            raise InvalidInputError(
                f"decisions() of {source.num_rows:,} rows needs about {needed / 1e9:.1f} GB, and the machine has "
                f"{free / 1e9:.1f} GB free; read them part by part with iter_decisions(), or the newest with "
                "decisions(max_rows=...)"
            )
        return self._decisions(source)

    def decisions_since(self, num_forwards: int) -> Decisions:
        """Return the kept rows after the first `num_forwards` forwards of this session.

        Raises:
            SessionClosedError: the session was closed.
        """
        self._settle()
        return self._decisions(self._rows.source(first_forward_index=self._base[0] + num_forwards))

    def iter_decisions(self, batch_rows: int = 65_536) -> Iterator[Decisions]:
        """Yield the kept rows in order, reading files part by part: memory stays flat however many there are.

        Rows that are captured meanwhile are not among them.

        Args:
            batch_rows: a batch is whole forwards with at most so many rows, but at least one forward; 1 gives the
                forwards one by one.

        Raises:
            InvalidInputError: `batch_rows` is below 1.
            SessionClosedError: the session was closed, also while this runs.
        """
        if batch_rows < 1:
            raise InvalidInputError(f"batch_rows {batch_rows}: expected 1 or more")
        self._settle()
        return self._iterate(regroup(self._rows.blocks(), batch_rows))

    def _iterate(self, groups: Iterator[list[RowBlock]]) -> Iterator[Decisions]:
        for group in groups:
            self._check_open()
            yield self._decisions(group)

    def _decisions(self, rows: RowSource | Sequence[RowBlock]) -> Decisions:
        return Decisions(rows, self._layers(), rank=self._options.coordinates.global_rank)

    def row_statistics(self) -> RowStatistics:
        """Return how many rows are kept, where they are, and how many are not kept.

        Raises:
            SessionClosedError: the session was closed.
        """
        self._settle()
        return self._rows.statistics()

    def layers(self) -> Layers:
        """Return what is known of each MoE layer; prints as a table.

        Raises:
            SessionClosedError: the session was closed.
        """
        self._settle()
        return Layers(self._layers())

    def get_routing_stats(self) -> RoutingStats:
        """Return load and confidence per layer."""
        counted = self._snapshot()
        return RoutingStats(
            session_name=self.name,
            num_forwards=self._totals.num_forwards,
            num_tokens=counted.state.num_tokens,
            num_requests=counted.state.num_requests,
            sampling_rate=self._options.sampling_rate,
            layers=tuple(layer_routing_stats(info, counted.layer(info)) for info in self._layers()),
        )

    def get_expert_metrics(self) -> ExpertMetrics:
        """Return the load of every expert."""
        counted, owners = self._snapshot(), self._options.expert_owners
        rows = [row for info in self._layers() for row in counted.expert_rows(info, owners.get(info.layer_index, ()))]
        return ExpertMetrics(self.name, tuple(rows))

    def rank_load(self) -> RankLoad:
        """Return the load of each expert-parallel rank, which is empty where every rank computes all experts."""
        state = self.state()
        counts = {index: layer.counts for index, layer in state.layers.items()}
        return rank_load(self.name, self._layers(), counts, self._options.expert_owners)

    def get_performance_metrics(self) -> PerformanceMetrics:
        """Return what ran and what watching it cost."""
        self._settle()
        return self._performance(_Totals())

    def state(self) -> RoutingState:
        """Return all that was counted so far, such as the `baseline` of a later `analyze`; a copy.

        Raises:
            SessionClosedError: the session was closed.
        """
        return self._snapshot().state

    def analyze(self, *, baseline: RoutingState | None = None) -> Analysis:
        """Return metrics and findings of what was captured so far, by the debugger's thresholds."""
        state = self.state()
        return finish(state, thresholds=self._options.thresholds, baseline=baseline, health=self._health(is_live=False))

    @property
    def options(self) -> SessionOptions:
        """What the session keeps and where it sends it."""
        return self._options

    def query(self, text: str, *, tokenizer: Any = None) -> "QueryResult":
        """Return what a query finds in this session; docs/query.md describes the language, which only reads.

        Args:
            text: such as "experts where layer = 23 and load > 8x order by load desc".
            tokenizer: for the texts of tokens: of transformers, or `LoadedModel.tokenizer`.

        Raises:
            QueryError: the query has a fault; the error has the place.
            QueryCostError: it would read more than a query may.
            SessionClosedError: the session was closed.
        """
        from moe_debugger.query.engine import run_query
        from moe_debugger.query.local import SessionSource

        self._check_open()
        return run_query(text, SessionSource(self, tokenizer))

    def diagnose(self, *, baseline: RoutingState | None = None, max_rows: int = 200_000) -> Analysis:
        """Return what `analyze` finds, each finding with its explanation: since when, why, and what to do.

        Causes name only what was observed: the training series, the kept rows, the ranks of the experts. What is
        missing is named in each explanation; docs/explanations.md has the rules.

        Args:
            max_rows: newest rows that are looked at for dominating tokens and requests.

        Raises:
            SessionClosedError: the session was closed.
        """
        from moe_debugger.analysis.explanation import ObservedSettings, PlacementOptions, explain_analysis

        analysis = self.analyze(baseline=baseline)
        state, owners = self.state(), self._options.expert_owners
        rows = self.decisions(max_rows=max_rows)
        ranks = max((max(of_layer) + 1 for of_layer in owners.values() if of_layer), default=0)
        return explain_analysis(
            analysis,
            state=state,
            settings=ObservedSettings.from_columns(self.series()),
            rows=rows if len(rows) else None,
            placement=PlacementOptions(num_ranks=ranks, owners=owners) if ranks > 1 else None,
        )

    def capture_health(self) -> CaptureHealth:
        """Return how far this session's capture can be trusted; docs/metrics.md defines each check.

        Raises:
            SessionClosedError: the session was closed.
        """
        self._settle()
        return self._health(is_live=False)

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Wait until all that was captured is counted, and on the broker where there is a fleet.

        Returns:
            False when the time is up.
        """
        self._check_open()
        deadline = time.monotonic() + timeout_s
        self._capture.release()
        if not self._intake.flush(timeout_s):
            return False
        return self.publisher is None or self.publisher.flush(max(0.0, deadline - time.monotonic()))

    def publisher_statistics(self) -> PublisherStatistics | None:
        """Return the account of the way to the fleet; None for a local session."""
        return None if self.publisher is None else self.publisher.statistics()

    def close(self, *, timeout_s: float = 3.0, ends_session: bool = True, reason: str = "closed") -> None:
        """End the capture, publish what waits for at most `timeout_s`, and free the rows; again does nothing.

        Args:
            timeout_s: bound on the wait for the broker.
            ends_session: False where another process goes on under the same name (a worker that restarts).
            reason: shown in the fleet.
        """
        if self._is_closed:
            return
        self.stop(timeout_s=timeout_s, ends_session=ends_session, reason=reason)
        if self._recorder is not None:
            self._recorder.stop()
        self._profiling = None
        self._intake.close(timeout_s)
        self._if_lost.detach()
        self._is_closed = True
        self._rows.close()

    @contextmanager
    def profile(self, *, layers: bool = False, peak: "Peak | None" = None) -> Iterator[Profile]:
        """Measure what runs inside.

        Args:
            layers: time the parts of the MoE layers as well, see `layer_profile`; always so where the debugger was
                made with ``profiling=True``.
            peak: for the roofline; default: the debugger's.

        Raises:
            ModelNotSupportedError: `layers`, and the model is compiled.
        """
        self._settle()
        ours = None
        if layers and self._profiling is None:
            ours = self._profiling = LayerProfiling(self._capture, self._options)
        timing = self._profiling
        mark = 0 if timing is None else timing.mark()
        before, started = self._read_totals(), time.perf_counter()
        profile = Profile()
        try:
            yield profile
        finally:
            profile.wall_s = time.perf_counter() - started
            if ours is not None:
                ours.stop()
                self._profiling = None
            if not self._is_closed:
                self._settle()
                profile.performance = self._performance(before)
                profile.layers = None if timing is None else timing.profile(after=mark, peak=peak)

    def layer_profile(self) -> "LayerProfile":
        """Return where the forwards' time went so far, by layer, part and expert; docs/profiling.md defines it.

        Raises:
            InvalidInputError: the debugger was made without ``profiling=True``.
            SessionClosedError: the session was closed.
        """
        self._check_open()
        if self._profiling is None:
            raise InvalidInputError(
                "layers are not profiled: make the debugger with MoEDebugger(model, profiling=True), or run the model "
                "inside `with debugger.profile(layers=True) as profile:` and read profile.layers"
            )
        return self._profiling.profile()

    def record(
        self,
        path: str | os.PathLike[str],
        *,
        buffer_bytes: int = 64 * 1024 * 1024,
        part_bytes: int = 64 * 1024 * 1024,
        part_seconds: float = 30.0,
        max_bytes: int | None = None,
    ) -> "Recorder":
        """Write all that is captured from now on to a new folder, until `Recorder.stop` or `close`.

        docs/recordings.md describes the files; `moe_debugger.open_recording` reads them.

        Args:
            path: a folder that is not there yet, or is empty. The recording can reveal the text.
            buffer_bytes: bound on what waits for the disk; rows that do not fit are counted in the manifest.
            part_bytes, part_seconds: a part ends when it is so large or so old; a crash loses the one that is open.
            max_bytes: the recording takes no more rows once it is so large, and counts them; None = no bound.

        Raises:
            InvalidInputError: the folder is not empty, or cannot be made, or a recording of this session runs already.
            DependencyMissingError: pyarrow is not installed.
            SessionClosedError: the session was closed.
        """
        from moe_debugger.recording.recorder import Recorder
        from moe_debugger.recording.writer import Limits

        self._settle()
        if self._recorder is not None:
            raise InvalidInputError(f"this session is recorded to {self._recorder.path} already; stop that one first")
        limits = Limits(part_bytes=part_bytes, part_seconds=part_seconds, max_bytes=max_bytes)
        self._recorder = recorder = Recorder(self, path, buffer_bytes=buffer_bytes, limits=limits)
        # Those that came between are given twice, and written once.
        recorder.offer_series(self._series.points())
        return recorder

    def series(self) -> SeriesTable:
        """Return the training series recorded so far, waiting for values that are still on a device.

        Raises:
            SessionClosedError: the session was closed.
        """
        self._check_open()
        return self._series.table()

    def record_series(self, step: int, series: Mapping[str, Any]) -> None:
        """Record values of series of the whole model at a step; see `MoEDebugger.step`."""
        self._check_open()
        self._series.record(step, series)

    def record_gradients(self, step: int) -> None:
        """Read the norms of gradients and weights as they are now; see `MoEDebugger.record_gradients`."""
        self._check_open()
        self._series.record_gradients(step)

    def stop(self, *, timeout_s: float = 3.0, ends_session: bool = True, reason: str = "stopped") -> None:
        """Remove the hooks and say goodbye to the fleet; results can be read until `close`. Again does nothing.

        Args:
            timeout_s: bound on the wait for the broker.
            ends_session: False where another process goes on under the same name.
            reason: shown in the fleet.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        if self._profiling is not None:
            self._profiling.stop()
        self._capture.detach()
        self._intake.flush(timeout_s)
        if self.publisher is not None:
            self._series.poll(waits=True)
            self._report_lost()
            self.publisher.stop(timeout_s, closes_session=ends_session, reason=reason)

    def __enter__(self) -> "Session":
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "local" if self.publisher is None else "streaming"
        state = "closed" if self._is_closed else "open"
        return f"<Session {self.name!r} {state}, {where}, {self._totals.num_forwards} forwards>"

    def offer(self, raw: RawForward) -> None:
        """Take a forward from the hooks, or drop and count it: called on the model's thread."""
        self._totals.num_forwards += 1
        self._totals.num_tokens += raw.num_tokens
        self._totals.num_decisions += raw.num_decisions
        if not self._intake.offer(raw):
            self._monitor.forward_dropped(raw.forward_index)
            self._drop(pb.DROP_REASON_BUFFER_FULL, raw.num_decisions)

    def health(self) -> Health:
        """Return what goes into the next status: called on the publisher's thread."""
        now_ns, hook_ns = time.monotonic_ns(), self._capture.hook_ns
        before_ns, before_hook_ns = self._status_mark
        self._status_mark = (now_ns, hook_ns)
        self._report_lost()
        self._series.poll()
        if self._profiling is not None:
            self._send_points(self._profiling.points())
        health = self._health(is_live=True)
        return Health(
            last_step=self._last_step,
            hook_time_share=min(1.0, (hook_ns - before_hook_ns) / max(1, now_ns - before_ns)),
            is_healthy=health.is_healthy,
            problems=tuple(f"{text} ({number}x)" for text, number in self._problems().items()),
            checks=health.checks,
        )

    def _make_probe(self) -> GradientProbe:
        return GradientProbe(self._capture.discovery.sites, self._capture.model, self._options.layer_numbers)

    def _send_series(self, points: Sequence[SeriesPoint]) -> None:
        if self._recorder is not None:
            self._recorder.offer_series(points)
        if self.publisher is not None:
            self.publisher.set_series({p.name: float(p.values[0]) for p in points if p.layer_index == NO_INDEX})
            self._send_points(points)

    def _send_points(self, points: Sequence[SeriesPoint]) -> None:
        if self.publisher is not None:
            self.publisher.add_series_points([point.to_message() for point in points])

    def _process(self, raws: Sequence[RawForward]) -> None:
        started_ns = time.perf_counter_ns()
        for raw in raws:
            self._capture.wait_for_copies(raw)
        for group in self._assembler.assemble(raws):
            try:
                self._take(group)
            except Exception as error:  # noqa: BLE001 - what was counted already must not be given again
                for raw in group.raws:
                    self._failed(raw, error)
        self._totals.capture_ns += time.perf_counter_ns() - started_ns

    def _take(self, group: Assembled) -> None:
        if group.num_left_out:
            self._drop(pb.DROP_REASON_SAMPLED_OUT, group.num_left_out)
        numbers = self._options.layer_numbers
        for each in group.columns:
            for layer in each.layers:
                layer.layer_index = numbers.get(layer.layer_index, layer.layer_index)
        parts, num_unusable = self._monitor.check(forwards_seen(group.raws, numbers, group.num_left_out), group.columns)
        if num_unusable:
            self._drop(pb.DROP_REASON_CAPTURE_ERROR, num_unusable)
        with self._lock:
            if self._counted is None:
                # Not before: a layer's k is known once its experts were called.
                self._counted = CountedRoutes(self._layers())
            for columns in parts:
                self._counted.fold(columns)
        # Not under the lock: rows may go to a file here, and the model's thread takes the lock when it drops.
        self._rows.add(*(columns for columns in parts if isinstance(columns, RoutingColumns)))
        recorder = self._recorder
        if recorder is not None:
            recorder.offer(tuple(parts))
        if self.publisher is not None and not self._options.coordinates.is_replica:
            for columns in parts:
                self.publisher.submit(columns)
        self._last_step = max(self._last_step, *(raw.step for raw in group.raws))

    def _layers(self) -> tuple[LayerInfo, ...]:
        numbers = self._options.layer_numbers
        infos = self._assembler.layers()
        return tuple(replace(info, layer_index=numbers.get(info.layer_index, info.layer_index)) for info in infos)

    def _failed(self, raw: RawForward, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        self._monitor.forward_dropped(raw.forward_index)
        with self._lock:
            if text in self._failures or len(self._failures) < 16:
                self._failures[text] = self._failures.get(text, 0) + 1
        self._drop(pb.DROP_REASON_CAPTURE_ERROR, raw.num_decisions)

    def _drop(self, reason: int, num_decisions: int) -> None:
        with self._lock:
            self._dropped[reason] = self._dropped.get(reason, 0) + num_decisions
        # A replica's decisions are the recording rank's: it neither sends nor loses any.
        if self.publisher is not None and not self._options.coordinates.is_replica:
            self.publisher.count_dropped(reason, num_decisions)

    def _report_lost(self) -> None:
        lost = self._capture.num_lost_decisions - self._base[3] - self._lost_reported
        if lost > 0:
            self._lost_reported += lost
            self._drop(pb.DROP_REASON_CAPTURE_ERROR, lost)

    def _problems(self) -> dict[str, int]:
        with self._lock:
            return {**dict(self._capture.problems), **self._failures}

    def _health(self, *, is_live: bool) -> CaptureHealth:
        with self._lock:
            dropped = {reason_name(reason): number for reason, number in self._dropped.items()}
        if self.publisher is not None:
            dropped.update(self.publisher.statistics().num_dropped)
        dropped.pop(reason_name(pb.DROP_REASON_SAMPLED_OUT), None)
        totals = self._read_totals()
        checks = self._monitor.checks(
            num_produced=totals.num_decisions,
            dropped=dropped,
            hook_ns=totals.hook_ns,
            forward_ns=totals.forward_ns,
            is_live=is_live,
        )
        return CaptureHealth(
            num_produced=totals.num_decisions, dropped=dropped, problems=tuple(self._problems()), checks=checks
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError(
                f"session {self.name!r} was closed and its rows are freed; start a new one with "
                "debugger.start_session(), and read results before close() or the end of the with block"
            )

    def _settle(self) -> None:
        self._check_open()
        self._capture.release()
        if not self._intake.flush(_FLUSH_TIMEOUT_S):
            _log.warning("capture_is_behind", session_name=self.name, timeout_s=_FLUSH_TIMEOUT_S)
        self._report_lost()

    def _snapshot(self) -> CountedRoutes:
        self._settle()
        with self._lock:
            return CountedRoutes() if self._counted is None else self._counted.copy()

    def _read_totals(self) -> _Totals:
        totals = self._totals
        return _Totals(
            num_forwards=totals.num_forwards,
            num_tokens=totals.num_tokens,
            num_decisions=totals.num_decisions,
            forward_ns=self._capture.forward_ns - self._base[1],
            hook_ns=self._capture.hook_ns - self._base[2],
            capture_ns=totals.capture_ns,
        )

    def _performance(self, since: _Totals) -> PerformanceMetrics:
        now = self._read_totals()
        forward_s = (now.forward_ns - since.forward_ns) / 1e9
        hook_s = (now.hook_ns - since.hook_ns) / 1e9
        num_tokens = now.num_tokens - since.num_tokens
        intake = self._intake.statistics()
        with self._lock:
            dropped = dict(self._dropped)
        rows = self._rows.statistics()
        names = {reason_name(reason): number for reason, number in sorted(dropped.items())}
        if self.publisher is not None:
            names.update(self.publisher.statistics().num_dropped)
        return PerformanceMetrics(
            num_forwards=now.num_forwards - since.num_forwards,
            num_tokens=num_tokens,
            num_decisions=now.num_decisions - since.num_decisions,
            forward_s=forward_s,
            tokens_per_s=num_tokens / forward_s if forward_s else float("nan"),
            hook_s=hook_s,
            hook_time_share=hook_s / forward_s if forward_s else 0.0,
            capture_s=(now.capture_ns - since.capture_ns) / 1e9,
            buffer_peak_bytes=intake.peak_bytes,
            buffer_limit_bytes=intake.limit_bytes,
            num_rows_kept=rows.num_kept,
            num_rows_not_kept=rows.num_not_kept,
            num_dropped=names,
            # Rows that are not kept are no fault of the capture, so they are no part of its health.
            problems={**self._problems(), **self._rows.problems},
        )


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls a bound method as long as its object is there."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        held = reference()
        if held is not None:
            held(*arguments)

    return call


def _end_lost_session(intake: Intake, publisher: Publisher | None) -> None:
    intake.close(0.0)
    if publisher is not None:
        # Not waited for: this runs wherever garbage is collected.
        stop = partial(publisher.stop, reason="the debugger was lost without close()")
        threading.Thread(target=stop, name="moe-debugger-goodbye", daemon=True).start()
