"""What watching costs: forward time with the capture over forward time without it, in ABBA order.

    python tests/bench/bench_capture.py [--pairs 30] [--level routes]

The last line is JSON. Each ratio is the median over pairs of (A B B A) with a bootstrap 95 % interval; the same
measurement of nothing against nothing (``aa_interval``) shows the machine's own noise.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_debugger import MoEDebugger

_BOOTSTRAPS = 2000


def _model(num_layers: int) -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_local_experts=64,
            num_experts_per_tok=8,
            max_position_embeddings=1024,
        )
    ).eval()


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _ratios(run: Callable[[], None], switch: Callable[[bool], None], pairs: int) -> list[float]:
    """One ratio of on over off for each A B B A, so that a steady drift of the machine cancels."""
    ratios = []
    for _ in range(pairs):
        times: dict[bool, float] = {False: 0.0, True: 0.0}
        for is_on in (False, True, True, False):
            switch(is_on)
            times[is_on] += _seconds(run)
        ratios.append(times[True] / times[False])
    return ratios


def _interval(ratios: list[float]) -> list[float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAPS))
    return [round(medians[int(_BOOTSTRAPS * share)], 4) for share in (0.025, 0.975)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = _model(arguments.layers)
    prompt = torch.randint(0, 1024, (8, 128))
    step = torch.randint(0, 1024, (8, 1))

    def prefill() -> None:
        with torch.no_grad():
            model(prompt)

    def decode() -> None:
        with torch.no_grad():
            for _ in range(10):
                model(step)

    result: dict[str, Any] = {"pairs": arguments.pairs, "threads": arguments.threads}
    for name, run in (("prefill_8x128", prefill), ("decode_8x1", decode)):
        run()
        noise = _ratios(run, lambda _: None, arguments.pairs)
        result[name] = {"aa_ratio": round(statistics.median(noise), 4), "aa_interval": _interval(noise)}
        for level in ("counts", "routes"):
            debugger = MoEDebugger(model, level=level)
            session = debugger.start_session()

            def switch(is_on: bool, session: Any = session) -> None:
                session.flush()
                if is_on:
                    session._capture.attach()
                else:
                    session._capture.detach()

            ratios = _ratios(run, switch, arguments.pairs)
            performance = debugger.get_performance_metrics()
            debugger.close()
            result[name][f"{level}_ratio"] = round(statistics.median(ratios), 4)
            result[name][f"{level}_interval"] = _interval(ratios)
            result[name][f"{level}_hook_share"] = round(performance.hook_time_share, 5)
            per_forward_ms = performance.capture_s / max(1, performance.num_forwards) * 1e3
            result[name][f"{level}_capture_ms_per_forward"] = round(per_forward_ms, 3)
            result[name]["forward_ms"] = round(performance.forward_s / max(1, performance.num_forwards) * 1e3, 2)
            sys.stderr.write(f"{name} {level}: {statistics.median(ratios):.4f}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
