"""Builds of decoders without latent attention, A to G."""

from typing import Any

from zoo.build import VOCAB, Build, configured, decoder

# The two names under which configurations keep the same numbers.
ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
ONE_DENSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"]}


def causal(name: str, stem: str, config: str = "", note: str = "", **fields: Any) -> Build:
    """Return the build of `<stem>ForCausalLM` with the class `config` (by default `<stem>Config`) of `fields`."""
    config = config or f"{stem}Config"
    return decoder(name, f"{stem}ForCausalLM", lambda: configured(config, **fields), note=note)


BUILDS = [
    causal("afmoe", "Afmoe", **EXPERTS, num_dense_layers=1, num_shared_experts=1, head_dim=8, route_scale=1.5),
    causal("aria_text", "AriaText", moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1),
    causal("beam", "Beam", **EXPERTS, **GROUPS, **ONE_DENSE, head_dim=8, note="the block scales after the experts"),
    causal(
        "cohere2_moe",
        "Cohere2Moe",
        note="the average with the shared expert halves what the routed experts add",
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=1,
        head_dim=8,
        first_k_dense_replace=1,
        tie_word_embeddings=False,
    ),
    causal(
        "cohere2_moe_sigmoid",
        "Cohere2Moe",
        num_experts=8,
        num_experts_per_tok=3,
        expert_selection_fn="sigmoid",
        head_dim=8,
        first_k_dense_replace=1,
        tie_word_embeddings=False,
    ),
    causal(
        "dbrx",
        "Dbrx",
        note="top-k is done in the block, not in the router",
        hidden_size=...,
        intermediate_size=...,
        num_hidden_layers=...,
        num_attention_heads=...,
        num_key_value_heads=...,
        max_position_embeddings=...,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    ),
    causal(
        "doge",
        "Doge",
        note="product keys: 4 x 4 of them choose among 16 experts, which are embeddings",
        is_moe=True,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    causal("dots1", "Dots1", **ROUTED, **GROUPS, n_shared_experts=1, first_k_dense_replace=1),
    causal(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        tie_word_embeddings=False,
    ),
    causal("exaone_moe", "ExaoneMoe", **EXPERTS, **GROUPS, num_shared_experts=1, sliding_window=4),
    causal("flex_olmo", "FlexOlmo", num_experts=8, num_experts_per_tok=3),
    causal("flint", "Flint", **EXPERTS, shared_expert_intermediate_size=16, head_dim=8, mlp_only_layers=[0]),
    causal(
        "gemma4_text",
        "Gemma4",
        "Gemma4TextConfig",
        note="router and experts sit in the layer itself, beside a dense MLP",
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=16,
        tie_word_embeddings=False,
    ),
    causal("glm4_moe", "Glm4Moe", **ROUTED, **GROUPS, first_k_dense_replace=1, num_mtp_layers=0),
    causal(
        "gpt_oss",
        "GptOss",
        note="the router has a bias",
        num_local_experts=8,
        num_experts_per_tok=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    causal("granitemoe", "GraniteMoe", num_local_experts=8, num_experts_per_tok=2),
    causal("granitemoe_swa", "GraniteMoeSWA", num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=16),
    causal(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        note="Mamba and attention layers, each with experts",
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    causal(
        "granitemoeshared", "GraniteMoeShared", num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=16
    ),
]
