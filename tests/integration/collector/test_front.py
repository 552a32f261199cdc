"""The loopback front against an ingress of the test's own: what it adds, what it passes on, and what it says."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import aeventually, free_port

from moe_collector.front import REPLICA_DIED, STARTING, STOPPING, Front
from moe_collector.server import MODEL_FAILED
from moe_debugger.v1 import collector_pb2 as pb
from moe_debugger.v1 import collector_pb2_grpc as pb_grpc

TOKEN = "0123456789abcdef"


class Ingress(pb_grpc.WorkerServiceServicer):
    """Stands where Ray Serve stands; `failure` is what a call ends with after two tokens."""

    def __init__(self) -> None:
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.metadata: dict[str, Any] = {}
        self.num_ended = 0
        self.is_endless = False

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.metadata = dict(context.invocation_metadata())
        try:
            position = 0
            while position < 2 or self.is_endless:
                yield pb.GenerateResponse(token=pb.GeneratedToken(position=position))
                position += 1
                await asyncio.sleep(0.001)
        finally:
            # By cancellation where the call waits, by being closed where it yields.
            self.num_ended += 1
        if self.failure:
            await context.abort(*self.failure)

    async def GetWorkerInfo(self, request: pb.GetWorkerInfoRequest, context: Any) -> pb.GetWorkerInfoResponse:
        return pb.GetWorkerInfoResponse(model_name="here")


class Setup:
    ingress: Ingress
    front: Front
    stub: "pb_grpc.WorkerServiceAsyncStub"
    channel: grpc.aio.Channel


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    here = Setup()
    here.ingress = Ingress()
    server = grpc.aio.server()
    pb_grpc.add_WorkerServiceServicer_to_server(here.ingress, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    here.front = Front("127.0.0.1", 0, ingress=f"127.0.0.1:{port}", token=TOKEN)
    await here.front.start()
    here.channel = grpc.aio.insecure_channel(f"127.0.0.1:{here.front.port}")
    here.stub = pb_grpc.WorkerServiceStub(here.channel)
    yield here
    await here.channel.close()
    await here.front.stop(0)
    await server.stop(0)


async def failure_of(setup: Setup, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in setup.stub.Generate(pb.GenerateRequest(), **options):
            pass
    return caught.value


async def health(setup: Setup) -> Any:
    health_stub: Any = health_pb2_grpc.HealthStub(setup.channel)
    return (await health_stub.Check(health_pb2.HealthCheckRequest())).status


async def test_it_says_that_the_worker_starts_until_the_first_probe(setup: Setup) -> None:
    error = await failure_of(setup)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, STARTING)
    assert await health(setup) == health_pb2.HealthCheckResponse.NOT_SERVING
    await setup.front.probe(5)
    assert setup.front.is_ready
    assert (await setup.stub.GetWorkerInfo(pb.GetWorkerInfoRequest())).model_name == "here"
    assert await health(setup) == health_pb2.HealthCheckResponse.SERVING


async def test_it_adds_the_token_and_streams(setup: Setup) -> None:
    await setup.front.probe(5)
    positions = [response.token.position async for response in setup.stub.Generate(pb.GenerateRequest())]
    assert positions == [0, 1]
    assert setup.ingress.metadata["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "prompt is empty"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "64 requests wait already"),
        (grpc.StatusCode.ALREADY_EXISTS, "request x is being generated already"),
        (grpc.StatusCode.INTERNAL, MODEL_FAILED + "out of memory"),
    ],
)
async def test_the_workers_own_errors_pass_as_they_are(setup: Setup, failure: tuple[grpc.StatusCode, str]) -> None:
    await setup.front.probe(5)
    setup.ingress.failure = failure
    error = await failure_of(setup)
    assert (error.code(), error.details()) == failure
    assert setup.front.is_ready


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.INTERNAL, "The actor died unexpectedly before finishing this task."),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.NOT_FOUND, "Application 'moe-worker' not found."),
    ],
)
async def test_a_lost_replica_is_said_clearly_and_found_again(
    setup: Setup, failure: tuple[grpc.StatusCode, str]
) -> None:
    await setup.front.probe(5)
    setup.ingress.failure = failure
    error = await failure_of(setup)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, REPLICA_DIED)
    assert not setup.front.is_ready
    await setup.front.probe(5)
    assert setup.front.is_ready


async def test_a_cancel_and_a_deadline_reach_the_ingress(setup: Setup) -> None:
    await setup.front.probe(5)
    setup.ingress.is_endless = True
    call = setup.stub.Generate(pb.GenerateRequest())
    async for _ in call:
        break
    call.cancel()
    await aeventually(lambda: setup.ingress.num_ended == 1)
    error = await failure_of(setup, timeout=0.3)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await aeventually(lambda: setup.ingress.num_ended == 2)


async def test_a_stopping_front_refuses(setup: Setup) -> None:
    await setup.front.probe(5)
    await setup.front.refuse()
    await setup.front.probe(5)
    error = await failure_of(setup)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPING)


async def test_an_ingress_that_is_away_is_no_ready_worker() -> None:
    front = Front("127.0.0.1", 0, ingress=f"127.0.0.1:{free_port()}", token=TOKEN)
    await front.start()
    await front.probe(2)
    assert not front.is_ready
    await front.stop(0)


async def test_a_port_that_is_taken_is_named(setup: Setup) -> None:
    second = Front("127.0.0.1", setup.front.port, ingress="127.0.0.1:1", token=TOKEN)
    with pytest.raises(OSError, match=str(setup.front.port)):
        await second.start()
    await second.stop(0)
