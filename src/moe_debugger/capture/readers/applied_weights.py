"""Confirms recomputed gate weights: weighted by them, the experts' outputs must give the output of their block.

Old-style code applies its weights inside of the block, where no hook sees them. What goes into an expert and what comes
out of it is seen, though. Until one forward has decided, each tap keeps two sums over the hidden dimension of every row
(fixed projections, so that rows stay small), and some features, by which the rows of an expert are told apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["AppliedWeights", "Rule"]

_NUM_FEATURES = 16
# Relative to the outputs' own size: rounding of float32, and of types with 8 to 11 bits.
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.02
_NOT_YET = "not confirmed by any forward yet"

Floats = npt.NDArray[np.float32]
# (name, weights [n, k])
Rule = tuple[str, Floats]


@dataclass(slots=True)
class AppliedWeights:
    """What is known of one layer's weights.

    Attributes:
        rule: name of the rule that gave the block's output, "" until a forward has decided.
        reason: why the weights are not known, "" where they are.
    """

    rule: str = ""
    reason: str = _NOT_YET

    @property
    def is_decided(self) -> bool:
        """Whether no more has to be kept for this."""
        return bool(self.rule) or self.reason != _NOT_YET

    def keep_features(self, name: str, hidden: Any) -> dict[str, Any]:
        """Return what tells the rows of `hidden` apart, as a tap keeps it."""
        if self.is_decided or not _is_hidden(hidden):
            return {}
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        return {f"features_{name}": rows[:, :: max(1, rows.shape[1] // _NUM_FEATURES)][:, :_NUM_FEATURES].clone()}

    def keep_sums(self, name: str, output: Any) -> dict[str, Any]:
        """Return two projections of each row of `output` [..., H], as a tap keeps them."""
        output = output[0] if isinstance(output, tuple | list) and output else output
        if self.is_decided or not _is_hidden(output):
            return {}
        return {f"sums_{name}": _project(output), f"is_coarse_{name}": int(output.dtype.itemsize < 4)}

    def decide(
        self, arrays: Mapping[str, Any], expert_ids: npt.NDArray[np.int32], rules: Sequence[Rule], num_experts: int
    ) -> None:
        """Find the rule that gives the block's output, where this forward can tell."""
        if self.is_decided or not len(expert_ids) or "sums_block" not in arrays or "features_gate" not in arrays:
            return
        outputs = _outputs_by_slot(arrays, expert_ids, num_experts)
        total = arrays["sums_block"]
        if outputs is None or len(total) != len(expert_ids) or not np.isfinite(total).all():
            return
        tolerance = _COARSE_TOLERANCE if arrays["is_coarse_block"] else _TOLERANCE
        for name, weights in rules:
            routed = np.einsum("nk,nkp->np", weights, outputs)
            for shared in _shared(arrays, total):
                # A sum of parts that cancel out is only as exact as they are.
                size = max(float(np.sqrt(np.mean(np.square(each)))) for each in (total, routed))
                if float(np.sqrt(np.mean(np.square(total - shared - routed)))) <= tolerance * size:
                    self.rule, self.reason = name, ""
                    return
        self.reason = (
            "the block's output is not the sum of its experts' outputs by "
            + " or ".join(name for name, _ in rules)
            + "; say which weights it applies with an adapter (moe_debugger.Adapter)"
        )


def _is_hidden(value: Any) -> bool:
    return getattr(value, "ndim", 0) >= 2 and value.is_floating_point()


def _project(output: "torch.Tensor") -> "torch.Tensor":
    import torch

    with torch.no_grad():
        rows = output.detach().reshape(-1, output.shape[-1]).float()
        phase = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32)
        # Products and sums, which autocast leaves in float32.
        return torch.stack([(rows * phase.cos()).sum(-1), (rows * (1.7 * phase).sin()).sum(-1)], dim=-1)


def _outputs_by_slot(arrays: Mapping[str, Any], ids: npt.NDArray[np.int32], num_experts: int) -> Floats | None:
    """Return the projected outputs of the slots' experts [n, k, 2]; None where one got other rows than the ids say."""
    gate = np.ascontiguousarray(arrays["features_gate"])
    outputs = np.zeros((*ids.shape, 2), np.float32)
    for expert in range(num_experts):
        rows, slots = np.nonzero(ids == expert)
        if not len(rows):
            continue
        given, made = arrays.get(f"features_{expert}"), arrays.get(f"sums_{expert}")
        if given is None or made is None or len(made) != len(rows):
            return None
        at = {given[index].tobytes(): index for index in range(len(given))}
        found = [at.get(gate[row].tobytes(), -1) for row in rows]
        if -1 in found:
            return None
        outputs[rows, slots] = made[found]
    return outputs


def _shared(arrays: Mapping[str, Any], total: Floats) -> list[Floats]:
    """Return what a shared expert may add: nothing, its output, or that times the sigmoid of its gate."""
    added = [np.zeros_like(total)]
    shared = arrays.get("sums_shared")
    if shared is not None and shared.shape == total.shape:
        gate = arrays.get("shared_gate")
        if gate is not None and len(gate) == len(total):
            added.append((shared / (1 + np.exp(-gate.reshape(-1, 1)))).astype(np.float32))
        added.append(shared)
    return added
