"""Records a session while it runs: what is captured goes through a bounded queue to a thread that writes.

The rows are taken where the capture hands them out, before any of them can be pushed out of the session's memory. A
disk that is too slow fills the queue; what does not fit is counted, and said in the manifest. Neither the model nor the
capture waits for the disk.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import structlog

from moe_debugger.capture import LayerInfo
from moe_debugger.errors import InvalidInputError, SessionClosedError
from moe_debugger.publish.batching import columns_size_bytes
from moe_debugger.recording.manifest import Health, Manifest, ModelIdentity, Topology
from moe_debugger.recording.tables import require_pyarrow
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.training.series import SeriesPoint, SeriesTable
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, RoutingColumns
from moe_debugger.wire.ids import new_id

if TYPE_CHECKING:
    from moe_debugger._session import Session

__all__ = ["Recorder", "RecorderStatistics", "model_identity"]

_LEVELS: dict[int, Literal["counts", "routes", "routes+tokens", "full"]] = {
    pb.CAPTURE_LEVEL_COUNTS: "counts",
    pb.CAPTURE_LEVEL_ROUTES: "routes",
    pb.CAPTURE_LEVEL_ROUTES_TOKENS: "routes+tokens",
    pb.CAPTURE_LEVEL_FULL: "full",
}
# What arrays and objects weigh beside their values; as of the rows in memory.
_OVERHEAD_BYTES = 2000
_TICK_S = 1.0
# Of series, some 300 bytes each.
_MAX_WAITING_POINTS = 262_144
# How long garbage collection or the interpreter's exit waits for the disk.
_GOODBYE_S = 5.0
# Differ between two loads of the same model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RecorderStatistics:
    """A snapshot of a recording's account.

    Attributes:
        num_rows_written: rows in whole parts; num_parts: of rows or counts.
        num_rows_not_written: rows that were captured and are in no part, by reason.
        waiting_bytes: of what waits for the disk.
    """

    num_rows_written: int
    num_parts: int
    size_bytes: int
    num_rows_not_written: dict[str, int]
    waiting_bytes: int
    problems: tuple[str, ...]


class _Feed:
    """The queue and its thread; knows nothing of the session, so that it keeps neither it nor the model alive."""

    def __init__(self, writer: RecordingWriter, limit_bytes: int) -> None:
        self.writer = writer
        self._limit_bytes = limit_bytes
        self._items: deque[tuple[int, tuple[RoutingColumns | CountsColumns, ...]]] = deque()
        self._changed = threading.Condition()
        self._lost: Counter[str] = Counter()
        self._points: list[SeriesPoint] = []
        self.num_points_lost = 0
        self._ending: Ending | None = None
        self._is_closed = False
        self._process_id = os.getpid()
        self.used_bytes = 0
        self._thread = threading.Thread(target=self._run, name="moe-debugger-recording", daemon=True)
        self._thread.start()

    def offer(self, parts: tuple[RoutingColumns | CountsColumns, ...]) -> None:
        size = sum(columns_size_bytes(each) + _OVERHEAD_BYTES * (1 + len(each.layers)) for each in parts)
        with self._changed:
            if self._is_closed or (self._items and self.used_bytes + size > self._limit_bytes):
                rows = (each.num_decisions if isinstance(each, RoutingColumns) else len(each.layers) for each in parts)
                self._lost["stopped" if self._is_closed else "buffer_full"] += sum(rows)
                return
            self._items.append((size, parts))
            self.used_bytes += size
            self._changed.notify()

    def offer_series(self, points: Sequence[SeriesPoint]) -> None:
        with self._changed:
            if self._is_closed or len(self._points) + len(points) > _MAX_WAITING_POINTS:
                self.num_points_lost += len(points)
            else:
                self._points += points

    def close(self, ending: Ending | None = None, timeout_s: float = 60.0) -> bool:
        """Write what waits, and end the thread; without an ending the recording stays unfinished."""
        if os.getpid() != self._process_id:
            return False  # a forked child, which has no such thread and must leave its parent's files alone
        with self._changed:
            if not self._is_closed:
                self._ending, self._is_closed = ending, True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._items and not self._is_closed:
                    self._changed.wait(min(_TICK_S, self.writer.limits.part_seconds))
                parts = self._items[0][1] if self._items else None
                is_closed = self._is_closed
                lost, self._lost = self._lost, Counter()
                points, self._points = self._points, []
            if points:
                self.writer.add_series(points)
            for reason, num_rows in lost.items():
                self.writer.count_not_written(reason, num_rows)
            if parts is not None:
                self.writer.add(parts)
                with self._changed:
                    self.used_bytes -= self._items.popleft()[0]
            elif is_closed:
                break
            self.writer.tick()
        if self._ending is None:
            self.writer.end_part()
        else:
            self.writer.finish(self._ending)


class Recorder:
    """Records a session from now on, until `stop`; made by `Session.record`. A context manager, too.

    Attributes:
        path: the recording's folder.
    """

    def __init__(self, session: "Session", path: str | os.PathLike[str], *, buffer_bytes: int, limits: Limits) -> None:
        if buffer_bytes < 1:
            raise InvalidInputError(f"buffer_bytes {buffer_bytes}: expected 1 or more")
        require_pyarrow()
        self.path = make_folder(path)
        self._session = session
        self._dropped_before = session.capture_health().dropped or {}
        layers = _weakly_known_layers(session)
        try:
            writer = RecordingWriter(self.path, _manifest(session), limits, layers, session._options.expert_owners)
        except OSError as error:
            raise InvalidInputError(
                f"the recording cannot be written to {self.path}: {error.strerror or error}"
            ) from error
        self._feed = _Feed(writer, buffer_bytes)
        # A recorder that everyone has lost, and the interpreter's exit: what waits is written, the status stays.
        self._if_lost = weakref.finalize(self, self._feed.close, None, _GOODBYE_S)
        self._is_recording = True
        self._lock = threading.Lock()
        # Points that the session had given up before: those that come are all written, whatever it keeps of them.
        self._num_points_before = session.series().num_not_kept

    @property
    def is_recording(self) -> bool:
        """Whether rows still go to it."""
        return self._is_recording

    @property
    def manifest(self) -> Manifest:
        """The manifest as it was last written."""
        return self._feed.writer.manifest

    def offer(self, parts: tuple[RoutingColumns | CountsColumns, ...]) -> None:
        """Take what was captured together: called on the capture's thread; never waits for the disk."""
        if parts:
            self._feed.offer(parts)

    def offer_series(self, points: Sequence[SeriesPoint]) -> None:
        """Take points of training series; never waits for the disk."""
        self._feed.offer_series(points)

    def statistics(self) -> RecorderStatistics:
        """Return what is written so far."""
        manifest = self.manifest
        parts = [each for each in manifest.parts if each.kind in ("rows", "counts")]
        return RecorderStatistics(
            num_rows_written=sum(each.num_rows for each in parts),
            num_parts=len(parts),
            size_bytes=sum(each.size_bytes for each in manifest.parts),
            num_rows_not_written=dict(manifest.num_rows_not_written),
            waiting_bytes=self._feed.used_bytes,
            problems=tuple(manifest.problems),
        )

    def stop(self, timeout_s: float = 60.0) -> Manifest:
        """Write what was captured until now, and finish the recording; again only returns its manifest.

        A disk that refused does not raise here: the manifest's `status` is then "failed", and `problems` says why.

        Args:
            timeout_s: bound on the wait for the disk; past it the recording goes on to be written in the background.
        """
        with self._lock:
            if not self._is_recording:
                return self.manifest
            ending = self._ending()
            self._is_recording = False
            self._if_lost.detach()
            if not self._feed.close(ending, timeout_s):
                _log.warning("recording_is_behind", path=str(self.path), timeout_s=timeout_s)
        manifest = self.manifest
        if manifest.problems or manifest.num_rows_not_written:
            _log.warning(
                "recording_is_not_whole",
                path=str(self.path),
                problems=manifest.problems,
                num_rows_not_written=manifest.num_rows_not_written,
            )
        return manifest

    def _ending(self) -> Ending:
        """Wait until all that was captured has come, and return what is known then."""
        try:
            health = self._session.capture_health()
            series = self._session.series()
        except SessionClosedError:
            return Ending()
        finally:
            self._session._recorder = None
        notes = SeriesTable([], notes=series.notes, num_not_kept=self._num_points_before + self._feed.num_points_lost)
        dropped = {
            reason: number - self._dropped_before.get(reason, 0) for reason, number in (health.dropped or {}).items()
        }
        return Ending(Health.of(health), notes, {reason: number for reason, number in dropped.items() if number > 0})

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "recording" if self._is_recording else self.manifest.status
        return f"<Recorder {str(self.path)!r} {state}, {self.manifest.num_rows:,} rows in whole parts>"


def _weakly_known_layers(session: "Session") -> Callable[[], tuple[LayerInfo, ...]]:
    """Return what gives the session's layers, the last ones where the session is lost."""
    reference = weakref.WeakMethod(session._layers)
    known = session._layers()

    def layers() -> tuple[LayerInfo, ...]:
        nonlocal known
        held = reference()
        known = known if held is None else held()
        return known

    return layers


def _manifest(session: "Session") -> Manifest:
    options = session._options
    coordinates = {name: getattr(options.coordinates, name) for name in Topology.model_fields}
    return Manifest(
        recording_id=new_id(),
        started_at_unix_ns=time.time_ns(),
        session_name=session.name[:4096],
        session_id=session.session_id,
        source_id="" if session.publisher is None else session.publisher.source_id,
        step_domain="global" if options.step_domain == pb.STEP_DOMAIN_GLOBAL else "source",
        level=_LEVELS[options.level],
        sampling_rate=options.sampling_rate,
        model=model_identity(session._capture.model, options.model_name),
        topology=Topology(**coordinates),
    )


def model_identity(model: Any, name: str) -> ModelIdentity:
    """Return which model it is.

    Args:
        name: what to call it; empty = its own name or path, else its class.
    """
    config = getattr(model, "config", None)
    return ModelIdentity(
        name=(name or str(getattr(config, "_name_or_path", "") or "") or type(model).__name__)[:4096],
        model_type=str(getattr(config, "model_type", "") or "")[:4096],
        class_name=type(model).__name__,
        config_sha256=_config_digest(config),
        versions=_versions(),
    )


def _config_digest(config: Any) -> str | None:
    try:
        values = config.to_dict()
        kept = {key: value for key, value in values.items() if key not in _NOT_THE_MODEL}
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    except Exception:  # noqa: BLE001 - any model's own code, which need not have a configuration
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("moe-debugger", "torch", "transformers", "numpy", "pyarrow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
