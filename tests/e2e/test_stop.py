"""However `up` ends, nothing of it is left."""

import signal
import socket
import tempfile
from pathlib import Path

import pytest
from e2e.fleet import Fleet, eventually


def ray_folders() -> set[Path]:
    """Short folders of the system's temporary directory that hold a Ray cluster."""
    return {path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith(("moe", "ray"))}


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_no_process_port_lock_or_temporary_folder_is_left(sent: signal.Signals) -> None:
    before = ray_folders()
    fleet = Fleet(recount=False)
    try:
        fleet.wait_until_ready()
        before.add(Path(fleet.folder.name))
        done = fleet.generate("1 + 1 =", 8)
        assert done.is_finished
        ports = [int(fleet.endpoints[name].rsplit(":", 1)[1].strip("/")) for name in ("page", "grpc", "worker")]
        assert all(is_listening(port) for port in ports)
        code = fleet.stop(sent)
        if sent is not signal.SIGKILL:
            assert code == 0
        eventually(lambda: not fleet.processes(), 10, f"no process is left: {fleet.processes()}")
        assert not any(is_listening(port) for port in ports)
        eventually(lambda: ray_folders() <= before, 5, f"no temporary folder is left: {ray_folders() - before}")
    finally:
        fleet.close()
