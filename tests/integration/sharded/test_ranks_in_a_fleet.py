"""Ranks of one session in a fleet: replicated decisions count once, batches and stages of other ranks add up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analyzer_process import Analyzer
from servers import NatsServer, ValkeyServer, eventually

from moe_debugger.v1 import analyzer_pb2
from moe_debugger.v1 import session_pb2 as pb
from moe_debugger.wire.ids import DEFAULT_TENANT

pytestmark = pytest.mark.slow
CONFIGS: dict[str, dict[str, Any]] = {
    "ep": {"tp_size": 2, "ep_size": 2},
    "dp": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
}


@pytest.fixture(scope="module")
def nats() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="module")
def analyzer(nats: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Analyzer]:
    folder: Path = tmp_path_factory.mktemp("analyzer")
    with ValkeyServer() as valkey:
        analyzer = Analyzer(nats, valkey, folder).start()
        yield analyzer
        analyzer.close()


@pytest.mark.timeout(240)
def test_the_sum_over_all_ranks_is_what_one_process_counts(
    torchrun: Any, reference: Any, nats: NatsServer, analyzer: Analyzer
) -> None:
    jobs = [
        {"name": name, "model": "mixtral", "config": config, "own_batch": name == "dp", "fleet": nats.url}
        for name, config in CONFIGS.items()
    ]
    ran = torchrun(2, jobs, timeout_s=180)
    expected = {
        "ep": [reference("mixtral", 0)],
        "dp": [reference("mixtral", 0), reference("mixtral", 1)],
        "pp": [reference("mixtral", 0, is_padded=False)],
    }
    for name, ranks in ran.items():
        snapshot = settled_snapshot(analyzer, ranks[0].report["session_id"], num_sources=2)
        assert [layer.description.layer_index for layer in snapshot.layers] == [0, 1, 2, 3]
        for layer in snapshot.layers:
            counts = np.sum([one.counts(layer.description.module_name, 8) for one in expected[name]], axis=0)
            np.testing.assert_array_equal(np.frombuffer(layer.expert_counts, "<u8"), counts)
            assert layer.num_tokens == sum(one.is_valid.sum() for one in expected[name])
            by_rank = [] if name == "pp" else counts.reshape(2, 4).sum(axis=1).tolist()
            assert list(layer.expert_parallel_counts) == by_rank
            assert (layer.num_rank_steps > 0) == (layer.rank_step_imbalance >= 1) == bool(by_rank)
        assert snapshot.account.num_produced == snapshot.account.num_counted
        by_id = {source.source_id: source for source in snapshot.sources}
        for number, rank in enumerate(ranks):
            source = by_id[rank.report["source_id"]]
            assert (source.coordinates.global_rank, source.coordinates.world_size) == (number, 2)
            assert source.said_goodbye
            assert source.is_healthy, list(source.problems)
            is_replica = name == "ep" and number == 1
            assert source.coordinates.HasField("replica_of_rank") == is_replica
            assert (source.num_counted == 0) == is_replica


def settled_snapshot(analyzer: Analyzer, session_id: str, num_sources: int) -> pb.SessionSnapshot:
    """Return the session once the analyzer has all that its sources said."""
    request = analyzer_pb2.AnalyzerServiceGetSnapshotRequest(tenant=DEFAULT_TENANT, session_id=session_id)

    def read() -> pb.SessionSnapshot | None:
        snapshot = analyzer.stub.GetSnapshot(request).snapshot
        sources = [source for source in snapshot.sources if source.said_goodbye]
        is_settled = len(sources) == num_sources and all(
            source.num_counted == source.counters.num_produced for source in sources
        )
        return snapshot if is_settled else None

    snapshot = eventually(read, 20)
    assert isinstance(snapshot, pb.SessionSnapshot)
    return snapshot
