"""Recordings of sessions: started, stopped, listed and read by request.

The replica that is asked to start a recording writes it, to its own disk, and says in the catalogue every half second
that it does. Any replica takes a request to stop it: what was stored in the stream until then belongs to it. A
recording whose replica falls silent is `interrupted`: nobody else can go on with its files, and what is whole is read.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from nats.aio.client import Client
from sqlalchemy.exc import SQLAlchemyError

from moe_analyzer.queries import NotFoundError
from moe_analyzer.recording_book import RecordingBook
from moe_analyzer.recording_task import RecordingTask, stream_end
from moe_debugger.catalogue import Catalogue, RecordingRow
from moe_debugger.errors import FleetError, InvalidInputError, RecordingError, SessionClosedError
from moe_debugger.recording.manifest import MANIFEST_NAME, GroupManifest, read_any_manifest, read_manifest
from moe_debugger.recording.tables import require_pyarrow
from moe_debugger.v1 import session_pb2 as pb
from moe_debugger.wire.ids import check_id, check_tenant, new_id

__all__ = ["FileChunk", "Recordings", "recording_message"]

_log = structlog.get_logger()

# A replica that says nothing for so long does not write any more; one that is no member either is gone sooner.
_SILENCE_NS = 10_000_000_000
_SILENCE_OF_STRANGERS_NS = 4_000_000_000
_SWEEP_S = 2.0
# How long a stop waits for the disk before it answers "stopping".
_STOP_S = 10.0
_STOP_POLL_S = 0.1
# How long the end of this replica waits for the disk.
_CLOSE_S = 8.0
_CHUNK_BYTES = 256 * 1024
_STATES = {
    "recording": pb.RECORDING_STATE_RECORDING,
    "stopping": pb.RECORDING_STATE_STOPPING,
    "finished": pb.RECORDING_STATE_FINISHED,
    "failed": pb.RECORDING_STATE_FAILED,
    "interrupted": pb.RECORDING_STATE_INTERRUPTED,
}


@dataclass(frozen=True, slots=True)
class FileChunk:
    """A part of one of a recording's files; `total_bytes` is of all files."""

    path: str
    offset: int
    data: bytes
    total_bytes: int


def recording_message(row: RecordingRow) -> pb.Recording:
    """Return a row of the catalogue as a message."""
    return pb.Recording(
        recording_id=row.recording_id,
        session_id=row.session_id,
        session_name=row.session_name,
        name=row.name,
        state=_STATES.get(row.state, pb.RECORDING_STATE_UNSPECIFIED),
        started_at_unix_ns=row.started_at_unix_ns,
        ended_at_unix_ns=row.ended_at_unix_ns,
        num_rows=row.num_rows,
        size_bytes=row.size_bytes,
        max_bytes=row.max_bytes,
        num_sources=row.num_sources,
        num_missing_messages=row.num_missing_messages,
        num_decisions_dropped=row.num_decisions_dropped,
        num_rows_not_written=json.loads(row.not_written),
        path=row.path,
        detail=row.detail,
    )


class Recordings:
    """The recordings that this replica writes, and those of all replicas in the catalogue.

    Args:
        root: folder of this replica's recordings; made when the first one is.
        max_bytes: bound of each; min_free_bytes: room that is left on the disk.
        members: the replicas that live, as this one knows them; none where it does not.
    """

    def __init__(
        self,
        client: Client,
        catalogue: Catalogue,
        *,
        replica_id: str,
        root: Path,
        max_bytes: int,
        min_free_bytes: int,
        members: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._members = members
        self._client = client
        self._js = client.jetstream(timeout=5.0)
        self._catalogue = catalogue
        self._replica_id = replica_id
        self._root = root.absolute()
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._tasks: dict[str, tuple[RecordingTask, asyncio.Task[None]]] = {}
        self._is_closing = False

    async def start(
        self, tenant: str, session_id: str, name: str = "", max_bytes: int = 0
    ) -> tuple[pb.Recording, bool]:
        """Record a session from now on; return its recording, and whether it was running before.

        Raises:
            NotFoundError: the tenant has no such session.
            SessionClosedError: it is closed.
            DependencyMissingError: pyarrow is not installed.
            FleetError: this replica stops, or its disk refuses.
        """
        session = await self._catalogue.get_session(check_tenant(tenant), check_id(session_id, "session_id"))
        if session is None:
            raise NotFoundError(f"session {session_id} does not exist; list the sessions for those that do")
        if session.closed_at_unix_ns:
            raise SessionClosedError(f"session {session.name!r} is closed; only an open one can be recorded")
        if self._is_closing:
            raise FleetError("this analyzer is stopping; try again in a moment")
        require_pyarrow()
        await self._sweep()
        stream, _, position = await stream_end(self._js)
        now = time.time_ns()
        recording_id = new_id()
        row = RecordingRow(
            recording_id=recording_id,
            tenant=tenant,
            session_id=session_id,
            session_name=session.name,
            name=name or session.name,
            state="recording",
            owner=self._replica_id,
            path=str(self._root / recording_id),
            started_at_unix_ns=now,
            heartbeat_at_unix_ns=now,
            max_bytes=min(max_bytes or self._max_bytes, self._max_bytes),
        )
        if not await self._catalogue.recordings.add(row):
            running = await self._catalogue.recordings.running(tenant, session_id)
            if running is None:
                raise FleetError("a recording of this session has just ended; try again")
            return recording_message(running), True
        try:
            book = await asyncio.to_thread(self._new_book, row)
        except (OSError, InvalidInputError) as error:
            values = {"state": "failed", "ended_at_unix_ns": time.time_ns(), "detail": str(error)[:2000]}
            await self._catalogue.recordings.update_running(recording_id, self._replica_id, **values)
            raise FleetError(f"the recording cannot be written to {self._root}: {error}") from error
        task = RecordingTask(self._client, self._js, self._catalogue, row, book, stream=stream, position=position)
        running_task = asyncio.create_task(task.run(), name=f"recording-{recording_id}")
        self._tasks[recording_id] = task, running_task
        running_task.add_done_callback(lambda done: self._ended(recording_id, done))
        _log.info("recording_started", recording_id=recording_id, session_id=session_id, position=position)
        return recording_message(row), False

    def _new_book(self, row: RecordingRow) -> RecordingBook:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        group = GroupManifest(
            recording_id=row.recording_id,
            name=row.name,
            started_at_unix_ns=row.started_at_unix_ns,
            session_name=row.session_name,
            session_id=row.session_id,
        )
        return RecordingBook(
            self._root / row.recording_id, group, max_bytes=row.max_bytes, min_free_bytes=self._min_free_bytes
        )

    def _ended(self, recording_id: str, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(recording_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("recording_failed", recording_id=recording_id, exc_info=error)

    async def stop(self, tenant: str, recording_id: str = "", session_id: str = "") -> pb.Recording:
        """Stop a recording, named by itself or by its session; one that has ended stays as it is.

        Returns:
            "stopping" where its replica needs more than some seconds to write what was stored until now.

        Raises:
            NotFoundError: there is none.
        """
        store = self._catalogue.recordings
        if recording_id:
            row = await store.get(check_tenant(tenant), check_id(recording_id, "recording_id"))
        else:
            row = await store.running(check_tenant(tenant), check_id(session_id, "session_id"))
        if row is None:
            raise NotFoundError(
                f"there is no recording {recording_id}" if recording_id else f"session {session_id} is not recorded now"
            )
        if row.ended_at_unix_ns:
            return recording_message(row)
        _, _, end = await stream_end(self._js)
        # At least 1: an empty stream has nothing that was missed, and 0 means that nobody asked.
        await store.ask_to_stop(row.recording_id, max(1, end))
        if row.recording_id in self._tasks:
            self._tasks[row.recording_id][0].look_now()
        deadline = time.monotonic() + _STOP_S
        while True:
            found = await store.get(tenant, row.recording_id)
            if found is None:
                raise NotFoundError(f"recording {row.recording_id} was deleted")
            if found.ended_at_unix_ns or time.monotonic() > deadline:
                return recording_message(found)
            await asyncio.sleep(_STOP_POLL_S)

    async def list(self, tenant: str, session_id: str = "") -> "list[pb.Recording]":
        """Return the tenant's recordings, newest first; of one session where one is given."""
        if session_id:
            check_id(session_id, "session_id")
        rows = await self._catalogue.recordings.list(check_tenant(tenant), session_id)
        return [recording_message(row) for row in rows]

    async def download(self, tenant: str, recording_id: str) -> AsyncIterator[FileChunk]:
        """Yield the files of a recording that has ended and that this replica can read.

        Raises:
            NotFoundError: the tenant has no such recording, or its files are not here.
            InvalidInputError: it still runs.
        """
        row = await self._catalogue.recordings.get(check_tenant(tenant), check_id(recording_id, "recording_id"))
        if row is None:
            raise NotFoundError(f"there is no recording {recording_id}; list the recordings for those that there are")
        if not row.ended_at_unix_ns:
            raise InvalidInputError(f"recording {recording_id} still runs; stop it, then get it")
        folder = self._root / row.recording_id
        try:
            names = await asyncio.to_thread(_file_names, folder)
            total_bytes = await asyncio.to_thread(lambda: sum((folder / name).stat().st_size for name in names))
        except (OSError, RecordingError) as error:
            raise NotFoundError(
                f"the files of recording {recording_id} cannot be read here ({error}); they were written to {row.path} "
                f"by {row.owner}"
            ) from error
        for name in names:
            offset = 0
            while True:
                data = await asyncio.to_thread(_read, folder / name, offset)
                if data or not offset:
                    yield FileChunk(name, offset, data, total_bytes)
                offset += len(data)
                if len(data) < _CHUNK_BYTES:
                    break

    def connection_lost(self) -> None:
        """Let all recordings begin again after the last message that they took."""
        for task, _ in self._tasks.values():
            task.connection_lost()

    async def run(self) -> None:
        """Look for recordings whose replica is gone, until cancelled."""
        while True:
            try:
                await self._sweep()
            except (SQLAlchemyError, OSError) as error:
                _log.warning("recordings_not_swept", error=str(error))
            await asyncio.sleep(_SWEEP_S)

    async def _sweep(self) -> None:
        members = self._members()
        for row in await self._catalogue.recordings.all_running():
            is_stranger = bool(members) and row.owner not in members
            limit = time.time_ns() - (_SILENCE_OF_STRANGERS_NS if is_stranger else _SILENCE_NS)
            if row.heartbeat_at_unix_ns > limit or row.recording_id in self._tasks:
                continue
            values = await asyncio.to_thread(_whole_on_disk, self._root / row.recording_id)
            detail = "the analyzer that wrote it ended; what is whole can be read"
            if await self._catalogue.recordings.interrupt(
                row.recording_id, limit, ended_at_unix_ns=row.heartbeat_at_unix_ns, detail=detail, **values
            ):
                _log.warning("recording_interrupted", recording_id=row.recording_id, owner=row.owner)

    async def close(self) -> None:
        """End all recordings of this replica, in order."""
        self._is_closing = True
        running = list(self._tasks.values())
        for task, _ in running:
            task.abort("the analyzer that wrote it was stopped")
        if running:
            await asyncio.wait([one for _, one in running], timeout=_CLOSE_S)


def _file_names(folder: Path) -> "list[str]":
    """Return the files of a recording: those that its manifests name, and the manifests."""
    group = read_any_manifest(folder)
    if not isinstance(group, GroupManifest):
        raise RecordingError(f"{folder} is no recording of a session", part=MANIFEST_NAME)
    names = [MANIFEST_NAME]
    for member in group.members:
        names += [
            f"{member}/{name}" for name in (MANIFEST_NAME, *(p.path for p in read_manifest(folder / member).parts))
        ]
    return names


def _read(path: Path, offset: int) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        file.seek(offset)
        return file.read(_CHUNK_BYTES)


def _whole_on_disk(folder: Path) -> dict[str, int]:
    """Return what the files of an interrupted recording hold, where this replica can see them."""
    try:
        group = read_any_manifest(folder)
        members = [read_manifest(folder / name) for name in getattr(group, "members", ())]
    except (RecordingError, OSError):
        return {}
    parts = [entry for member in members for entry in member.parts]
    return {
        "num_rows": sum(entry.num_rows for entry in parts if entry.kind in ("rows", "counts")),
        "size_bytes": sum(entry.size_bytes for entry in parts),
        "num_sources": len(members),
        "num_missing_messages": sum(member.num_missing_messages for member in members),
        "num_decisions_dropped": sum(sum(member.num_decisions_dropped.values()) for member in members),
    }
