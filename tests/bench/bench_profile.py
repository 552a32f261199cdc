"""What profiling costs: time of forwards with it over time without it, interleaved, beside bare over bare.

    python tests/bench/bench_profile.py [--pairs 30] [--threads 1] [--workloads prefill decode_1 decode_8]

The last line is JSON. Model and workloads are those of bench_capture.py. Each pair runs both ways in a random order; a
ratio is the median over the pairs of (with / without), with an interval by bootstrap, of wall time and of the process's
CPU time, which other processes disturb less. `aa` is the bare model against
itself, which shows how far the machine alone moves a ratio; `profile` is the profiler without a capture; `capture` and
`capture_profile` are sessions at level "counts" without and with profiling. `by_its_own_clock` is what the profiler
says of itself: what torch spends on calling hooks is not in it. `held_out_error` is that of the cost model.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_capture import Decode, Prefill, build_model  # type: ignore[import-not-found]  # beside this script

from moe_debugger import MoEDebugger
from moe_debugger.capture.discovery import find_sites
from moe_debugger.profiling import LayerProfile, LayerProfiler

_BOOTSTRAPS = 4000


class _Bare:
    def on(self) -> None:
        """Nothing is placed."""

    def off(self) -> None:
        """Nothing is removed."""


class _Profiler:
    def __init__(self, model: Any) -> None:
        self.profiler = LayerProfiler(model, find_sites(model).sites)

    def on(self) -> None:
        self.profiler.attach()

    def off(self) -> None:
        self.profiler.detach()


class _Session:
    """A session, placed anew for each run: what was captured has been counted when it ends."""

    def __init__(self, model: Any, *, profiling: bool) -> None:
        self._model, self._profiling = model, profiling
        self._debugger: MoEDebugger | None = None

    def on(self) -> None:
        self._debugger = MoEDebugger(self._model, level="counts", profiling=self._profiling)
        self._debugger.start_session()

    def settle(self) -> None:
        assert self._debugger is not None
        assert self._debugger.session is not None
        self._debugger.session.flush()

    def off(self) -> None:
        assert self._debugger is not None
        self._debugger.close()


def _timed(run: Callable[[], Any], variant: Any) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    variant.on()
    try:
        started, started_cpu = time.perf_counter(), time.process_time()
        run()
        settle = getattr(variant, "settle", None)
        if settle is not None:
            settle()
        return time.perf_counter() - started, time.process_time() - started_cpu
    finally:
        variant.off()


def _ratio(run: Callable[[], Any], rewind: Callable[[], None], variant: Any, pairs: int) -> dict[str, Any]:
    bare = _Bare()
    ratios: list[list[float]] = [[], []]
    for _ in range(pairs):
        order = [bare, variant]
        random.shuffle(order)
        took = {}
        for each in order:
            took[id(each)] = _timed(run, each)
            rewind()
        for own, with_it, without in zip(ratios, took[id(variant)], took[id(bare)], strict=True):
            own.append(with_it / without)
    return {"wall": _summary(ratios[0]), "cpu": _summary(ratios[1])}


def _summary(ratios: list[float]) -> list[float]:
    """Return the median, and a 95 % interval of it."""
    medians = np.median(np.random.default_rng(0).choice(ratios, (_BOOTSTRAPS, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return [round(float(value), 4) for value in (statistics.median(ratios), low, high)]


def _workload(name: str, model: Any) -> tuple[Any, Callable[[], None]]:
    if name == "prefill":
        return Prefill(model, 8, 256, 1), lambda: None
    decode = Decode(model, int(name.removeprefix("decode_")), 16)
    return decode, decode.rewind


def main() -> None:
    """Run the benchmark and print its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", default=["prefill", "decode_1", "decode_8"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    model = build_model()
    answer: dict[str, Any] = {"bench": "profile", "pairs": options.pairs, "threads": options.threads}
    with torch.no_grad():
        for name in options.workloads:
            run, rewind = _workload(name, model)
            profiler = _Profiler(model)
            for _ in range(2):
                _timed(run, profiler)
                rewind()
            found: dict[str, Any] = {
                "aa": _ratio(run, rewind, _Bare(), options.pairs),
                "profile": _ratio(run, rewind, profiler, options.pairs),
                "capture": _ratio(run, rewind, _Session(model, profiling=False), options.pairs),
                "capture_profile": _ratio(run, rewind, _Session(model, profiling=True), options.pairs),
            }
            profile = LayerProfile(profiler.profiler)
            found["by_its_own_clock"] = round(profile.overhead.share, 4)
            errors = [layer.model.held_out_error for layer in profile.layers if layer.model.is_fitted]
            found["held_out_error"] = round(statistics.median(errors), 4) if errors else None
            answer[name] = found
            print(name, json.dumps(found), flush=True)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
