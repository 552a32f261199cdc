"""One worker with its Ray cluster for all tests here: the real program, the demo model, a real NATS.

Instead of an analyzer, a small responder opens the session and a stream keeps what the worker sends.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import nats
import psutil
import pytest
from nats.aio.msg import Msg
from servers import NatsServer, eventually, free_port

from moe_debugger.v1 import collector_pb2 as pb
from moe_debugger.v1 import collector_pb2_grpc as pb_grpc
from moe_debugger.v1 import control_pb2, routing_pb2
from moe_debugger.wire.codec import format_version
from moe_debugger.wire.ids import new_id
from moe_debugger.wire.subjects import EVENT_STREAM, EVENT_SUBJECTS, open_session_subject, partition_transform

T = TypeVar("T")

TOKEN = "a-token-of-this-test-0123456789"
START_DEADLINE_S = 150.0


class Broker:
    """Answers open_session with one session id, and reads back the stream, in a thread with its own loop."""

    def __init__(self, url: str) -> None:
        self.session_id = new_id()
        self.url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._start())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        self._nats = await nats.connect(self.url)
        source, destination = partition_transform(16)
        from nats.js.api import StreamConfig, SubjectTransform

        config = StreamConfig(
            name=EVENT_STREAM,
            subjects=[EVENT_SUBJECTS],
            subject_transform=SubjectTransform(src=source, dest=destination),
        )
        await self._nats.jetstream().add_stream(config)
        await self._nats.subscribe(open_session_subject("default"), cb=self._open)

    async def _open(self, message: Msg) -> None:
        request = control_pb2.OpenSessionRequest.FromString(message.data)
        assert request.name == "demo"
        response = control_pb2.OpenSessionResponse(
            format_version=format_version(), session_id=self.session_id, joined=False
        )
        await message.respond(response.SerializeToString())

    def messages(self) -> list[routing_pb2.SourceMessage]:
        """Return all that the stream holds, in order."""
        return self._call(self._read())

    async def _read(self) -> list[routing_pb2.SourceMessage]:
        stream = self._nats.jetstream()
        info = await stream.stream_info(EVENT_STREAM)
        found = []
        for sequence in range(info.state.first_seq, info.state.last_seq + 1):
            message = await stream.get_msg(EVENT_STREAM, sequence)
            found.append(routing_pb2.SourceMessage.FromString(message.data or b""))
        return found

    def close(self) -> None:
        self._call(self._nats.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@dataclass
class WorkerProcess:
    """`python -m moe_collector` as a supervisor starts it."""

    nats_url: str
    log_path: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port, self.ingress_port = free_port(), free_port()
        self.started_at = time.monotonic()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MOE_", "RAY_"))}
        environment |= {
            "MOE_COLLECTOR_NATS_URL": self.nats_url,
            "MOE_COLLECTOR_PORT": str(self.port),
            "MOE_COLLECTOR_INGRESS_PORT": str(self.ingress_port),
            "MOE_COLLECTOR_FLEET_TOKEN": TOKEN,
            **self.environment,
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "moe_collector"], env=environment, stderr=log)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """All processes of the worker."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def temp_dirs(self) -> list[Path]:
        return list(Path("/tmp").glob(f"moe-ray-{self.process.pid}-*"))

    def wait_ready(self) -> float:
        """Wait until it answers; return the seconds that it took since its start."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub = pb_grpc.WorkerServiceStub(channel)

            def answers() -> bool:
                assert self.process.poll() is None, self.log()[-3000:]
                try:
                    stub.GetWorkerInfo(pb.GetWorkerInfoRequest(), timeout=5)
                except grpc.RpcError:
                    return False
                return True

            eventually(answers, START_DEADLINE_S, interval_s=0.1)
        return time.monotonic() - self.started_at

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()


@pytest.fixture(scope="session")
def collector_broker() -> Iterator[Broker]:
    with NatsServer() as server:
        broker = Broker(server.url)
        yield broker
        broker.close()


@pytest.fixture(scope="session")
def worker(collector_broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log_path = tmp_path_factory.mktemp("worker") / "worker.log"
    process = WorkerProcess(collector_broker.url, log_path)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


@pytest.fixture
def stub(worker: WorkerProcess) -> Iterator[pb_grpc.WorkerServiceStub]:
    worker.wait_ready()
    with grpc.insecure_channel(f"127.0.0.1:{worker.port}") as channel:
        yield pb_grpc.WorkerServiceStub(channel)
