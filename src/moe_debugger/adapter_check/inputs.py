"""Random inputs for a model that is checked: token ids of its vocabulary, some rows padded on the left."""

import inspect
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["make_inputs"]

# Rows of unequal length, so that padding is part of what is checked.
_LENGTHS = (14, 14, 9, 5)
_SEED = 0


def make_inputs(model: "nn.Module") -> dict[str, Any]:
    """Return `input_ids` [4, 14] and, where the model takes them, `attention_mask` and `decoder_input_ids`.

    A model that knows `use_cache` is told to make none: a cache would grow with each call of a layer that is run alone.

    Raises:
        InvalidInputError: the model takes no `input_ids`, or the size of its vocabulary is not known.
    """
    import torch

    names = inspect.signature(type(model).forward).parameters
    kind = type(model).__name__
    if "input_ids" not in names:
        raise InvalidInputError(
            f"{kind}.forward takes no input_ids, so no inputs can be made for it; give some: "
            "check_adapter(adapter, model, inputs={...}), or a factory that returns (model, inputs)"
        )
    vocab_size = _vocab_size(model)
    if vocab_size < 2:
        raise InvalidInputError(
            f"the vocabulary of {kind} is not known (no config.vocab_size and no embedding); give inputs: "
            "check_adapter(adapter, model, inputs={...}), or a factory that returns (model, inputs)"
        )
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(_SEED)
    shape = (len(_LENGTHS), max(_LENGTHS))
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    mask = torch.arange(shape[1]) >= shape[1] - torch.tensor(_LENGTHS)[:, None]
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if "attention_mask" in names:
        inputs["input_ids"] = torch.where(mask, ids, pad if isinstance(pad, int) and 0 <= pad < vocab_size else 0)
        inputs["attention_mask"] = mask.long()
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(0, vocab_size, shape, generator=generator)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    return {**on_device, "use_cache": False} if "use_cache" in names else on_device


def _vocab_size(model: "nn.Module") -> int:
    from torch import nn

    config: Any = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    size = getattr(get_text_config() if callable(get_text_config) else config, "vocab_size", None)
    if isinstance(size, int):
        return size
    return next((each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)), 0)
