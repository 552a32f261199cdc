"""Measure how often the collapse warning fires on noise: the run lengths of docs/early-warning.md.

    .venv/bin/python tests/bench/bench_early_warning.py --page-steps 2e6

Each series is AR(1) noise around a constant level, seen as points of 1, 2 or 4 steps, or as a live session sees it: one
step a point up to step 512, then two, then four, with every view judged. Baselines come from the first 100 steps behind
the warm-up. The effect floor is off, so the statistic alone decides, whatever the scale of the noise. A page of so many
layers has the threshold for that many; its steps are the series' steps over the number of layers.

    .venv/bin/python tests/bench/bench_early_warning.py --counts --page-steps 4e5

draws loads of few slots instead and pools them by `LayerSeries.from_loads`, for pages of four layers, with the floor.

    .venv/bin/python tests/bench/bench_early_warning.py --sd 0.06 0.1 0.15 --layers 4

has noise of other standard deviations, with the floors: the rule for fast falls rests on their size.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_counts import SmallCounts

from moe_debugger.analysis.collapse_chart import ChartSettings, run_chart
from moe_debugger.analysis.early_warning import min_slots

_Floats = npt.NDArray[np.float64]
# The noise of one step's ln effective experts in the trained runs of docs/early-warning.md is 0.02 to 0.05.
_NOISE = 0.03
_SERIES = 4000


def ar1(rng: np.random.Generator, phi: float, num_steps: int, num_series: int, sd: float = _NOISE) -> _Floats:
    """Return [num_steps, num_series] of AR(1) noise of a standard deviation, in its long-run state."""
    out = np.empty((num_steps, num_series))
    out[0] = rng.standard_normal(num_series) * sd
    innovation = sd * math.sqrt(1 - phi * phi)
    for step in range(1, num_steps):
        out[step] = phi * out[step - 1] + innovation * rng.standard_normal(num_series)
    return out


def in_points(values: _Floats, width: int) -> _Floats:
    """Return means of `width` steps."""
    num = len(values) // width
    points: _Floats = values[: num * width].reshape(num, width, -1).mean(axis=1)
    return points


def false_alarms(values: _Floats, width: int, settings: ChartSettings, layers: int) -> set[int]:
    """Return the series that are warned of."""
    points = in_points(values, width)
    steps = np.arange(len(points), dtype=np.float64) * width
    result = run_chart(points, steps, np.ones(len(points)), settings, num_series=layers)
    return {alarm.series for alarm in result.alarms}


def live_false_alarms(values: _Floats, settings: ChartSettings, layers: int) -> set[int]:
    """Return the series that a live session would have been warned of, in buckets that widen as steps come."""
    found: set[int] = set()
    width = 1
    while True:
        found |= false_alarms(values[: 512 * width], width, settings, layers)
        if 512 * width >= len(values):
            return found
        width *= 2


def rate_bound(num_alarms: int, num_steps: float) -> float:
    """Return the 95 % lower bound on the run length: the exact Poisson bound on the number of alarms, inverted."""
    low, high = float(num_alarms), num_alarms + 20 + 5 * math.sqrt(num_alarms + 1)
    for _ in range(60):
        mean = (low + high) / 2
        log_terms = [i * math.log(mean) - mean - math.lgamma(i + 1) for i in range(num_alarms + 1)] if mean else [0.0]
        low, high = (mean, high) if sum(map(math.exp, log_terms)) > 0.05 else (low, mean)
    return num_steps / high


def measure(
    page_steps: float, *, num_steps: int, layers: int, phis: Sequence[float], seed: int, sd: float | None = None
) -> Iterator[dict[str, object]]:
    """Yield one row for each noise and each view; with the floors where a standard deviation is given."""
    settings = ChartSettings(min_fall=0.0) if sd is None else ChartSettings()
    watched = num_steps - settings.warm_up_steps - settings.baseline_steps
    for phi in phis:
        alarms: dict[str, int] = dict.fromkeys(("1", "2", "4", "live"), 0)
        rng, done = np.random.default_rng([seed, layers, int(phi * 10)]), 0
        while done * watched < page_steps * layers:
            values = ar1(rng, phi, num_steps, _SERIES, _NOISE if sd is None else sd)
            for width in (1, 2, 4):
                alarms[str(width)] += len(false_alarms(values, width, settings, layers))
            alarms["live"] += len(live_false_alarms(values, settings, layers))
            done += _SERIES
        for view, count in alarms.items():
            steps = done * watched / layers
            yield {
                "layers": layers,
                "phi": phi,
                "sd": _NOISE if sd is None else sd,
                "steps a point": view,
                "page-steps": round(steps),
                "alarms": count,
                "run length at least": round(rate_bound(count, steps)),
            }


def measure_counts(page_steps: float, shapes: Sequence[str], *, seed: int) -> Iterator[dict[str, object]]:
    """Yield one row for each shape, size of the steps and skew."""
    for shape in shapes:
        num_experts, top_k = map(int, shape.split("/"))
        just_enough = -(-min_slots(num_experts) // top_k)
        for sigma in (0.0, 1.0):
            for tokens in (just_enough, 4, 16, 64, (4, 64)) if sigma == 0 else (just_enough, (4, 64)):
                noise = SmallCounts(num_experts, top_k, tokens, sigma)
                count, steps = noise.false_alarms(np.random.default_rng(seed), page_steps)
                yield {
                    "experts": shape,
                    "sigma": sigma,
                    "tokens": tokens,
                    "page-steps": round(steps),
                    "alarms": count,
                    "run length at least": round(rate_bound(count, steps)),
                }


def main() -> int:
    """Run the measurement and print one JSON object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-steps", type=float, default=2e6, help="steps of pages to watch")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64], help="layers of a page")
    parser.add_argument("--phi", type=float, nargs="+", default=[0.0, 0.5, 0.9], help="autocorrelation of the noise")
    parser.add_argument("--num-steps", type=int, default=2150, help="steps of one series")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sd", type=float, nargs="+", help="standard deviations of the noise, with the floors")
    parser.add_argument("--counts", action="store_true", help="measure on loads of few slots")
    parser.add_argument(
        "--shapes", nargs="+", default=["8/1", "8/2", "16/2", "64/8", "128/8", "256/8"], help="experts/k, with --counts"
    )
    arguments = parser.parse_args()
    if arguments.counts:
        for row in measure_counts(arguments.page_steps, arguments.shapes, seed=arguments.seed):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        return 0
    for layers, sd in itertools.product(arguments.layers, arguments.sd or [None]):
        for row in measure(
            arguments.page_steps,
            num_steps=arguments.num_steps,
            layers=layers,
            phis=arguments.phi,
            seed=arguments.seed,
            sd=sd,
        ):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
