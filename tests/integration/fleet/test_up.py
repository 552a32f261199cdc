"""`moe-debugger up` without a worker: start, the lock, ports, restarts, and that nothing is left behind."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet_process import FleetProcess, wait_until

from moe_debugger.embedded import health

# A fleet starts in 3 s on a quiet machine, in 30 s on one that does much else.
pytestmark = pytest.mark.timeout(300)

StartFleet = Callable[..., FleetProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFleet]:
    """Return a function that starts a fleet in its own folder; all are ended."""
    fleets: list[FleetProcess] = []

    def start_fleet(*options: str, name: str = "a", ignore_sigint: bool = False) -> FleetProcess:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        fleets.append(FleetProcess(folder, "--no-worker", *options, ignore_sigint=ignore_sigint))
        return fleets[-1]

    yield start_fleet
    for fleet in fleets:
        fleet.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_one_line_of_json_names_parts_that_answer(start: StartFleet) -> None:
    fleet = start()
    endpoints = fleet.wait_ready()
    assert set(endpoints) == {"page", "grpc", "nats", "redis", "worker"}
    assert endpoints["worker"] is None
    with urllib.request.urlopen(endpoints["page"] + "/healthz", timeout=5) as answer:
        assert answer.status == 200
    assert health.grpc_problem(endpoints["grpc"]) == ""
    assert health.nats_problem(endpoints["nats"]) == ""
    assert health.redis_problem(endpoints["redis"]) == ""
    assert json.loads((fleet.data / "endpoints.json").read_text()) == endpoints
    assert stat.S_IMODE(fleet.data.stat().st_mode) == 0o700
    for name in ("endpoints.json", "secrets.json", "nats.conf", "valkey.conf", "lock"):
        assert stat.S_IMODE((fleet.data / name).stat().st_mode) == 0o600, name


def test_the_servers_refuse_a_client_without_the_password(start: StartFleet) -> None:
    endpoints = start().wait_ready()
    for url, problem in ((endpoints["nats"], health.nats_problem), (endpoints["redis"], health.redis_problem)):
        scheme, _, rest = url.partition("://")
        assert "cannot be used" in problem(f"{scheme}://{rest.rpartition('@')[2]}")


def test_a_second_up_names_the_running_one_and_leaves_it_alone(start: StartFleet) -> None:
    first = start()
    page = first.wait_ready()["page"]
    second = start()
    assert second.wait_exit() == 1
    assert f"pid {first.process.pid}" in second.stderr
    assert page in second.stderr
    assert health.page_problem(page) == ""


def test_two_fleets_run_side_by_side_and_doctor_sees_each(start: StartFleet) -> None:
    first, second = start(name="a"), start(name="b")
    endpoints = [first.wait_ready(), second.wait_ready()]
    assert endpoints[0]["page"] != endpoints[1]["page"]
    assert not first.listening_ports() & second.listening_ports()
    command = [sys.executable, "-m", "moe_debugger.cli", "doctor", "--json", "--data", str(second.data)]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    fleet = [check["detail"] for check in answer["checks"] if check["name"] == "fleet"]
    assert any(endpoints[1]["page"] in detail for detail in fleet)


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_that_is_taken_is_named_and_nothing_is_started(start: StartFleet, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        fleet = start(option, str(port))
        assert fleet.wait_exit() == 1
    assert f"port {port} ({option})" in fleet.stderr
    assert fleet.children() == {}
    assert not (fleet.data / "lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_orderly_stop_leaves_nothing(start: StartFleet, number: signal.Signals) -> None:
    fleet = start(ignore_sigint=number is signal.SIGINT)
    fleet.wait_ready()
    ports, temp_dir = fleet.listening_ports(), fleet.temp_dir()
    assert len(ports) >= 5
    fleet.process.send_signal(number)
    assert fleet.wait_exit() == 0, fleet.stderr
    fleet.assert_nothing_is_left(ports, temp_dir)


def test_a_stop_while_starting_leaves_nothing(start: StartFleet) -> None:
    fleet = start()
    wait_until(lambda: "nats" in fleet.stderr, 30, "the first part")
    ports, temp_dir = fleet.listening_ports(), fleet.temp_dir()
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.wait_exit() == 0, fleet.stderr
    fleet.assert_nothing_is_left(ports, temp_dir)


def test_kill_9_leaves_nothing_and_the_next_up_resumes(start: StartFleet) -> None:
    fleet = start()
    before = fleet.wait_ready()
    ports, temp_dir = fleet.listening_ports(), fleet.temp_dir()
    fleet.process.kill()
    fleet.process.wait()
    # At once: it waits for the clean-up, then has the same ports and passwords, so that sources reconnect.
    after = start().wait_ready()
    assert after == before
    assert not temp_dir.exists()
    assert ports & {int(after["page"].rpartition(":")[2])}


def test_kill_9_of_up_ends_all_processes(start: StartFleet) -> None:
    fleet = start()
    fleet.wait_ready()
    ports, temp_dir = fleet.listening_ports(), fleet.temp_dir()
    fleet.process.kill()
    fleet.process.wait()
    fleet.assert_nothing_is_left(ports, temp_dir)


def test_kill_9_of_up_and_its_guardian_is_cleaned_up_by_the_next(start: StartFleet) -> None:
    fleet = start()
    fleet.wait_ready()
    temp_dir = fleet.temp_dir()
    os.kill(fleet.pid_of("_guardian.py"), signal.SIGKILL)
    fleet.process.kill()
    fleet.process.wait()
    following = start()
    following.wait_ready()
    assert fleet.children() == {}
    assert not temp_dir.exists()


@pytest.mark.parametrize(
    ("part", "command", "problem"),
    [
        ("nats", "nats-server", lambda e: health.nats_problem(e["nats"])),
        ("valkey", "valkey-server", lambda e: health.redis_problem(e["redis"])),
        ("analyzer", "moe_analyzer", None),
        ("gateway", "moe_gateway", lambda e: health.page_problem(e["page"]) or health.grpc_problem(e["grpc"])),
    ],
)
def test_a_part_that_is_killed_comes_back_on_the_same_port(
    start: StartFleet, part: str, command: str, problem: Callable[[dict[str, str]], str] | None
) -> None:
    fleet = start()
    endpoints = fleet.wait_ready()
    ports = fleet.listening_ports()
    os.kill(fleet.pid_of(command), signal.SIGKILL)
    wait_until(lambda: f"{part:<9} ready again" in fleet.stderr, 60, f"{part} again: {fleet.stderr}")
    if problem is not None:
        assert problem(endpoints) == ""
    wait_until(lambda: fleet.listening_ports() == ports, 20, "the same ports")
    assert fleet.process.poll() is None


def test_the_guardian_is_replaced_where_it_is_killed(start: StartFleet) -> None:
    fleet = start()
    fleet.wait_ready()
    guardian = fleet.pid_of("_guardian.py")
    os.kill(guardian, signal.SIGKILL)

    def is_replaced() -> bool:
        return any("_guardian.py" in command for pid, command in fleet.children().items() if pid != guardian)

    wait_until(is_replaced, 10, "a new guardian")


def test_servers_that_are_given_are_used_and_not_started(start: StartFleet) -> None:
    first = start(name="a").wait_ready()
    second = start("--nats-url", first["nats"], "--redis-url", first["redis"], name="b")
    endpoints = second.wait_ready()
    assert (endpoints["nats"], endpoints["redis"]) == (first["nats"], first["redis"])
    assert not [command for command in second.children().values() if "-server" in command]


def test_a_server_that_is_given_but_does_not_answer_is_an_error(start: StartFleet) -> None:
    fleet = start("--nats-url", f"nats://moe:hunter2@127.0.0.1:{_free_port()}")
    assert fleet.wait_exit() == 1
    assert "cannot be used" in fleet.stderr
    assert "hunter2" not in fleet.stderr
    assert fleet.children() == {}
