"""Every build of the zoo runs, always alike, and routes in a way that a test of exactness can tell apart."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from zoo.build import ALL, Build

torch.set_num_threads(1)

BUILDS = pytest.mark.parametrize("build", ALL.values(), ids=list(ALL))


def finite(output: Any) -> bool:
    """Say whether the logits of an output, or its first item, are finite."""
    logits = output.logits if getattr(output, "logits", None) is not None else output[0]
    return all(bool(torch.isfinite(item).all()) for item in (logits if isinstance(logits, tuple) else (logits,)))


def chosen(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the expert ids that each module of experts was called with, by its path, for one forward."""
    seen: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            ids = [item for item in args if isinstance(item, torch.Tensor) and item.dtype == torch.long]
            if ids:
                # switch_transformers and nllb_moe give one-hot rows over the eight experts.
                seen[path] = ids[0].argmax(dim=-1) if ids[0].shape[-1] == 8 else ids[0]

        return before

    handles = [
        module.register_forward_pre_hook(watch(path))
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1] == "experts"
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@BUILDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_is_finite(build: Build, dtype: torch.dtype) -> None:
    model = build.make(dtype=dtype)
    assert not model.training
    with torch.no_grad():
        assert finite(model(**build.inputs(model)))
        if build.right_padded is not None:
            assert finite(model(**build.right_padded(model)))


@BUILDS
def test_batches_are_padded_on_their_side(build: Build) -> None:
    model = build.make()
    left = build.inputs(model).get("attention_mask")
    if left is None:
        assert build.kind == "vision"
        return
    assert len(left) >= 2
    assert len(set(left.sum(dim=1).tolist())) > 1
    assert left[:, -1].all()
    if build.right_padded is not None:
        right = build.right_padded(model)["attention_mask"]
        assert right[:, 0].all()
        assert right.sum() == left.sum()


@BUILDS
def test_every_make_gives_the_same_weights(build: Build) -> None:
    first, second = build.make().state_dict(), build.make().state_dict()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert different == []
    assert all(torch.isfinite(tensor).all() for tensor in first.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    "build", [build for build in ALL.values() if build.generate_inputs], ids=lambda build: build.name
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_generate_makes_every_token(build: Build) -> None:
    assert build.generate_inputs is not None
    model: Any = build.make()
    inputs = build.generate_inputs(model)
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    output = getattr(output, "sequences", output)
    assert len(output) == len(inputs["attention_mask"])
    # A decoder repeats the prompt, but not one of embeddings; an encoder-decoder model begins with one token.
    assert output.shape[1] - 4 in (inputs["attention_mask"].shape[1], 1 if "input_ids" in inputs else 0)


@BUILDS
def test_experts_are_chosen_per_token(build: Build) -> None:
    model = build.make()
    for path, ids in chosen(model, build.inputs(model)).items():
        assert len(set(ids.flatten().tolist())) >= 3, f"{path} uses {ids.tolist()} only"


@pytest.mark.parametrize("name", ["afmoe", "deepseek_v3", "dots3_note_vision", "ernie4_5_moe", "kolibri1"])
def test_selection_biases_change_the_choice(name: str) -> None:
    build = ALL[name]
    model = build.make()
    biased = chosen(model, build.inputs(model))
    for tensor_name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if re.search(r"correction_bias|expert_bias", tensor_name):
            tensor.data.zero_()
    unbiased = chosen(model, build.inputs(model))
    first = next(iter(biased))
    assert biased[first].sort(dim=-1)[0].tolist() != unbiased[first].sort(dim=-1)[0].tolist()
