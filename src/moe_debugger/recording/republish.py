"""Plays a recording into a fleet, without the model: each recorded source becomes a source of the kind "replay"."""

import heapq
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from moe_debugger._decisions import Decisions
from moe_debugger.errors import FleetError, InvalidInputError
from moe_debugger.publish import Health, Publisher, SourceDescription
from moe_debugger.recording.columns import decisions_to_columns
from moe_debugger.recording.joined import JoinedRecording
from moe_debugger.recording.reader import Recording
from moe_debugger.training.series import NO_INDEX, SeriesTable
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, RoutingColumns
from moe_debugger.wire.ids import DEFAULT_TENANT

__all__ = ["ReplayProgress", "replay_to_fleet"]

_LEVELS = {
    "counts": pb.CAPTURE_LEVEL_COUNTS,
    "routes": pb.CAPTURE_LEVEL_ROUTES,
    "routes+tokens": pb.CAPTURE_LEVEL_ROUTES_TOKENS,
    "full": pb.CAPTURE_LEVEL_FULL,
}
_DOMAINS = {"global": pb.STEP_DOMAIN_GLOBAL, "source": pb.STEP_DOMAIN_SOURCE}
# Rows that are read at once where nothing has to wait.
_BATCH_ROWS = 65_536
# So full the way to the broker may be: a source that captures drops what does not fit, a replay waits.
_MAX_BUFFER_SHARE = 0.5
_POLL_S = 0.002
_STOP_TIMEOUT_S = 60.0
# Points that go with one batch: what a status a second carries away.
_POINTS_TOGETHER = 2000

Item = tuple[int, int, list[RoutingColumns] | list[CountsColumns]]


@dataclass(slots=True)
class ReplayProgress:
    """How far a replay has come, and at its end all of it.

    Attributes:
        session_id: of the fleet's session.
        num_rows: rows, or sums, that were handed to the fleet's sources; num_dropped: decisions lost on the way, by
            reason.
        recorded_s: time of the recording that was played.
        elapsed_s: time that it took, up to the broker's last acknowledgement.
    """

    session_id: str = ""
    num_rows: int = 0
    num_dropped: dict[str, int] = field(default_factory=dict)
    recorded_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def rows_per_s(self) -> float:
        """Rows for each second that it took; 0 before the first."""
        return self.num_rows / self.elapsed_s if self.elapsed_s else 0.0


def replay_to_fleet(
    recording: Recording,
    fleet: str,
    *,
    speed: float = math.inf,
    session_name: str | None = None,
    tenant: str = DEFAULT_TENANT,
    buffer_bytes: int = 64 * 1024 * 1024,
    wait_s: float = 10.0,
    on_progress: Callable[[ReplayProgress], None] = lambda _: None,
    is_stopping: threading.Event | None = None,
) -> ReplayProgress:
    """Publish a recording as a session of a fleet, in the order and at the pace in which it was captured.

    The session's step numbers, forwards, requests and ranks are those of the recording. The routers' probabilities are
    not there, except at level "counts": of rows the files have them in sums of whole parts.

    Args:
        fleet: NATS URL of a running fleet (the `nats` value of ``moe-debugger up --json``).
        speed: 1 = as it was captured, 4 = four times as fast, infinite = as fast as the fleet takes it.
        session_name: default: the recorded session's, with " (replay)".
        wait_s: how long to wait for the fleet's answer.
        on_progress: called after each batch.
        is_stopping: set to end before the end.

    Raises:
        InvalidInputError: `speed` is not above 0.
        FleetError: the fleet did not answer in `wait_s`, or refused.
        RecordingError: a part is damaged.
    """
    if not speed > 0:
        raise InvalidInputError(f"speed {speed}: expected more than 0; 1 is as it was, math.inf without waiting")
    stopping = is_stopping or threading.Event()
    members = recording.members if isinstance(recording, JoinedRecording) else (recording,)
    name = session_name or f"{recording.manifest.session_name[:100]} (replay)"
    publishers = [
        Publisher(fleet, _description(each, name), tenant=tenant, buffer_bytes=buffer_bytes) for each in members
    ]
    progress = ReplayProgress()
    steps = [0] * len(members)
    for index, publisher in enumerate(publishers):
        publisher.set_health_source(lambda index=index: Health(last_step=steps[index]))  # type: ignore[misc]
        publisher.start()
    is_done = False
    try:
        for publisher in publishers:
            progress.session_id = publisher.wait_for_session(wait_s)
        series = [_Series(each.series()) for each in members]
        began, first = time.monotonic(), None
        for captured_at, index, items in _items(members, is_paced=math.isfinite(speed)):
            first = captured_at if first is None else first
            progress.recorded_s = max(progress.recorded_s, (captured_at - first) / 1e9)
            if math.isfinite(speed):
                stopping.wait(max(0.0, began + progress.recorded_s / speed - time.monotonic()))
            for columns in items:
                _wait_for_room(publishers[index], stopping)
                if stopping.is_set():
                    break
                publishers[index].submit(columns)
                last = columns.last_step if isinstance(columns, CountsColumns) else int(columns.step.max(initial=0))
                steps[index] = max(steps[index], last)
                progress.num_rows += (
                    len(columns.layers) if isinstance(columns, CountsColumns) else columns.num_decisions
                )
            if stopping.is_set():
                break
            publishers[index].add_series_points(series[index].take(steps[index]))
            progress.elapsed_s = time.monotonic() - began
            on_progress(progress)
        if not stopping.is_set():
            _send_rest(publishers, series, stopping)
        for publisher in publishers:
            publisher.flush(_STOP_TIMEOUT_S)
        progress.elapsed_s = time.monotonic() - began
        is_done = True
    finally:
        # The last one ends the session for all of them.
        for place, publisher in enumerate(reversed(publishers), 1):
            publisher.stop(
                _STOP_TIMEOUT_S if is_done else 3.0,
                closes_session=place == len(publishers),
                reason="the recording was played" if is_done and not stopping.is_set() else "the replay was stopped",
            )
    for publisher in publishers:
        for reason, number in publisher.statistics().num_dropped.items():
            progress.num_dropped[reason] = progress.num_dropped.get(reason, 0) + number
    return progress


def _extent(columns: RoutingColumns | CountsColumns) -> tuple[int, int]:
    """Return the rows, or sums, and the last step."""
    if isinstance(columns, CountsColumns):
        return len(columns.layers), columns.last_step
    return columns.num_decisions, int(columns.step.max(initial=0))


_LAYER_FIELDS = (
    "layer_index", "model_layer_index", "module_name", "stack", "num_experts", "top_k", "num_shared_experts",
    "num_identity_experts", "scoring_function", "weight_meaning", "unavailable_reason", "site",
)  # fmt: skip


def _description(member: Recording, name: str) -> SourceDescription:
    manifest, topology = member.manifest, member.manifest.topology
    owners = member.expert_owners()
    # A replica that recorded itself has rows, which count here as anybody's.
    is_replica = topology.recording_rank != topology.global_rank and not manifest.num_rows
    return SourceDescription(
        session_name=name,
        model_name=manifest.model.name or manifest.model.class_name or "recording",
        model_type=manifest.model.model_type,
        model_fingerprint=manifest.model.config_sha256 or "",
        model_class_name=manifest.model.class_name,
        layers=[
            pb.LayerDescription(
                **{name: getattr(info, name) for name in _LAYER_FIELDS},
                expert_parallel_ranks=owners.get(info.layer_index, ()),
            )
            for info in member.layers()
        ],
        level=_LEVELS[manifest.level],
        sampling_rate=manifest.sampling_rate,
        step_domain=_DOMAINS.get(manifest.step_domain, pb.STEP_DOMAIN_SOURCE),
        kind="replay",
        versions=dict(manifest.model.versions),
        coordinates=pb.ParallelCoordinates(
            global_rank=topology.global_rank,
            world_size=topology.world_size,
            data_parallel_rank=topology.data_parallel_rank,
            tensor_parallel_rank=topology.tensor_parallel_rank,
            expert_parallel_rank=topology.expert_parallel_rank,
            pipeline_parallel_rank=topology.pipeline_parallel_rank,
            replica_of_rank=topology.recording_rank if is_replica else None,
        ),
    )


def _items(members: tuple[Recording, ...], *, is_paced: bool) -> Iterator[Item]:
    """Yield what was captured together, with its time and member: in the order of time, else by turns."""
    sources = [_items_of(index, member, is_paced=is_paced) for index, member in enumerate(members)]
    if is_paced:
        yield from heapq.merge(*sources, key=lambda item: item[:2])
        return
    while sources:
        for source in list(sources):
            item = next(source, None)
            if item is None:
                sources.remove(source)
            else:
                yield item


def _items_of(index: int, member: Recording, *, is_paced: bool) -> Iterator[Item]:
    if member.manifest.level == "counts":
        for counts in member.iter_counts():
            yield counts.captured_at_unix_ns, index, [counts]
        return
    parts: Iterator[tuple[int, Decisions]] = (
        ((time_ns, member._decisions(blocks)) for time_ns, blocks, _ in member._captures())
        if is_paced
        else ((member.manifest.started_at_unix_ns, rows) for rows in member.iter_decisions(_BATCH_ROWS))
    )
    for captured_at, rows in parts:
        yield captured_at, index, decisions_to_columns(rows, captured_at)


def _wait_for_room(publisher: Publisher, stopping: threading.Event) -> None:
    while not stopping.is_set():
        statistics = publisher.statistics()
        if statistics.state in ("refused", "stopped"):
            raise FleetError(f"the fleet takes no more of the recording: {statistics.last_error or statistics.state}")
        if statistics.buffer_used_bytes <= _MAX_BUFFER_SHARE * statistics.buffer_limit_bytes:
            return
        time.sleep(_POLL_S)


class _Series:
    """A member's points of training series, handed out by step."""

    def __init__(self, table: SeriesTable) -> None:
        self._points = _points(table)
        self._place = 0

    @property
    def is_over(self) -> bool:
        return self._place >= len(self._points)

    def take(self, last_step: int | None) -> list[pb.SeriesPoint]:
        """Return the next points up to a step, at most so many as the way to the fleet takes at once."""
        start = self._place
        while (
            not self.is_over
            and self._place - start < _POINTS_TOGETHER
            and (last_step is None or self._points[self._place].step <= last_step)
        ):
            self._place += 1
        return self._points[start : self._place]


def _send_rest(publishers: list[Publisher], series: list[_Series], stopping: threading.Event) -> None:
    """Send the points that are left: a status a second carries some of them."""
    for publisher, rest in zip(publishers, series, strict=True):
        while not rest.is_over and not stopping.is_set():
            if publisher.num_series_points_waiting < _POINTS_TOGETHER:
                publisher.add_series_points(rest.take(None))
            else:
                stopping.wait(0.05)


def _points(table: SeriesTable) -> list[pb.SeriesPoint]:
    """Return the table's points as they go to a fleet: values of all experts of a layer are one point."""
    points: list[pb.SeriesPoint] = []
    key: tuple[int, str, int] | None = None
    for step, name, layer, expert, value in zip(
        table.step.tolist(), table.name.tolist(), table.layer_index.tolist(), table.expert_id.tolist(),
        table.value.tolist(), strict=True,
    ):  # fmt: skip
        if expert != NO_INDEX and key == (step, name, layer):
            points[-1].values.append(value)
            continue
        key = (step, name, layer)
        points.append(
            pb.SeriesPoint(
                step=step,
                name=name,
                layer_index=None if layer == NO_INDEX else layer,
                values=[value],
                is_per_expert=expert != NO_INDEX,
            )
        )
    return points
