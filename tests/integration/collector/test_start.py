"""Starts that do not get far: wrong settings, a signal while Ray starts, a supervisor that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import eventually

from .conftest import WorkerProcess

pytestmark = pytest.mark.ray


def test_wrong_settings_exit_with_2_and_name_them_all() -> None:
    environment = os.environ | {"MOE_COLLECTOR_PORT": "abc", "MOE_COLLECTOR_HOST": "0.0.0.0"}
    result = subprocess.run(
        [sys.executable, "-m", "moe_collector"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "MOE_COLLECTOR_PORT='abc'" in result.stderr
    assert "MOE_COLLECTOR_HOST='0.0.0.0'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_ray_starts_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    worker = WorkerProcess("nats://127.0.0.1:1", tmp_path / "log")
    try:
        eventually(lambda: any(process.name() == "raylet" for process in worker.tree()), 60)
        tree, folders = worker.tree(), worker.temp_dirs()
        assert len(folders) == 1
        started = time.monotonic()
        worker.process.send_signal(number)
        code = worker.process.wait(15)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL), worker.log()[-2000:]
        # Killed outright, its child cleans up after it.
        eventually(lambda: not any(process.is_running() and process.status() != "zombie" for process in tree), 8)
        assert time.monotonic() - started < 8
        eventually(lambda: not any(folder.exists() for folder in folders), 8)
    finally:
        worker.stop()
