"""A fleet started as a user would start it, with a recount inside its model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from moe_debugger.v1 import collector_pb2, collector_pb2_grpc, gateway_pb2, gateway_pb2_grpc, session_pb2

RECOUNT_HOOK = Path(__file__).parent / "recount"
COMMAND = Path(sys.executable).parent / "moe-debugger"
# An environment variable that every process of a fleet inherits, so that its processes can be found.
MARKER = "MOE_TEST_FLEET"


T = TypeVar("T")


def eventually(check: Callable[[], T | bool | None], deadline_s: float, what: str) -> T:
    """Return the first true answer of `check`; fail with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        answer = check()
        if answer:
            return answer  # type: ignore[return-value]
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Generation:
    """What a caller of Generate got."""

    request_id: str
    session_id: str
    num_prompt_tokens: int
    num_generated_tokens: int
    text: bytes
    is_finished: bool


@dataclass(frozen=True)
class Recount:
    """The model's own counts of one request: valid tokens, and [layers, experts] assignments."""

    num_tokens: int
    counts: npt.NDArray[np.int64]


class Fleet:
    """`moe-debugger up --json` in a folder of its own."""

    def __init__(self, *arguments: str, command: tuple[str, ...] = (), recount: bool = True) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="moe-e2e-")
        self.data = Path(self.folder.name) / "data"
        self.recount_folder = Path(self.folder.name) / "recount"
        self.recount_folder.mkdir()
        self.marker = f"{os.getpid()}-{time.time_ns()}"
        # Short: Ray's Unix sockets lie below it, and their paths end at 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="m-"))
        environment = {**os.environ, MARKER: self.marker, "TMPDIR": str(self.temporary)}
        if recount:
            environment |= {
                "MOE_TEST_RECOUNT_DIR": str(self.recount_folder),
                "PYTHONPATH": os.pathsep.join([str(RECOUNT_HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]),
            }
        self.log = Path(self.folder.name) / "up.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(COMMAND), "up", "--json", "--data", str(self.data), *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder.name,
                env=environment,
            )
        self.endpoints: dict[str, str] = {}

    def wait_until_ready(self, deadline_s: float = 90) -> None:
        """Read the one line that `up --json` prints."""
        line: list[bytes] = []
        assert self.process.stdout is not None
        reader = threading.Thread(target=lambda: line.append(self.process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
        reader.start()
        reader.join(deadline_s)
        if not line or not line[0]:
            raise AssertionError(f"the fleet was not ready within {deadline_s:.0f} s\n{self.log.read_text()[-4000:]}")
        self.endpoints = json.loads(line[0])

    def processes(self) -> dict[int, str]:
        """Return pid -> command line of every living process of this fleet."""
        found = {}
        wanted = f"{MARKER}={self.marker}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if wanted in environment and state != "Z":
                found[int(entry.name)] = command
        return found

    def pid_of(self, *words: str) -> int:
        """Return the pid of the one process whose command line has all `words`."""
        found = [pid for pid, command in self.processes().items() if all(word in command for word in words)]
        assert len(found) == 1, f"{words}: {found} of {self.processes()}"
        return found[0]

    def stop(self, sent: signal.Signals = signal.SIGINT, deadline_s: float = 20) -> int:
        """Send a signal and wait for the end; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        return self.process.wait(deadline_s)

    def close(self) -> None:
        """End everything that is left, and remove the folder."""
        if self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process.stdout is not None:
            self.process.stdout.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.folder.cleanup()

    # --- clients ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        cancel_after: int | None = None,
        through: str = "grpc",
        timeout_s: float = 100,
    ) -> Generation:
        """Generate through the gateway (`grpc`) or straight at the `worker`; cancel after so many tokens."""
        request = collector_pb2.GenerateRequest(prompt=prompt, max_new_tokens=max_new_tokens)
        request_id = session_id = ""
        num_prompt = num_generated = 0
        text, finished = b"", False
        with grpc.insecure_channel(self.endpoints[through]) as channel:
            call: Any
            if through == "worker":
                call = collector_pb2_grpc.WorkerServiceStub(channel).Generate(request, timeout=timeout_s)
            else:
                call = gateway_pb2_grpc.DebuggerServiceStub(channel).Generate(
                    gateway_pb2.DebuggerServiceGenerateRequest(request=request), timeout=timeout_s
                )
            for answer in call:
                event: collector_pb2.GenerateResponse = answer if through == "worker" else answer.response
                kind = event.WhichOneof("event")
                if kind == "started":
                    request_id, session_id = event.started.request_id, event.started.session_id
                    num_prompt = len(event.started.prompt_tokens)
                elif kind == "token":
                    num_generated += 1
                    text += event.token.piece.text
                    if cancel_after is not None and num_generated >= cancel_after:
                        call.cancel()
                        break
                elif kind == "finished":
                    finished = True
                    assert event.finished.num_prompt_tokens == num_prompt
                    assert event.finished.num_generated_tokens == num_generated
        return Generation(request_id, session_id, num_prompt, num_generated, text, finished)

    def snapshot(self, session_id: str) -> session_pb2.SessionSnapshot:
        """Return the session as a plain grpcio client sees it."""
        with grpc.insecure_channel(self.endpoints["grpc"]) as channel:
            stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
            return stub.GetSession(gateway_pb2.GetSessionRequest(session_id=session_id), timeout=10).snapshot

    def routes(self, session_id: str, request_id: str) -> session_pb2.RequestRoutes:
        """Return the decisions of one request as a plain grpcio client sees them."""
        with grpc.insecure_channel(self.endpoints["grpc"]) as channel:
            stub = gateway_pb2_grpc.DebuggerServiceStub(channel)
            return stub.GetRequestRoutes(
                gateway_pb2.GetRequestRoutesRequest(session_id=session_id, request_id=request_id), timeout=10
            ).routes

    def recount(self) -> dict[str, Recount]:
        """Return what the model itself counted, per request."""
        tokens: dict[str, int] = {}
        counts: dict[str, npt.NDArray[np.int64]] = {}
        for path in self.recount_folder.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                for name, part in json.loads(line)["requests"].items():
                    if part["tokens"]:
                        tokens[name] = tokens.get(name, 0) + part["tokens"]
                        counts[name] = counts.get(name, 0) + np.array(part["counts"], np.int64)
        return {name: Recount(tokens[name], counts[name]) for name in tokens}


def snapshot_counts(snapshot: session_pb2.SessionSnapshot) -> npt.NDArray[np.int64]:
    """Return [layers, experts] of a snapshot whose layers have equally many experts."""
    return np.stack([np.frombuffer(layer.expert_counts, "<u8") for layer in snapshot.layers]).astype(np.int64)
