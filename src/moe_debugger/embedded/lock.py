"""The data folder: private, of a known format, and used by one fleet at a time.

The lock is an flock on `<data>/lock`, which the kernel lets go when the last holder ends. The guardian inherits it:
after kill -9 of `up` the folder stays locked until everything is cleaned up.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moe_debugger.errors import FleetError

__all__ = ["DATA_FORMAT_VERSION", "DataLock", "LockInfo", "prepare_data_dir", "read_lock"]

DATA_FORMAT_VERSION = 1
_FORMAT_FILE = "format.json"
_LOCK_FILE = "lock"
# The guardian of a killed `up` needs at most 10 s to clean up.
_TAKEOVER_TIMEOUT_S = 15.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds a data folder.

    Attributes:
        pid: process id of `moe-debugger up`.
        fleet_id: the marker in the environment of all of its processes.
        page: URL of its page; empty while it is starting.
        temp_dir: its folder under the system's temporary directory.
    """

    pid: int
    fleet_id: str
    page: str = ""
    temp_dir: str = ""


def prepare_data_dir(path: Path) -> Path:
    """Create or check a data folder, and return its absolute path.

    Raises:
        FleetError: it cannot be used, holds other things, or is of another format.
    """
    folder = path.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = {entry.name for entry in folder.iterdir()}
        if names and _FORMAT_FILE not in names:
            raise FleetError(
                f"{folder} holds files that are not a fleet's ({', '.join(sorted(names)[:3])}…): "
                "name a new or empty folder with --data"
            )
        folder.chmod(0o700)
        if _FORMAT_FILE not in names:
            (folder / _FORMAT_FILE).write_text(json.dumps({"format_version": DATA_FORMAT_VERSION}), encoding="utf-8")
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")
        stored = json.loads((folder / _FORMAT_FILE).read_text(encoding="utf-8")).get("format_version")
    except OSError as error:
        raise FleetError(f"the data folder {folder} cannot be used ({error}): name another one with --data") from error
    except (ValueError, AttributeError) as error:
        raise FleetError(f"{folder / _FORMAT_FILE} is not readable: {error}") from error
    if stored != DATA_FORMAT_VERSION:
        raise FleetError(
            f"{folder} has data format {stored!r}, this program reads {DATA_FORMAT_VERSION}: "
            "use the program that wrote it, or another folder with --data"
        )
    return folder


def _read(path: Path) -> LockInfo | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return LockInfo(**values)
    except (OSError, ValueError, TypeError):
        return None


def read_lock(data_dir: Path) -> LockInfo | None:
    """Return who holds the folder, or None where nobody does (also where a dead fleet left its lock file)."""
    path = data_dir / _LOCK_FILE
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    finally:
        os.close(handle)
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        # A killed process stays listed until its parent asks for its exit code.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return True


class DataLock:
    """The held lock of a data folder."""

    def __init__(self, path: Path, handle: int, info: LockInfo, stale: LockInfo | None) -> None:
        self.path = path
        self.handle = handle
        self.info = info
        #: What the lock file said of a fleet that ended without cleaning up.
        self.stale = stale

    @classmethod
    def acquire(cls, data_dir: Path, fleet_id: str, on_wait: Callable[[str], None] | None = None) -> "DataLock":
        """Take the folder's lock; waits for the clean-up of a fleet that was killed.

        Raises:
            FleetError: a fleet is running there; names its pid and page.
        """
        path = data_dir / _LOCK_FILE
        deadline = time.monotonic() + _TAKEOVER_TIMEOUT_S
        has_said = False
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                holder = _read(path)
                # A reader of the lock, or one that is just starting, holds it for an instant.
                is_running = holder is not None and _is_alive(holder.pid)
                if is_running or time.monotonic() > deadline:
                    raise FleetError(_running_message(data_dir, holder)) from None
                if not has_said and on_wait is not None and holder is not None:
                    on_wait("cleaning up after a fleet that was killed")
                    has_said = True
                time.sleep(_POLL_S)
                continue
            with contextlib.suppress(FileNotFoundError):
                # The holder before us unlinks the file: what we locked must be what the path names.
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    lock = cls(path, handle, LockInfo(os.getpid(), fleet_id), _read(path))
                    lock._write()
                    return lock
            os.close(handle)

    def update(self, *, page: str | None = None, temp_dir: str | None = None) -> None:
        """Write more of who we are."""
        before = self.info
        self.info = replace(
            before,
            page=before.page if page is None else page,
            temp_dir=before.temp_dir if temp_dir is None else temp_dir,
        )
        self._write()

    def release(self) -> None:
        """Remove the lock file, then let the lock go."""
        self.path.unlink(missing_ok=True)
        os.close(self.handle)

    def _write(self) -> None:
        text = (json.dumps(asdict(self.info)) + "\n").encode()
        os.pwrite(self.handle, text, 0)
        os.ftruncate(self.handle, len(text))


def _running_message(data_dir: Path, holder: LockInfo | None) -> str:
    if holder is None:
        return f"another fleet is starting on {data_dir}: use it, or name another folder with --data"
    where = f"its page is {holder.page}" if holder.page else "it is still starting"
    return (
        f"a fleet is already running on {data_dir} (pid {holder.pid}; {where}). "
        "Use it, stop it with Ctrl-C, or start another one beside it with --data OTHER_FOLDER"
    )
