"""The causal oracle: which experts computed for which tokens, told from their outputs alone.

While an `Oracle` is open, each call of a model's experts is replayed, in float64, once per expert with all the others'
output weights zeroed. A token used an expert exactly if that expert alone moves its output; the weight is the factor
between that movement and what the expert gives at weight 1. No routing tensor is interpreted, and no code is shared
with the capture. The model itself runs unchanged: it gets the result of its own call.

What it cannot see: a chosen expert whose weight is exactly 0, and which of two slots with the same expert had which
part of the weight. Where it cannot be done at all (none of the architectures here), a definition would be needed.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from oracle.custom import CUSTOM_KINDS
from oracle.kinds import KINDS, Kind, ScaledInput, Site, find_sites
from torch import nn

__all__ = ["Oracle", "SiteCall"]

_REPLAY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class SiteCall:
    """What one call of one site did; T rows in the order of the call, E experts with weights of their own.

    Attributes:
        site: name of the module whose experts computed.
        used: [T, E] bool.
        weights: [T, E] float64, 0 where unused.
        identity_weights: [T] float64, the sum of the weights by which the hidden state itself was added.
        tolerance: relative rounding of `weights` by the replay itself.
        unexplained: the largest share of a contribution that no multiple of the expert's unit output explains.
        replay_error: the largest difference between the real output and the replay's, relative to the largest output.
        replay_tolerance: what rounding in the model's dtype may make of it.
        thread: which called, as `threading.get_ident` says it.
    """

    site: str
    used: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float64]
    identity_weights: npt.NDArray[np.float64]
    tolerance: float
    unexplained: float
    replay_error: float
    replay_tolerance: float
    thread: int = 0


class Oracle:
    """Replays a model's experts while it is open::

        with Oracle(model) as oracle:
            model(**inputs)
        oracle.calls["model.layers.0.mlp.experts"][0].used

    Args:
        model: runs as always; its experts' modules get a `forward` of their own until the oracle is closed.
        more_kinds: for experts that are built as none of those known here are.

    Attributes:
        calls: by site, in the order of the calls. A call inside a backward pass (a recomputation of gradient
            checkpointing) is none.
        num_recomputed: calls inside backward passes, by site.
    """

    def __init__(self, model: nn.Module, more_kinds: Sequence[type[Kind]] = ()) -> None:
        self.sites: tuple[Site, ...] = tuple(find_sites(model, (*more_kinds, *CUSTOM_KINDS, *KINDS)))
        self.calls: dict[str, list[SiteCall]] = {site.name: [] for site in self.sites}
        self.num_recomputed: dict[str, int] = defaultdict(int)
        self._modules = dict(model.named_modules())
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> "Oracle":
        for site in self.sites:
            if issubclass(site.kind, ScaledInput):
                self._wrap(self._modules[site.name.rpartition(".")[0]], "forward", _keeps_input_for(site.module))
                site.module.__dict__["oracle_hidden"] = {}
                self._undo.append(partial(site.module.__dict__.pop, "oracle_hidden", None))
            self._wrap(site.module, site.method, self._replays(site))
        return self

    def __exit__(self, *exception: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _wrap(self, module: nn.Module, method: str, around: Callable[..., Any]) -> None:
        original = getattr(module, method)
        # Someone (accelerate, expert parallelism) may have given the instance a method of its own.
        own = module.__dict__.get(method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        def undo() -> None:
            if own is None:
                del module.__dict__[method]
            else:
                module.__dict__[method] = own

        module.__dict__[method] = wrapped
        self._undo.append(undo)

    def _replays(self, site: Site) -> Callable[..., Any]:
        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:
                self.num_recomputed[site.name] += 1
                return original(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():
                # Made before the call: it may change its arguments in place.
                kind = site.kind(site.module, args, kwargs)
            result = original(*args, **kwargs)
            device = _hidden_device(args, kwargs)
            # Under autocast the experts compute in its dtype, whatever that of their output.
            computed_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                torch.autocast(device, enabled=False),
            ):
                self.calls[site.name].append(_replay(site.name, kind, result, computed_in))
            return result

        return around


def _replay(name: str, kind: Kind, result: Any, computed_in: torch.dtype | None) -> SiteCall:
    silent = kind.run(None)
    used = torch.zeros(len(silent), kind.num_experts, dtype=torch.bool)
    weights = torch.zeros(len(silent), kind.num_experts, dtype=torch.float64)
    total, unexplained = silent.clone(), 0.0
    for expert_id in range(kind.num_experts):
        contribution = kind.run(expert_id) - silent
        moved = (contribution != 0).any(-1)
        if not bool(moved.any()):
            continue
        total += contribution
        weight, rest = kind.weight(expert_id, contribution)
        used[:, expert_id] = moved.cpu()
        weights[:, expert_id] = torch.where(moved, weight, 0).double().cpu()
        unexplained = max(unexplained, float(rest[moved].max()))
    hidden = kind.hidden()
    # What is left with all experts silenced and follows the hidden state came through identity experts; a bias differs.
    identity = torch.zeros(len(silent), dtype=torch.float64)
    if hidden.shape == silent.shape and bool((silent != 0).any()):
        share = (silent * hidden).sum(-1) / (hidden * hidden).sum(-1).clamp_min(1e-300)
        follows = (silent - share.unsqueeze(-1) * hidden).norm(dim=-1) <= 1e-9 * silent.norm(dim=-1)
        identity = torch.where(follows, share, 0).double().cpu()
    dtype = computed_in or (result[0] if isinstance(result, tuple) else result).dtype
    real = kind.output(result).detach().double()
    difference = (real - total).abs()
    is_known = ~difference.isnan()
    error = float(difference[is_known].max() / total.abs().max().clamp_min(1e-300)) if is_known.any() else 0.0
    return SiteCall(
        site=name,
        used=used.numpy(),
        weights=weights.numpy(),
        identity_weights=identity.numpy(),
        tolerance=kind.tolerance,
        unexplained=unexplained,
        replay_error=error,
        replay_tolerance=_REPLAY_TOLERANCE[dtype],
        thread=threading.get_ident(),
    )


def _keeps_input_for(experts: nn.Module) -> Callable[..., Any]:
    def around(original: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        experts.__dict__["oracle_hidden"][threading.get_ident()] = hidden.detach().clone()
        return original(hidden, *args, **kwargs)

    return around


def _hidden_device(args: Sequence[Any], kwargs: Any) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"
