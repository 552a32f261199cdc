"""However `up` ends, nothing of it is left."""

import signal
import socket

import pytest
from e2e.fleet import Fleet, eventually


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def port_of(endpoint: str) -> int:
    return int(endpoint.rsplit(":", 1)[1].split("/")[0])


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_no_process_port_lock_or_temporary_folder_is_left(sent: signal.Signals) -> None:
    fleet = Fleet(recount=False)
    try:
        fleet.wait_until_ready()
        done = fleet.generate("1 + 1 =", 8)
        assert done.is_finished
        ports = [port_of(endpoint) for endpoint in fleet.endpoints.values()]
        assert all(is_listening(port) for port in ports)
        assert list(fleet.temporary.iterdir()), "Ray's folder should lie here while it runs"
        lock = fleet.data / "lock"
        assert lock.exists()
        code = fleet.stop(sent)
        if sent is not signal.SIGKILL:
            assert code == 0
        eventually(lambda: not fleet.processes(), 10, f"no process is left: {fleet.processes()}")
        assert [port for port in ports if is_listening(port)] == []
        eventually(lambda: not list(fleet.temporary.iterdir()), 5, "no temporary folder is left")
        assert not lock.exists()
    finally:
        fleet.close()
