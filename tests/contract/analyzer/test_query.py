"""Queries of an analyzer against the batches that it counted, row by row."""

from collections import Counter
from dataclasses import replace
from typing import Any

import grpc
import pytest
from contract.analyzer.test_analyzer_service import Service, service  # noqa: F401  # a fixture

from moe_analyzer import session_query
from moe_debugger.query import FLEET_LIMITS
from moe_debugger.query.messages import result_from_proto
from moe_debugger.query.result import QueryResult
from moe_debugger.v1 import analyzer_pb2 as pb


async def _ask(session: Service, text: str, tenant: str = "default") -> QueryResult:
    request = pb.AnalyzerServiceQueryRequest(tenant=tenant, session_id=session.session_id, text=text)
    return result_from_proto((await session.stub.Query(request)).result)


async def test_experts_are_the_counts(service: Service) -> None:  # noqa: F811
    result = await _ask(service, "experts show layer, expert, assignments, load")
    expected: dict[tuple[int, int], int] = {}
    for source in service.sources:
        for layer, counts in source.expected_counts().items():
            for expert, count in enumerate(counts):
                expected[layer, expert] = expected.get((layer, expert), 0) + int(count)
    assert {(layer, expert): count for layer, expert, count, _ in result} == expected
    one = await _ask(service, "experts where layer = 1 order by load desc limit 1")
    assert one["assignments"][0] == max(count for (layer, _), count in expected.items() if layer == 1)


async def test_rows_agree_with_the_counts_by_every_way_to_ask(service: Service) -> None:  # noqa: F811
    by_state = {(row[0], row[1]): row[2] for row in await _ask(service, "experts show layer, expert, assignments")}
    by_rows = await _ask(service, "tokens by layer, expert show count limit 1000")
    assert {(layer, expert): count for layer, expert, count in by_rows} == {k: v for k, v in by_state.items() if v}
    # Every token is at a position from 0 on, so this chooses all rows, and counts them anew.
    chosen = await _ask(service, "experts where position >= 0 show layer, expert, assignments")
    assert {(layer, expert): count for layer, expert, count in chosen} == by_state
    listed = await _ask(service, "requests show request, tokens order by request")
    counted = await _ask(service, "requests where position >= 0 show request, tokens order by request")
    assert listed.rows == counted.rows
    assert [name for name, _ in listed] == ["q0", "q1"]
    some = await _ask(service, 'tokens where request = "q1" and layer = 0 show request, layer, position, experts')
    assert {(row[0], row[1]) for row in some} == {("q1", 0)}
    assert some.num_rows_scanned < by_rows.num_rows_scanned


async def test_rows_are_chosen_by_their_steps(service: Service) -> None:  # noqa: F811
    steps = await _ask(service, "tokens by step, layer show count")
    assert {row[0] for row in steps} == {1, 2, 3}
    of_sums = await _ask(service, "steps show step, layer, tokens")
    assert steps.rows == of_sums.rows
    since = await _ask(service, "experts where layer = 1 and step >= 2 show expert, assignments order by expert")
    counted = Counter[int]()
    for row in await _ask(service, "tokens where layer = 1 and step >= 2 show experts limit 10000"):
        counted.update(row[0])
    assert dict(since.rows) == {expert: counted[expert] for expert in range(len(since))}


async def test_steps_layers_series_and_findings(service: Service) -> None:  # noqa: F811
    steps = await _ask(service, "steps by step show sum(tokens), count")
    assert [row[0] for row in steps] == [1, 2, 3]
    layers = await _ask(service, "layers show layer, tokens, effective_experts, module")
    per_layer = {row[0]: row[1] for row in layers}
    assert sum(row[1] for row in steps) == sum(per_layer.values())
    assert [row[3] for row in layers] == [f"l{row[0]}" for row in layers]
    assert all(row[0] == "loss" for row in await _ask(service, "series where name = loss show name, value"))
    assert (await _ask(service, "findings where severity >= info")).subject == "findings"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tokens where margin > 3", "a live session has no `margin`"),
        ("experts where lod > 1", "did you mean `load`?"),
        ("tokens limit 100000", "more than the 10,000 rows"),
        ("drop limit 3", "there is no subject `drop`"),
        ("drop table experts", "`table` is not expected here"),
    ],
)
async def test_refusals(service: Service, text: str, says: str) -> None:  # noqa: F811
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(service, text)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in (caught.value.details() or "")


async def test_of_another_tenant_nothing_is_found(service: Service) -> None:  # noqa: F811
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(service, "experts", tenant="other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_cost_cap_names_itself_and_a_way_out(service: Service, monkeypatch: Any) -> None:  # noqa: F811
    desk_answer = session_query.QueryDesk.answer

    async def small(self: Any, text: str, reader: Any) -> QueryResult:
        self._limits = replace(FLEET_LIMITS, max_rows=10)
        return await desk_answer(self, text, reader)

    monkeypatch.setattr(session_query.QueryDesk, "answer", small)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(service, "tokens by layer")
    assert "the cap is 10" in (caught.value.details() or "")
    assert "`layer = 3`" in (caught.value.details() or "")
