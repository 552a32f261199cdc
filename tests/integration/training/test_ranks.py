"""Data-parallel training in two processes: one session, steps shared, every rank a source of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import NatsServer
from source_broker import Broker

from moe_analyzer.aggregate import Limits, SessionPart
from moe_analyzer.series import INDEX_FIELD, StoredPoint, chunk_fields, read_chunk, series_messages
from moe_debugger.v1 import routing_pb2 as pb

NUM_STEPS, ACCUMULATION, BATCH, LENGTH, NUM_LAYERS = 3, 2, 2, 8, 3
PROGRAM = Path(__file__).with_name("rank_training.py")


def run_ranks(url: str, folder: Path, mode: str) -> list[dict[str, Any]]:
    """Run the program on two ranks and return what each wrote."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    log = folder / "torchrun.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(PROGRAM), url, str(folder), mode],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(150)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert code == 0, log.read_text()[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("mode", ["loop", pytest.param("trainer", marks=pytest.mark.slow)])
def test_ranks_share_steps_and_no_value_is_counted_twice(tmp_path: Path, mode: str) -> None:
    with NatsServer() as server:
        broker = Broker(server)
        broker.start()
        try:
            ranks = run_ranks(server.url, tmp_path, mode)
            messages = [message for _, message in broker.messages()]
        finally:
            broker.stop()

    manifests = [message.manifest for message in messages if message.WhichOneof("payload") == "manifest"]
    rank_of = {one.source_id: one.coordinates.global_rank for one in manifests}
    assert sorted(rank_of.values()) == [0, 1]
    assert all(one.step_domain == pb.STEP_DOMAIN_GLOBAL and one.kind == "training" for one in manifests)
    assert not any(m.goodbye.closes_session for m in messages if m.WhichOneof("payload") == "goodbye")

    # On the wire: each rank's rows of each step, the forwards of accumulation told apart.
    tokens: dict[tuple[int, int], int] = {}
    forwards: dict[tuple[int, int], set[int]] = {}
    for message in messages:
        if message.WhichOneof("payload") == "batch":
            steps = message.batch.first_step + np.frombuffer(message.batch.step_offset, "<u4").astype(int)
            indices = message.batch.first_forward_index + np.frombuffer(message.batch.forward_offset, "<u4").astype(int)
            for step, index in zip(steps.tolist(), indices.tolist(), strict=True):
                key = (rank_of[message.source_id], step)
                tokens[key] = tokens.get(key, 0) + 1
                forwards.setdefault(key, set()).add(index)
    expected = {(rank, step) for rank in range(2) for step in range(1, NUM_STEPS + 1)}
    assert tokens == dict.fromkeys(expected, ACCUMULATION * BATCH * LENGTH)
    assert {key: len(found) for key, found in forwards.items()} == dict.fromkeys(expected, ACCUMULATION)

    # In the analyzer: loads add up to what the experts of both ranks were given, in one range of steps.
    part = SessionPart(manifests[0].session_id, Limits())
    for message in messages:
        part.apply(message, 1_000_000_000)
    writes = part.take_writes()
    assert (part.totals.first_step, part.totals.last_step) == (1, NUM_STEPS)
    counts = np.sum([rank["counts"] for rank in ranks], axis=0)
    assert [part.totals.layers[layer].counts.tolist() for layer in range(NUM_LAYERS)] == counts.tolist()

    # Series: one of each source, the loss once a step, and never their sum.
    state = {name: value for name, value in writes.state.items() if value is not None}
    fields, num_not_kept = chunk_fields(state[INDEX_FIELD], with_experts=True)
    points: list[StoredPoint] = [point for name in fields for point in read_chunk(state[name])]
    assert num_not_kept == 0
    losses = series_messages(points, rank_of, ["loss"], 100)
    assert [one.global_rank for one in losses] == [0, 1]
    for one in losses:
        assert np.frombuffer(one.step, "<u8").tolist() == list(range(1, NUM_STEPS + 1))
    assert losses[0].value == losses[1].value
    if mode == "trainer":
        assert np.frombuffer(losses[0].value, "<f8").tolist() == ranks[0]["logged"]
    # DDP averages gradients over the ranks before they are read, so both saw the same.
    assert ranks[0]["norms"] == ranks[1]["norms"]
    assert np.isfinite(ranks[0]["norms"]).all()
    norms = series_messages(points, rank_of, ["expert_gradient_norm"], 100)
    assert [(one.global_rank, one.layer_index, one.num_values) for one in norms] == [
        (rank, layer, 8) for rank in range(2) for layer in range(NUM_LAYERS)
    ]
