"""The public door for architectures that the capture does not know: an adapter of a few lines.

    class GlamAdapter(moe_debugger.Adapter):
        name = "glam"

        def matches(self, name, module):
            return type(module).__name__ == "GlamMoE"

        def describe(self, module):
            return moe_debugger.LayerShape(num_experts=module.num_experts, top_k=2)

        def hooked(self, module):
            return module.router

        def read(self, call):
            return moe_debugger.Routing.dense(call.output.probabilities, call.output.routing_map)

    moe_debugger.register_adapter(GlamAdapter())

An installed package can offer its adapters by the entry point group ``moe_debugger.adapters``: each entry names an
`Adapter` class or instance.
"""

import importlib.metadata
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from moe_debugger.errors import InvalidInputError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Adapter", "Call", "LayerShape", "Routing", "register_adapter", "registered_adapters", "unregister_adapter"]

ENTRY_POINT_GROUP = "moe_debugger.adapters"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """How an adapter describes one MoE layer; the fields are those of `LayerInfo`.

    Attributes:
        empty_slot: what an empty slot (id -1) of the layer means: "dropped" (over capacity), "skipped" or
            "unused" (the token has fewer experts than slots).
    """

    num_experts: int
    top_k: int
    num_shared_experts: int = 0
    num_identity_experts: int = 0
    scoring_function: str = "softmax"
    weight_meaning: str = "multiplies the expert's output"
    block_scale: float = 1.0
    site: Literal["mlp", "attention"] = "mlp"
    empty_slot: Literal["dropped", "skipped", "unused"] = "unused"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the hooked module; `output` is None for an adapter whose moment is "before"."""

    module: "nn.Module"
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


@dataclass(frozen=True, slots=True)
class Routing:
    """What one call was routed to: torch tensors as the model holds them, kept by reference; n rows.

    Either `expert_ids` with `gate_weights`, or a dense map (`Routing.dense`).

    Attributes:
        expert_ids: [n, k] integer; -1 where a slot reached no expert.
        gate_weights: [n, k] floating, as the experts' outputs are multiplied.
        probabilities, routing_map: [n, E] floating and bool, as Megatron-Core has them.
        logits: [n, E] of the router, before any correction bias; None where there are none.
        intended_expert_ids: [n, k] integer, the router's choice before capacity.
        row_mask: [T] bool, which of the forward's T tokens the n rows are; None = all of them, in order.
    """

    expert_ids: "torch.Tensor | None" = None
    gate_weights: "torch.Tensor | None" = None
    probabilities: "torch.Tensor | None" = None
    routing_map: "torch.Tensor | None" = None
    logits: "torch.Tensor | None" = None
    intended_expert_ids: "torch.Tensor | None" = None
    row_mask: "torch.Tensor | None" = None

    @classmethod
    def dense(
        cls,
        probabilities: "torch.Tensor",
        routing_map: "torch.Tensor",
        *,
        logits: "torch.Tensor | None" = None,
        intended_expert_ids: "torch.Tensor | None" = None,
        row_mask: "torch.Tensor | None" = None,
    ) -> "Routing":
        """Return the routing of a dense map: weights [n, E] and which of them [n, E] (bool) were used."""
        return cls(
            probabilities=probabilities,
            routing_map=routing_map,
            logits=logits,
            intended_expert_ids=intended_expert_ids,
            row_mask=row_mask,
        )


class Adapter:
    """Says which modules are MoE layers and how their routing is read; subclass it.

    Every `module` that a method gets is one that `matches` knew, so a subclass may declare its own type there.

    Attributes:
        name: shown in `session.layers()`.
        moment: "after" reads the output of the hooked module, "before" its arguments.
    """

    name: str = ""
    moment: Literal["before", "after"] = "after"

    def matches(self, name: str, module: "nn.Module") -> bool:
        """Return whether `module`, called `name` in the model, is one MoE layer."""
        raise NotImplementedError

    def describe(self, module: Any) -> LayerShape:
        """Return the shape of a layer that matches."""
        raise NotImplementedError

    def hooked(self, module: Any) -> "nn.Module":
        """Return the module whose call is read; the layer itself by default."""
        return cast("nn.Module", module)

    def read(self, call: Call) -> Routing:
        """Return the routing of one call, by reference: no copy, no `.item()`, nothing that waits for a device."""
        raise NotImplementedError

    def router(self, module: Any) -> "nn.Module | None":
        """Return the layer's router, for its gradients; None where there is none."""
        return _submodule(module, "router") or _submodule(module, "gate")

    def experts(self, module: Any) -> "nn.Module":
        """Return the module that holds the experts' parameters; the layer itself by default."""
        return _submodule(module, "experts") or cast("nn.Module", module)

    def expert_output_weights(self, module: Any, expert_id: int) -> "Sequence[torch.Tensor]":
        """Return the parameters (or views of them) that, set to zero, silence one expert: for `check-adapter`.

        Those of its last map, so that twice the parameters give twice the output: `[module.experts.w_out[expert_id]]`.
        """
        raise NotImplementedError

    def expert_output(self, module: Any, expert_id: int, hidden: "torch.Tensor") -> "torch.Tensor":
        """Return what one expert gives at weight 1, for `check-adapter`; needed only where the weights are computed.

        Where `read` returns the very tensor of weights that the layer uses, the check proves it by changing it. By
        default, and where there is one, the expert's own module of a ModuleList is called.

        Args:
            module: the layer.
            expert_id: 0 to num_experts - 1.
            hidden: [n, H], the rows of the first floating tensor that the layer was called with.

        Returns:
            [n, H] that the layer multiplies by the gate weight and adds.
        """
        raise NotImplementedError


@dataclass
class _Registry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    adapters: list[Adapter] = field(default_factory=list)
    has_entry_points: bool = False


_registry = _Registry()


def register_adapter(adapter: Adapter) -> None:
    """Use `adapter` for the models that are attached from now on; the newest one is asked first.

    Raises:
        InvalidInputError: it is no `Adapter`, or has no name.
    """
    _check(adapter)
    with _registry.lock:
        _registry.adapters[:] = [adapter, *(known for known in _registry.adapters if known.name != adapter.name)]


def unregister_adapter(name: str) -> bool:
    """Forget the adapter of that name; return whether there was one."""
    with _registry.lock:
        kept = [known for known in _registry.adapters if known.name != name]
        was_there = len(kept) < len(_registry.adapters)
        _registry.adapters[:] = kept
        return was_there


def registered_adapters() -> tuple[Adapter, ...]:
    """Return the registered adapters, those of installed packages last.

    Raises:
        InvalidInputError: an entry point cannot be loaded, or names something that is no adapter.
    """
    with _registry.lock:
        if not _registry.has_entry_points:
            for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                adapter = _load(entry)
                if adapter.name not in {known.name for known in _registry.adapters}:
                    _registry.adapters.append(adapter)
            _registry.has_entry_points = True
        return tuple(_registry.adapters)


def _submodule(module: "nn.Module", name: str) -> "nn.Module | None":
    # An attribute of that name may also be a parameter: a gate without a module of its own.
    return module._modules.get(name)


def _load(entry: importlib.metadata.EntryPoint) -> Adapter:
    where = f"entry point {entry.name} = {entry.value}: "
    try:
        loaded = entry.load()
        adapter = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:
        # Code of another package: it may fail in any way, and must not pass for an error of the model.
        raise InvalidInputError(
            f"{where}{type(error).__name__}: {error}; repair or uninstall the package that offers this adapter"
        ) from error
    _check(adapter, where=where)
    return adapter  # type: ignore[no-any-return]


def _check(adapter: Any, where: str = "") -> None:
    if not isinstance(adapter, Adapter):
        raise InvalidInputError(f"{where}{adapter!r} is no moe_debugger.Adapter; subclass it and pass an instance")
    if not adapter.name:
        raise InvalidInputError(f"{where}{type(adapter).__name__} has no name; set the class attribute `name`")
