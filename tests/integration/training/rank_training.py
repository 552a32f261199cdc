"""One rank of the data-parallel training of `test_ranks.py`, started by torchrun: NATS URL, output folder, mode."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_moe import VOCABULARY, build, recount
from torch.nn.parallel import DistributedDataParallel

from moe_debugger import MoEDebugger
from moe_debugger.training import MoEDebuggerCallback

NUM_STEPS, ACCUMULATION, BATCH, LENGTH = 3, 2, 2, 8


def loop(model: Any, url: str, rank: int) -> dict[str, Any]:
    """A plain loop: no_sync for all but the last micro-batch, one block around each step."""
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    with MoEDebugger(
        model, level="routes", fleet=url, session_name="ranks", step_domain="global", kind="training", gradients=True
    ) as debugger:
        session = debugger.session
        assert session is not None
        for step in range(1, NUM_STEPS + 1):
            with debugger.step(step, lr=1e-2) as scope:
                loss = torch.zeros(())
                for batch in range(ACCUMULATION):
                    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
                    wrapped.require_backward_grad_sync = batch == ACCUMULATION - 1
                    loss = wrapped(input_ids=ids, labels=ids).loss / ACCUMULATION
                    loss.backward()
                whole = loss.detach().clone()
                dist.all_reduce(whole)
                scope.record(loss=whole / dist.get_world_size())
            optimizer.step()
            optimizer.zero_grad()
        norms = session.series().select("expert_gradient_norm").value.tolist()
        # Nobody ends the session: the other rank may still send.
        debugger.close(timeout_s=20, ends_session=False)
    return {"norms": norms}


def trainer(model: Any, url: str, folder: Path) -> dict[str, Any]:
    """The same by a Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(3, VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    ]
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "ddp_backend": "gloo",
        "disable_tqdm": True,
    }
    with MoEDebuggerCallback(fleet=url, session_name="ranks", gradients=True) as callback:
        running = Trainer(model, TrainingArguments(**options), train_dataset=rows, callbacks=[callback])
        running.train()
        norms = callback.session.series().select("expert_gradient_norm").value.tolist()
        logged = [one["loss"] for one in running.state.log_history if "loss" in one]
    return {"norms": norms, "logged": logged}


def main() -> None:
    """Train, and write down what this rank's experts were really given."""
    url, folder, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model = build("mixtral", output_router_logits=True).train()
    with recount(model) as counted:
        if mode == "loop":
            dist.init_process_group("gloo")
            result = loop(model, url, rank)
        else:
            result = trainer(model, url, folder)
    result["counts"] = [counted.counts(name, 8).tolist() for name in sorted(counted.ids)]
    result["rank"] = rank
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
