"""The Qwen family from qwen2_moe on."""

from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3OmniMoeTalkerForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerConfig
from zoo.build import SPECIAL, Build, batch, decoder
from zoo.text_b_decoders import SIZES
from zoo.text_b_media import Padding, dtype_of, noise, written

__all__ = ["BUILDS"]

_IMAGE, _VIDEO, _AUDIO, _START, _END, _AUDIO_START = range(SPECIAL, SPECIAL + 6)
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
_SHARED: dict[str, Any] = {**_EXPERTS, "shared_expert_intermediate_size": 24}
_HEADS: dict[str, Any] = {**SIZES, "head_dim": 8}
_NO_DENSE: dict[str, Any] = {name: size for name, size in _HEADS.items() if name != "intermediate_size"}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_HYBRID: dict[str, Any] = {
    **_LINEAR_ATTENTION,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": SIZES["hidden_size"],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
# The models read these, while the library's configurations do not declare them.
_MORE_OF_THINKER: dict[str, Any] = {
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
    "pad_token_id": SIZES["pad_token_id"],
}
_MORE_OF_TALKER: dict[str, Any] = {"spatial_merge_size": 2}
# Two images of 2 by 4 patches: merged 2 by 2, each is two tokens of the text.
_GRID = ((1, 2, 4), (1, 2, 4))
_PATCH_SIZE = 3 * 2 * 4 * 4


def _images(padding: Padding, *, typed: bool) -> Any:
    """Return the inputs that write an image into rows 0 and 2; `typed` adds the type of each token."""

    def inputs(model: nn.Module) -> dict[str, Any]:
        picture = (_START, _IMAGE, _IMAGE, _END)
        result = written(padding, {0: picture, 2: picture})
        if typed:
            result["mm_token_type_ids"] = (result["input_ids"] == _IMAGE).to(torch.int64)
        result["pixel_values"] = noise(16, _PATCH_SIZE, dtype=dtype_of(model))
        result["image_grid_thw"] = torch.tensor(_GRID)
        return result

    return inputs


def _vision_model(name: str, model_class: Any, config: Any, *, typed: bool) -> Build:
    left, right = _images("left", typed=typed), _images("right", typed=typed)
    return decoder(name, model_class, config, kind="decoder in VLM", inputs=left, generate_inputs=left, right=right)


def _qwen3_vl_moe() -> Any:
    return Qwen3VLMoeConfig(
        text_config={**_HEADS, **_EXPERTS, "mlp_only_layers": [0], "rope_parameters": dict(_MROPE)},
        vision_config=dict(_VISION),
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
    )


def _qwen3_omni_thinker() -> Any:
    return Qwen3OmniMoeThinkerConfig(
        text_config={**SIZES, **_EXPERTS, "rope_parameters": dict(_MROPE)},
        vision_config=dict(_VISION),
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 16,
            "n_window": 4,
            "n_window_infer": 8,
            "output_dim": SIZES["hidden_size"],
            "downsample_hidden_size": 8,
            "max_source_positions": 32,
        },
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        audio_token_id=_AUDIO,
        audio_start_token_id=_AUDIO_START,
        **_MORE_OF_THINKER,
    )


def _talker() -> Any:
    return Qwen3OmniMoeTalkerConfig(
        text_config={**SIZES, **_SHARED},
        code_predictor_config={**_HEADS, "num_hidden_layers": 1, "num_code_groups": 4},
        num_code_groups=4,
        thinker_hidden_size=SIZES["hidden_size"],
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        audio_token_id=_AUDIO,
        audio_start_token_id=_AUDIO_START,
        vision_start_token_id=_START,
        **_MORE_OF_TALKER,
    )


def _talker_inputs(padding: Padding, *, generates: bool = False) -> Any:
    """Return the inputs of the talker, which takes embeddings; generating, it also takes what the thinker says next."""

    def inputs(model: Any) -> dict[str, Any]:
        texts = batch(padding)
        result = {"attention_mask": texts["attention_mask"]}
        with torch.no_grad():
            result["inputs_embeds"] = model.get_input_embeddings()(texts["input_ids"])
        if generates:
            rows, hidden = texts["input_ids"].shape[0], SIZES["hidden_size"]
            # A step's residual codes come from the hidden states of the step before.
            result["output_hidden_states"] = True
            result["talker_input_ids"] = texts["input_ids"]
            result["trailing_text_hidden"] = noise(rows, 2, hidden, dtype=dtype_of(model))
            result["tts_pad_embed"] = noise(1, 1, hidden, dtype=dtype_of(model))
        return result

    return inputs


BUILDS: tuple[Build, ...] = (
    decoder(
        "qwen2_moe",
        Qwen2MoeForCausalLM,
        lambda: Qwen2MoeConfig(**SIZES, **_SHARED, mlp_only_layers=[0]),
        note="weights are not renormalised",
    ),
    decoder(
        "qwen3_5_moe_text",
        Qwen3_5MoeForCausalLM,
        lambda: Qwen3_5MoeTextConfig(**_NO_DENSE, **_SHARED, **_HYBRID),
    ),
    decoder(
        "qwen3_moe",
        Qwen3MoeForCausalLM,
        lambda: Qwen3MoeConfig(**{**_HEADS, "num_hidden_layers": 4}, **_EXPERTS, decoder_sparse_step=2),
        note="weights are not renormalised",
    ),
    decoder(
        "qwen3_next",
        Qwen3NextForCausalLM,
        lambda: Qwen3NextConfig(**_HEADS, **_SHARED, **_HYBRID, mlp_only_layers=[1]),
    ),
    decoder(
        "qwen3_omni_moe_talker_text",
        Qwen3OmniMoeTalkerForConditionalGeneration,
        _talker,
        inputs=_talker_inputs("left"),
        generate_inputs=_talker_inputs("left", generates=True),
        right=_talker_inputs("right"),
        note="takes embeddings; generates together with its code predictor",
    ),
    _vision_model(
        "qwen3_omni_moe_thinker", Qwen3OmniMoeThinkerForConditionalGeneration, _qwen3_omni_thinker, typed=False
    ),
    _vision_model("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration, _qwen3_vl_moe, typed=True),
    decoder(
        "qwen4_exp_text",
        Qwen4ExpForCausalLM,
        lambda: Qwen4ExpTextConfig(
            **{
                **_NO_DENSE,
                **_SHARED,
                **_HYBRID,
                "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            },
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=4,
            indexer_compress_ratio=2,
        ),
        note="an indexer selects tokens for the attention; several residual streams",
    ),
)
