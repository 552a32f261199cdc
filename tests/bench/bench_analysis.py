"""How fast decisions are analysed, against the bare count that nobody can do without.

    python tests/bench/bench_analysis.py [--decisions 10000000] [--repeats 3] [--shapes 64/8 8/2 256/8]

A decision is one token at one layer: one row of `session.decisions()`, with k assignments. Each row of the table is 10
million of them, in one process and one thread: with the columns that counts come from (layer, experts, request, step,
forward, phase, position, padding, slot status), and with all columns that a session gives. "bincount" is `np.bincount`
over layer and expert of every slot and nothing else. Speeds are per second of CPU time, which others on the machine
disturb least; the last line is JSON and has wall time too. docs/analysis-speed.md says what each field is.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_debugger.analysis import analyze, finish, fold_decisions

_NUM_LAYERS = 16
_TOKENS_PER_FORWARD = 4096
_REQUEST_TOKENS = 256
_COUNTING = (
    "layer_index",
    "expert_ids",
    "request_id",
    "step",
    "forward_index",
    "phase",
    "position",
    "is_padding",
    "slot_status",
)


def make_decisions(num_experts: int, top_k: int, num_rows: int, *, seed: int = 0) -> dict[str, Any]:
    """Return columns in the form and order of `session.decisions()`: forward after forward, layer after layer."""
    rng = np.random.default_rng(seed)
    tokens = max(num_rows // _NUM_LAYERS, 1)
    token = np.concatenate(
        [
            np.tile(np.arange(start, min(start + _TOKENS_PER_FORWARD, tokens), dtype=np.int64), _NUM_LAYERS)
            for start in range(0, tokens, _TOKENS_PER_FORWARD)
        ]
    )
    sizes = [min(_TOKENS_PER_FORWARD, tokens - start) for start in range(0, tokens, _TOKENS_PER_FORWARD)]
    layer = np.concatenate([np.repeat(np.arange(_NUM_LAYERS, dtype=np.uint32), size) for size in sizes])
    rows = len(token)
    # k different experts of each row, skewed as real ones: an arithmetic walk from a random start.
    start = (rng.beta(1, 1.3, rows) * num_experts).astype(np.int32)
    stride = rng.integers(1, max(2, (num_experts - 1) // top_k + 1), rows, dtype=np.int32)
    ids = np.empty((rows, top_k), np.int32)
    for slot in range(top_k):
        ids[:, slot] = (start + slot * stride) % num_experts
    forward = (token // _TOKENS_PER_FORWARD).astype(np.uint64)
    names = np.array([f"request {i}" for i in range(int(token.max()) // _REQUEST_TOKENS + 1)], dtype=object)
    score = rng.random(rows, dtype=np.float32)
    return {
        "step": forward,
        "forward_index": forward.copy(),
        "phase": np.ones(rows, np.uint8),
        "request_id": names[token // _REQUEST_TOKENS],
        "position": (token % _REQUEST_TOKENS).astype(np.uint32),
        "token_id": (token * 2654435761 % 32_000).astype(np.int32),
        "is_padding": np.zeros(rows, np.bool_),
        "layer_index": layer,
        "expert_ids": ids,
        "gate_weights": np.full((rows, top_k), 1 / top_k, np.float32) + 0.01 * score[:, None],
        "slot_status": np.ones((rows, top_k), np.uint8),
        "margin": score,
        "router_entropy": score + 1,
        "router_logsumexp": score + 2,
        "top1_probability": score / 2,
    }


def bare_bincount(decisions: dict[str, Any], num_experts: int) -> Any:
    """Return the assignments of each layer and expert, and nothing else."""
    cells = decisions["layer_index"].astype(np.int64)[:, None] * num_experts + decisions["expert_ids"]
    return np.bincount(cells.ravel(), minlength=_NUM_LAYERS * num_experts)


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the least CPU time and the least wall time of some calls."""
    cpu, wall = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start)
    return min(cpu), min(wall)


def measure(num_experts: int, top_k: int, num_rows: int, repeats: int) -> dict[str, Any]:
    """Return the speeds of one shape in decisions a second."""
    decisions = make_decisions(num_experts, top_k, num_rows)
    num = len(decisions["layer_index"])
    counting = {name: decisions[name] for name in _COUNTING}
    sizes: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k}
    state = fold_decisions(counting, **sizes)
    counts = np.stack([layer.counts for layer in state.layers.values()])
    if (counts.ravel() != bare_bincount(decisions, num_experts)).any():
        raise AssertionError("the fold and the bare count differ")
    calls: dict[str, Callable[[], Any]] = {
        "bincount": lambda: bare_bincount(decisions, num_experts),
        "fold": lambda: fold_decisions(counting, **sizes),
        "finish": lambda: finish(state),
        "analyze": lambda: analyze(counting, **sizes),
        "analyze_all_columns": lambda: analyze(decisions, **sizes),
    }
    times = {name: seconds(call, repeats) for name, call in calls.items()}
    return {
        "experts": num_experts,
        "top_k": top_k,
        "decisions": num,
        **{f"{name}_per_cpu_s": round(num / cpu) for name, (cpu, _) in times.items() if name != "finish"},
        **{f"{name}_per_s": round(num / wall) for name, (_, wall) in times.items() if name != "finish"},
        "finish_cpu_s": round(times["finish"][0], 4),
        "analyze_over_bincount": round(times["analyze"][0] / times["bincount"][0], 2),
    }


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["64/8", "8/2", "256/8"])
    options = parser.parse_args()
    results = []
    print(
        f"{'E/k':>6} {'bincount':>9} {'fold':>6} {'analyze':>8} {'all columns':>12}   million decisions per CPU second"
    )
    for shape in options.shapes:
        num_experts, top_k = map(int, shape.split("/"))
        result = measure(num_experts, top_k, options.decisions, options.repeats)
        results.append(result)
        bare, fold, whole, every = (
            result[f"{name}_per_cpu_s"] / 1e6 for name in ("bincount", "fold", "analyze", "analyze_all_columns")
        )
        ratio, rules = result["analyze_over_bincount"], result["finish_cpu_s"]
        print(
            f"{shape:>6} {bare:9.1f} {fold:6.2f} {whole:8.2f} {every:12.2f}   {ratio} bincounts, finish {rules} s",
            flush=True,
        )
    print(json.dumps({"bench": "analysis", "cpus": os.cpu_count(), "numpy": np.__version__, "results": results}))


if __name__ == "__main__":
    main()
