"""How the debugger reads the GLaM of `modeling_glam`: the worked example of docs/adapters.md."""

from collections.abc import Sequence

import torch.nn.functional as F
from modeling_glam import GlamMoE
from torch import Tensor, nn

from moe_debugger import Adapter, Call, LayerShape, Routing

__all__ = ["GlamAdapter"]


class GlamAdapter(Adapter):
    """Reads the dense map that `GlamRouter` returns."""

    name = "glam"

    def matches(self, name: str, module: nn.Module) -> bool:
        """Return whether `module` is one MoE layer."""
        return isinstance(module, GlamMoE)

    def describe(self, module: GlamMoE) -> LayerShape:
        """Return E and k; a slot that is empty was dropped, as its expert was full."""
        return LayerShape(num_experts=module.router.num_experts, top_k=module.router.top_k, empty_slot="dropped")

    def hooked(self, module: GlamMoE) -> nn.Module:
        """Return the module whose call is read."""
        return module.router

    def read(self, call: Call) -> Routing:
        """Return what a call of the router returned, by reference."""
        routing = call.output
        return Routing.dense(
            routing.probabilities, routing.routing_map, logits=routing.logits, intended_expert_ids=routing.chosen
        )

    def expert_output_weights(self, module: GlamMoE, expert_id: int) -> Sequence[Tensor]:
        """Return what `moe-debugger check-adapter` sets to zero to silence one expert."""
        return [module.experts.w_out[expert_id]]

    def expert_output(self, module: GlamMoE, expert_id: int, hidden: Tensor) -> Tensor:
        """Return what an expert gives at weight 1: with it, the check measures the weights themselves."""
        inner: Tensor = F.gelu(hidden @ module.experts.w_in[expert_id])
        return inner @ module.experts.w_out[expert_id]
