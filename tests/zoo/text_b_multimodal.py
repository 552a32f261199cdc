"""Models that read images or audio, from mistral_large4 to unlimited_ocr (without those of the Qwen family)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    MuseSparkConfig,
    MuseSparkForConditionalGeneration,
    Nemotron3_5TranscribeConfig,
    Nemotron3_5TranscribeForConditionalGeneration,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)
from zoo.build import SPECIAL, Build, decoder
from zoo.text_b_decoders import NEMOTRON_H, SIZES, yarn
from zoo.text_b_media import Padding, dtype_of, noise, written

__all__ = ["BUILDS"]

_MEDIA = SPECIAL
_HEADS: dict[str, Any] = {**SIZES, "head_dim": 8}
_DENSE_FIRST = ["dense", "sparse", "sparse"]
_GROUPS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
# The picture of a build is 8 pixels high and 16 wide, in patches of 4 by 4, merged 2 by 2: two tokens of the text.
_HEIGHT, _WIDTH, _PATCH = 8, 16, 4


def _with_media(
    name: str,
    model_class: Any,
    config: Callable[[], Any],
    media: Callable[[torch.dtype], dict[str, Any]],
    *,
    num_tokens: int = 2,
    note: str = "",
) -> Build:
    """Return the build of a model that reads an image or audio of `num_tokens` tokens in rows 0 and 2."""

    def inputs(padding: Padding) -> Callable[[nn.Module], dict[str, Any]]:
        tokens = (_MEDIA,) * num_tokens
        return lambda model: {**written(padding, {0: tokens, 2: tokens}), **media(dtype_of(model))}

    left, right = inputs("left"), inputs("right")
    build = decoder(
        name, model_class, config, kind="decoder in VLM", inputs=left, generate_inputs=left, right=right, note=note
    )

    def make(dtype: torch.dtype = torch.float32, experts_implementation: str | None = None) -> nn.Module:
        # The wrapper, or its vision tower, may refuse an implementation that its text model accepts.
        of_text = {"text_config": experts_implementation} if experts_implementation else None
        return build.make(dtype=dtype, experts_implementation=of_text)

    return replace(build, make=make)


def _mistral_large4() -> Any:
    return MistralLarge4Config(
        text_config={
            **SIZES,
            **_GROUPS,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "index_topk": 4,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "rope_parameters": yarn(),
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": _PATCH,
            "image_size": 32,
        },
        image_token_index=_MEDIA,
    )


def _muse_spark() -> Any:
    return MuseSparkConfig(
        text_config={
            **_HEADS,
            "moe_intermediate_size": 16,
            "moe_hidden_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "mlp_layer_types": _DENSE_FIRST,
            "sliding_window": 4,
            "output_multiplier": 0.7,
        },
        vision_config={
            "patch_size": _PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
        },
        audio_config={
            "patch_sizes": [2, 2],
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "conv_kernel_size": 3,
            "out_hidden_size": SIZES["hidden_size"],
        },
        image_token_id=_MEDIA,
        video_token_id=_MEDIA + 1,
        audio_token_id=_MEDIA + 2,
        out_hidden_size=64,
        projector_hidden_size=32,
    )


def _nemo_speechlm() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio = {**sizes, "num_mel_bins": 8}
    return Nemotron3_5TranscribeConfig(
        text_config={"model_type": "nemotron_h", **NEMOTRON_H},
        audio_config={
            "asr_config": dict(audio),
            "diarization_config": {
                "model_type": "nemotron3_diarization",
                "audio_config": dict(audio),
                "head_config": {"hidden_size": 8, "audio_hidden_size": 16, "num_speakers": 2},
                "streaming_config": {"num_speakers": 2},
            },
        },
        word_timestamp_config={**sizes, "vocab_size": 12, "blank_token_id": 11},
        audio_token_id=_MEDIA,
    )


def _nemotron_h_omni() -> Any:
    return NemotronH_Omni_Reasoning_V3_Config(
        text_config={"model_type": "nemotron_h", **NEMOTRON_H},
        vision_config={
            "model_type": "radio",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": _PATCH,
            "image_size": 32,
            "max_img_size": 32,
            "video_temporal_patch_size": 2,
        },
        vision_hidden_size=16,
        projector_hidden_size=32,
        image_token_id=_MEDIA,
        video_token_id=_MEDIA + 1,
        audio_token_id=_MEDIA + 2,
    )


def _step3p7() -> Any:
    return Step3p7Config(
        text_config={
            **_HEADS,
            "mlp_layer_types": _DENSE_FIRST,
            "moe_intermediate_size": 16,
            "share_expert_dim": 16,
            "n_routed_experts": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "moe_router_scaling_factor": 1.7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 2,
            "mlp_ratio": 2.0,
        },
        image_token_id=_MEDIA,
    )


def _unlimited_ocr() -> Any:
    return UnlimitedOcrConfig(
        text_config={
            **SIZES,
            **_GROUPS,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "sliding_window": 8,
            "mlp_layer_types": _DENSE_FIRST,
        },
        vision_config={
            "sam_config": {
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": _PATCH,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
                "downsample_channels": [8, 16],
                "initializer_range": 0.02,
            },
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 16,
            },
        },
        image_token_id=_MEDIA,
    )


BUILDS: tuple[Build, ...] = (
    _with_media(
        "mistral_large4",
        MistralLarge4ForConditionalGeneration,
        _mistral_large4,
        lambda dtype: {
            "pixel_values": noise(2, 3, _HEIGHT, _WIDTH, dtype=dtype),
            "image_sizes": torch.tensor([[_HEIGHT, _WIDTH]] * 2),
        },
    ),
    _with_media(
        "muse_spark",
        MuseSparkForConditionalGeneration,
        _muse_spark,
        lambda dtype: {
            "pixel_values": noise(16, 2 * 3 * _PATCH**2, dtype=dtype),
            "image_grid_thw": torch.tensor([[1, 2, 4]] * 2),
        },
        note="the experts work at a width of their own",
    ),
    _with_media(
        "nemo_speechlm",
        Nemotron3_5TranscribeForConditionalGeneration,
        _nemo_speechlm,
        lambda dtype: {
            "input_features": noise(2, 16, 8, dtype=dtype),
            "input_features_mask": torch.ones(2, 16, dtype=torch.int64),
        },
        note="reads audio; a layer is one of Mamba, attention, experts and dense",
    ),
    _with_media(
        "nemotron_h_omni",
        NemotronH_Omni_Reasoning_V3,
        _nemotron_h_omni,
        lambda dtype: {
            "pixel_values": noise(16, 3 * _PATCH**2, dtype=dtype),
            "image_grid_hw": torch.tensor([[2, 4]] * 2),
        },
        note="a layer is one of Mamba, attention, experts and dense",
    ),
    _with_media(
        "step3p7",
        Step3p7ForConditionalGeneration,
        _step3p7,
        lambda dtype: {"pixel_values": noise(2, 3, _HEIGHT, _WIDTH, dtype=dtype)},
        note="the routed scaling factor multiplies the experts' sum",
    ),
    _with_media(
        "unlimited_ocr",
        UnlimitedOcrForConditionalGeneration,
        _unlimited_ocr,
        lambda dtype: {"pixel_values": noise(2, 3, 16, 16, dtype=dtype)},
        num_tokens=3,
        note="weights are not renormalised",
    ),
)
