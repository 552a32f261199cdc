"""A real NATS, and what stands where an analyzer does."""

from collections.abc import Iterator

import pytest
import torch
from servers import NatsServer
from source_broker import Broker

torch.set_num_threads(1)


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def broker(nats_server: NatsServer) -> Iterator[Broker]:
    broker = Broker(nats_server)
    broker.start()
    yield broker
    broker.stop()
