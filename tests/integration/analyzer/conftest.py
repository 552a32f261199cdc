"""A real NATS, a real Valkey, and analyzers as processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from analyzer_process import Analyzer
from servers import NatsServer, ValkeyServer


@pytest.fixture
def nats() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def analyzer(nats: NatsServer, valkey: ValkeyServer, tmp_path: Path) -> Iterator[Analyzer]:
    analyzer = Analyzer(nats, valkey, tmp_path)
    analyzer.start()
    yield analyzer
    analyzer.close()
