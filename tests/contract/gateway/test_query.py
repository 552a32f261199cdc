"""The Query RPC through a gateway, over every transport: columns, errors with a place, limits."""

import asyncio
import sys
from collections.abc import Callable

import numpy as np
import pytest
from contract.gateway.callers import TRANSPORTS, Caller, CallError
from contract.gateway.conftest import Bench

from moe_debugger.query.messages import result_from_proto
from moe_debugger.query.parser import MAX_TEXT
from moe_debugger.v1 import gateway_pb2 as pb
from moe_debugger.wire.ids import new_id

Connect = Callable[[str], Caller]
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


async def _ask(bench: Bench, caller: Caller, text: str) -> pb.QueryResponse:
    response: pb.QueryResponse = await caller.unary("Query", pb.QueryRequest(session_id=bench.session_id, text=text))
    return response


@every_transport
async def test_columns_come_back_as_they_are(bench: Bench, connect: Connect, transport: str) -> None:
    bench.analyzer.counts[bench.session_id] = np.array([[4, 0, 0, 4], [1, 1, 1, 5], [0, 0, 0, 0]], np.uint64)
    answer = await _ask(bench, connect(transport), "experts where load > 1x order by load desc, layer, expert")
    result = result_from_proto(answer.result)
    assert result.query == "experts where load > 1x order by load desc, layer, expert"
    assert result.rows == [
        (1, 3, 5, 0.625, 2.5, None, None),
        (0, 0, 4, 0.5, 2.0, None, None),
        (0, 3, 4, 0.5, 2.0, None, None),
    ]
    assert (result.num_matched, result.is_truncated, result.num_rows_scanned, result.notes) == (
        3,
        False,
        12,
        ("a double's",),
    )
    assert bench.analyzer.tenants == {"default"}


@every_transport
async def test_an_error_shows_the_place(bench: Bench, connect: Connect, transport: str) -> None:
    caller = connect(transport)
    with pytest.raises(CallError) as caught:
        await _ask(bench, caller, "experts where lod > 8x")
    assert caught.value.code == 3
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("`experts` has no column `lod`; did you mean `load`?")
    assert lines[1:] == ["  experts where lod > 8x", "                ^^^"]
    with pytest.raises(CallError) as caught:
        await _ask(bench, caller, "x" * (MAX_TEXT + 1))
    assert caught.value.code == 3
    with pytest.raises(CallError) as caught:
        await caller.unary("Query", pb.QueryRequest(session_id=new_id(), text="experts"))
    assert caught.value.code == 5


@every_transport
async def test_too_many_at_a_time_are_refused(bench: Bench, connect: Connect, transport: str) -> None:
    bench.analyzer.is_slow = True
    caller = connect(transport)
    calls = [asyncio.create_task(_ask(bench, caller, "experts")) for _ in range(9)]
    done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    assert len(done) == 1
    error = done.pop().exception()
    assert isinstance(error, CallError)
    assert (error.code, error.reasons) == (8, ["BUSY"])
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["experts where load > 1x order by load desc show layer, expert, assignments", "--csv"], 0, "1,3,5\n"),
        (["experts by layer", "--session", "demo"], 0, "3 rows (12 rows read"),
        (["experts where lod > 1"], 1, "did you mean `load`?"),
        (["experts", "--session", "nobody"], 1, "no session 'nobody'; it has: demo"),
    ],
)
async def test_the_command_line_asks_a_fleet(bench: Bench, arguments: list[str], exit_code: int, says: str) -> None:
    bench.analyzer.counts[bench.session_id] = np.array([[4, 0, 0, 4], [1, 1, 1, 5], [0, 0, 0, 0]], np.uint64)
    command = [sys.executable, "-m", "moe_debugger.cli", "query", "--fleet", f"127.0.0.1:{bench.gateway.grpc_port}"]
    process = await asyncio.create_subprocess_exec(
        *command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await process.communicate()
    assert process.returncode == exit_code, error.decode()
    assert says in (out if exit_code == 0 else error).decode()
