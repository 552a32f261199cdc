"""What each rank does: load a saved build under each plan, run it, and compare what it captured.

    torchrun --nproc-per-node 2 modes_sharded_rank.py '{"arch": "mixtral", "folder": "...", "out": "...", "plans": {}}'

The oracle watches the whole model, which each rank has too. Rank r writes PLAN-r.json.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from oracle.builds import EVERY_BUILD
from oracle.causal import Oracle
from oracle.compare import compare, sites_of_layers
from oracle.matrix import NEW_TOKENS
from oracle.observe import bare, is_same, state_of
from oracle.outcome import Impossible
from torch import distributed
from transformers.distributed import DistributedConfig  # pyright: ignore[reportPrivateImportUsage]

from moe_debugger import MoEDebugger

# Sharded sums differ in the last bits of float32.
WEIGHT_ROUNDING = 1e-4


def main() -> None:
    """Run all plans of a task."""
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = distributed.get_rank()
    for plan, config in task["plans"].items():
        report: dict[str, Any]
        try:
            report = run(task["arch"], task["folder"], plan, config)
        except Impossible as error:
            report = {"impossible": str(error)}
        except Exception as error:
            report = {"error": f"{type(error).__name__}: {error}"}
        (Path(task["out"]) / f"{plan}-{rank}.json").write_text(json.dumps({"rank": rank, **report}))
        distributed.barrier()
    distributed.destroy_process_group()


def run(arch: str, folder: str, plan: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of one plan."""
    build = EVERY_BUILD[arch]
    plain = build.make()
    is_staged, has_own_batch = plan == "pp", plan == "fsdp + ep"
    inputs = build.inputs(plain)
    prompts = None if build.generate_inputs is None else build.generate_inputs(plain)

    def given(values: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if is_staged and "attention_mask" in values:
            # transformers 5.23 leaves padding on the left unmasked at a pipeline's later stages.
            values["attention_mask"] = torch.ones_like(values["attention_mask"])
        if has_own_batch and distributed.get_rank() == 1:
            values = {
                name: value.flip(0) if isinstance(value, torch.Tensor) else value for name, value in values.items()
            }
        return values

    def ran(model: Any) -> Any:
        with torch.no_grad():
            # A stage gives its hidden states on: what the whole model gives comes from generate.
            first = None if is_staged and prompts is not None else model(**given(inputs))
            tokens = None
            if prompts is not None:
                tokens = model.generate(**given(prompts), do_sample=False, max_new_tokens=NEW_TOKENS)
        return [each for each in (first, tokens) if each is not None]

    def load(_: Any) -> Any:
        return type(plain).from_pretrained(folder, distributed_config=DistributedConfig(**config)).eval()  # type: ignore[attr-defined]

    with Oracle(plain) as oracle, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected_of_one = ran(plain)
    model = bare(load, plain)
    model.generation_config = getattr(plain, "generation_config", None)
    expected = bare(ran, model)
    before = state_of(model)
    with torch.random.fork_rng(devices=[]), MoEDebugger(model, level="routes+tokens") as debugger, debugger.profile():
        torch.manual_seed(0)
        output = ran(model)
        assert debugger.session is not None
        decisions = debugger.session.decisions()
        problems = debugger.get_performance_metrics().problems
        is_replica = debugger.coordinates.is_replica
    sites = set(sites_of_layers(decisions.module_names, oracle.calls).values())
    here = {site: calls for site, calls in oracle.calls.items() if site in sites}
    comparison = compare(decisions, here, weight_rounding=WEIGHT_ROUNDING)
    if problems:
        comparison.add_problem(f"the capture reports problems: {problems}")
    if not is_same(expected, output):
        comparison.add_problem("the outputs with the debugger differ from those without")
    if prompts is not None and not torch.equal(output[-1], expected_of_one[-1]):
        comparison.add_problem("the tokens are not those of the model in one process")
    if before != state_of(model):
        comparison.add_problem("the model's hooks, methods or modes are not as they were before the debugger")
    return {
        "comparison": asdict(comparison),
        "sites": sorted(sites),
        "every_site": sorted(oracle.calls),
        "is_replica": is_replica,
    }


if __name__ == "__main__":
    main()
