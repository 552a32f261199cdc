"""Which modules of a model are timed, by which clock, and the numbers by which marks name them."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_debugger.capture import Site
from moe_debugger.errors import ModelNotSupportedError

from .clocks import CudaClock, EventRuntime, HostClock, clock_of
from .places import WHOLE_MODEL, LayerPlan, Part, layer_plan
from .spans import Places

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Placement", "refuse_compiled"]


def refuse_compiled(model: "nn.Module") -> None:
    """Refuse a model that is compiled, wholly or in part.

    Raises:
        ModelNotSupportedError: compiled code has no calls of modules left that could be timed.
    """
    for name, module in [("", model), *model.named_modules()]:
        if _is_compiled(module):
            raise ModelNotSupportedError(
                f"profiling: {name or 'the model'} ({type(module).__name__}) is compiled, and compiled code has no "
                "calls of routers and experts left to time; profile the model before torch.compile, or watch it "
                "without profiling and use torch.profiler for its kernels"
            )


def _is_compiled(module: "nn.Module") -> bool:
    return getattr(module, "_orig_mod", None) is not None or getattr(module, "_compiled_call_impl", None) is not None


class Placement:
    """The places of one model.

    Args:
        model: the model.
        sites: its MoE layers.
        runtime: of CUDA events.
        note: takes what cannot be measured.

    Attributes:
        plans: how each layer is timed.
        places: what the numbers mean.
        clocks, names: of each place, the clock and its name.
    """

    def __init__(
        self, model: "nn.Module", sites: Sequence[Site], runtime: EventRuntime | None, note: Callable[[str], None]
    ) -> None:
        self._model, self._runtime, self._note = model, runtime, note
        self._roots = {site.root for site in sites}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._known: dict[str, HostClock | CudaClock] = {}
        self.plans: tuple[LayerPlan, ...] = tuple(layer_plan(site, self._modules) for site in sites)
        self._timed = self._with_parents()
        self.clocks: list[Any] = []
        self.names: list[str] = []
        self.places = self._number()

    @property
    def devices(self) -> dict[str, CudaClock]:
        """The clocks of devices by name."""
        return {name: clock for name, clock in self._known.items() if isinstance(clock, CudaClock)}

    def compiled(self) -> list[str]:
        """Return the names of what was timed and is compiled by now; of a compiled module its own name alone."""
        found: list[str] = []
        for name, module in self._timed:
            is_inside = bool(found) and (found[-1] == "the model" or f"{name}.".startswith(f"{found[-1]}."))
            if _is_compiled(module) and not is_inside:
                found.append(name or "the model")
        return found

    def _with_parents(self) -> "list[tuple[str, nn.Module]]":
        """Return the timed modules and those around them by name, each behind those that it lies in."""
        timed = {id(place.module) for plan in self.plans for place in plan.places}
        names: set[tuple[str, ...]] = set()
        for name, module in self._modules.items():
            if id(module) in timed:
                parts = tuple(name.split(".")) if name else ()
                names.update(parts[:length] for length in range(len(parts) + 1))
        return [(".".join(parts), self._modules[".".join(parts)]) for parts in sorted(names)]

    def _number(self) -> Places:
        """Number the places: 0 is the forward, then come the waits of no layer and of each layer, then the modules."""
        layers, parts, experts = [WHOLE_MODEL], [Part.FORWARD], [WHOLE_MODEL]
        model_clock = self._clock_of(self._model)
        self.clocks, self.names = [model_clock[1]], [model_clock[0]]
        for plan in (WHOLE_MODEL, *range(len(self.plans))):
            name, clock = model_clock if plan < 0 else self._clock_of(self.plans[plan].places[0].module)
            layers.append(plan)
            parts.append(Part.WAIT)
            experts.append(WHOLE_MODEL)
            self.clocks.append(clock)
            self.names.append(name)
        for plan, layer in enumerate(self.plans):
            for place in layer.places:
                layers.append(plan)
                parts.append(place.part)
                experts.append(place.expert_id)
                name, clock = self._clock_of(place.module)
                self.clocks.append(clock)
                self.names.append(name)
        return Places(np.array(layers, np.int32), np.array(parts, np.int32), np.array(experts, np.int32))

    def waits(self) -> dict[int, tuple[int, Any]]:
        """Return the code and the clock of the wait of each plan, and of none (-1)."""
        return {plan: (2 * (plan + 2), self.clocks[plan + 2]) for plan in range(WHOLE_MODEL, len(self.plans))}

    def _clock_of(self, module: "nn.Module") -> tuple[str, Any]:
        parameter = next(iter(module.parameters()), None)
        if parameter is None:
            parameter = next(iter(self._model.parameters()), None)
        device = getattr(parameter, "device", None)
        kind = getattr(device, "type", "cpu")
        if kind not in ("cpu", "cuda"):
            self._note(
                f"on a device of type {kind} the host's clock shows when work is handed over, not when it is done"
            )
        clock = clock_of(device, self._known, self._runtime)
        return ("host" if isinstance(clock, HostClock) else str(device)), clock

    def codes(self) -> dict[tuple[int, Part], dict[int, int]]:
        """Return the codes of each module and part by plan."""
        codes: dict[tuple[int, Part], dict[int, int]] = {}
        number = 2 + len(self.plans)
        for plan, layer in enumerate(self.plans):
            for place in layer.places:
                codes.setdefault((id(place.module), place.part), {})[plan] = 2 * number
                number += 1
        return codes

    def entries(self) -> "Iterable[nn.Module]":
        """Return the modules whose call is a forward, the outermost that runs; as the capture has them."""
        found: list[Any] = [self._model, getattr(self._model, "base_model", None)]
        for root in self._roots:
            parts = root.split(".")
            found += [self._modules.get(".".join(parts[:length])) for length in range(1, len(parts) + 1)]
        return {id(each): each for each in found if hasattr(each, "register_forward_hook")}.values()
