"""The whole fleet, Ray included: it generates, its worker comes back, and neither a stop nor a kill leaves anything."""

import os
import signal
from pathlib import Path

import grpc
import pytest
from fleet_process import FleetProcess, wait_until

from moe_debugger.embedded import health
from moe_debugger.v1 import collector_pb2, collector_pb2_grpc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

_START_TIMEOUT_S = 200.0


def _generate(target: str) -> bytes:
    with grpc.insecure_channel(target) as channel:
        stub = collector_pb2_grpc.WorkerServiceStub(channel)
        request = collector_pb2.GenerateRequest(prompt="def add(a, b):", max_new_tokens=8)
        events = list(stub.Generate(request, timeout=60))
    assert events[-1].finished.num_generated_tokens == 8
    return b"".join(event.token.piece.text for event in events if event.HasField("token"))


def test_the_worker_comes_back_on_its_port_and_a_stop_leaves_nothing(tmp_path: Path) -> None:
    fleet = FleetProcess(tmp_path)
    try:
        endpoints = fleet.wait_ready(_START_TIMEOUT_S)
        # The page answered before the worker: it is said first.
        assert fleet.stderr.index(endpoints["page"]) < fleet.stderr.index("worker    ready")
        text = _generate(endpoints["worker"])
        (worker, *_) = [pid for pid, command in fleet.children().items() if "moe_collector" in command]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: "worker    ready again" in fleet.stderr, _START_TIMEOUT_S, f"worker again: {fleet.stderr}")
        assert health.worker_problem(endpoints["worker"]) == ""
        assert _generate(endpoints["worker"]) == text
        ports, temp_dir = fleet.listening_ports(), fleet.temp_dir()
        assert len(fleet.children()) > 10
        fleet.process.send_signal(signal.SIGINT)
        assert fleet.wait_exit(40) == 0, fleet.stderr
        fleet.assert_nothing_is_left(ports, temp_dir)
    finally:
        fleet.close()


def test_kill_9_of_up_ends_ray_too(tmp_path: Path) -> None:
    fleet = FleetProcess(tmp_path)
    try:
        fleet.wait_ready(_START_TIMEOUT_S)
        ports, temp_dir = fleet.listening_ports(), fleet.temp_dir()
        assert any("raylet" in command for command in fleet.children().values())
        fleet.process.kill()
        fleet.process.wait()
        fleet.assert_nothing_is_left(ports, temp_dir)
    finally:
        fleet.close()
