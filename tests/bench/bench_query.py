"""What queries of a large recording take: wall time and peak memory of each, in a process of its own.

    python tests/bench/bench_query.py [--rows 1_000_000] [--folder REC]

The recording has 16 MoE layers of 64 experts, 8 of them chosen, in forwards of 4,096 tokens with token ids; the rows
are random. `bare` is what pyarrow alone takes to read the columns of `experts`; `cpu_s` is the process's own time,
`peak_mb` the most memory that it had, of which `import_mb` stood before the query. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
LAYERS, EXPERTS, TOP_K, TOKENS = 16, 64, 8, 4096
QUERIES = {
    "experts": "experts order by load desc limit 10",
    "experts of a layer": "experts where layer = 3 order by load desc limit 10",
    "experts of a token": "experts where token_id = 262 order by load desc limit 10",
    "layers": "layers order by effective_experts",
    "tokens of an expert": "tokens where layer = 3 and expert = 5 limit 20",
    "tokens, sorted": "tokens where layer = 3 and expert = 5 order by margin limit 20",
    "tokens, grouped": "tokens by layer, expert show count, mean(margin) order by count desc limit 20",
    "steps": "steps where layer = 3 order by effective_experts limit 20",
    "a few steps": "tokens where step between 3 and 5 and layer = 3 show count",
    "requests": "requests order by tokens desc limit 10",
}


def make(folder: Path, num_rows: int) -> None:
    """Write a recording of about `num_rows` rows."""
    sys.path.insert(0, str(TESTS))
    import numpy as np
    from recorded_rows import begin
    from routing_rows import layer_infos

    from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
    from moe_debugger.wire.codec import LayerColumns, RoutingColumns

    infos = layer_infos(*[(EXPERTS, TOP_K)] * LAYERS)
    writer = RecordingWriter(make_folder(folder), begin("routes+tokens"), Limits(), lambda: infos, {})
    rng = np.random.default_rng(0)
    statistics = ("margin", "router_entropy", "router_logsumexp", "top1_probability")
    for index in range(max(1, round(num_rows / (LAYERS * TOKENS)))):
        layers = []
        for number in range(LAYERS):
            start = rng.integers(0, EXPERTS, (TOKENS, 1))
            ids = ((start + np.arange(TOP_K) * 7) % EXPERTS).astype(np.int32)
            layer = LayerColumns(number, EXPERTS, ids, rng.random((TOKENS, TOP_K), dtype=np.float32))
            for name in statistics:
                setattr(layer, name, rng.random(TOKENS, dtype=np.float32))
            layers.append(layer)
        writer.add([
            RoutingColumns(
                step=np.full(TOKENS, index, np.uint64),
                forward_index=np.full(TOKENS, index, np.uint64),
                request_ids=[f"request-{index}-{number}" for number in range(8)],
                request_index=np.repeat(np.arange(8), TOKENS // 8).astype(np.uint32),
                position=np.tile(np.arange(TOKENS // 8), 8).astype(np.uint32),
                phase=np.full(TOKENS, 1, np.uint8),
                is_padding=np.zeros(TOKENS, np.bool_),
                token_id=rng.integers(0, 32_000, TOKENS).astype(np.uint32),
                layers=layers,
            )
        ])  # fmt: skip
        writer.tick()
    writer.finish(Ending())


def measure(folder: str, text: str) -> dict[str, Any]:
    """Return what one query takes in this process."""
    from moe_debugger import open_recording
    from moe_debugger.query import parse

    parse("experts")
    before, started, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    if text == "bare":
        _bare(folder)
        wall, used = time.perf_counter() - started, time.process_time() - cpu
        return {"wall_s": wall, "cpu_s": used, "peak_mb": _peak_mb(), "import_mb": before}
    result = open_recording(folder).query(text)
    wall, used = time.perf_counter() - started, time.process_time() - cpu
    return {
        "wall_s": wall, "cpu_s": used, "peak_mb": _peak_mb(), "import_mb": before, "rows": len(result),
        "rows_read": result.num_rows_scanned,
    }  # fmt: skip


def _peak_mb() -> float:
    """Return the most memory that this process has had, by the kernel."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _bare(folder: str) -> None:
    import pyarrow.parquet as pq

    for path in sorted((Path(folder) / "rows").iterdir()):
        reader = pq.ParquetFile(path)
        for group in range(reader.metadata.num_row_groups):
            names = ["layer_index", "is_padding", "expert_ids", "slot_status", "gate_weights"]
            reader.read_row_group(group, columns=names, use_threads=False)


def main() -> None:
    """Make the recording where it is not given, and measure every query."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", default="")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.folder, arguments.one)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or Path(temporary) / "rec")
        if not folder.is_dir():
            make(folder, arguments.rows)
        size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        found: dict[str, Any] = {}
        for name, text in {"bare": "bare", **QUERIES}.items():
            command = [sys.executable, __file__, "--folder", str(folder), "--one", text]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            one = found[name]
            print(
                f"{name:22} {one['wall_s']:7.2f} s ({one['cpu_s']:6.2f} s of CPU) {one['peak_mb']:5.0f} MB "
                f"{one.get('rows_read', 0):>12,} rows  {text}"
            )
        print(json.dumps({"bench": "query", "size_mb": round(size_mb), **found}))


if __name__ == "__main__":
    main()
