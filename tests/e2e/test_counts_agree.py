"""What the page, the RPC and Redis show equals what the model itself counted."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from e2e.fleet import Fleet, Generation, Recount, eventually, snapshot_counts
from e2e.page import open_page, table_counts
from e2e.redis_view import redis_counts, redis_request_counts

PROMPTS = [
    "def merge(left, right):\n    result = []\n",
    "The library was quiet in the afternoon, and",
    "12 + 30 = 42\n7 * 8 = 56\n19 - 4 =",
    '{"id": 17, "name": "alpha", "tags": ["x", "y"], "value":',
    "import os\nimport sys\n\nclass Reader:\n",
    "In the year of the great flood the town",
    "3.14159, 2.71828, 1.41421,",
    "name,age,city\nanna,31,rome\n",
]
# 2,040 tokens: eight of different lengths at the same time, then two longer ones.
LENGTHS = [120, 150, 180, 210, 240, 90, 200, 250]


@pytest.fixture(scope="module")
def generations(fleet: Fleet) -> list[Generation]:
    """Eight concurrent calls of different lengths, one of them cancelled midway, one that joins late, then two more."""
    with ThreadPoolExecutor(10) as pool:
        calls = [
            pool.submit(
                fleet.generate,
                prompt,
                length,
                cancel_after=40 if index == 3 else None,
                through="worker" if index % 2 else "grpc",
            )
            for index, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
        ]
        # The late one joins when the first of the others has ended.
        calls[5].result()
        late = pool.submit(fleet.generate, "late: 1, 2, 3, 4,", 400)
        results = [call.result() for call in [*calls, late]]
    results.append(fleet.generate("for index in range(10):\n", 400))
    assert sum(result.num_generated_tokens for result in results) >= 2000
    return results


@pytest.fixture(scope="module")
def recount(fleet: Fleet, generations: list[Generation]) -> dict[str, Recount]:
    """The model's own counts, once the fleet has counted as many decisions."""
    session_id = generations[0].session_id

    def settled() -> dict[str, Recount] | None:
        inside = fleet.recount()
        wanted = sum(part.counts.sum() for part in inside.values())
        return inside if snapshot_counts(fleet.snapshot(session_id)).sum() == wanted else None

    return eventually(settled, 30, "the fleet's total equals the model's")


def test_routed_tokens_are_prompt_plus_generated_minus_one(
    generations: list[Generation], recount: dict[str, Recount]
) -> None:
    for done in generations:
        if done.is_finished:
            assert recount[done.request_id].num_tokens == done.num_prompt_tokens + done.num_generated_tokens - 1
    assert [done.is_finished for done in generations].count(False) == 1


def test_the_rpc_equals_the_recount_per_layer_and_expert(
    fleet: Fleet, generations: list[Generation], recount: dict[str, Recount]
) -> None:
    snapshot = fleet.snapshot(generations[0].session_id)
    np.testing.assert_array_equal(snapshot_counts(snapshot), sum(part.counts for part in recount.values()))
    tokens = sum(part.num_tokens for part in recount.values())
    assert [layer.num_tokens for layer in snapshot.layers] == [tokens] * len(snapshot.layers)


def test_every_request_equals_its_recount(
    fleet: Fleet, generations: list[Generation], recount: dict[str, Recount]
) -> None:
    for done in generations:
        routes = fleet.routes(done.session_id, done.request_id)
        inside = recount[done.request_id]
        assert routes.num_tokens == inside.num_tokens
        assert np.frombuffer(routes.position, "<u4").tolist() == list(range(inside.num_tokens))
        for layer in routes.layers:
            counted = np.frombuffer(layer.expert_counts, "<u8").astype(np.int64)
            np.testing.assert_array_equal(counted, inside.counts[layer.layer_index])
            rows = np.frombuffer(layer.expert_ids, "<u2").reshape(-1, layer.top_k)
            np.testing.assert_array_equal(np.bincount(rows.ravel(), minlength=layer.num_experts), counted)


def test_redis_equals_the_recount_per_layer_and_expert_and_per_request(
    fleet: Fleet, generations: list[Generation], recount: dict[str, Recount]
) -> None:
    url, session_id = fleet.endpoints["redis"], generations[0].session_id
    np.testing.assert_array_equal(redis_counts(url, session_id), sum(part.counts for part in recount.values()))
    for done in generations:
        np.testing.assert_array_equal(
            redis_request_counts(url, session_id, done.request_id), recount[done.request_id].counts
        )


@pytest.mark.browser
def test_the_pages_dom_equals_the_recount(
    fleet: Fleet, generations: list[Generation], recount: dict[str, Recount]
) -> None:
    wanted = sum(part.counts for part in recount.values())
    with open_page(fleet.endpoints["page"], generations[0].session_id) as page:
        eventually(lambda: bool(np.array_equal(table_counts(page), wanted)), 20, "the page's table equals the recount")


def test_the_account_has_no_difference(
    fleet: Fleet, generations: list[Generation], recount: dict[str, Recount]
) -> None:
    def account_closes() -> bool:
        account = fleet.snapshot(generations[0].session_id).account
        dropped = sum(drop.num_decisions for drop in account.dropped)
        return account.num_produced == account.num_counted + dropped + account.num_in_flight and not dropped

    eventually(account_closes, 10, "produced = counted + dropped + in flight")


def test_concurrent_calls_shared_forwards(fleet: Fleet, generations: list[Generation]) -> None:
    import grpc

    from moe_debugger.v1 import collector_pb2, collector_pb2_grpc

    with grpc.insecure_channel(fleet.endpoints["worker"]) as channel:
        info = collector_pb2_grpc.WorkerServiceStub(channel).GetWorkerInfo(collector_pb2.GetWorkerInfoRequest())
    assert info.num_forward_rows / info.num_forwards > 2
