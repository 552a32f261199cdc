"""Train small networks, healthy and with faults, and tell when the early warning spoke, for docs/early-warning.md.

.venv/bin/python tests/bench/bench_trained_runs.py --out runs.jsonl     # resumable; 5 s of one core for 100 steps
.venv/bin/python tests/bench/bench_trained_runs.py --out runs.jsonl --table
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trained_runs import CASES, TrainedRun, train_case


def describe(case: str, run: TrainedRun) -> dict[str, Any]:
    """Return what is reported of a run."""
    warned = [layer for layer in run.warnings.layers.values() if layer.since_step is not None]
    return {
        "case": case,
        "seed": run.seed,
        "steps": len(run.loads),
        "fault": run.fault_step,
        "warned": run.warned_at,
        "since": min((layer.since_step for layer in warned if layer.since_step is not None), default=None),
        "half": run.half_at,
        "collapsed": run.collapsed_at(),
        "layers warned": len(warned),
        "effective experts at the end": run.effective_experts[-10:].mean(axis=0).round(2).tolist(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| run | seed | fault | warned | half lost | lead | `router_collapse` | effective experts at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (list(CASES).index(row["case"]), row["seed"])):
        fault = row["fault"]

        def after(name: str, row: dict[str, Any] = row, fault: int | None = fault) -> str:
            if row[name] is None:
                return "never"
            return str(row[name]) if fault is None else f"+{row[name] - fault}"

        lead = "" if fault is None else "none" if row["half"] is None else str(row["half"] - row["warned"])
        end = " ".join(f"{value:.1f}" for value in row["effective experts at the end"])
        half = "" if fault is None else after("half")
        lines.append(
            f"| {row['case']} | {row['seed']} | {'' if fault is None else fault} | {after('warned')} | {half} | {lead} "
            f"| {after('collapsed')} | {end} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Train the runs that `--out` does not hold yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="one JSON object a run; runs that it holds are kept")
    parser.add_argument("--loads", type=Path, help="folder to keep loads in, [steps, layers, experts] .npy")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="only these")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if arguments.table:
        sys.stdout.write(table(rows) + "\n")
        return 0
    done = {(row["case"], row["seed"]) for row in rows}
    # Seed by seed, so that a run that was stopped has some of each case.
    for seed in range(max(case.num_seeds for case in CASES.values())):
        for name, case in CASES.items():
            if name in arguments.cases and seed < case.num_seeds and (name, seed) not in done:
                run = train_case(name, seed)
                if arguments.loads is not None:
                    np.save(arguments.loads / f"{name}-{seed}.npy", run.loads)
                row = describe(name, run)
                with arguments.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
