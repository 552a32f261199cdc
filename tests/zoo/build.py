"""Tiny seeded models, one for each MoE architecture of transformers, for tests of exactness.

A zoo file (`zoo.text_a`, `zoo.text_b`) lists its builds in `BUILDS`; `ALL` gathers them by name. A build is made of a
configuration and a model class, both named, so that a zoo file imports no model:

    BUILDS = [decoder("mixtral", "MixtralForCausalLM", lambda: configured("MixtralConfig", num_local_experts=8))]

Vocabulary: `VOCAB` ids. `PAD` (0) pads; 1 and 2 begin and end texts; ids from `SPECIAL` up are kept for images and the
like; a batch draws its words from the ids between.
"""

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import nn

VOCAB = 96
PAD, BOS, EOS = 0, 1, 2
SPECIAL = 88
LENGTHS = (7, 4, 6)
SEED = 7

# What nearly every configuration takes. Three layers: with a dense first one there still are two MoE layers.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

# The logits of a router whose input is normalised then spread by about 2: choices differ between tokens, while a
# sigmoid of them stays off its ends, where bfloat16 would tie.
_ROUTER_SPREAD = 2.0
# Enough to change choices among softmax scores of eight experts, too little to make them for every token alike.
_BIAS_SPREAD = 0.15
_SELECTION_BIAS = re.compile(r"correction_bias|expert_bias|router_bias|balancing_biases|bias_for_selection")
_ROUTER = re.compile(r"(^|\.)(gate|router|router_weights|shared_expert_gate)(\.|$)")

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision", "decoder in VLM"]
Inputs = Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class Build:
    """One architecture as a tiny model, with the inputs to run it.

    Attributes:
        name: The model_type, as in the census of MoE architectures; a suffix tells a variant.
        kind: What the model is.
        make: `make(dtype=torch.float32, experts_implementation=None)` returns a new model in eval mode, always with the
            same weights. The implementation is a name, or names by part of the configuration, as transformers takes
            it; where the model offers no choice, transformers raises ValueError for "grouped_mm".
        inputs: Arguments of one forward; where the model takes text, a left-padded batch with its attention_mask.
        generate_inputs: Arguments of `model.generate`, without those of the decoding (max_new_tokens, do_sample); None
            where the model does not generate.
        right_padded: `inputs`, padded on the right; None where the model takes no text.
        note: What is special about this build.
    """

    name: str
    kind: Kind
    make: Callable[..., nn.Module]
    inputs: Inputs
    generate_inputs: Inputs | None
    right_padded: Inputs | None = None
    note: str = ""


def batch(padding: Literal["left", "right"] = "left", seed: int = SEED) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask`, both [3, 7] int64, of texts of the lengths `LENGTHS`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    input_ids = torch.full((len(LENGTHS), width), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(LENGTHS):
        columns = slice(width - length, width) if padding == "left" else slice(0, length)
        input_ids[row, columns] = torch.randint(EOS + 1, SPECIAL, (length,), generator=generator)
        attention_mask[row, columns] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def left_padded(model: nn.Module) -> dict[str, Any]:
    """Return the left-padded batch of `batch`; the shape of `Build.inputs`."""
    return batch("left")


def right_padded(model: nn.Module) -> dict[str, Any]:
    """Return the right-padded batch of `batch`; the shape of `Build.right_padded`."""
    return batch("right")


def configured(config_class: str, **fields: Any) -> Any:
    """Return a configuration of transformers with `SIZES` and `fields`; `...` takes a size away."""
    import transformers

    values = {name: value for name, value in {**SIZES, **fields}.items() if value is not ...}
    return getattr(transformers, config_class)(**values)


def decoder(
    name: str,
    model_class: Any,
    config: Callable[[], Any],
    *,
    kind: Kind = "decoder",
    inputs: Inputs = left_padded,
    generate_inputs: Inputs | None = left_padded,
    right: Inputs | None = right_padded,
    note: str = "",
) -> Build:
    """Return the build of a text model; every argument after `config` has the value of a plain causal decoder."""
    return Build(name, kind, maker(model_class, config), inputs, generate_inputs, right, note)


def maker(model_class: Any, config: Callable[[], Any]) -> Callable[..., nn.Module]:
    """Return a `Build.make` that gives a new configuration to a model class, and draws the weights by `redraw`.

    The class is one of transformers or the name of one.
    """

    def make(
        dtype: torch.dtype = torch.float32, experts_implementation: str | dict[str, str] | None = None
    ) -> nn.Module:
        import transformers

        found = getattr(transformers, model_class) if isinstance(model_class, str) else model_class
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model: nn.Module = found._from_config(config(), dtype=dtype, experts_implementation=experts_implementation)
        _keep_in_float32(model, dtype)
        redraw(model)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            # Random weights may well choose the end at the first step; without one, generate always makes every token.
            generation.eos_token_id = None
            generation.pad_token_id = PAD
        return model.eval()

    return make


def _keep_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the tensors to float32 that the model keeps so when it is loaded; a new model has them all in `dtype`."""
    found: Any = model
    kept = [f"*{name}*" for name in found._get_dtype_plan(dtype)]
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(fnmatch(path, name) for name in kept):
            tensor.data = tensor.data.float()


def redraw(model: nn.Module, seed: int = SEED) -> None:
    """Draw the weights that decide on the routing again, in place, so that routing differs between tokens and layers.

    Drawn in float32 and then rounded, so models of different dtypes have nearly the same weights. Drawn are: linear
    layers and embeddings, routers, experts (some models leave those uninitialised), biases, and the biases that a
    router adds for the selection only (which start at zero and would not matter). The rest stays as the library
    initialised it.
    """
    generator = torch.Generator().manual_seed(seed)
    tied: set[int] = set()
    for path, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if name == "tid2eid":
                # A table of experts by token id, all zeros in a new model: draw distinct experts for every token.
                order = torch.rand(len(tensor), len(module.get_parameter("weight")), generator=generator).argsort(
                    dim=-1
                )
                tensor.copy_(order[:, : tensor.shape[1]])
            if id(tensor) in tied or not tensor.is_floating_point():
                continue
            tied.add(id(tensor))
            drawn = _draw(f"{path}.{name}", name, module, tensor, generator)
            if drawn is not None:
                with torch.no_grad():
                    tensor.copy_(drawn)


def _draw(
    path: str, name: str, module: nn.Module, tensor: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """Return new values for a tensor of `module`, float32 and of the tensor's shape, or None to leave it as it is."""

    def normal(std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    if _SELECTION_BIAS.search(name):
        return normal(_BIAS_SPREAD)
    if not isinstance(tensor, nn.Parameter):
        return None
    if name == "per_expert_scale" or path.endswith("router.scale"):
        return torch.rand(tensor.shape, generator=generator) + 0.5
    if _ROUTER.search(path) and tensor.ndim == 2:
        return normal(_ROUTER_SPREAD / math.sqrt(tensor.shape[-1]))
    if _ROUTER.search(path) and name == "bias":
        return normal(_BIAS_SPREAD)
    if isinstance(module, nn.Embedding):
        return normal(1.0)
    if isinstance(module, nn.Linear) and name == "weight":
        return normal(1 / math.sqrt(tensor.shape[-1]))
    if isinstance(module, nn.Linear):
        return normal(0.1)
    if "experts" in path or (tensor.ndim == 3 and not isinstance(module, nn.Conv1d)):
        return normal(1 / math.sqrt(tensor.shape[-1])) if tensor.ndim > 1 else None
    return None


class _Zoo(Mapping[str, Build]):
    """The builds of all zoo files by name, read at first use: the files import this module."""

    _files = ("zoo.text_a", "zoo.text_b")

    def __init__(self) -> None:
        self._builds: dict[str, Build] | None = None

    def _gathered(self) -> dict[str, Build]:
        if self._builds is None:
            builds: dict[str, Build] = {}
            for file in self._files:
                if importlib.util.find_spec(file) is None:
                    continue
                for build in importlib.import_module(file).BUILDS:
                    assert build.name not in builds, f"two builds are named {build.name}"
                    builds[build.name] = build
            self._builds = builds
        return self._builds

    def __getitem__(self, name: str) -> Build:
        return self._gathered()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gathered())

    def __len__(self) -> int:
        return len(self._gathered())


ALL: Mapping[str, Build] = _Zoo()
