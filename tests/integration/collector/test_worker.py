"""The worker as a whole: a plain grpcio client, the front, Ray Serve, the model, and what arrives in JetStream."""

import ipaddress
import re
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import eventually

from moe_debugger.v1 import collector_pb2 as pb
from moe_debugger.v1 import collector_pb2_grpc as pb_grpc
from moe_debugger.v1 import routing_pb2
from moe_debugger.wire.ids import new_id

from .conftest import TOKEN, Broker, WorkerProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

Stub = pb_grpc.WorkerServiceStub


def generate(stub: Stub, prompt: str, num_tokens: int, **fields: Any) -> tuple[str, bytes, pb.GenerateFinished]:
    responses = list(stub.Generate(pb.GenerateRequest(prompt=prompt, max_new_tokens=num_tokens, **fields), timeout=60))
    assert responses[0].WhichOneof("event") == "started"
    assert responses[-1].WhichOneof("event") == "finished"
    assert b"".join(piece.text for piece in responses[0].started.prompt_tokens) == prompt.encode()
    tokens = [response.token for response in responses[1:-1]]
    assert [token.position for token in tokens] == list(range(len(prompt), len(prompt) + len(tokens)))
    return responses[0].started.request_id, b"".join(token.piece.text for token in tokens), responses[-1].finished


def routed_tokens(broker: Broker) -> Counter[str]:
    """Valid token rows of each request, from what the stream holds."""
    found: Counter[str] = Counter()
    for message in broker.messages():
        if message.WhichOneof("payload") == "batch":
            batch = message.batch
            valid = np.frombuffer(batch.is_padding, "u1") == 0
            index = np.frombuffer(batch.request_index, "<u4")
            for row in index[valid]:
                found[batch.request_ids[row]] += 1
    return found


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_eight_calls_stream_share_forwards_and_arrive_with_their_own_ids(stub: Stub, collector_broker: Broker) -> None:
    before = stub.GetWorkerInfo(pb.GetWorkerInfoRequest())
    assert (before.model_name, before.model_type) == ("demo", "mixtral")
    lengths = [10, 80, 35, 60, 25, 90, 45, 70]
    results: dict[int, tuple[str, bytes, pb.GenerateFinished]] = {}

    def call(index: int) -> None:
        results[index] = generate(stub, f"prompt {index} " + "word " * index, lengths[index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert [results[index][2].num_generated_tokens for index in range(8)] == lengths
    after = stub.GetWorkerInfo(pb.GetWorkerInfoRequest())
    shared = (after.num_forward_rows - before.num_forward_rows) / (after.num_forwards - before.num_forwards)
    assert shared > 1.5
    # The same text as alone.
    assert generate(stub, "prompt 3 " + "word " * 3, lengths[3])[1] == results[3][1]
    expected = {
        request_id: finished.num_prompt_tokens + finished.num_generated_tokens - 1
        for request_id, _, finished in results.values()
    }

    def all_arrived() -> bool:
        found = routed_tokens(collector_broker)
        return {request_id: found[request_id] for request_id in expected} == expected

    eventually(all_arrived, 20, interval_s=0.2)
    assert eventually(lambda: stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).session_id) == collector_broker.session_id


def test_the_first_token_arrives_before_the_last_is_made(stub: Stub) -> None:
    call = stub.Generate(pb.GenerateRequest(prompt="stream", max_new_tokens=300))
    started = time.monotonic()
    first = next(response for response in call if response.HasField("token"))
    first_after_s = time.monotonic() - started
    assert first.token.position == len("stream")
    rest = list(call)
    assert rest[-1].finished.num_generated_tokens == 300
    assert first_after_s < (time.monotonic() - started) / 2


def test_a_cancelled_call_leaves_the_batch(stub: Stub) -> None:
    call = stub.Generate(pb.GenerateRequest(prompt="cancelled", max_new_tokens=512))
    for response in call:
        if response.HasField("token"):
            break
    assert stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).num_active_requests == 1
    call.cancel()
    eventually(lambda: stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).num_active_requests == 0, 3)


def test_a_deadline_ends_the_call_and_the_request(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(prompt="too slow", max_new_tokens=512), timeout=0.5))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).num_active_requests == 0, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x" * 65537}, ["65537 bytes", "65536"]),
        ({"prompt": "x", "max_new_tokens": 513}, ["513", "512"]),
        ({"prompt": ""}, ["empty"]),
        ({"prompt": "x", "temperature": -1.0}, ["temperature is -1.0"]),
        ({"prompt": "x", "request_id": "NOT-AN-ID"}, ["NOT-AN-ID"]),
    ],
)
def test_a_wrong_value_is_told_with_its_limit(stub: Stub, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(**fields), timeout=20))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert all(word in (caught.value.details() or "") for word in words)


def test_an_id_of_the_caller_is_kept(stub: Stub) -> None:
    request_id = new_id()
    assert generate(stub, "mine", 3, request_id=request_id)[0] == request_id


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong-token-0123456789"),),
        (("authorization", TOKEN),),
        (("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer other")),
    ],
)
@pytest.mark.parametrize(
    "method",
    [
        "/moe_debugger.v1.WorkerService/Generate",
        "/moe_debugger.v1.WorkerService/GetWorkerInfo",
        "/ray.serve.RayServeAPIService/ListApplications",
        "/ray.serve.RayServeAPIService/Healthz",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_the_ingress_refuses_calls_without_the_token(
    worker: WorkerProcess, stub: Stub, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{worker.ingress_port}") as channel:
        method_call: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
        call = method_call(b"", timeout=10, metadata=(*metadata, ("application", "moe-worker")))
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        refusals = {grpc.StatusCode.UNAUTHENTICATED}
        if "reflection" in method:
            refusals = {grpc.StatusCode.UNIMPLEMENTED}
        assert caught.value.code() in refusals


def test_the_ingress_answers_with_the_token(worker: WorkerProcess, stub: Stub) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{worker.ingress_port}") as channel:
        metadata = (("authorization", f"Bearer {TOKEN}"), ("application", "moe-worker"))
        info = pb_grpc.WorkerServiceStub(channel).GetWorkerInfo(
            pb.GetWorkerInfoRequest(), timeout=10, metadata=metadata
        )
    assert info.model_name == "demo"


def test_every_socket_of_the_worker_listens_on_loopback(worker: WorkerProcess, stub: Stub) -> None:
    listening = [
        (process.name(), ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:")))
        for process in worker.tree()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    off_loopback = [(name, str(address)) for name, address in listening if not address.is_loopback]
    assert off_loopback == []


def test_the_files_of_the_cluster_are_private(worker: WorkerProcess, stub: Stub) -> None:
    (folder,) = worker.temp_dirs()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600


def test_health_is_answered(worker: WorkerProcess, stub: Stub) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{worker.port}") as channel:
        health_stub: Any = health_pb2_grpc.HealthStub(channel)
        response = health_stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_a_replica_that_is_killed_ends_its_calls_clearly_and_comes_back(worker: WorkerProcess, stub: Stub) -> None:
    source_id = stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).source_id
    call = stub.Generate(pb.GenerateRequest(prompt="killed", max_new_tokens=512))
    next(response for response in call if response.HasField("token"))
    (replica,) = [process for process in worker.tree() if process.name().startswith("ray::ServeRepli")]
    replica.kill()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "replica died during this call" in (caught.value.details() or "")
    worker.wait_ready()
    assert stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).source_id != source_id
    assert generate(stub, "back", 5)[2].num_generated_tokens == 5


def test_sigterm_says_goodbye_and_leaves_no_process_and_no_file(
    collector_broker: Broker, worker: WorkerProcess, stub: Stub
) -> None:
    """The last test here: it ends the shared worker."""
    source_id = stub.GetWorkerInfo(pb.GetWorkerInfoRequest()).source_id
    generate(stub, "the last one", 5)
    tree, folders = worker.tree(), worker.temp_dirs()
    assert len(tree) > 5
    assert len(folders) == 1
    started = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(15) == 0, worker.log()[-3000:]
    assert time.monotonic() - started < 8
    assert [process for process in tree if process.is_running()] == []
    assert not any(folder.exists() for folder in folders)
    assert not is_listening(worker.port)
    assert not is_listening(worker.ingress_port)
    mine = [message for message in collector_broker.messages() if message.source_id == source_id]
    assert [message.sequence for message in mine] == list(range(1, len(mine) + 1))
    assert mine[0].WhichOneof("payload") == "manifest"
    assert mine[0].manifest.level == routing_pb2.CAPTURE_LEVEL_ROUTES_TOKENS
    assert mine[-1].WhichOneof("payload") == "goodbye"
    assert not mine[-1].goodbye.closes_session
    log = worker.log()
    assert TOKEN not in log
    assert "the last one" not in log
    assert not re.search(r"nats://[^\"]*:[^\"]*@", log)
    assert not any(Path("/tmp").glob(f"moe-ray-{worker.process.pid}-*"))
