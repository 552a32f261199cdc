"""Every model that is checked: the zoo of transformers' architectures, and models of other code with their adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from zoo.build import ALL, Build
from zoo.custom import CUSTOM

from moe_debugger import Adapter, Call, LayerShape, Routing, register_adapter, unregister_adapter

__all__ = ["EVERY_BUILD", "adapter_for"]

EVERY_BUILD: Mapping[str, Build] = {**ALL, **CUSTOM}


class _GlamAdapter(Adapter):
    """Reads the dense map that the GLaM of the examples makes."""

    name = "glam of the tests"

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ == "GlamMoE"

    def describe(self, module: nn.Module) -> LayerShape:
        router = module.get_submodule("router")
        return LayerShape(num_experts=int(router.num_experts), top_k=int(router.top_k), empty_slot="dropped")  # type: ignore[arg-type]

    def hooked(self, module: nn.Module) -> nn.Module:
        return module.get_submodule("router")

    def read(self, call: Call) -> Routing:
        output = call.output
        return Routing.dense(
            output.probabilities, output.routing_map, logits=output.logits, intended_expert_ids=output.chosen
        )


@contextmanager
def adapter_for(model: nn.Module) -> Iterator[None]:
    """Register the adapter that `model` needs, if it needs one, for as long as the context is open."""
    needs_one = any(type(module).__name__ == "GlamMoE" for module in model.modules())
    if needs_one:
        register_adapter(_GlamAdapter())
    try:
        yield
    finally:
        if needs_one:
            unregister_adapter(_GlamAdapter.name)
