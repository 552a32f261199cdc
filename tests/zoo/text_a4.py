"""Builds of what runs otherwise than a decoder of texts: images and texts together, a block diffusion, a tower."""

from typing import Any, Literal

import torch
from torch import nn
from zoo.build import SEED, SIZES, SPECIAL, Build, batch, configured, decoder, left_padded, maker
from zoo.text_a3 import WITH_VIDEO, composed, image_tokens

IMAGE, IMAGE_START, IMAGE_END = SPECIAL, SPECIAL + 1, SPECIAL + 2
CANVAS = 4
Padding = Literal["left", "right"]


def _ernie(**fields: Any) -> Any:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 32}
    text = {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": [16, 8],
        "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": False,
    }
    return composed(
        "Ernie4_5_VLMoeConfig",
        "Ernie4_5_VLMoeTextConfig",
        {**text, **fields},
        vision_config=vision,
        tie_word_embeddings=False,
        **image_tokens(*WITH_VIDEO),
    )


def _text_and_images(padding: Padding) -> dict[str, Any]:
    """Return the batch with an image of two tokens, between its start and its end, in the texts 0 and 2."""
    inputs = batch(padding)
    image = torch.tensor([IMAGE_START, IMAGE, IMAGE, IMAGE_END])
    moe_types = torch.zeros_like(inputs["input_ids"])
    for row in (0, 2):
        first = int(inputs["attention_mask"][row].argmax()) + 1
        inputs["input_ids"][row, first : first + len(image)] = image
        moe_types[row, first : first + len(image)] = 1
    # 4 x 2 patches each of 4 x 4 pixels of three colours; a token stands for 2 x 2 patches.
    grids = torch.tensor([[1, 4, 2], [1, 4, 2]])
    pixels = torch.randn(16, 3 * 4 * 4, generator=torch.Generator().manual_seed(SEED))
    return {
        **inputs,
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
        "moe_mm_token_type_ids": moe_types.int(),
    }


def _image_patches(model: nn.Module) -> dict[str, Any]:
    """Return two images, of 4 x 4 and of 2 x 4 patches, for the tower of dots3_note."""
    pixels = torch.randn(24, 3 * 4 * 4, generator=torch.Generator().manual_seed(SEED))
    dtype = next(model.parameters()).dtype
    return {"pixel_values": pixels.to(dtype), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}


def _text_and_canvas(padding: Padding) -> dict[str, Any]:
    """Return the batch and a canvas for each of its texts: without one, the model draws a random one."""
    inputs = batch(padding)
    size = (len(inputs["input_ids"]), CANVAS)
    canvas = torch.randint(3, SPECIAL, size, generator=torch.Generator().manual_seed(SEED + 1))
    seen = torch.cat([inputs["attention_mask"], torch.ones_like(canvas)], dim=1)
    return {**inputs, "decoder_input_ids": canvas, "decoder_attention_mask": seen}


_GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}

_DOTS_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
    "moe_intermediate_size": 16,
    "pyramid_num_routed": [-1, 4, 8],
    "num_experts_per_tok": 2,
    "router_scaling_factor": 1.5,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
}

_GEMMA_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}

BUILDS = [
    Build(
        "diffusion_gemma",
        "encoder-decoder",
        maker(
            "DiffusionGemmaForBlockDiffusion",
            lambda: composed(
                "DiffusionGemmaConfig",
                "DiffusionGemmaTextConfig",
                _GEMMA,
                vision_config={"model_type": "gemma4_vision", **_GEMMA_TOWER},
                canvas_length=CANVAS,
                boi_token_id=IMAGE_START,
                eoi_token_id=IMAGE_END,
                **image_tokens(),
            ),
        ),
        lambda model: _text_and_canvas("left"),
        lambda model: {**left_padded(model), "max_denoising_steps": 3},
        lambda model: _text_and_canvas("right"),
        note="encoder and decoder share their weights; each denoising step routes the canvas again",
    ),
    Build(
        "dots3_note_vision",
        "vision",
        maker(
            "Dots3NoteVisionModel",
            lambda: configured(
                "Dots3NoteVisionConfig",
                **{**dict.fromkeys(SIZES, ...), **_DOTS_TOWER},
            ),
        ),
        _image_patches,
        None,
        note="the layers have 4 and 8 experts",
    ),
    decoder("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", _ernie, kind="decoder in VLM"),
    decoder(
        "ernie4_5_vl_moe_mixed",
        "Ernie4_5_VLMoeForConditionalGeneration",
        _ernie,
        kind="decoder in VLM",
        inputs=lambda model: _text_and_images("left"),
        generate_inputs=lambda model: _text_and_images("left"),
        right=lambda model: _text_and_images("right"),
        note="text tokens and image tokens have a pool of experts each",
    ),
]
