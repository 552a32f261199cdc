"""What the hooks keep of one forward: references to tensors, nothing computed yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["PHASES", "PhaseName", "RawForward", "RawLayer", "phase_number"]

PhaseName = Literal["prefill", "decode", "train", "eval"]
# The numbers of moe_debugger.v1.Phase.
PHASES: dict[str, int] = {"prefill": 1, "decode": 2, "train": 3, "eval": 4}


def phase_number(name: str) -> int:
    """Return the `Phase` of a name."""
    return PHASES[name]


@dataclass(slots=True)
class RawLayer:
    """Inputs of one call of an experts module, and the router's logits where it has any."""

    layer_index: int
    expert_ids: "torch.Tensor"
    gate_weights: "torch.Tensor"
    logits: "torch.Tensor | None"


@dataclass(slots=True)
class RawForward:
    """One forward of the model: [num_rows, num_columns] tokens and the routes of each MoE layer.

    Attributes:
        request_ids: one for each batch row; None is a row that belongs to no request (a dummy).
        are_ids_minted: True where the caller named none.
        phases: `Phase` of each batch row.
        start_positions: position of each row's first real token, where the caller gave it.
        position: [num_rows or 1, num_columns] tensor; None = counted from `past_length`.
        is_padding: [num_rows, num_columns] bool tensor; None = no padding.
        copied: a CUDA event after which the tensors are on the host, else None.
    """

    forward_index: int
    step: int
    num_rows: int
    num_columns: int
    request_ids: Sequence[str | None]
    are_ids_minted: bool
    phases: Sequence[int]
    past_length: int
    captured_at_unix_ns: int
    start_positions: Sequence[int] | None = None
    position: "torch.Tensor | None" = None
    is_padding: "torch.Tensor | None" = None
    token_ids: "torch.Tensor | None" = None
    layers: list[RawLayer] = field(default_factory=list)
    copied: Any = None
    duration_ns: int = 0

    @property
    def num_decisions(self) -> int:
        """Token rows of all layers, padded ones included."""
        return sum(int(layer.expert_ids.shape[0]) for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that this forward keeps alive."""
        tensors = [self.position, self.is_padding, self.token_ids]
        for layer in self.layers:
            tensors += [layer.expert_ids, layer.gate_weights, layer.logits]
        return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors if tensor is not None)
