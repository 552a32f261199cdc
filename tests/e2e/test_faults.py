"""A part dies while the model generates: a clear message, and the fleet recovers by itself."""

import os
import signal
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from e2e.fleet import Fleet, Generation, eventually, snapshot_counts

from moe_debugger.v1 import gateway_pb2, gateway_pb2_grpc

PROMPT = "def add(a, b):\n"
PARTS = {
    "analyzer": ("moe_analyzer",),
    "nats": ("nats-server",),
    "redis": ("valkey-server",),
    "gateway": ("moe_gateway",),
}


@pytest.fixture(scope="module")
def breakable() -> Iterator[Fleet]:
    """A fleet of its own, since these tests break it."""
    running = Fleet()
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def components(fleet: Fleet) -> dict[str, tuple[int, str]]:
    """Return name -> (state, detail) as the gateway says it."""
    with grpc.insecure_channel(fleet.endpoints["grpc"]) as channel:
        info = gateway_pb2_grpc.DebuggerServiceStub(channel).GetServerInfo(
            gateway_pb2.GetServerInfoRequest(), timeout=10
        )
    return {part.name: (part.state, part.detail) for part in info.components}


def all_ready(fleet: Fleet) -> bool:
    try:
        return all(state == gateway_pb2.COMPONENT_STATE_READY for state, _ in components(fleet).values())
    except grpc.RpcError:
        return False


def session_counts_equal_the_models(fleet: Fleet, session_id: str) -> bool:
    try:
        counted = snapshot_counts(fleet.snapshot(session_id))
    except (grpc.RpcError, ValueError):
        return False
    return bool(np.array_equal(counted, sum(part.counts for part in fleet.recount().values())))


@pytest.mark.parametrize("part", ["analyzer", "nats", "redis"])
def test_the_text_is_the_same_and_the_counts_are_exact_after_a_part_was_killed(breakable: Fleet, part: str) -> None:
    fleet = breakable
    eventually(lambda: all_ready(fleet), 40, "all parts are ready")
    undisturbed = fleet.generate(PROMPT, 200, through="worker")

    killed = threading.Event()
    results = []

    def generate() -> None:
        results.append(fleet.generate(PROMPT, 200, through="worker"))
        killed.wait(30)
        results.append(fleet.generate(PROMPT, 100, through="worker"))

    thread = threading.Thread(target=generate)
    thread.start()
    os.kill(fleet.pid_of(*PARTS[part]), signal.SIGKILL)
    killed.set()
    thread.join(100)
    assert len(results) == 2
    assert results[0].text == undisturbed.text
    assert undisturbed.text.startswith(results[1].text)

    eventually(lambda: all_ready(fleet), 40, f"all parts are ready after {part} was killed")
    eventually(
        lambda: session_counts_equal_the_models(fleet, undisturbed.session_id),
        40,
        f"the counts equal the model's after {part} was killed",
    )


def test_a_killed_gateway_comes_back_on_the_same_ports(breakable: Fleet) -> None:
    eventually(lambda: all_ready(breakable), 40, "all parts are ready")
    os.kill(breakable.pid_of(*PARTS["gateway"]), signal.SIGKILL)
    eventually(lambda: all_ready(breakable), 30, "the gateway is back")


@pytest.mark.parametrize("part", ["ray::ServeReplica", "-P -m moe_collector"], ids=["replica", "worker"])
def test_a_killed_worker_ends_the_call_with_a_clear_message_and_comes_back(breakable: Fleet, part: str) -> None:
    fleet = breakable
    eventually(lambda: all_ready(fleet), 40, "all parts are ready")
    started = fleet.generate(PROMPT, 3)
    errors: list[grpc.RpcError] = []

    def generate() -> None:
        try:
            fleet.generate(PROMPT, 500)
        except grpc.RpcError as error:
            errors.append(error)

    before = sum(each.num_tokens for each in fleet.recount().values())
    thread = threading.Thread(target=generate)
    thread.start()
    eventually(
        lambda: sum(each.num_tokens for each in fleet.recount().values()) > before + 20, 20, "the model is generating"
    )
    os.kill(fleet.pid_of(part), signal.SIGKILL)
    thread.join(60)
    assert errors
    assert errors[0].code() == grpc.StatusCode.UNAVAILABLE
    assert "worker" in (errors[0].details() or "")

    def generates_again() -> Generation | None:
        try:
            return fleet.generate(PROMPT, 3)
        except grpc.RpcError:
            return None

    again = eventually(generates_again, 90, "the worker is back")
    assert again.text == started.text
    assert again.session_id == started.session_id
