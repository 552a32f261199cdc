"""Generate with a sharded MoE model and see the load of every expert-parallel rank.

    torchrun --nproc-per-node 2 examples/sharded/generate.py --model tiny --plan ep

`--model tiny` is a random Mixtral of 8 experts that is made on the spot; else give a folder with config.json,
safetensors and a tokenizer. Nothing is downloaded. Plans, for N processes:

    tp   tensor parallelism over N: every rank holds a slice of each expert
    ep   tensor parallelism over N, and each rank holds N-th of the experts
    dp   FSDP over N, each rank with prompts of its own, and N-th of the experts
    pp   pipeline parallelism over N: every rank holds some of the layers

With `--fleet` (the `nats` value of `moe-debugger up --json`) every rank becomes a source of one session, and the page
shows them together.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from moe_debugger import MoEDebugger

PLANS = ("tp", "ep", "dp", "pp")
NUM_TINY_PROMPTS, TINY_PROMPT_LENGTH = 4, 12


def main() -> None:
    """Run one rank."""
    arguments = parse_arguments()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        # Before the process group: within one, only rank 0 saves.
        folder = make_tiny_model(Path(scratch)) if arguments.model == "tiny" else arguments.model
        distributed.init_process_group()
        num_ranks = distributed.get_world_size()
        config: dict[str, Any] = {
            "tp": {"tp_size": num_ranks},
            "ep": {"tp_size": num_ranks, "ep_size": num_ranks},
            "dp": {"fsdp_size": num_ranks, "ep_size": num_ranks},
            "pp": {"pp_size": num_ranks},
        }[arguments.plan]
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(**config), local_files_only=True
        ).eval()

    debugger = MoEDebugger(
        model,
        fleet=arguments.fleet,
        session_name=f"sharded-{arguments.plan}",
        # Sessions are joined by name and model, and each rank has made the tiny one in a folder of its own.
        model_name=str(arguments.model),
    )
    rank = debugger.coordinates
    session = debugger.start_session()
    inputs = make_inputs(arguments, rank.data_parallel_rank)
    with torch.no_grad():
        # FSDP gathers weights at every forward, so all ranks have to run equally many: none may stop early.
        model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=arguments.max_new_tokens,
            min_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )

    for turn in range(num_ranks):
        distributed.barrier()
        if turn == rank.global_rank:
            print(f"\n=== {rank}", flush=True)
            if not rank.is_replica:
                print(session.get_routing_stats(), session.rank_load(), sep="\n\n", flush=True)
    session.flush()
    # The goodbye that ends the session in the fleet has to be the last: what came after it would count as late.
    distributed.barrier()
    debugger.close(ends_session=rank.global_rank == 0)
    distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or the folder of a transformers MoE model")
    parser.add_argument("--plan", choices=PLANS, default="ep")
    parser.add_argument("--fleet", help="NATS URL of a running fleet")
    parser.add_argument("--prompt", default="The mixture of experts", help="for a model that is not tiny")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    return parser.parse_args()


def make_tiny_model(folder: Path) -> Path:
    """Save a random model; every rank makes the same one."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
        )
    )
    model.save_pretrained(folder)
    return folder


def make_inputs(arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Return one batch; ranks of the same data-parallel rank have to get the same one."""
    if arguments.model == "tiny":
        generator = torch.Generator().manual_seed(batch)
        input_ids = torch.randint(3, 256, (NUM_TINY_PROMPTS, TINY_PROMPT_LENGTH), generator=generator)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    prompt = arguments.prompt if batch == 0 else f"{batch}. {arguments.prompt}"
    return dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))


if __name__ == "__main__":
    main()
