"""What each rank does: load a saved build under each plan, run it, and compare what it captured.

    torchrun --nproc-per-node 2 modes_sharded_rank.py '{"arch": "mixtral", "folder": "...", "out": "...", "plans": {}}'

The oracle watches the plain model, which each rank has too, in one process and with the weights of the sharded one.
Only a pipeline's stages hold whole experts: there it watches the sharded model itself. Rank r writes PLAN-r.json.

The reference has to be what the run computes, and transformers 5.23 changes that when it shards some models, without a
debugger, too. A pipeline's later stages mask a decoded token's past as if it were one column wide, the cache that they
ask for its width being that of the first layer, and every stage applies a last norm of another name than `norm`
(Jamba's). FSDP splits a fused checkpoint tensor between the ranks before it is taken apart, so that queries, keys and
values of Nemotron-H Omni's vision tower get each other's rows.
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
from oracle.compare import Comparison, compare, sites_of_layers
from oracle.matrix import NEW_TOKENS
from oracle.observe import bare, is_same, state_of
from oracle.outcome import Impossible
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig  # pyright: ignore[reportPrivateImportUsage]

from moe_debugger import ModelNotSupportedError, MoEDebugger

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
        if has_own_batch and distributed.get_rank() == 1:
            values = {
                name: value.flip(0) if isinstance(value, torch.Tensor) else value for name, value in values.items()
            }
        return values

    def ran(model: Any) -> Any:
        with torch.no_grad():
            first = model(**given(inputs))
            tokens = None
            if prompts is not None:
                tokens = model.generate(**given(prompts), do_sample=False, max_new_tokens=NEW_TOKENS)
        return [each for each in (first, tokens) if each is not None]

    def load(_: Any) -> Any:
        return type(plain).from_pretrained(folder, distributed_config=DistributedConfig(**config)).eval()  # type: ignore[attr-defined]

    model = bare(load, plain)
    model.generation_config = getattr(plain, "generation_config", None)
    every_site = [site.name for site in Oracle(plain).sites]
    expected = bare(ran, model)
    before = state_of(model)
    if is_staged and not Oracle(model).sites:
        comparison = _check_refusal(model)
        sites, is_replica = set[str](), False
        # The other stages' watched run needs this one's part; where it fails, that is not the bare model's fault.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = ran(model)
    else:
        with Oracle(model if is_staged else plain) as oracle, torch.random.fork_rng(devices=[]):
            if has_own_batch:
                _copy_weights(model, plain)
            torch.manual_seed(0)
            output_of_one = None if is_staged else ran(plain)
            with MoEDebugger(model, level="routes+tokens") as debugger, debugger.profile():
                torch.manual_seed(0)
                output = ran(model)
                assert debugger.session is not None
                decisions = debugger.session.decisions()
                problems = debugger.get_performance_metrics().problems
                is_replica = debugger.coordinates.is_replica
        sites = set(sites_of_layers(decisions.module_names, oracle.calls).values())
        comparison = compare(decisions, oracle.calls, weight_rounding=WEIGHT_ROUNDING)
        if problems:
            comparison.add_problem(f"the capture reports problems: {problems}")
        if output_of_one and prompts is not None and not torch.equal(output[-1], output_of_one[-1]):
            comparison.add_problem("the tokens are not those of the model in one process")
    if not is_same(expected, output):
        comparison.add_problem("the outputs with the debugger differ from those without")
    if before != state_of(model):
        comparison.add_problem("the model's hooks, methods or modes are not as they were before the debugger")
    return {
        "comparison": asdict(comparison),
        "sites": sorted(sites),
        "every_site": sorted(every_site),
        "is_replica": is_replica,
    }


def _check_refusal(model: Any) -> Comparison:
    """Check that the debugger does not watch a pipeline's stage that holds no experts, and says why."""
    result = Comparison()
    try:
        MoEDebugger(model).close()
    except ModelNotSupportedError as error:
        if "this pipeline stage holds no MoE layer" not in str(error):
            result.add_problem(f"the stage holds no experts, but the debugger says: {error}")
    else:
        result.add_problem("the stage holds no experts, but the debugger watches it")
    return result


def _copy_weights(model: Any, plain: Any) -> None:
    """Give the plain model the weights that the sharded one runs with; all ranks do it together."""
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
    plain.load_state_dict(weights)


if __name__ == "__main__":
    main()
