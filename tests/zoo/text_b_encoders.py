"""Encoder-decoders, encoders and a vision backbone, from laguna to zaya."""

from typing import Any

import torch
from torch import nn
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OpenAIPrivacyFilterConfig,
    OpenAIPrivacyFilterForTokenClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    VitPoseBackbone,
    VitPoseBackboneConfig,
)
from zoo.build import BOS, EOS, PAD, VOCAB, Build, batch, decoder
from zoo.text_b_decoders import SIZES
from zoo.text_b_media import Padding, dtype_of, noise

__all__ = ["BUILDS"]

_SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_ANOTHER_SEED = 11


def _both(padding: Padding) -> Any:
    """Return the inputs of one forward: the texts to read, and those said so far, both padded."""

    def inputs(model: nn.Module) -> dict[str, Any]:
        said = batch(padding, seed=_ANOTHER_SEED)
        return {
            **batch(padding),
            "decoder_input_ids": said["input_ids"],
            "decoder_attention_mask": said["attention_mask"],
        }

    return inputs


def _switch() -> Any:
    return SwitchTransformersConfig(
        **{**_SPECIAL, "decoder_start_token_id": PAD},
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_experts=8,
        expert_capacity=1,
    )


def _nllb() -> Any:
    return NllbMoeConfig(
        **_SPECIAL,
        vocab_size=VOCAB,
        d_model=32,
        max_position_embeddings=128,
        encoder_layers=4,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        encoder_sparse_step=2,
        decoder_layers=4,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        decoder_sparse_step=2,
        decoder_start_token_id=EOS,
        num_experts=8,
        moe_eval_capacity_token_fraction=0.1,
    )


def _privacy_filter() -> Any:
    return OpenAIPrivacyFilterConfig(
        **{**SIZES, "intermediate_size": 16},
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _poses(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": noise(3, 3, 32, 24, dtype=dtype_of(model)), "dataset_index": torch.tensor([2, 0, 5])}


def _vitpose() -> Any:
    return VitPoseBackboneConfig(
        image_size=(32, 24),
        patch_size=(8, 8),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        num_experts=6,
        part_features=8,
    )


BUILDS: tuple[Build, ...] = (
    decoder(
        "nllb_moe",
        NllbMoeForConditionalGeneration,
        _nllb,
        kind="encoder-decoder",
        inputs=_both("left"),
        right=_both("right"),
        note="capacity of 3 tokens for each expert drops some; the library computes only its experts 0 and 1",
    ),
    decoder(
        "openai_privacy_filter",
        OpenAIPrivacyFilterForTokenClassification,
        _privacy_filter,
        kind="encoder",
        generate_inputs=None,
        note="weights are divided by k, and the experts' sum is multiplied by it",
    ),
    decoder(
        "switch_transformers",
        SwitchTransformersForConditionalGeneration,
        _switch,
        kind="encoder-decoder",
        inputs=_both("left"),
        right=_both("right"),
        note="capacity of 1 token for each expert and text drops some",
    ),
    decoder(
        "vitpose_backbone",
        VitPoseBackbone,
        _vitpose,
        kind="vision",
        inputs=_poses,
        generate_inputs=None,
        right=None,
        note="no router: the caller chooses one expert for each image",
    ),
)
