"""Text decoders from laguna to zaya, without the Qwen family."""

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    LagunaConfig,
    LagunaForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MellumConfig,
    MellumForCausalLM,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
    Mistral4Config,
    Mistral4ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    SolarOpenConfig,
    SolarOpenForCausalLM,
    ZayaConfig,
    ZayaForCausalLM,
)
from zoo.build import BOS, EOS, PAD, VOCAB, Build, decoder

__all__ = ["BUILDS", "NEMOTRON_H", "SIZES", "yarn"]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_HEADS: dict[str, Any] = {**SIZES, "head_dim": 8}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_SLIDING_IN_THE_MIDDLE: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
}
_DENSE_FIRST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_GROUPS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
_EIGHT: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_SELECTION_BIAS = re.compile(r"(correction_bias|balancing_biases)$")
# The last class of zaya's router skips the experts: this much makes a few tokens of each layer do so.
_SKIP_BIAS = 0.2
_SMALL_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}

NEMOTRON_H: dict[str, Any] = {
    **{name: size for name, size in _HEADS.items() if name != "num_hidden_layers"},
    **_GROUPS,
    "num_experts_per_tok": 3,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 4,
    "moe_shared_expert_intermediate_size": 16,
}


def yarn() -> dict[str, Any]:
    """Return a YaRN setting that agrees with `max_position_embeddings`: the default one warns on a tiny model."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


def _longcat_flash() -> LongcatFlashConfig:
    sizes = {name: size for name, size in SIZES.items() if name not in ("num_hidden_layers", "intermediate_size")}
    return LongcatFlashConfig(
        **{**sizes, **_LATENT_ATTENTION},
        head_dim=8,
        num_layers=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        moe_topk=3,
        n_routed_experts=8,
        zero_expert_num=4,
        routed_scaling_factor=2.0,
    )


def _with_small_biases(build: Build) -> Build:
    """Return the build with a tenth of each selection bias: as drawn, they outweigh the probabilities of a softmax."""

    def make(dtype: torch.dtype = torch.float32, experts_implementation: str | None = None) -> nn.Module:
        model = build.make(dtype=dtype, experts_implementation=experts_implementation)
        for name, bias in [*model.named_buffers(), *model.named_parameters()]:
            if _SELECTION_BIAS.search(name):
                with torch.no_grad():
                    bias.mul_(0.1)
                    if name.endswith("balancing_biases"):
                        bias[-1] = _SKIP_BIAS
        return model

    return replace(build, make=make)


BUILDS: tuple[Build, ...] = (
    decoder(
        "laguna",
        LagunaForCausalLM,
        lambda: LagunaConfig(
            **_HEADS,
            **_SMALL_EXPERTS,
            **_SLIDING_IN_THE_MIDDLE,
            **_DENSE_FIRST,
            shared_expert_intermediate_size=16,
            num_attention_heads_per_layer=[4, 2, 4],
            moe_routed_scaling_factor=1.7,
            moe_router_logit_softcapping=3.0,
        ),
        note="softcapped logits; the routed scaling factor multiplies the experts' sum",
    ),
    decoder(
        "lfm2_moe",
        Lfm2MoeForCausalLM,
        lambda: Lfm2MoeConfig(
            **{**SIZES, **_SMALL_EXPERTS, "num_hidden_layers": 4},
            num_dense_layers=1,
            routed_scaling_factor=1.5,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
        ),
    ),
    decoder(
        "llama4_text",
        Llama4ForCausalLM,
        lambda: Llama4TextConfig(
            **{**_HEADS, **_EIGHT, "num_hidden_layers": 4, "intermediate_size": 16},
            intermediate_size_mlp=48,
            interleave_moe_layer_step=2,
            attention_chunk_size=32,
        ),
        note="the weight scales the expert's input",
    ),
    _with_small_biases(
        decoder("longcat_flash", LongcatFlashForCausalLM, _longcat_flash, note="ids 8 to 11 are identity experts")
    ),
    decoder(
        "mellum",
        MellumForCausalLM,
        lambda: MellumConfig(**_HEADS, **_SMALL_EXPERTS, **_SLIDING_IN_THE_MIDDLE, **_DENSE_FIRST),
    ),
    decoder(
        "mimo_v2_flash",
        MiMoV2FlashForCausalLM,
        lambda: MiMoV2FlashConfig(
            **{**_HEADS, **_GROUPS, **_SLIDING_IN_THE_MIDDLE, **_DENSE_FIRST, "head_dim": 12}, v_head_dim=8
        ),
    ),
    decoder(
        "minimax",
        MiniMaxForCausalLM,
        lambda: MiniMaxConfig(
            **_HEADS, **_EIGHT, block_size=4, layer_types=["full_attention", "linear_attention", "full_attention"]
        ),
    ),
    decoder(
        "minimax_m2",
        MiniMaxM2ForCausalLM,
        lambda: MiniMaxM2Config(**{**_HEADS, **_EIGHT, "num_experts_per_tok": 3}),
    ),
    decoder(
        "minimax_m3_vl_text",
        MiniMaxM3VLForCausalLM,
        lambda: MiniMaxM3VLTextConfig(
            **{**_HEADS, **_EIGHT, **_DENSE_FIRST, "intermediate_size": 16},
            dense_intermediate_size=48,
            shared_intermediate_size=16,
            rotary_dim=4,
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=2,
            layer_types=["full_attention", "minimax_m3_sparse", "full_attention"],
        ),
        note="the routed scaling factor multiplies the experts' sum; an indexer selects tokens for the attention",
    ),
    decoder(
        "mistral4",
        Mistral4ForCausalLM,
        lambda: Mistral4Config(
            **{**SIZES, **_LATENT_ATTENTION, **_GROUPS},
            first_k_dense_replace=1,
            rope_parameters={**yarn(), "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        ),
    ),
    decoder("mixtral", MixtralForCausalLM, lambda: MixtralConfig(**SIZES, **_EIGHT)),
    decoder(
        "nemotron_h",
        NemotronHForCausalLM,
        lambda: NemotronHConfig(**NEMOTRON_H),
        note="a layer is one of Mamba, attention, experts and dense",
    ),
    decoder("olmoe", OlmoeForCausalLM, lambda: OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3)),
    decoder(
        "phimoe", PhimoeForCausalLM, lambda: PhimoeConfig(**SIZES, **_EIGHT), note="the weights add up to 2 at most"
    ),
    decoder(
        "solar_open",
        SolarOpenForCausalLM,
        lambda: SolarOpenConfig(
            **{name: size for name, size in _HEADS.items() if name != "intermediate_size"}, **_GROUPS
        ),
    ),
    _with_small_biases(
        decoder(
            "zaya",
            ZayaForCausalLM,
            lambda: ZayaConfig(**_HEADS, moe_intermediate_size=16, num_experts=8, router_hidden_size=16),
            note="one expert for each token, or none: class 8 of the router skips them",
        )
    ),
)
