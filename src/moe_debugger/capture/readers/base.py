"""What the readers share: the model as they see it, what they answer, and how attributes are looked up."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..sites import Interpret, Tap

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ROUTER_NAMES",
    "SHARED_NAMES",
    "Model",
    "Reading",
    "detached",
    "first_int",
    "first_of",
    "is_ids_and_weights",
    "keep_logits",
    "num_fused_experts",
    "positional_names",
    "router_of",
]

ROUTER_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp")


@dataclass(frozen=True, slots=True)
class Model:
    """The model while it is searched: all its modules by name, and its (text) config, None where it has none."""

    modules: "Mapping[str, nn.Module]"
    config: Any

    def parent(self, name: str) -> "tuple[str, nn.Module]":
        """Return name and module of the parent of `name`."""
        parent_name = name.rpartition(".")[0]
        return parent_name, self.modules[parent_name]

    def num_shared(self, block: "nn.Module") -> int:
        """Return the number of shared experts of a block, 0 where it holds none."""
        if all(getattr(block, name, None) is None for name in SHARED_NAMES):
            return 0
        return first_int(self.config, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")) or 1

    def top_k(self, *owners: "nn.Module | None") -> int:
        """Return the number of slots, by the modules' attributes first; 0 where nothing says it."""
        for owner in owners:
            value = first_int(owner, ("top_k", "num_experts_per_tok", "moe_top_k", "moe_k", "num_selects"))
            if value:
                return value
        return first_int(self.config, ("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "top_k_experts")) or 0


@dataclass(frozen=True, slots=True)
class Reading:
    """How one MoE layer is read; the fields are those of `Site` and `LayerInfo`."""

    module_name: str
    experts: "nn.Module"
    router: "nn.Module | None"
    num_experts: int
    top_k: int
    taps: tuple[Tap, ...]
    interpret: Interpret
    adapter: str
    num_shared_experts: int = 0
    num_identity_experts: int = 0
    scoring_function: str = "unknown"
    weight_meaning: str = "multiplies the expert's output"
    unavailable_reason: str = ""
    site: Literal["mlp", "attention"] = "mlp"
    block_scale: float = 1.0
    pool: str = ""
    is_row_wise: bool = False
    reduces: Literal["ids", "scores"] | None = None


def router_of(block: "nn.Module") -> "nn.Module | None":
    """Return the block's gate or router."""
    return next((child for name in ROUTER_NAMES if (child := getattr(block, name, None)) is not None), None)


def positional_names(module: "nn.Module") -> tuple[str, ...] | None:
    """Return the names of the inputs of a module's forward; None where a wrapper takes any (*args)."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(each.name for each in parameters if each.kind in kinds)[1:]


def num_fused_experts(experts: "nn.Module") -> int | None:
    """Return E of fused experts. Under expert parallelism `num_experts` is local, parameters keep the global shape."""
    for name in ("down_proj", "up_proj", "gate_up_proj"):
        weight = getattr(experts, name, None)
        if weight is not None and getattr(weight, "ndim", 0) == 3:
            return int(weight.shape[0])
    return first_int(experts, ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"))


def is_ids_and_weights(ids: Any, weights: Any) -> bool:
    """Return whether these are [n, k] integer ids and floating weights of one shape."""
    return (
        getattr(ids, "ndim", 0) == 2
        and not ids.is_floating_point()
        and getattr(weights, "ndim", 0) == 2
        and weights.is_floating_point()
        and ids.shape == weights.shape
    )


def keep_logits(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[dict[str, Any], int] | None:
    """Keep a router's logits: its first output, [n, C]."""
    logits: Any = output[0] if isinstance(output, tuple | list) and output else output
    if getattr(logits, "ndim", 0) == 2 and logits.is_floating_point():
        return {"logits": detached(logits)}, 0
    # A router whose first output is something else gives no logits, which is no error.
    return {}, 0


def detached(tensor: Any) -> Any:
    """Return a tensor without its graph; itself where it has none, which is nearly always and spares a microsecond."""
    return tensor.detach() if tensor.requires_grad else tensor


def first_of(owners: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    """Return the first attribute that is there and not None."""
    return next(
        (value for owner in owners for name in names if (value := getattr(owner, name, None)) is not None), None
    )


def first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    """Return the first attribute that is an int."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
