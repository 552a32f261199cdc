"""Whether the files of a recording are those that were written: there, whole, and no others."""

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from moe_debugger.errors import RecordingError
from moe_debugger.recording.manifest import Manifest, PartEntry

__all__ = ["check_content", "check_size", "open_part", "unlisted_files"]

_CHUNK_BYTES = 1024 * 1024
_MAX_SHOWN = 8


def _fault(entry: PartEntry, what: str) -> RecordingError:
    return RecordingError(
        f"part {entry.path} {what}; open_recording(..., damaged='skip'), on the command line --damaged, reads what is "
        "whole",
        part=entry.path,
    )


def open_part(folder: Path, entry: PartEntry) -> BinaryIO:
    """Open a part, which is a plain file of the stated size in the folder itself.

    Raises:
        RecordingError: it is missing, truncated, or a link to elsewhere.
    """
    path = folder / entry.path
    try:
        if path.parent != folder and path.parent.is_symlink():
            raise _fault(entry, "is in a folder that is a link to elsewhere")
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except FileNotFoundError as error:
        raise _fault(entry, "is missing") from error
    except OSError as error:
        reason = "is a link to elsewhere" if path.is_symlink() else f"cannot be read: {error.strerror or error}"
        raise _fault(entry, reason) from error
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise _fault(entry, "is no plain file")
    if status.st_size != entry.size_bytes:
        file.close()
        what = "is truncated: it" if status.st_size < entry.size_bytes else "is not the file that was written: it"
        raise _fault(entry, f"{what} has {status.st_size} bytes, the manifest says {entry.size_bytes}")
    return file


def check_size(folder: Path, entry: PartEntry) -> None:
    """Check that a part is there with its size, without reading it.

    Raises:
        RecordingError: it is not.
    """
    open_part(folder, entry).close()


def check_content(file: BinaryIO, entry: PartEntry) -> None:
    """Check the whole content of an open part, and go back to its beginning.

    Raises:
        RecordingError: it is not what was written.
    """
    digest = hashlib.sha256()
    try:
        file.seek(0)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        file.seek(0)
    except OSError as error:
        raise _fault(entry, f"cannot be read: {error.strerror or error}") from error
    if digest.hexdigest() != entry.sha256:
        raise _fault(
            entry,
            f"is damaged, or from another recording: its sha256 is {digest.hexdigest()[:16]}…, the manifest says "
            f"{entry.sha256[:16]}…",
        )


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return Parquet files of the folder that the manifest does not name, at most a few of them."""
    listed = {entry.path for entry in manifest.parts}
    found: list[str] = []
    for parent in ("", "rows/", "counts/"):
        try:
            names = sorted(os.listdir(folder / parent))
        except OSError:
            continue
        for name in names:
            if name.endswith(".parquet") and not name.startswith(".") and parent + name not in listed:
                found.append(parent + name)
                if len(found) == _MAX_SHOWN:
                    return found
    return found
