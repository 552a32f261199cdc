"""The private folder of a worker's Ray cluster: short, since Unix sockets lie below it, and gone with the worker."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from moe_debugger.errors import ConfigError

__all__ = ["make_temp_dir", "remove_stale_temp_dirs"]

_TEMP_DIR = re.compile(r"moe-ray-(\d+)-[a-z0-9_]+\Z")


def make_temp_dir(wanted: str = "") -> Path:
    """Make a folder that only this user can enter; `wanted` names it, else a new one below the system's is made.

    Raises:
        ConfigError: the folder that is wanted holds files of others.
    """
    remove_stale_temp_dirs()
    if wanted:
        folder = Path(wanted)
        others = {entry.name for entry in folder.iterdir()} - {"r", "token"} if folder.is_dir() else set()
        if others:
            raise ConfigError(
                "environment of the worker",
                [f"{wanted} holds {', '.join(sorted(others)[:3])}; it is removed at stop, so name a folder of its own"],
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        return folder
    return Path(tempfile.mkdtemp(prefix=f"moe-ray-{os.getpid()}-", dir=_short_temp_root()))


def remove_stale_temp_dirs() -> None:
    """Remove the folders that workers of this user left when they were killed."""
    for folder in Path(_short_temp_root()).glob("moe-ray-*"):
        match = _TEMP_DIR.match(folder.name)
        with contextlib.suppress(OSError):
            if match and folder.lstat().st_uid == os.getuid() and not _is_running(int(match[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _short_temp_root() -> str:
    # A Unix socket's path ends at 107 bytes, and Ray needs 60 of them below this folder.
    root = tempfile.gettempdir()
    return root if len(os.fsencode(root)) <= 20 else "/tmp"  # noqa: S108 - the folder itself is made by mkdtemp


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
