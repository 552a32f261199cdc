"""`check_adapter`: what is done, in order."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.capture import Adapter
from moe_debugger.capture.readers import Model, read_by_adapter
from moe_debugger.errors import InvalidInputError, ModelNotSupportedError

from .claims import Claims, read_claims
from .comparison import compare_ids, compare_weights
from .inputs import make_inputs
from .recording import Layer, LayerCall, find_rows_order, record
from .replay import Measurement, Replay, UnitOutput, measure, tolerance_of
from .result import AdapterCheck, LayerCheck
from .silencing import Experts, output_weights, restored_buffers, silenced
from .tensors import first_rows, is_same, tensors_in

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["check_adapter"]

_MAX_KINDS_IN_ERROR = 12


def check_adapter(
    adapter: Adapter, model: "nn.Module", inputs: Mapping[str, Any] | None = None, *, max_experts: int = 64
) -> AdapterCheck:
    """Prove `adapter` on `model` by experiment, and return what agrees and what does not.

    Each layer that the adapter matches is run once within the model, and then alone, on the same input, with one
    expert speaking at a time (`expert_output_weights` of the others are zero). A token used an expert exactly if its
    output moved. That must be what `read` returned, ids exactly and weights within rounding.

    The model is left as it was: parameters and buffers bit by bit, its mode, and its hooks.

    Args:
        adapter: need not be registered.
        model: any module with MoE layers that the adapter matches; a few layers of small size show as much as many.
        inputs: keyword arguments of the model's forward; random token ids in a left-padded batch where None.
        max_experts: experts of a layer that are silenced, evenly spread over its ids. The time is that of
            layers x experts calls of one layer.

    Raises:
        InvalidInputError: `adapter` is none, or no inputs can be made for the model.
        ModelNotSupportedError: the adapter matches no module of the model, or fails to describe one.
    """
    import torch

    if not isinstance(adapter, Adapter) or not adapter.name:
        raise InvalidInputError(f"{adapter!r} is no moe_debugger.Adapter with a name; pass an instance")
    if not isinstance(model, torch.nn.Module):
        raise InvalidInputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if max_experts < 1:
        raise InvalidInputError(f"max_experts {max_experts}: expected at least 1")
    layers = _matching(adapter, model)
    given = dict(inputs) if inputs is not None else make_inputs(model)
    with restored_buffers(model), _evaluating(model):
        calls = record(model, layers, given)
        again = record(model, layers, given)
        different = next((each.name for each in layers if not _is_same_call(calls[each.name], again[each.name])), None)
        if different is not None:
            return AdapterCheck(adapter.name, (), (_not_deterministic(different),))
        orders = find_rows_order(model, layers, given, calls)
        lengths = {int(ids.numel()): int(ids.shape[1]) for ids in given.values() if getattr(ids, "ndim", 0) == 2}
        checks = [_Check(adapter, each, calls[each.name], max_experts, orders, lengths).run() for each in layers]
    return AdapterCheck(adapter.name, tuple(checks))


def _matching(adapter: Adapter, model: "nn.Module") -> list[Layer]:
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    searched = Model(modules, get_text_config() if callable(get_text_config) else config)
    layers: list[Layer] = []
    inside: list[nn.Module] = []
    for name, module in modules.items():
        if any(module is each for each in inside):
            continue
        reading = read_by_adapter(adapter, searched, name, module)
        if reading is not None:
            layers.append(Layer(name, module, reading))
            # As in the search for layers: what lies inside a layer of an adapter is the adapter's.
            inside += module.modules()
    if not layers:
        kinds = list(dict.fromkeys(type(module).__name__ for module in modules.values()))
        more = f" and {len(kinds) - _MAX_KINDS_IN_ERROR} more" if len(kinds) > _MAX_KINDS_IN_ERROR else ""
        raise ModelNotSupportedError(
            f"adapter {adapter.name!r} matches none of the {len(modules)} modules of {type(model).__name__}; it was "
            f"asked about {', '.join(kinds[:_MAX_KINDS_IN_ERROR])}{more}"
        )
    return layers


@contextmanager
def _evaluating(model: "nn.Module") -> Iterator[None]:
    """Run in evaluation mode, without gradients, by deterministic kernels; afterwards all is as it was."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        model.eval()
        # On a GPU, sums in any order would move every token a little.
        torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis.*")
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
        for module, mode in modes:
            module.training = mode


def _is_same_call(one: LayerCall, other: LayerCall) -> bool:
    pairs = [list(tensors_in((each.args, each.kwargs, each.result))) for each in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(is_same(a, b) for a, b in zip(*pairs, strict=True))


def _not_deterministic(name: str) -> str:
    return (
        f"the model is not deterministic: {name} differs between two runs on the same inputs, in evaluation mode. "
        "Nothing can be told from outputs that move by themselves; switch off what is random (jitter, dropout that "
        "ignores eval(), sampling of experts)"
    )


class _Check:
    """The check of one layer."""

    def __init__(
        self,
        adapter: Adapter,
        layer: Layer,
        call: LayerCall,
        max_experts: int,
        orders: Mapping[int, npt.NDArray[np.int64]],
        lengths: Mapping[int, int],
    ) -> None:
        reading = layer.reading
        self._adapter = adapter
        self._layer = layer
        self._call = call
        self._expert_ids = _spread(reading.num_experts, max_experts)
        self._orders = orders
        self._lengths = lengths
        self._result = LayerCheck(layer.name, reading.num_experts, 0, reading.top_k)
        self._not_checked: list[str] = []

    def run(self) -> LayerCheck:
        """Return the finished check."""
        call = self._call
        problems = list(call.problems)
        if call.num_calls == 0:
            problems.append("the layer was not called in a forward of the model; are the inputs of another part of it?")
        elif not problems and call.num_reads != 1:
            problems.append(
                f"the module that hooked() returns was called {call.num_reads} times in a call of the layer: return "
                "the one whose single call has the routing of all tokens"
            )
        if call.num_calls > 1:
            self._not_checked.append(f"the calls of this layer after the first, of {call.num_calls} in a forward")
        if not problems:
            problems = self._experiment()
        return replace(self._result, problems=tuple(problems), not_checked=tuple(self._not_checked))

    def _experiment(self) -> list[str]:
        reading, arrays = self._layer.reading, self._call.arrays
        assert arrays is not None
        num_rows = self._num_rows(arrays)
        if num_rows is None:
            shapes = [tuple(each.shape) for each in tensors_in(self._call.result)]
            return [f"the layer returned tensors of shapes {shapes}, none of which has a row for each routed token"]
        claims = read_claims(reading, arrays, num_rows)
        self._result = replace(self._result, num_tokens=num_rows)
        if claims.problems:
            return claims.problems
        try:
            weights = output_weights(self._adapter, self._layer, self._expert_ids)
        except InvalidInputError as error:
            return [str(error)]
        if num_rows not in self._orders:
            self._not_checked.append("that the rows are the tokens of the forward in order")
        replay = Replay(self._adapter, self._layer, self._call, num_rows, self._orders.get(num_rows))
        real = replay.rows(self._call.result)
        first, second = replay.run(), replay.run()
        if not is_same(first, second):
            return [_not_deterministic("the layer, run alone,")]
        if not is_same(first, real):
            return [
                "run alone on what it was called with, the layer gives another output than within the model: it "
                "depends on something else than its arguments; match the module that gets all it needs as arguments"
            ]
        hidden = replay.hidden()
        with silenced(weights) as experts:
            try:
                unit = self._unit(experts, hidden, real, claims)
                measured = measure(replay, experts, self._expert_ids, real, unit)
            except InvalidInputError as error:
                return [str(error)]
        return self._compare(claims, measured, real)

    def _num_rows(self, arrays: Mapping[str, npt.NDArray[Any]]) -> int | None:
        """Return T: the rows of the layer's output, which are those that were read or those of its input."""
        names = ("row_mask", "routing_map", "expert_ids")
        candidates = [len(arrays[name]) for name in names if name in arrays]
        if self._call.hidden is not None:
            candidates.append(len(self._call.hidden))
        for num_rows in candidates:
            if first_rows(self._call.result, num_rows) is not None:
                return num_rows
        return None

    def _unit(
        self, experts: Experts, hidden: "torch.Tensor | None", real: "torch.Tensor", claims: Claims
    ) -> UnitOutput | None:
        """Return what gives an expert's output at weight 1; None where the adapter has no way to tell."""
        from torch import nn

        module, reading = self._layer.module, self._layer.reading
        is_written = type(self._adapter).expert_output is not Adapter.expert_output
        is_list = isinstance(reading.experts, nn.ModuleList) and len(reading.experts) >= reading.num_experts
        if hidden is None or not (is_written or is_list):
            return None
        scales_input = reading.weight_meaning.startswith("multiplies the expert's input")

        def call(expert_id: int, rows: "torch.Tensor") -> Any:
            if is_written:
                return self._adapter.expert_output(module, expert_id, rows)
            assert isinstance(reading.experts, nn.ModuleList)
            return reading.experts[expert_id](rows)

        def unit(expert_id: int) -> "torch.Tensor":
            said = claims.weights[:, expert_id, None]
            rows = hidden * hidden.new_tensor(said) if scales_input else hidden
            experts.speak(expert_id)
            try:
                loud = call(expert_id, rows.clone())
                experts.silence(expert_id)
                # A bias that was not silenced is in both.
                output = loud - call(expert_id, rows.clone())
                if output.shape != real.shape:
                    raise ValueError(f"its shape is {tuple(output.shape)}, expected {tuple(real.shape)}")
            except Exception as error:
                raise InvalidInputError(
                    f"expert_output(module, {expert_id}, hidden): {type(error).__name__}: {error}"
                ) from error
            if scales_input:
                # The contribution at the weight that was said: what remains to be measured is the factor 1.
                output = output / rows.new_tensor(np.where(said == 0, 1, said))
            return output  # type: ignore[no-any-return]

        if not is_written:
            try:
                unit(self._expert_ids[0])
            except InvalidInputError:
                # Experts that take more than rows cannot be called like this.
                experts.silence()
                return None
        return unit

    def _compare(self, claims: Claims, measured: Measurement, real: "torch.Tensor") -> list[str]:
        reading, tolerance = self._layer.reading, tolerance_of(real)
        if not measured.used.any():
            return [
                "silencing the experts changes nothing for any token: expert_output_weights does not return what the "
                "layer computes with"
            ]
        if measured.additivity_error > 20 * tolerance:
            return [
                "the layer's output is not the sum of its experts' contributions (off by "
                f"{measured.additivity_error:.1%}): something follows that is not linear, a norm perhaps; match the "
                "module inside, whose output is the sum"
            ]
        problems = compare_ids(claims, measured, self._expert_ids, self._lengths.get(len(claims.used), 0))
        if problems:
            self._result = replace(self._result, num_experts_checked=len(self._expert_ids))
            return problems
        scale = reading.block_scale
        error, problems = compare_weights(claims, measured, self._expert_ids, tolerance, scale)
        self._result = replace(
            self._result,
            num_experts_checked=len(self._expert_ids),
            num_slots=int((claims.used[:, self._expert_ids] & measured.used).sum()),
            num_empty_slots=claims.num_empty_slots,
            weight_proof="none" if problems else measured.proof,
            max_weight_error=error,
            weight_tolerance=tolerance,
        )
        self._note_unchecked(claims, measured)
        return problems

    def _note_unchecked(self, claims: Claims, measured: Measurement) -> None:
        reading, arrays = self._layer.reading, self._call.arrays
        assert arrays is not None
        said = claims.used[:, self._expert_ids]
        if len(self._expert_ids) < reading.num_experts:
            self._not_checked.append(f"{reading.num_experts - len(self._expert_ids)} experts beyond max_experts")
        num_silent = int((~measured.used).all(axis=0).sum())
        if num_silent:
            self._not_checked.append("experts that no token used, but for that they move none; more inputs use more")
        num_unseen = int((said & ~measured.used).sum())
        if num_unseen:
            self._not_checked.append(f"{num_unseen} slots whose weight or whose expert's output is 0, or next to it")
        if measured.proof == "changed weights":
            self._not_checked.append(
                "a factor between the weights that were read and the experts' outputs that does not come from them; "
                "expert_output would tell"
            )
        most = int(claims.used.sum(axis=1).max(initial=0))
        if "routing_map" in arrays and most < reading.top_k and not reading.num_identity_experts:
            self._not_checked.append(f"top_k={reading.top_k}: no token used more than {most} experts")
        if claims.num_empty_slots:
            self._not_checked.append("why slots are empty (dropped, skipped or unused): that is the adapter's word")
        if claims.num_identity_slots:
            self._not_checked.append(f"{claims.num_identity_slots} slots of identity experts, which have no weights")
        named = [name for name in ("logits", "intended_expert_ids") if name in arrays]
        if named:
            self._not_checked.append(f"the values of {' and '.join(named)}: only their shape and range")


def _spread(num_experts: int, max_experts: int) -> Sequence[int]:
    if num_experts <= max_experts:
        return range(num_experts)
    return [int(each) for each in np.linspace(0, num_experts - 1, max_experts).round()]
