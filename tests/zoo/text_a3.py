"""Builds of decoders inside models of images, on texts alone, A to K."""

from typing import Any

from zoo.build import SIZES, SPECIAL, VOCAB, Build, configured, decoder
from zoo.text_a1 import GROUPS, ROUTED
from zoo.text_a2 import INDEXED, LATENT, SHARED

WITH_VIDEO = (
    "image_start_token_id",
    "image_end_token_id",
    "video_token_id",
    "video_start_token_id",
    "video_end_token_id",
)


def image_tokens(*names: str) -> dict[str, Any]:
    """Return the ids from `SPECIAL` up for `image_token_id` and then for the named fields of a configuration."""
    return {name: SPECIAL + index for index, name in enumerate(["image_token_id", *names])}


def composed(config_class: str, text_class: str, text: dict[str, Any], **fields: Any) -> Any:
    """Return a configuration whose text part has the sizes of the zoo and the fields `text`."""
    without_sizes = dict.fromkeys(SIZES, ...)
    return configured(config_class, **{**without_sizes, "text_config": configured(text_class, **text), **fields})


def in_vlm(name: str, stem: str, text_class: str, text: dict[str, Any], note: str = "", **fields: Any) -> Build:
    """Return the build of `<stem>ForConditionalGeneration` on texts; the image tower stays idle."""
    return decoder(
        name,
        f"{stem}ForConditionalGeneration",
        lambda: composed(f"{stem}Config", text_class, text, **fields),
        kind="decoder in VLM",
        note=note,
    )


BUILDS = [
    in_vlm(
        "deepseek_ocr2",
        "DeepseekOcr2",
        "DeepseekOcr2TextConfig",
        {
            **ROUTED,
            **SHARED,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 64,
                "global_attn_indexes": [0],
                "downsample_channels": [16, 32],
            },
            "encoder_config": {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
        },
        **image_tokens(),
    ),
    in_vlm(
        "glm4v_moe",
        "Glm4vMoe",
        "Glm4vMoeTextConfig",
        {
            **ROUTED,
            **GROUPS,
            **SHARED,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "image_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
        },
        **image_tokens(*WITH_VIDEO),
    ),
    in_vlm(
        "glm5_next",
        "Glm5Next",
        "Glm5NextTextConfig",
        {
            **LATENT,
            **INDEXED,
            **ROUTED,
            **GROUPS,
            **SHARED,
            "qk_rope_head_dim": 0,
            "index_kpool": 2,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
            "image_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "projection_intermediate_size": 32,
        },
        **image_tokens(*WITH_VIDEO),
    ),
    in_vlm(
        "internvl_qwen3_moe",
        "InternVL",
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
        note="a wrapper around any text model",
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "image_size": 16,
            "patch_size": 4,
        },
        tie_word_embeddings=False,
        **image_tokens(),
    ),
    in_vlm(
        "kimi_k25",
        "Kimi_K25",
        "DeepseekV3Config",
        {**LATENT, **ROUTED, **GROUPS, **SHARED, "first_k_dense_replace": 1},
        note="a wrapper around deepseek_v3",
        vision_config={
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
        },
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **image_tokens("video_token_id", "vision_start_token_id", "vision_end_token_id"),
    ),
]
