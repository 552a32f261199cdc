"""Watch a GLaM, which no release of transformers has: register its adapter, generate, and see where the tokens went.

    python examples/glam/watch.py

The model is a random one that is made on the spot: two layers of 64 experts, of which a token goes to two. Each expert
has room for 1.25 times its even share, and what finds it full is dropped.
"""

import argparse

import torch
from glam_adapter import GlamAdapter
from modeling_glam import tiny_model

from moe_debugger import MoEDebugger, register_adapter

NUM_PROMPTS, PROMPT_LENGTH = 8, 24
DROPPED = 2  # SlotStatus, see docs/decisions.md


def main() -> None:
    """Generate from random prompts, and print what was captured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()

    register_adapter(GlamAdapter())
    model = tiny_model()
    prompts = torch.randint(1, 256, (NUM_PROMPTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    debugger = MoEDebugger(model)
    session = debugger.start_session()
    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=arguments.max_new_tokens, do_sample=False
    )
    print(session.layers())
    print()
    print(session.get_routing_stats())
    print()
    decisions = session.decisions()
    for layer in session.layers():
        rows = (decisions.layer_index == layer.layer_index) & ~decisions.is_padding
        share = (decisions.slot_status[rows] == DROPPED).mean()
        print(f"{layer.module_name}: {share:.1%} of {rows.sum() * layer.top_k} choices found their expert full")
    debugger.close()


if __name__ == "__main__":
    main()
