"""A gateway in this process, over loopback, with an analyzer and a worker that the test controls and a real NATS."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contract.gateway.callers import Caller, ConnectCaller, NativeCaller, WebCaller
from contract.gateway.doubles import AnalyzerDouble, WorkerDouble, serving
from pydantic import SecretStr
from servers import NatsServer, free_port

from moe_debugger.wire.ids import new_id
from moe_gateway.server import Gateway, run_gateway
from moe_gateway.settings import GatewaySettings


@dataclass
class Bench:
    """A running gateway and what stands around it."""

    gateway: Gateway
    settings: GatewaySettings
    analyzer: AnalyzerDouble
    worker: WorkerDouble
    session_id: str
    analyzer_port: int
    worker_port: int
    stop_analyzer: Callable[[], Awaitable[None]]
    stop_worker: Callable[[], Awaitable[None]]


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def overrides() -> dict[str, Any]:
    """Settings that a test module changes."""
    return {}


@pytest.fixture
async def bench(nats_server: NatsServer, tmp_path: Path, overrides: dict[str, Any]) -> AsyncIterator[Bench]:
    analyzer, worker = AnalyzerDouble(), WorkerDouble(token="fleet-secret")
    session_id = new_id()
    analyzer.add_session(session_id)
    analyzer_port, worker_port = free_port(), free_port()
    values: dict[str, Any] = {
        "web_port": 0,
        "grpc_port": 0,
        "analyzer_target": f"127.0.0.1:{analyzer_port}",
        "worker_target": f"127.0.0.1:{worker_port}",
        "nats_url": SecretStr(nats_server.url),
        "fleet_token": SecretStr("fleet-secret"),
        "static_dir": tmp_path / "static",
        "probe_interval_s": 0.1,
        "max_prompt_bytes": 4096,
        "max_request_bytes": 8192,
        "max_concurrent_generations": 3,
        **overrides,
    }
    settings = GatewaySettings(**values)
    async with contextlib.AsyncExitStack() as stack:
        analyzer_server = await stack.enter_async_context(serving(analyzer, analyzer_port))
        worker_server = await stack.enter_async_context(serving(worker, worker_port))
        gateway = await stack.enter_async_context(run_gateway(settings))
        yield Bench(
            gateway,
            settings,
            analyzer,
            worker,
            session_id,
            analyzer_port,
            worker_port,
            stop_analyzer=lambda: analyzer_server.stop(0),
            stop_worker=lambda: worker_server.stop(0),
        )


@pytest.fixture
async def connect(bench: Bench) -> AsyncIterator[Callable[[str], Caller]]:
    """Make a client of a transport by its name."""
    closers: list[Callable[[], Awaitable[None]]] = []

    def make(transport: str) -> Caller:
        web_port = bench.gateway.web_port
        if transport.startswith("web-"):
            return WebCaller(web_port, is_text=transport == "web-text")
        caller = NativeCaller(bench.gateway.grpc_port) if transport == "native" else ConnectCaller(web_port)
        closers.append(caller.close)
        return caller

    yield make
    await asyncio.gather(*(close() for close in closers))
