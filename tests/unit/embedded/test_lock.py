"""The data folder: one fleet at a time, of a known format, private."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_debugger.embedded.endpoints import Endpoints, read_endpoints, write_endpoints
from moe_debugger.embedded.lock import DataLock, prepare_data_dir, read_lock
from moe_debugger.errors import FleetError


def _ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_is_private_and_hidden_from_git(tmp_path: Path) -> None:
    folder = prepare_data_dir(tmp_path / "a" / "data")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / ".gitignore").read_text() == "*\n"
    assert prepare_data_dir(folder) == folder


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FleetError, match=r"thesis\.tex"):
        prepare_data_dir(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_another_format_is_refused_and_both_are_named(tmp_path: Path) -> None:
    folder = prepare_data_dir(tmp_path / "data")
    (folder / "format.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(FleetError, match=r"99.*reads 1"):
        prepare_data_dir(folder)


def test_a_second_holder_is_told_of_the_first(tmp_path: Path) -> None:
    lock = DataLock.acquire(tmp_path, "fleet-a")
    lock.update(page="http://127.0.0.1:1234")
    with pytest.raises(FleetError, match=rf"pid {os.getpid()}.*http://127\.0\.0\.1:1234"):
        DataLock.acquire(tmp_path, "fleet-b")
    held = read_lock(tmp_path)
    assert held is not None
    assert held.fleet_id == "fleet-a"
    lock.release()
    assert read_lock(tmp_path) is None
    assert not lock.path.exists()


def test_a_stale_lock_is_taken_over_and_says_whose_it_was(tmp_path: Path) -> None:
    text = json.dumps({"pid": _ended_pid(), "fleet_id": "old", "page": "", "temp_dir": "/nowhere"})
    (tmp_path / "lock").write_text(text)
    assert read_lock(tmp_path) is None
    lock = DataLock.acquire(tmp_path, "new")
    assert lock.stale is not None
    assert lock.stale.fleet_id == "old"
    lock.release()


def test_a_lock_that_the_guardian_still_holds_is_waited_for(tmp_path: Path) -> None:
    guardian = DataLock.acquire(tmp_path, "old")
    guardian.path.write_text(json.dumps({"pid": _ended_pid(), "fleet_id": "old"}))
    notes: list[str] = []

    def on_wait(text: str) -> None:
        notes.append(text)
        threading.Timer(0.2, guardian.release).start()

    lock = DataLock.acquire(tmp_path, "new", on_wait)
    assert len(notes) == 1
    assert lock.stale is None
    lock.release()


def test_endpoints_are_private_and_need_a_running_fleet(tmp_path: Path) -> None:
    endpoints = Endpoints("http://127.0.0.1:1", "127.0.0.1:2", "nats://moe:secret@127.0.0.1:3", "redis://:s@h:4/0")
    assert "secret" not in repr(endpoints)
    with pytest.raises(FleetError, match="moe-debugger up"):
        read_endpoints(tmp_path)
    lock = DataLock.acquire(tmp_path, "a")
    with pytest.raises(FleetError, match="still starting"):
        read_endpoints(tmp_path)
    write_endpoints(tmp_path, endpoints)
    assert stat.S_IMODE((tmp_path / "endpoints.json").stat().st_mode) == 0o600
    assert read_endpoints(tmp_path) == endpoints
    assert set(json.loads(endpoints.to_json())) == {"page", "grpc", "nats", "redis", "worker"}
    lock.release()
    with pytest.raises(FleetError, match="no fleet is running"):
        read_endpoints(tmp_path)
