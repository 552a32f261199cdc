"""The Watch stream: one hub per watched session, shared by all who watch it, and one pace per watcher.

A hub subscribes to the session's live deltas first and takes a snapshot from an analyzer second, so that nothing falls
between the two. Watchers read the hub's state whenever they are ready to send: a slow one skips states, never queues
them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator

import structlog
from google.protobuf.message import DecodeError

from moe_debugger.errors import FleetError, MoEDebuggerError, WireFormatError
from moe_debugger.v1 import control_pb2, session_pb2
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.wire.codec import check_format_version
from moe_debugger.wire.ids import check_id
from moe_debugger.wire.subjects import live_subject
from moe_gateway.analyzer_client import AnalyzerClient
from moe_gateway.components import ComponentMonitor
from moe_gateway.errors import BusyError, NotFoundError
from moe_gateway.live_state import Applied, LiveState
from moe_gateway.nats_link import NatsLink, Topic

__all__ = ["Listeners", "SessionHub", "SessionList", "WatchService"]

log = structlog.get_logger(__name__)

DEFAULT_HZ = 10.0
HEARTBEAT_S = 5.0
# Snapshots: at most 2 a second, one every 2 s while counts change, one every second without NATS or after a failure,
# and a slow one so that a session that went quiet is seen to go stale.
SNAPSHOT_MIN_S = 0.5
SNAPSHOT_ACTIVE_S = 2.0
SNAPSHOT_POLL_S = 1.0
SNAPSHOT_IDLE_S = 5.0
SESSIONS_POLL_S = 1.0
FIRST_SNAPSHOT_WAIT_S = 2.0
# Deltas kept while a snapshot is on its way; more than this means that the snapshot is late, and the next one heals it.
_MAX_RECORDED = 10_000
_MAX_PAUSE_S = 0.25


class Listeners:
    """Events to set when something changed."""

    def __init__(self) -> None:
        self._events: set[asyncio.Event] = set()

    @contextlib.contextmanager
    def listening(self, event: asyncio.Event) -> Iterator[None]:
        """Set `event` at every change, for the time of the block."""
        self._events.add(event)
        try:
            yield
        finally:
            self._events.discard(event)

    def notify(self) -> None:
        """Tell everybody."""
        for event in self._events:
            event.set()

    def __len__(self) -> int:
        return len(self._events)


class SessionHub:
    """The live state of one session.

    Attributes:
        state: None until the first snapshot.
        num_changes: deltas and snapshots applied so far.
        snapshot_version: grows with every snapshot.
        error: set where the session cannot be watched any more.
    """

    def __init__(self, session_id: str, tenant: str, analyzer: AnalyzerClient, link: NatsLink) -> None:
        self.session_id = session_id
        self.listeners = Listeners()
        self.state: LiveState | None = None
        self.num_changes = 0
        self.snapshot_version = 0
        self.error: MoEDebuggerError | None = None
        self._analyzer = analyzer
        self._link = link
        self._topic = Topic(live_subject(tenant, session_id), self._on_message, self._ask_for_snapshot)
        self._wake = asyncio.Event()
        self._is_asked = True
        self._has_new_counts = False
        self._has_failed = False
        self._recorded: list[control_pb2.LiveDelta] | None = None
        self._frame: tuple[int, pb.WatchFrame] | None = None

    async def run(self) -> None:
        """Follow the session until cancelled, or until it turns out not to exist."""
        try:
            await self._link.add(self._topic)
            last_try = float("-inf")
            while self.error is None:
                due = last_try + self._snapshot_interval_s()
                now = time.monotonic()
                if now >= due:
                    last_try = now
                    await self._take_snapshot()
                    continue
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(due - now):
                        await self._wake.wait()
        finally:
            await self._link.remove(self._topic)

    def note_end(self, task: "asyncio.Task[None]") -> None:
        """Tell the watchers where `run` ended by a fault of ours, rather than leave them without news."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("session_hub_failed", session_id=self.session_id, exc_info=fault)
            self.error = FleetError("following the session failed in the gateway; its log holds the cause; watch again")
            self.listeners.notify()

    def frame(self) -> pb.WatchFrame:
        """Return the absolute counts; only once there is a state."""
        assert self.state is not None
        if self._frame is None or self._frame[0] != self.num_changes:
            self._frame = (self.num_changes, self.state.to_frame())
        return self._frame[1]

    def _snapshot_interval_s(self) -> float:
        if self._is_asked:
            return SNAPSHOT_MIN_S
        if not self._link.is_up or self._has_failed:
            return SNAPSHOT_POLL_S
        return SNAPSHOT_ACTIVE_S if self._has_new_counts else SNAPSHOT_IDLE_S

    def _ask_for_snapshot(self) -> None:
        self._is_asked = True
        self._wake.set()

    async def _take_snapshot(self) -> None:
        self._is_asked = self._has_new_counts = False
        self._recorded = []
        try:
            snapshot, flushes = await self._analyzer.get_snapshot(self.session_id)
            state = LiveState(snapshot, flushes)
        except NotFoundError as error:
            self.error = error
            self.listeners.notify()
            return
        except (MoEDebuggerError, ValueError) as error:
            # The components' health tells the watchers; the next try is a second away.
            if not self._has_failed:
                log.info("snapshot_failed", session_id=self.session_id, error=str(error))
            self._has_failed = True
            return
        finally:
            recorded, self._recorded = self._recorded or [], None
        for delta in recorded:
            if state.apply(delta) is Applied.HOLE:
                self._ask_for_snapshot()
        self.state = state
        self._has_failed = False
        self.snapshot_version += 1
        self._changed()

    def _on_message(self, data: bytes) -> None:
        try:
            delta = control_pb2.LiveDelta.FromString(data)
            check_format_version(delta.format_version, "a live delta")
        except (DecodeError, WireFormatError) as error:
            log.warning("live_delta_refused", session_id=self.session_id, error=str(error))
            self._ask_for_snapshot()
            return
        if delta.session_id != self.session_id:
            log.warning("live_delta_of_other_session", session_id=self.session_id, other=delta.session_id[:32])
            return
        if not self._has_new_counts:
            self._has_new_counts = True
            self._wake.set()
        if self._recorded is not None and len(self._recorded) < _MAX_RECORDED:
            self._recorded.append(delta)
        if delta.overview_changed:
            self._ask_for_snapshot()
        if self.state is None:
            return
        match self.state.apply(delta):
            case Applied.DONE:
                self._changed()
            case Applied.HOLE:
                self._ask_for_snapshot()
            case Applied.OLD:
                pass

    def _changed(self) -> None:
        self.num_changes += 1
        self.listeners.notify()


class SessionList:
    """The tenant's sessions, polled while anybody watches."""

    def __init__(self, analyzer: AnalyzerClient) -> None:
        self.listeners = Listeners()
        self.sessions: list[session_pb2.Session] = []
        self.version = 0
        self._analyzer = analyzer
        self._key: tuple[bytes, ...] | None = None

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            if len(self.listeners):
                await self.refresh()
            await asyncio.sleep(SESSIONS_POLL_S)

    async def refresh(self) -> None:
        """Ask an analyzer now; a failure keeps the last list, since the components' health tells of it."""
        try:
            sessions = await self._analyzer.list_sessions()
        except MoEDebuggerError as error:
            log.debug("list_sessions_failed", error=str(error))
            return
        key = tuple(_session_key(session) for session in sessions)
        if key != self._key:
            self._key, self.sessions = key, sessions
            self.version += 1
            self.listeners.notify()


def _session_key(session: session_pb2.Session) -> bytes:
    # Every open session is seen again each second: that alone is no news.
    copy = session_pb2.Session()
    copy.CopyFrom(session)
    copy.ClearField("last_seen_at_unix_ns")
    return copy.SerializeToString(deterministic=True)


class WatchService:
    """Hands out Watch streams.

    Args:
        monitor: health of the fleet's parts.
        health_listeners: told by the monitor's `on_change`.
    """

    def __init__(
        self,
        analyzer: AnalyzerClient,
        link: NatsLink,
        monitor: ComponentMonitor,
        health_listeners: Listeners,
        *,
        tenant: str,
        max_hz: float,
        max_watches: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._analyzer = analyzer
        self._link = link
        self._monitor = monitor
        self._health_listeners = health_listeners
        self._tenant = tenant
        self._max_hz = max_hz
        self._max_watches = max_watches
        self._clock = clock
        self._sessions = SessionList(analyzer)
        self._hubs: dict[str, tuple[SessionHub, asyncio.Task[None]]] = {}
        self._num_watches = 0
        self._is_stopping = False

    @property
    def num_watches(self) -> int:
        """Return the number of open streams."""
        return self._num_watches

    @property
    def num_hubs(self) -> int:
        """Return the number of sessions that are followed."""
        return len(self._hubs)

    async def run(self) -> None:
        """Do the work that all streams share, until cancelled."""
        await self._sessions.run()

    def stop(self) -> None:
        """End all streams with a message that tells clients to come back."""
        self._is_stopping = True
        self._health_listeners.notify()

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse, None]:
        """Yield a stream's events until the client leaves."""
        if request.session_id:
            check_id(request.session_id, "session_id")
        if self._num_watches >= self._max_watches:
            raise BusyError(
                f"{self._max_watches} Watch streams are open, the most allowed; close a tab, or raise "
                "MOE_GATEWAY_MAX_WATCHES"
            )
        hz = min(request.max_hz if request.max_hz > 0 else DEFAULT_HZ, self._max_hz)
        dirty = asyncio.Event()
        self._num_watches += 1
        try:
            with (
                self._health_listeners.listening(dirty),
                self._sessions.listeners.listening(dirty),
                self._hub(request.session_id) as hub,
                hub.listeners.listening(dirty) if hub else contextlib.nullcontext(),
            ):
                stream = self._events(hub, dirty, 1 / hz, request.resume_after_sequence)
                async with contextlib.aclosing(stream) as events:
                    async for event in events:
                        yield event
        finally:
            self._num_watches -= 1

    @contextlib.contextmanager
    def _hub(self, session_id: str) -> Iterator[SessionHub | None]:
        if not session_id:
            yield None
            return
        if session_id not in self._hubs:
            hub = SessionHub(session_id, self._tenant, self._analyzer, self._link)
            task = asyncio.get_running_loop().create_task(hub.run())
            task.add_done_callback(hub.note_end)
            self._hubs[session_id] = (hub, task)
        hub, task = self._hubs[session_id]
        try:
            yield hub
        finally:
            # This stream no longer listens when its block ends; the last one turns off the light.
            if not len(hub.listeners) and self._hubs.get(session_id, (None,))[0] is hub:
                del self._hubs[session_id]
                task.cancel()

    async def _events(
        self, hub: SessionHub | None, dirty: asyncio.Event, interval_s: float, resume_after: int
    ) -> AsyncGenerator[pb.WatchResponse, None]:
        sent_health = sent_sessions = sent_snapshot = sent_changes = 0
        next_frame = self._clock()
        next_heartbeat = next_frame + HEARTBEAT_S
        if hub is not None and not await _first_snapshot(hub, dirty):
            log.info("watch_starts_without_snapshot", session_id=hub.session_id)
        elif hub is None:
            await self._sessions.refresh()
        while True:
            dirty.clear()
            if self._is_stopping:
                raise FleetError("the gateway is stopping; connect again in a moment")
            if hub is not None:
                if hub.error is not None:
                    raise hub.error
                if hub.state is not None and hub.snapshot_version != sent_snapshot:
                    has_counts = sent_snapshot == 0 and 0 < resume_after == hub.state.sequence
                    sent_snapshot, sent_changes = hub.snapshot_version, hub.num_changes
                    next_frame = self._clock() + interval_s
                    snapshot = hub.state.to_snapshot(with_counts=not has_counts)
                    yield pb.WatchResponse(snapshot=pb.WatchSnapshot(snapshot=snapshot))
                elif sent_snapshot and hub.num_changes != sent_changes and self._clock() >= next_frame:
                    frame = pb.WatchFrame()
                    frame.CopyFrom(hub.frame())
                    frame.num_conflated = hub.num_changes - sent_changes - 1
                    sent_changes = hub.num_changes
                    next_frame = self._clock() + interval_s
                    yield pb.WatchResponse(frame=frame)
            if self._monitor.version != sent_health:
                sent_health = self._monitor.version
                yield pb.WatchResponse(components=pb.WatchComponents(components=self._monitor.components()))
            if self._sessions.version != sent_sessions:
                sent_sessions = self._sessions.version
                yield pb.WatchResponse(sessions=pb.WatchSessions(sessions=self._sessions.sessions))
            if self._clock() >= next_heartbeat:
                next_heartbeat = self._clock() + HEARTBEAT_S
                yield pb.WatchResponse(heartbeat=pb.WatchHeartbeat(sent_at_unix_ns=time.time_ns()))
            has_frame = hub is not None and sent_snapshot and hub.num_changes != sent_changes
            wake_at = min(next_heartbeat, next_frame) if has_frame else next_heartbeat
            await self._wait(dirty, wake_at, only_time=bool(has_frame))

    async def _wait(self, dirty: asyncio.Event, wake_at: float, *, only_time: bool) -> None:
        """Wait for a change, or, where one waits for its turn already, until that turn."""
        pause_s = wake_at - self._clock()
        if only_time:
            # Counts change far more often than a frame is due: waiting for them would spin. The cap is for clients that
            # ask for very few frames, which still want the other news.
            await asyncio.sleep(min(max(0.0, pause_s), _MAX_PAUSE_S))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, pause_s)):
                await dirty.wait()


async def _first_snapshot(hub: SessionHub, dirty: asyncio.Event) -> bool:
    """Give the first snapshot a moment, so that it leads the stream; a fleet in trouble is shown without one."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_SNAPSHOT_WAIT_S):
            while hub.state is None and hub.error is None:
                dirty.clear()
                await dirty.wait()
    return hub.state is not None
