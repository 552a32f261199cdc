"""Engines under Ray Serve push into a fleet: what the analyzer counts is what the engines routed."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analyzer_process import Analyzer
from engine_deployment import EXPERTS, MOE_LAYERS
from servers import NatsServer, ValkeyServer, eventually

from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import session_pb2

_TESTS = Path(__file__).parents[2]


@pytest.fixture
def nats() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture
def analyzer(nats: NatsServer, tmp_path: Path) -> Iterator[Analyzer]:
    with ValkeyServer() as valkey:
        analyzer = Analyzer(nats, valkey, tmp_path).start()
        yield analyzer
        analyzer.close()


def _serve(nats: NatsServer) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MOE_", "RAY_"))}
    environment["PYTHONPATH"] = str(_TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "engine_deployment", nats.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ledgers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return ledgers


def _complete(
    analyzer: Analyzer, request: pb.AnalyzerServiceGetSnapshotRequest, num_decisions: int
) -> session_pb2.SessionSnapshot | None:
    view = analyzer.stub.GetSnapshot(request, timeout=5).snapshot
    is_over = all(source.said_goodbye for source in view.sources)
    return view if is_over and view.account.num_counted == num_decisions else None


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_the_analyzer_counts_what_two_replicas_routed(analyzer: Analyzer, nats: NatsServer) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for ledger in _serve(nats):
        by_kind[ledger["kind"]].append(ledger)
    assert set(by_kind) == {"vllm", "sglang"}
    for kind, ledgers in by_kind.items():
        (session_id,) = {ledger["session_id"] for ledger in ledgers}
        assert len({ledger["source_id"] for ledger in ledgers}) == 2, "both replicas served"
        assert all(not ledger["problems"] for ledger in ledgers)
        load: Counter[tuple[int, int]] = Counter()
        for ledger in ledgers:
            for layer, expert, number in ledger["load"]:
                load[layer, expert] += number
        num_routed = sum(ledger["num_routed"] for ledger in ledgers)
        num_cached = sum(ledger["num_cached"] for ledger in ledgers)
        assert num_cached > 50
        request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)

        view = eventually(partial(_complete, analyzer, request, num_routed * len(MOE_LAYERS)), 30, interval_s=0.1)
        assert isinstance(view, session_pb2.SessionSnapshot)
        assert view.session.name == f"engines-{kind}"
        assert [np.frombuffer(layer.expert_counts, "<u8").tolist() for layer in view.layers] == [
            [load[layer, expert] for expert in range(EXPERTS)] for layer in range(len(MOE_LAYERS))
        ]
        assert [layer.description.model_layer_index for layer in view.layers] == MOE_LAYERS
        assert [layer.num_tokens for layer in view.layers] == [num_routed] * len(MOE_LAYERS)
        assert view.account.num_missing_messages == 0
        assert not view.account.dropped
        assert {source.kind for source in view.sources} == {"engine"}
        assert sum(source.series["not_routed_tokens"] for source in view.sources) == num_cached
