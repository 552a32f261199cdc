"""The program in docs/findings.md does what the page says."""

import asyncio
import contextlib
import io
import re
from pathlib import Path
from typing import Any

from contract.gateway.conftest import Bench

from moe_debugger.v1 import session_pb2

_PAGE = Path(__file__).parents[3] / "docs" / "findings.md"


async def test_the_program_acknowledges_and_silences_what_is_open(bench: Bench) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    states: dict[str, dict[str, Any]] = {
        "open": {"state": session_pb2.FINDING_STATE_OPEN, "num_occurrences": 7},
        "closed": {"state": session_pb2.FINDING_STATE_CLOSED},
        "silenced": {"state": session_pb2.FINDING_STATE_OPEN, "silenced_until_unix_ns": 9},
    }
    bench.analyzer.findings = {
        name: session_pb2.Finding(rule_id=name, opened_at_unix_ns=5, **fields) for name, fields in states.items()
    }
    names: dict[str, Any] = {
        "address": f"127.0.0.1:{bench.gateway.grpc_port}",
        "session_id": bench.session_id,
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        await asyncio.to_thread(exec, program, names)
    # The gateway logs to the same place.
    lines = [line for line in printed.getvalue().splitlines() if "[info" not in line]
    assert lines == ["open 5 7"]
    marked = bench.analyzer.findings
    assert (marked["open"].acknowledged_at_unix_ns, marked["open"].silenced_until_unix_ns) == (7, 3600)
    assert (marked["closed"].acknowledged_at_unix_ns, marked["silenced"].acknowledged_at_unix_ns) == (0, 0)
