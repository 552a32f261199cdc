"""The experiment: a layer is replayed alone, with one expert speaking at a time.

contribution of an expert to a token = what the layer gives with this expert alone, less what it gives with none. All
other experts' outputs are then zero, so their rounding hides nothing, and a token moved exactly if the expert computed
for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.capture import Adapter, Call

from .recording import Layer, LayerCall
from .result import WeightProof
from .silencing import Experts
from .tensors import copied, first_rows, moved_rows

if TYPE_CHECKING:
    import torch

__all__ = ["Measurement", "Replay", "UnitOutput", "measure", "tolerance_of"]

# What is there besides the experts (a residual, shared experts) rounds the contributions; louder experts round less.
_POWERS = {"torch.float16": 5}
_POWER = 8
# Relative: a chain of products and sums in the dtype, done twice in different shapes.
_TOLERANCES = {"torch.float64": 1e-6, "torch.float32": 1e-4, "torch.float16": 3e-3, "torch.bfloat16": 2e-2}

UnitOutput = Callable[[int], "torch.Tensor"]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def tolerance_of(tensor: "torch.Tensor") -> float:
    """Return what rounding may do to a weight that is measured in the dtype of `tensor`."""
    return _TOLERANCES.get(str(tensor.dtype), 2e-2)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the experiment saw; T rows, C experts that were silenced.

    Attributes:
        used: [T, C] which experts moved which row.
        weights: [T, C] the measured weight, NaN where there is none.
        unexplained: [T, C] share of a contribution that neither a weight nor rounding explains, NaN where no weight was
            measured.
        least_weight: [T, C] what is lost in the rounding of the rest of the layer's output: infinite where the expert
            gives zero, so that using it moves nothing; 0 where that is not known.
        additivity_error: how far the layer's output is from the sum of the contributions, relative to that sum.
        proof: how the weights were measured.
        failure: why they were not, "" where they were.
    """

    used: Bools
    weights: Floats
    unexplained: Floats
    least_weight: Floats
    additivity_error: float
    proof: WeightProof
    failure: str = ""


class Replay:
    """Runs a layer alone, on copies of what it was called with.

    Args:
        order: where each token is among the rows of the layer's output; None = in order.
    """

    def __init__(
        self, adapter: Adapter, layer: Layer, call: LayerCall, num_rows: int, order: npt.NDArray[np.int64] | None
    ) -> None:
        self._adapter = adapter
        self._layer = layer
        self._call = call
        self._num_rows = num_rows
        self._order = order

    def run(self, gate_weight: float | None = None) -> "torch.Tensor":
        """Return the layer's output rows [T, H]; with `gate_weight`, every weight that `read` returns is set to it."""
        handle = None if gate_weight is None else self._set_weights(gate_weight)
        try:
            result = self._layer.module(*copied(self._call.args), **copied(self._call.kwargs))
        finally:
            if handle is not None:
                handle.remove()
        return self.rows(result)

    def rows(self, value: Any) -> "torch.Tensor":
        """Return the rows of what the layer returned, in the order of the tokens."""
        rows = first_rows(value, self._num_rows)
        assert rows is not None
        return rows if self._order is None else rows[self._order]

    def hidden(self) -> "torch.Tensor | None":
        """Return the rows that the layer was called with, in the order of the tokens; None where they are others."""
        hidden = self._call.hidden
        if hidden is None or len(hidden) != self._num_rows:
            return None
        return hidden.clone() if self._order is None else hidden[self._order]

    def _set_weights(self, value: float) -> Any:
        tap = self._layer.reading.taps[0]

        def change(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            routing = self._adapter.read(Call(tap.module, args, kwargs, output))
            if routing.routing_map is not None and routing.probabilities is not None:
                routing.probabilities.masked_fill_(routing.routing_map.bool(), value)
            elif routing.expert_ids is not None and routing.gate_weights is not None:
                routing.gate_weights.masked_fill_(routing.expert_ids >= 0, value)

        if tap.moment == "before":
            return tap.module.register_forward_pre_hook(lambda m, a, k: change(a, k, None), with_kwargs=True)
        return tap.module.register_forward_hook(lambda m, a, k, o: change(a, k, o), with_kwargs=True)


def measure(
    replay: Replay, experts: Experts, expert_ids: Sequence[int], real: "torch.Tensor", unit: UnitOutput | None
) -> Measurement:
    """Let each expert speak alone, and return what moved and by how much.

    Args:
        experts: silenced, all of them.
        real: [T, H], what the layer gave in the model.
        unit: what an expert gives at weight 1, [T, H]; None = measured by setting the weights that were read.
    """
    import torch

    shape = (len(real), len(expert_ids))
    used, least = np.zeros(shape, bool), np.zeros(shape)
    weights, unexplained = np.full(shape, np.nan), np.full(shape, np.nan)
    silent = replay.run()
    # With unit weights and with double ones: whether the output follows is what proves the tensor.
    baselines = None if unit is not None else [replay.run(gate_weight=value) for value in (1.0, 2.0)]
    power = 0 if not bool(silent.any()) else _POWERS.get(str(silent.dtype), _POWER)
    limits = torch.finfo(silent.dtype)
    noise = 2 * limits.eps * (silent.double().nan_to_num(0).norm(dim=-1) + limits.smallest_normal * silent.shape[-1])
    noise /= 2.0**power
    total = silent.double().clone()
    is_deaf, num_moved, worst_ratio = True, 0, 2.0
    for column, expert_id in enumerate(expert_ids):
        contribution, moved = _contribution(replay, experts, expert_id, silent, power, None)
        total += contribution
        used[:, column] = moved.cpu().numpy()
        if unit is not None:
            base = unit(expert_id).double()
            ratio = None
        else:
            assert baselines is not None
            base, follows = _contribution(replay, experts, expert_id, baselines[0], power, 1.0)
            double, _ = _contribution(replay, experts, expert_id, baselines[1], power, 2.0)
            ratio = double.norm(dim=-1) / base.norm(dim=-1)
            is_deaf &= bool(((base == contribution) & (base == double))[moved & follows].all())
        size = base.norm(dim=-1)
        lost = torch.where(size > 0, noise / size, torch.inf if unit is not None else 0.0)
        least[:, column] = lost.cpu().numpy()
        if not bool(moved.any()):
            continue
        num_moved += int(moved.sum())
        weight = (contribution * base).sum(-1) / (base * base).sum(-1)
        rest = (contribution - weight.unsqueeze(-1) * base).norm(dim=-1) - noise
        rest = rest.clamp_min(0) / contribution.norm(dim=-1)
        if ratio is not None and bool(torch.isfinite(ratio[moved]).any()):
            finite = ratio[moved][torch.isfinite(ratio[moved])]
            furthest = float(finite[(finite - 2).abs().argmax()])
            worst_ratio = max(worst_ratio, furthest, key=lambda value: abs(value - 2))
        moved_numpy = moved.cpu().numpy()
        weights[moved_numpy, column] = weight[moved].cpu().numpy()
        unexplained[moved_numpy, column] = rest[moved].cpu().numpy()
    failure = ""
    if unit is None and num_moved:
        failure = _failure(is_deaf, worst_ratio, tolerance_of(real))
    change = float((total - silent.double()).abs().max()) if total.numel() else 0.0
    error = float((real.double() - total).abs().nan_to_num(0).max()) / change if change else 0.0
    rounding = limits.eps * float(silent.double().abs().nan_to_num(0).max()) * 4
    return Measurement(
        used=used,
        weights=weights,
        unexplained=unexplained,
        least_weight=least,
        additivity_error=max(0.0, error - (rounding / change if change else 0.0)),
        proof="none" if failure else "expert_output" if unit is not None else "changed weights",
        failure=failure,
    )


def _contribution(
    replay: Replay, experts: Experts, expert_id: int, silent: "torch.Tensor", power: int, gate_weight: float | None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return what one expert adds [T, H] float64, and which rows moved [T]; all are silent again afterwards."""
    import torch

    experts.speak(expert_id, power)
    rows = replay.run(gate_weight)
    if power and not bool(torch.isfinite(rows[torch.isfinite(silent)]).all()):
        power = 0
        experts.speak(expert_id)
        rows = replay.run(gate_weight)
    experts.silence(expert_id)
    contribution = (rows.double() - silent.double()).nan_to_num(0) / 2.0**power
    return contribution, moved_rows(rows, silent)


def _failure(is_deaf: bool, ratio: float, tolerance: float) -> str:
    if is_deaf:
        return (
            "changing the weights that read() returned changes nothing in the layer's output: they are a copy, were "
            "computed by the adapter, or are not what the experts are multiplied by. Return the very tensor that the "
            "layer uses; where there is none, add expert_output(module, expert_id, hidden) to the adapter"
        )
    if abs(ratio - 2) > 8 * tolerance:
        return (
            f"doubling the weights that read() returned multiplies an expert's contribution by {ratio:.3g} and not by "
            "2: something lies between them and the experts (a normalisation?). Return the weights as the experts' "
            "outputs are multiplied by them"
        )
    return ""
