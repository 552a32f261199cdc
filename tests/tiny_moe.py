"""Tiny random models of five architectures, and a recount taken inside their experts' forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["ARCHITECTURES", "Recount", "build", "recount"]

VOCABULARY = 96
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny model in eval mode, with weights spread so that routing differs between tokens."""
    torch.manual_seed(seed)
    shared = {**_SHARED, **changes}
    model: Any
    if name == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**shared, num_local_experts=8, num_experts_per_tok=2))
    elif name == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**{**shared, "head_dim": 8}, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16)
        )
    elif name == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**shared, num_experts=8, num_experts_per_tok=2))
    elif name == "gpt_oss":
        model = GptOssForCausalLM(GptOssConfig(**shared, num_local_experts=8, num_experts_per_tok=2, head_dim=8))
    else:
        model = DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **{**shared, "num_key_value_heads": 4},
                n_routed_experts=8,
                num_experts_per_tok=2,
                n_group=4,
                topk_group=2,
                moe_intermediate_size=16,
                n_shared_experts=1,
                first_k_dense_replace=1,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            )
        )
    with torch.no_grad():
        for module_name, parameter in model.named_parameters():
            if "gate.weight" in module_name or "router.weight" in module_name:
                parameter.normal_(std=0.5)
        for module in model.modules():
            bias = getattr(module, "e_score_correction_bias", None)
            if bias is not None:
                bias.normal_(std=0.2)
    return model.to(dtype).eval()


@dataclass
class Recount:
    """What the experts were called with: for each experts module the ids and weights of each call."""

    ids: dict[str, list[np.ndarray[Any, Any]]] = field(default_factory=dict)
    weights: dict[str, list[np.ndarray[Any, Any]]] = field(default_factory=dict)

    def counts(self, name: str, num_experts: int) -> np.ndarray[Any, Any]:
        """Assignments per expert, padded tokens included."""
        return np.bincount(np.concatenate(self.ids[name]).reshape(-1), minlength=num_experts)


@contextmanager
def recount(model: nn.Module) -> Iterator[Recount]:
    """Patch `forward` of each experts module, sharing no code with the capture."""
    result = Recount()
    patched: list[tuple[nn.Module, Any]] = []
    for name, module in model.named_modules():
        if name.split(".")[-1] != "experts":
            continue
        original = module.forward

        def counted(
            hidden: Any, ids: Any, weights: Any, *rest: Any, _name: str = name, _original: Any = original
        ) -> Any:
            result.ids.setdefault(_name, []).append(ids.detach().cpu().numpy().copy())
            result.weights.setdefault(_name, []).append(weights.detach().float().cpu().numpy().copy())
            return _original(hidden, ids, weights, *rest)

        module.forward = counted
        patched.append((module, original))
    try:
        yield result
    finally:
        for module, _ in patched:
            del module.forward
