"""Recordings of a fleet's sessions, by its gateway: start, stop, list and fetch them."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from moe_debugger.errors import FleetError, InvalidInputError, RecordingError
from moe_debugger.recording.writer import make_folder
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.v1 import gateway_pb2_grpc, session_pb2
from moe_debugger.wire.ids import ID_PATTERN

__all__ = ["FleetRecordings"]

_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 64 << 20
# What a recording's folder can hold: a fleet must not be able to name any other file here.
_PATH = re.compile(
    r"\A(sources/[0-9a-z]{26}/)?(manifest\.json|(rows|counts)/part-[0-9]{8}\.parquet|(layers|series)-[0-9]{8}\.parquet)\Z"
)


class FleetRecordings:
    """Recordings of a running fleet; a context manager.

    Args:
        target: `HOST:PORT` of the gateway's gRPC (the `grpc` value of ``moe-debugger up --json``).

    Every method raises `FleetError` where the fleet does not answer or cannot do it, and `InvalidInputError` where
    there is no such session or recording.
    """

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://").rstrip("/")
        self._channel = grpc.insecure_channel(
            self.target,
            options=(("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)),
        )
        self._stub = gateway_pb2_grpc.DebuggerServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def find_session(self, name: str | None = None) -> session_pb2.Session:
        """Return the open session of that name or id; None = the one that is open.

        Raises:
            InvalidInputError: there is none, or there are several and none was named.
        """
        sessions = self._call(self._stub.ListSessions, pb.ListSessionsRequest()).sessions
        is_open = (session_pb2.SESSION_STATE_OPEN, session_pb2.SESSION_STATE_STALE)
        found = [one for one in sessions if one.state in is_open and name in (None, one.name, one.session_id)]
        if len(found) == 1:
            session: session_pb2.Session = found[0]
            return session
        names = ", ".join(sorted(repr(one.name) for one in sessions if one.state in is_open)) or "none"
        if not found:
            what = "no session is open" if name is None else f"session {name[:80]!r} is not open"
            raise InvalidInputError(f"{what} in the fleet at {self.target}; open are: {names}")
        raise InvalidInputError(f"{len(found)} sessions are open, name one of them: {names}")

    def start(self, session_id: str, *, name: str = "", max_bytes: int = 0) -> tuple[session_pb2.Recording, bool]:
        """Record a session from now on; return its recording, and whether it was running before.

        Args:
            name: for people; default: the session's.
            max_bytes: it takes no more rows once its files are so large; 0 = the fleet's own bound.
        """
        request = pb.StartRecordingRequest(session_id=session_id, name=name, max_bytes=max_bytes)
        answer = self._call(self._stub.StartRecording, request)
        return answer.recording, answer.was_running

    def stop(self, *, recording_id: str = "", session_id: str = "") -> session_pb2.Recording:
        """Stop a recording, named by itself or by its session; one that has ended stays as it is."""
        request = pb.StopRecordingRequest(recording_id=recording_id, session_id=session_id)
        answer: pb.StopRecordingResponse = self._call(self._stub.StopRecording, request, _STOP_TIMEOUT_S)
        return answer.recording

    def list(self, session_id: str = "") -> "list[session_pb2.Recording]":
        """Return the recordings of a session, or of all, newest first."""
        request = pb.ListRecordingsRequest(session_id=session_id)
        return list(self._call(self._stub.ListRecordings, request).recordings)

    def get(self, recording_id: str) -> session_pb2.Recording:
        """Return one recording.

        Raises:
            InvalidInputError: there is none.
        """
        for one in self.list():
            if one.recording_id == recording_id:
                return one
        raise InvalidInputError(f"there is no recording {recording_id[:64]!r} in the fleet at {self.target}")

    def find_running(self, name: str | None) -> session_pb2.Recording:
        """Return the recording that runs, by its own id, or by the name or id of its session; None = the only one.

        Raises:
            InvalidInputError: there is none, or there are several and none was named.
        """
        running = [one for one in self.list() if not one.ended_at_unix_ns]
        found = [one for one in running if name in (None, one.recording_id, one.session_id, one.session_name)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(sorted(repr(one.session_name) for one in running)) or "none"
        what = "several recordings run" if found else "no such recording runs"
        raise InvalidInputError(f"{what} in the fleet at {self.target}; recorded are the sessions: {names}")

    def download(
        self,
        recording_id: str,
        folder: str | os.PathLike[str],
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Path:
        """Fetch the files of a recording that has ended into a new folder, and return its path.

        Args:
            folder: not there yet, or empty.
            on_progress: called with the bytes that came, and all.

        Raises:
            RecordingError: the fleet names a file that no recording has, or sends less than it says.
        """
        if not ID_PATTERN.match(recording_id):
            raise InvalidInputError(f"recording {recording_id[:64]!r} is not an id; list the recordings for theirs")
        chunks = self._stub.DownloadRecording(pb.DownloadRecordingRequest(recording_id=recording_id))
        target: Path | None = None
        done = total = 0
        try:
            for chunk in chunks:
                # Not before the fleet has it: a refusal must leave nothing behind.
                target = target or make_folder(folder)
                done, total = done + len(chunk.data), chunk.total_bytes
                _append(target, chunk)
                on_progress(done, total)
        except grpc.RpcError as error:
            raise _error(error, self.target) from error
        finally:
            chunks.cancel()
        if target is None or done != total:
            raise RecordingError(f"recording {recording_id}: {done} bytes came, {total} were announced", part="")
        return target

    def _call(self, method: Any, request: Any, timeout_s: float = _TIMEOUT_S) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _error(error, self.target) from error


def _append(folder: Path, chunk: pb.DownloadRecordingResponse) -> None:
    if not _PATH.match(chunk.path):
        raise RecordingError(f"the fleet sent a file {chunk.path[:80]!r}, which no recording has", part=chunk.path[:80])
    path = folder / chunk.path
    for parent in reversed([one for one in path.parents if folder in one.parents]):
        parent.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | (0 if chunk.offset else os.O_EXCL)
    with os.fdopen(os.open(path, flags, 0o600), "ab") as file:
        if file.tell() != chunk.offset:
            raise RecordingError(f"{chunk.path}: bytes from {chunk.offset} came at {file.tell()}", part=chunk.path)
        file.write(chunk.data)


def _error(error: grpc.RpcError, target: str) -> Exception:
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else "") or code.name
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
        return InvalidInputError(details)
    return FleetError(f"the fleet at {target} does not do it: {details}")
