"""What the capture knows of one MoE layer: its description, where it is tapped, and how what was kept is read.

Glossary:
    site   one MoE layer (or one routed attention) as the capture sees it.
    tap    one hook of a site: it keeps references to tensors, and computes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .routes import Routes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Arrays", "Interpret", "Keep", "Kept", "LayerInfo", "Site", "Tap"]

# What a tap keeps: tensors by name, and how many rows were routed (0 where the tap cannot know).
Kept = tuple[dict[str, Any], int]
# (arguments, keyword arguments, output or None) of a module's call; None = not what was expected.
Keep = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Kept | None]
# The same tensors as numpy arrays, bfloat16 and float16 as float32; what was no tensor stays as it is.
Arrays = Mapping[str, Any]
Interpret = Callable[[Arrays, "LayerInfo"], Routes]


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One MoE layer as the model's structure describes it.

    Attributes:
        layer_index: index among the model's MoE layers, from 0.
        model_layer_index: index among all layers of its stack.
        module_name: name of the module that holds router and experts.
        stack: "decoder", "encoder" or "vision".
        num_experts: E, routed experts that compute something.
        top_k: 0 where only a forward will tell.
        num_shared_experts: experts that every token passes; they have no load of their own.
        num_identity_experts: Z "zero" experts that pass a token on unchanged; their ids are E..E+Z-1.
        scoring_function: how logits become probabilities: "softmax", "sigmoid", "sqrt_softplus", "probabilities" (the
            router gives them itself) or "unknown". Before the first forward it is what the structure says, afterwards
            what the applied weights confirmed.
        weight_meaning: what the experts module does with the weights it is given.
        unavailable_reason: why router statistics are NaN; empty where they are there.
        site: "mlp", or "attention" where attention heads are routed.
        block_scale: what the block multiplies the sum of the experts' outputs by afterwards.
        adapter: which reader reads this layer.
    """

    layer_index: int
    model_layer_index: int
    module_name: str
    stack: str
    num_experts: int
    top_k: int
    num_shared_experts: int = 0
    num_identity_experts: int = 0
    scoring_function: str = "unknown"
    weight_meaning: str = "multiplies the expert's output"
    unavailable_reason: str = ""
    site: Literal["mlp", "attention"] = "mlp"
    block_scale: float = 1.0
    adapter: str = "standard"


@dataclass(frozen=True, slots=True)
class Tap:
    """One hook of a site.

    Attributes:
        module: whose call is watched.
        moment: "before" sees the arguments, "after" also the output.
        keep: picks references out of the call.
        completes: True for the tap with which a call of the layer is whole.
        may_wait: `keep` may be called when the forward ends, with an empty first argument and no keywords. For taps
            that need the other arguments and the output alone, which are then small: they live until then.
    """

    module: "nn.Module"
    moment: Literal["before", "after"]
    keep: Keep
    completes: bool = True
    may_wait: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """One MoE layer.

    Attributes:
        info: what is known of the layer before its first forward.
        experts: the module that holds the experts' parameters.
        router: the module whose output are the logits, where there is one.
        root: name of the stack that the layer belongs to, "" = the model itself.
        taps: in the order of a forward.
        interpret: turns what the taps kept into `Routes`; runs on the capture's own thread.
        pool: name of the block whose tokens this layer shares with others by their kind, "" = it sees them all.
        is_row_wise: each row is interpreted by itself, so that those of several forwards may be read together.
        reduces: how rows can be counted on their device: by expert ids [n, k], or by scores [n, E] that are not 0.
        is_shared: other layers call the same experts module, each with a router of its own.
    """

    info: LayerInfo
    experts: "nn.Module"
    router: "nn.Module | None"
    root: str
    taps: tuple[Tap, ...]
    interpret: Interpret
    pool: str = ""
    is_row_wise: bool = False
    reduces: Literal["ids", "scores"] | None = None
    is_shared: bool = False


def floats(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return `array` as float32, without a copy where it is."""
    return np.asarray(array, np.float32)
