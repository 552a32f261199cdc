"""The gateway as a process: exit codes, messages, listening addresses, and a quick end under open streams."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psutil
import pytest
from contract.gateway.callers import CallError, NativeCaller, WebCaller, http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import aeventually, free_port

from moe_debugger.v1 import gateway_pb2 as pb


class Process:
    """`python -m moe_gateway` with its log lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            # gRPC's own C++ lines are no JSON; everything of ours is.
            with contextlib.suppress(json.JSONDecodeError):
                self.lines.append(json.loads(line))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    async def end(self) -> int:
        code = await self.process.wait()
        await self._reader
        return code


@contextlib.asynccontextmanager
async def gateway_process(**settings: Any) -> AsyncIterator[Process]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_GATEWAY_")}
    env |= {f"MOE_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_gateway", env=env, stderr=asyncio.subprocess.PIPE
    )
    running = Process(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await running.end()


# A cold start imports for a second of CPU, which a busy machine stretches.
_START_S = 60.0
_STOP_S = 4.0
_NOWHERE = {"analyzer_target": "127.0.0.1:1", "worker_target": "127.0.0.1:1", "nats_url": "nats://moe:pw@127.0.0.1:1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_ends_quickly_and_in_order_although_streams_are_open(number: signal.Signals) -> None:
    async with gateway_process(web_port=0, grpc_port=0, **_NOWHERE) as running:
        await aeventually(lambda: running.events("gateway_ready"), _START_S)
        ready = running.events("gateway_ready")[0]

        # Everything it listens on is on loopback.
        listening = [c for c in psutil.Process(running.process.pid).net_connections() if c.status == "LISTEN"]
        assert {c.laddr.port for c in listening} == {ready["web_port"], ready["grpc_port"]}
        # grpc binds the IPv4 address by an IPv6 socket.
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}

        native = NativeCaller(ready["grpc_port"])
        streams = [caller.stream("Watch", pb.WatchRequest()) for caller in (native, WebCaller(ready["web_port"]))]
        for stream in streams:
            await anext(stream)

        async def read_to_end(stream: Any) -> CallError:
            with pytest.raises(CallError) as caught:
                async for _ in stream:
                    pass
            return caught.value

        readers = [asyncio.create_task(read_to_end(stream)) for stream in streams]
        # A connection that a browser keeps open must not hold the end up.
        async with http(ready["web_port"], "GET", "/healthz") as idle:
            assert idle.status == 200
            began = time.monotonic()
            running.process.send_signal(number)
            assert await running.end() == 0
            # 0.5 s on a quiet machine.
            assert time.monotonic() - began < _STOP_S
        for reader in readers:
            error = await reader
            assert (error.code, error.reasons) == (14, ["FLEET_PART_DOWN"])
            assert "stopping" in error.message
        await native.close()


async def test_health_service_answers_on_the_native_port() -> None:
    async with gateway_process(web_port=0, grpc_port=0, **_NOWHERE) as running:
        await aeventually(lambda: running.events("gateway_ready"), _START_S)
        target = f"127.0.0.1:{running.events('gateway_ready')[0]['grpc_port']}"
        async with grpc.aio.insecure_channel(target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", "moe_debugger.v1.DebuggerService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("taken", ["web_port", "grpc_port"])
async def test_taken_port_is_named_with_exit_code_3(taken: str) -> None:
    async with gateway_process(web_port=0, grpc_port=0, **_NOWHERE) as first:
        await aeventually(lambda: first.events("gateway_ready"), _START_S)
        port = first.events("gateway_ready")[0][taken]
        ports = {"web_port": free_port(), "grpc_port": free_port(), taken: port}
        async with gateway_process(**ports, **_NOWHERE) as second:
            assert await second.end() == 3
            assert f"port {port} on 127.0.0.1" in second.events("port_taken")[0]["error"]


async def test_wrong_settings_are_all_named_with_exit_code_2() -> None:
    env = {**os.environ, "MOE_GATEWAY_HOST": "0.0.0.0", "MOE_GATEWAY_WEB_PORT": "x", "MOE_GATEWAY_FLEET_TOKN": "canary"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moe_gateway", env=env, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    text = stderr.decode()
    assert "3 problem(s)" in text
    assert "MOE_GATEWAY_HOST='0.0.0.0': the gateway has no authentication yet" in text
    assert "MOE_GATEWAY_WEB_PORT='x'" in text
    assert "MOE_GATEWAY_FLEET_TOKN" in text
    assert "canary" not in text
    assert "Traceback" not in text
