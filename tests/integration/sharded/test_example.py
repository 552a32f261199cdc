"""The example script runs, prints each decision's load once, and its ranks join one session of a fleet."""

from collections.abc import Callable
from pathlib import Path

import pytest
from servers import NatsServer
from source_broker import Broker

EXAMPLE = Path(__file__).parents[3] / "examples" / "sharded" / "generate.py"


def numbers(output: str, after: str, column: int) -> list[int]:
    """Return a column of the table whose title begins with `after`, in each place where it is printed."""
    lines = output.splitlines()
    values: list[int] = []
    for start, line in enumerate(lines):
        if line.startswith(after) and not line.endswith("every rank computes all experts"):
            for row in lines[start + 3 :]:
                if not row.strip():
                    break
                values.append(int(row.split()[column].replace(",", "")))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp", "ep", "dp", "pp"])
def test_the_example_prints_the_load_of_every_rank(launch: Callable[..., str], plan: str) -> None:
    output = launch(2, EXAMPLE, "--model", "tiny", "--plan", plan, "--max-new-tokens", "4")
    # Four prompts of 12 tokens, and three more of each that were fed back; one such batch for each rank under dp.
    num_tokens = 4 * (12 + 3)
    num_tables = 2 if plan == "dp" else 1
    assert numbers(output, "Routing of", 4) == [num_tokens] * 4 * num_tables
    by_rank = numbers(output, "Ranks of", 3)
    has_owners = plan in ("ep", "dp")
    assert sum(by_rank) == (2 * num_tokens * 4 * num_tables if has_owners else 0)
    assert len(by_rank) == (8 * num_tables if has_owners else 0)
    assert ("replica of rank 0" in output) == (plan in ("tp", "ep"))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_four_ranks_of_the_example_ask_for_one_session(launch: Callable[..., str]) -> None:
    with NatsServer() as server:
        broker = Broker(server)
        broker.start()
        try:
            options = ("--model", "tiny", "--plan", "tp", "--max-new-tokens", "4", "--fleet", server.url)
            launch(4, EXAMPLE, *options, timeout_s=150)
            messages = [message for _, message in broker.messages()]
        finally:
            broker.stop()
    # An analyzer refuses a session whose model is another one.
    assert {(request.name, request.model_name) for request in broker.opened} == {("sharded-tp", "tiny")}
    manifests = [message.manifest for message in messages if message.WhichOneof("payload") == "manifest"]
    assert sorted(one.coordinates.global_rank for one in manifests) == [0, 1, 2, 3]
    senders = {message.source_id for message in messages if message.WhichOneof("payload") == "batch"}
    assert senders == {one.source_id for one in manifests if one.coordinates.global_rank == 0}
    goodbyes = [message.goodbye for message in messages if message.WhichOneof("payload") == "goodbye"]
    assert sorted(one.closes_session for one in goodbyes) == [False, False, False, True]
