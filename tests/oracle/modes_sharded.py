"""Sharded models: ranks started by torchrun, against the oracle on the whole model in one process, or on the stages.

All plans of a build run in one torchrun, one after the other: starting the ranks takes longer than running them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from oracle.builds import EVERY_BUILD
from oracle.compare import Comparison
from oracle.matrix import merge
from oracle.outcome import ROOT, Impossible, NotAccepted
from oracle.registry import FAMILIES, Mode, register_mode
from zoo.build import ALL, Build

__all__ = ["PLANS", "SHARDED", "expert_plan"]

# Beside the families, one of each further kind of plan for expert parallelism: where the experts are, which of their
# parameters are split, and whether the plan is that of a part of the model.
SHARDED = (
    *FAMILIES, "jamba", "nemotron_h", "nemotron_h_omni", "muse_spark", "qwen3_vl_moe", "ernie4_5_vl_moe_mixed",
    "dots3_note_vision", "diffusion_gemma", "openai_privacy_filter",
)  # fmt: skip
# By column, the fields of transformers' DistributedConfig.
PLANS: dict[str, dict[str, Any]] = {
    "tp": {"tp_plan": "auto"},
    "ep": {"tp_size": 2, "ep_size": 2},
    "ep, all to all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "fsdp + ep": {"fsdp_size": 2, "ep_size": 2},
    "pp": {"pp_size": 2},
}
_NUM_RANKS = 2
_PROGRAM = Path(__file__).with_name("modes_sharded_rank.py")
_TIMEOUT_S = 240


def expert_plan(name: str) -> tuple[tuple[str, str], ...]:
    """Return what a build's plan for expert parallelism does with its experts: place and style, by name."""
    model: Any = ALL[name].make()
    plan: dict[str, str] = {}
    for module in model.modules():
        plan.update(getattr(module, "_ep_plan", None) or {})
    # A part of a model has its own plan, and its owner has it again under the part's name.
    return tuple(sorted({(re.sub(r"^.*\*\.", "", key), style) for key, style in plan.items() if "expert" in key}))


def _column(plan: str) -> Mode:
    def mode(build: Build) -> Comparison:
        return _read(_ran(build.name)[plan], plan)

    return mode


for _plan in PLANS:
    register_mode(_plan, families=SHARDED)(_column(_plan))


def _read(reports: list[Mapping[str, Any]], plan: str) -> Comparison:
    """Return what the ranks' reports say together; each rank has compared its own rows."""
    refusals = [report["impossible"] for report in reports if "impossible" in report]
    if refusals:
        # Where one rank fails, another may wait for it in vain.
        raise Impossible(min(refusals, key=lambda text: "Timed out" in text))
    for report in reports:
        if "error" in report:
            raise RuntimeError(f"rank {report['rank']}: {report['error']}")
    result = Comparison()
    for report in reports:
        merge(result, Comparison(**report["comparison"]))
    seen = [set(report["sites"]) for report in reports]
    every = set(reports[0]["every_site"])
    if plan == "pp":
        is_complete = set().union(*seen) == every and sum(map(len, seen)) == len(every)
    else:
        is_complete = all(sites == every for sites in seen)
    if not is_complete:
        result.add_problem(f"the ranks' layers are {[sorted(sites) for sites in seen]}, the model's {sorted(every)}")
    recording = [report["is_replica"] for report in reports]
    expected = [False, plan in ("tp", "ep", "ep, all to all")]
    if recording != expected:
        result.add_problem(f"replicas are {recording}, expected {expected}")
    return result


@cache
def _ran(name: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return the reports of all ranks, by plan."""
    model: Any = EVERY_BUILD[name].make()
    if not hasattr(model, "save_pretrained"):
        raise NotAccepted("plain torch, which transformers does not shard")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder / "model")
        task = {"arch": name, "folder": str(folder / "model"), "out": scratch, "plans": PLANS}
        log = folder / "log"
        is_over = _torchrun(json.dumps(task), log)
        reports: dict[str, list[Mapping[str, Any]]] = {}
        for plan in PLANS:
            reports[plan] = []
            for rank in range(_NUM_RANKS):
                path = folder / f"{plan}-{rank}.json"
                missing = {"error": f"no report (in time: {is_over}); {log.read_text()[-600:]}", "rank": rank}
                reports[plan].append(json.loads(path.read_text()) if path.exists() else missing)
        return reports


def _torchrun(task: str, log_path: Path) -> bool:
    """Run the ranks; return whether they ended in time."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*launcher, "--nproc-per-node", str(_NUM_RANKS), str(_PROGRAM), task],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            process.wait(_TIMEOUT_S)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a launcher and of its ranks, which have process groups of their own."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for each in (*parent.children(recursive=True), parent):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait(10)
