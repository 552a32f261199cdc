"""Recordings: rows a second when they are written, read, and played into a fleet as fast as it takes them.

    python tests/bench/bench_recordings.py [--rows 1000000] [--layers 8] [--experts 64] [--top-k 8]

The last line is JSON. `write` and `read` are of the files alone, in one thread; `columns` is the way back from rows to
what goes on the wire. `replay` plays the recording into a NATS server and an analyzer of its own: `published` is when
the broker had all of it, `counted` when the analyzer had counted it, which is slower and does not hold the replay up.
For scale, `bincount` is numpy's, of the same expert ids in memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from analyzer_process import Analyzer
from servers import NatsServer, ValkeyServer

from moe_debugger import open_recording
from moe_debugger.capture import LayerInfo
from moe_debugger.recording import Recording, replay_to_fleet
from moe_debugger.recording.columns import decisions_to_columns
from moe_debugger.recording.manifest import Manifest, ModelIdentity, Topology
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns
from moe_debugger.wire.ids import new_id

_TOKENS = 2048
_COUNT_TIMEOUT_S = 300.0


def make(path: Path, num_rows: int, layers: int, experts: int, top_k: int) -> float:
    """Write a recording of `num_rows` rows, and return the seconds that writing took."""
    infos = [LayerInfo(n, n, f"model.layers.{n}.mlp", "decoder", experts, top_k) for n in range(layers)]
    manifest = Manifest(
        recording_id=new_id(),
        started_at_unix_ns=time.time_ns(),
        session_name="bench",
        level="routes",
        sampling_rate=1.0,
        model=ModelIdentity(name="bench", model_type="bench"),
        topology=Topology(),
        step_domain="source",
    )
    rng = np.random.default_rng(0)
    writer = RecordingWriter(make_folder(path), manifest, Limits(), lambda: infos, {})
    elapsed_s = 0.0
    for index in range(num_rows // (_TOKENS * layers)):
        columns = RoutingColumns(
            step=np.full(_TOKENS, index, np.uint64),
            forward_index=np.full(_TOKENS, index, np.uint64),
            request_ids=[f"request-{index}"],
            request_index=np.zeros(_TOKENS, np.uint32),
            position=np.arange(_TOKENS, dtype=np.uint32),
            phase=np.ones(_TOKENS, np.uint8),
            is_padding=np.zeros(_TOKENS, np.bool_),
            layers=[
                LayerColumns(
                    layer,
                    experts,
                    rng.random((_TOKENS, experts)).argsort(axis=1)[:, :top_k].astype(np.int32),
                    rng.random((_TOKENS, top_k), dtype=np.float32),
                    margin=rng.random(_TOKENS, dtype=np.float32),
                    router_entropy=rng.random(_TOKENS, dtype=np.float32),
                )
                for layer in range(layers)
            ],
            captured_at_unix_ns=time.time_ns(),
        )
        began = time.perf_counter()
        writer.add([columns])
        writer.tick()
        elapsed_s += time.perf_counter() - began
    began = time.perf_counter()
    writer.finish(Ending())
    return elapsed_s + time.perf_counter() - began


def played(recording: Recording) -> dict[str, float]:
    """Return the rows a second that a broker takes, and that an analyzer counts."""
    with tempfile.TemporaryDirectory() as folder, NatsServer() as nats, ValkeyServer() as valkey:
        analyzer = Analyzer(nats, valkey, Path(folder), STREAM_MAX_BYTES=4 << 30, FLUSH_INTERVAL_S=0.2).start()
        try:
            began = time.perf_counter()
            done = replay_to_fleet(recording, nats.url)
            assert not done.num_dropped, done.num_dropped
            request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=done.session_id)
            while analyzer.stub.GetSnapshot(request, timeout=30).snapshot.account.num_counted < done.num_rows:
                assert time.perf_counter() - began < _COUNT_TIMEOUT_S
                time.sleep(0.1)
            counted_s = time.perf_counter() - began
        finally:
            analyzer.close()
    return {"published": done.rows_per_s, "counted": done.num_rows / counted_s}


def main() -> None:
    """Print one line for each number, then all of them as JSON."""
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 1_000_000), ("layers", 8), ("experts", 64), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rec"
        written_s = make(path, options.rows, options.layers, options.experts, options.top_k)
        recording = open_recording(path)
        num_rows = recording.manifest.num_rows
        size_bytes = sum(part.size_bytes for part in recording.manifest.parts)
        rates["write"] = num_rows / written_s
        began = time.perf_counter()
        parts = list(recording.iter_decisions())
        rates["read"] = num_rows / (time.perf_counter() - began)
        began = time.perf_counter()
        for part in parts:
            decisions_to_columns(part)
        rates["columns"] = num_rows / (time.perf_counter() - began)
        ids = np.concatenate([part.expert_ids for part in parts]).reshape(-1)
        began = time.perf_counter()
        np.bincount(ids, minlength=options.experts)
        rates["bincount"] = num_rows / (time.perf_counter() - began)
        del parts
        rates |= {f"replay_{name}": rate for name, rate in played(recording).items()}
    for name, rate in rates.items():
        print(f"{name:<18} {rate:>14,.0f} rows/s")
    print(
        json.dumps(
            {
                "bench": "recordings",
                "num_rows": num_rows,
                "bytes_per_row": round(size_bytes / num_rows, 1),
                "shape": {"layers": options.layers, "experts": options.experts, "top_k": options.top_k},
                "cpus": os.cpu_count(),
                "rows_per_s": {name: round(rate) for name, rate in rates.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
