"""A real NATS, a real Valkey and an analyzer; shared by a module's tests, each with sessions of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from analyzer_process import Analyzer
from servers import NatsServer, ValkeyServer


@pytest.fixture(scope="module")
def nats() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("analyzer")


@pytest.fixture(scope="module")
def analyzer(nats: NatsServer, valkey: ValkeyServer, folder: Path) -> Iterator[Analyzer]:
    analyzer = Analyzer(nats, valkey, folder).start()
    yield analyzer
    analyzer.close()
