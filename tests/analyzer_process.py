"""An analyzer as a process of its own, for tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import NatsServer, ValkeyServer, eventually, free_port

from moe_debugger.v1 import analyzer_pb2_grpc as rpc

__all__ = ["Analyzer"]


class Analyzer:
    """`python -m moe_analyzer` as a process of its own."""

    def __init__(self, nats: NatsServer, valkey: ValkeyServer, folder: Path, **settings: object) -> None:
        self.port = free_port()
        self.log_path = folder / f"analyzer-{self.port}.log"
        values = {
            "PORT": self.port,
            "NATS_URL": nats.url,
            "REDIS_URL": valkey.url,
            "DATABASE_URL": f"sqlite+aiosqlite:///{folder}/catalogue.db",
            "NUM_PARTITIONS": 4,
            "STREAM_MAX_BYTES": 256 << 20,
            "FLUSH_INTERVAL_S": 0.05,
            "LEASE_S": 1.0,
            **settings,
        }
        self._env = {**os.environ, **{f"MOE_ANALYZER_{name}": str(value) for name, value in values.items()}}
        self._process: subprocess.Popen[bytes] | None = None
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}",
            options=[("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)],
        )
        self.stub = rpc.AnalyzerServiceStub(self.channel)

    def start(self, *, wait: bool = True) -> "Analyzer":
        assert self._process is None
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "moe_analyzer"], env=self._env, stderr=log)
        if wait:
            eventually(lambda: self._process is None or self._process.poll() is not None or self.is_serving(), 40)
            assert self._process.poll() is None, self.log
        return self

    def is_serving(self) -> bool:
        health: Any = health_pb2_grpc.HealthStub(self.channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self, timeout_s: float = 20) -> int:
        """Return the exit code of a process that ends."""
        assert self._process is not None
        code = self._process.wait(timeout_s)
        self._process = None
        return code

    def stop(self) -> int:
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def close(self) -> None:
        self.kill()
        self.channel.close()
