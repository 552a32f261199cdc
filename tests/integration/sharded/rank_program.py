"""What each rank runs: load a saved model under a plan, generate with the debugger attached, write what it saw.

    torchrun --nproc-per-node 2 rank_program.py '{"out": "...", "jobs": [{"name": "tp", "folder": "...", ...}]}'

A job: `name`, `folder`, `config` (of DistributedConfig), `inputs` (by name, a list of batches), and optionally
`own_batch` (each data-parallel rank takes a batch of its own) and `fleet`. Rank r writes NAME-r.npz and NAME-r.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig  # pyright: ignore[reportPrivateImportUsage]

from moe_debugger import MoEDebugger

NUM_NEW_TOKENS = 3


def main() -> None:
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    for job in task["jobs"]:
        run(job, Path(task["out"]))
    distributed.destroy_process_group()


def run(job: dict[str, Any], out: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"], distributed_config=DistributedConfig(**job["config"])
    ).eval()
    debugger = MoEDebugger(model, fleet=job.get("fleet"), session_name=job["name"])
    place = debugger.coordinates
    batch = place.data_parallel_rank if job.get("own_batch") else 0
    session = debugger.start_session()
    inputs = {name: torch.tensor(rows[batch]) for name, rows in job["inputs"].items()}
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    decisions = session.decisions()
    metrics = session.get_performance_metrics()
    np.savez(
        out / f"{job['name']}-{place.global_rank}.npz",
        tokens=tokens.numpy(),
        layer_index=decisions.layer_index,
        expert_ids=decisions.expert_ids,
        gate_weights=decisions.gate_weights,
        rank=decisions.rank,
        phase=decisions.phase,
        position=decisions.position,
        request_index=decisions.request_index,
    )
    report = {
        "coordinates": {name: getattr(place, name) for name in place.__dataclass_fields__},
        "is_replica": place.is_replica,
        "layers": [[info.layer_index, info.module_name, info.num_experts, info.top_k] for info in session.layers()],
        "rank_load": session.rank_load().to_dict()["rows"],
        "owners": [row.expert_parallel_rank for row in session.get_expert_metrics().experts],
        "problems": metrics.problems,
        "session_id": session.session_id,
        "source_id": session.source_id,
    }
    (out / f"{job['name']}-{place.global_rank}.json").write_text(json.dumps(report))
    session.flush()
    # A goodbye that ends the session comes after what all ranks have to say.
    distributed.barrier()
    debugger.close(ends_session=place.global_rank == 0, timeout_s=10)
    distributed.barrier()


if __name__ == "__main__":
    main()
