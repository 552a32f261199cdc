"""What the oracle knows of each kind of experts: which call runs them, and which weights hold an expert's output.

A kind never reads who was chosen. It can do three things with one recorded call: run it again with a single expert that
is not silenced (`run`), give an expert's output for every token at weight 1 (`unit`), and say the tokens' hidden
states (`hidden`), which an identity expert would return.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle.bare import bare_copy, double, only
from torch import nn

__all__ = ["KINDS", "Kind", "ScaledInput", "Site", "Stacked", "autocast_as_now", "find_sites", "rows_of"]


@dataclass(frozen=True)
class Site:
    """One place where experts compute.

    Attributes:
        name: of the module whose call is replayed.
        module: that module.
        kind: how to replay it.
        method: the name of the module's method that is the call.
    """

    name: str
    module: nn.Module
    kind: "type[Kind]"
    method: str = "forward"


class Kind:
    """One call of a site, to be replayed; the weights are read when it is made.

    Attributes:
        num_experts: experts with weights of their own.
        tolerance: of the weights, relative: what the replay itself rounds, beyond float64.
    """

    num_experts: int
    tolerance: float = 1e-6

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        raise NotImplementedError

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        """Tell whether `module` is of this kind, by its structure."""
        raise NotImplementedError

    def run(self, expert_id: int | None) -> torch.Tensor:
        """Return the call's output [T, H] with every expert but `expert_id` silenced (all of them where None)."""
        raise NotImplementedError

    def unit(self, expert_id: int) -> torch.Tensor:
        """Return what expert `expert_id` gives for each token at weight 1, [T, H]."""
        raise NotImplementedError

    def hidden(self) -> torch.Tensor:
        """Return the tokens' hidden states, [T, H]."""
        raise NotImplementedError

    def output(self, result: Any) -> torch.Tensor:
        """Return the experts' part of what the real call returned, as `run` gives it; NaN where it cannot be told."""
        tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return rows_of(tensor)

    def weight(self, expert_id: int, contribution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights [T] by which the expert's output was multiplied, and how far that is from the whole truth.

        The second tensor [T] is the part of the contribution that no multiple of the unit output explains, as a share.
        """
        return _regress(contribution, self.unit(expert_id))


class Stacked(Kind):
    """`experts(hidden, ids [T, k], weights [T, k])` with stacked parameters: most architectures."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        self._args, self._kwargs = double(list(args)), double(kwargs)
        self._parameters = [
            parameter for name, parameter in self._clone.named_parameters(recurse=False) if name.startswith("down_proj")
        ]
        self._full = [parameter.clone() for parameter in self._parameters]
        self.num_experts = len(self._full[0])

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        weight = getattr(module, "down_proj", None)
        return _last(name) == "experts" and isinstance(weight, nn.Parameter) and weight.ndim == 3

    def run(self, expert_id: int | None) -> torch.Tensor:
        for parameter, full in zip(self._parameters, self._full, strict=True):
            only(parameter, full, expert_id)
        return self._call(*self._args, **self._kwargs)

    def unit(self, expert_id: int) -> torch.Tensor:
        for parameter, full in zip(self._parameters, self._full, strict=True):
            only(parameter, full, expert_id)
        hidden, ids, weights, *rest = self._args
        # Some experts refuse k = 1, so the slots are as many as they were.
        alone = torch.zeros_like(weights)
        alone[:, 0] = 1
        return self._call(hidden, torch.full_like(ids, expert_id), alone, *rest, **self._kwargs)

    def hidden(self) -> torch.Tensor:
        return rows_of(self._args[0])

    def _call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return rows_of(type(self._clone).forward(self._clone, *args, **kwargs))


class StackedInRows(Stacked):
    """DBRX: the experts' matrices are stacked in the rows of 2-D parameters, `mlp.w2` [E * I, H]."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        self._args, self._kwargs = double(list(args)), double(kwargs)
        self.num_experts = int(self._clone.num_experts)  # type: ignore[arg-type]
        stacked: Any = self._clone.get_parameter("mlp.w2")
        self._parameters = [stacked.data.view(self.num_experts, -1, stacked.shape[-1])]
        self._full = [self._parameters[0].clone()]

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        weight = getattr(getattr(module, "mlp", None), "w2", None)
        return _last(name) == "experts" and isinstance(weight, nn.Parameter) and weight.ndim == 2


class ScaledInput(Stacked):
    """Llama 4: every expert gets every token, [E * T, H], each already multiplied by its weight.

    The weight scales the expert's INPUT, so no multiple of the unit output explains a contribution. The oracle tells by
    silencing who was used, and takes the weight from the input that the expert really got: the factor between it and
    the token's hidden state. The hidden state itself is not among the arguments; it is what the block was called with.
    """

    # The scaled inputs have the model's dtype.
    tolerance = 0.0

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__(module, args, kwargs)
        self._inputs = double(args[0]).reshape(self.num_experts, -1, args[0].shape[-1])
        hidden: torch.Tensor = double(module.__dict__["oracle_hidden"][threading.get_ident()])
        self._hidden = hidden.reshape(-1, args[0].shape[-1])
        self.tolerance = 2 * float(torch.finfo(args[0].dtype).eps)

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        return super().fits(name, module) and type(module).forward.__code__.co_argcount == 2

    def run(self, expert_id: int | None) -> torch.Tensor:
        return super().run(expert_id).reshape(self.num_experts, len(self._hidden), -1).sum(0)

    def hidden(self) -> torch.Tensor:
        return self._hidden

    def output(self, result: Any) -> torch.Tensor:
        return super().output(result).double().reshape(self.num_experts, len(self._hidden), -1).sum(0)

    def weight(self, expert_id: int, contribution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _regress(self._inputs[expert_id], self._hidden)


class ExpertModules(Kind):
    """Switch Transformers and NLLB-MoE: a ModuleDict with one module per expert, called as a whole."""

    _OUTPUTS = ("wo", "fc2")

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        self._args, self._kwargs = double(list(args)), double(kwargs)
        if module.training:
            # Token dropout then zeroes parts of what an expert gave, which is no routing; else it is a factor.
            self._clone.__dict__["moe_token_dropout"] = 0.0
        self._experts = [
            child for name, child in self._clone.named_children() if re.fullmatch(r"expert_\d+", name) is not None
        ]
        self.num_experts = len(self._experts)
        # Nothing after the last linear map of an expert: zeroing it and its bias silences the expert.
        self._outputs = [
            list(next(getattr(expert, name) for name in self._OUTPUTS if hasattr(expert, name)).parameters())
            for expert in self._experts
        ]
        self._full = [[parameter.clone() for parameter in parameters] for parameters in self._outputs]

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleDict) and "expert_0" in module

    def run(self, expert_id: int | None) -> torch.Tensor:
        for index in range(self.num_experts):
            self._set(index, index == expert_id)
        return rows_of(type(self._clone).forward(self._clone, *self._args, **self._kwargs))

    def unit(self, expert_id: int) -> torch.Tensor:
        self._set(expert_id, True)
        output: torch.Tensor = self._experts[expert_id](self.hidden())
        return output

    def hidden(self) -> torch.Tensor:
        return rows_of(self._args[0])

    def _set(self, index: int, speaks: bool) -> None:
        for parameter, full in zip(self._outputs[index], self._full[index], strict=True):
            parameter.copy_(full) if speaks else parameter.zero_()


class HardChoice(ExpertModules):
    """ViTPose: a ModuleList of linear maps; each image's tokens go to the expert of its data set, at weight 1."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        self._args, self._kwargs = double(list(args)), double(kwargs)
        self._experts = list(self._clone.children())
        self.num_experts = len(self._experts)
        self._outputs = [list(expert.parameters()) for expert in self._experts]
        self._full = [[parameter.clone() for parameter in parameters] for parameters in self._outputs]

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        has_own_forward = type(module).forward is not nn.Module.forward
        return _last(name) == "experts" and isinstance(module, nn.ModuleList) and has_own_forward


class SortedRows(Kind):
    """JetMoE's feed-forward: rows sorted by expert, `output_linear.weight` [E, H, I]; the block is replayed.

    The block's own router runs in the model's dtype, so that the replay's choice is the model's bit by bit.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        router = self._clone._modules["router"]
        assert router is not None
        self._router = _NativeRouter(bare_copy(module.get_submodule("router"), None), _hidden(args, kwargs).dtype)
        self._clone._modules["router"] = self._router
        self._args, self._kwargs = double(list(args)), double(kwargs)
        self._weight = self._clone.get_parameter("output_linear.weight")
        self._full = self._weight.clone()
        self.num_experts = len(self._full)

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        weight = getattr(getattr(module, "output_linear", None), "weight", None)
        return isinstance(weight, nn.Parameter) and weight.ndim == 3 and not hasattr(module, "reduce")

    def run(self, expert_id: int | None) -> torch.Tensor:
        only(self._weight, self._full, expert_id)
        self._router.gates_are_one = False
        return self._call()

    def unit(self, expert_id: int) -> torch.Tensor:
        only(self._weight, self._full, None)
        self._router.gates_are_one = True
        silent = self._call()
        only(self._weight, self._full, expert_id)
        return self._call() - silent

    def hidden(self) -> torch.Tensor:
        return rows_of(_hidden(self._args, self._kwargs))

    def _call(self) -> torch.Tensor:
        return rows_of(type(self._clone).forward(self._clone, *self._args, **self._kwargs))


class SortedAttention(Kind):
    """JetMoE's attention: `reduce(attended [B, S, k, D], topology)` projects each slot by its expert.

    A padded token attends to nothing, so any expert would give it 0: the replay has ones in place of such zeros.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module)
        self._attended, topology = double(list(args))
        is_blank = (self._attended == 0).all(-1, keepdim=True)
        self._attended = torch.where(is_blank, 1.0, self._attended)
        self._is_blank_row = is_blank.any(-2).reshape(-1, 1)
        *self._order, self._gates, self._sizes = topology
        self._weight = self._clone.get_parameter("output_linear.weight")
        self._full = self._weight.clone()
        self.num_experts = len(self._full)

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        weight = getattr(getattr(module, "output_linear", None), "weight", None)
        return isinstance(weight, nn.Parameter) and weight.ndim == 3 and hasattr(module, "reduce")

    def run(self, expert_id: int | None) -> torch.Tensor:
        only(self._weight, self._full, expert_id)
        return self._call(self._gates)

    def unit(self, expert_id: int) -> torch.Tensor:
        only(self._weight, self._full, None)
        silent = self._call(torch.ones_like(self._gates))
        only(self._weight, self._full, expert_id)
        return self._call(torch.ones_like(self._gates)) - silent

    def hidden(self) -> torch.Tensor:
        # No identity experts here: nothing is compared with this.
        return torch.zeros_like(self._call(self._gates))

    def output(self, result: Any) -> torch.Tensor:
        return torch.where(self._is_blank_row, torch.nan, super().output(result).double())

    def _call(self, gates: torch.Tensor) -> torch.Tensor:
        # The class's method: the instance's own is the oracle's wrapper.
        reduce: Any = type(self._clone).reduce  # type: ignore[attr-defined]
        return rows_of(reduce(self._clone, self._attended, (*self._order, gates, self._sizes)))


class Embeddings(Kind):
    """Doge: an expert is one row of `down_embed` and one of `up_embed`; a dense MLP runs beside, which is silenced too.

    The replay runs in the model's dtype: in another one, sums of scores that tie could choose otherwise. So that this
    dtype rounds nothing but the weight itself, an expert that speaks is replaced by one that gives ones to every token.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._clone = bare_copy(module, None)
        self._args = [value.detach().clone() for value in args]
        for parameter in self._clone.get_submodule("down_proj").parameters():
            parameter.zero_()
        self._clone._modules["act_fn"] = _Ones()
        self._as_now = autocast_as_now()
        self._up = self._clone.get_parameter("up_embed.weight")
        self._ones = torch.ones_like(self._up)
        self.num_experts = len(self._up)
        # The softmax over the slots is the model's own, in its dtype.
        self.tolerance = max(2 * float(torch.finfo(self._up.dtype).eps), 1e-6)

    @classmethod
    def fits(cls, name: str, module: nn.Module) -> bool:
        return all(isinstance(getattr(module, part, None), nn.Embedding) for part in ("up_embed", "down_embed"))

    def run(self, expert_id: int | None) -> torch.Tensor:
        only(self._up, self._ones, expert_id)
        with self._as_now():
            output: torch.Tensor = type(self._clone).forward(self._clone, *self._args)[0]
        return rows_of(output).double()

    def unit(self, expert_id: int) -> torch.Tensor:
        return torch.ones_like(self.hidden())

    def hidden(self) -> torch.Tensor:
        return rows_of(self._args[0]).double()

    def output(self, result: Any) -> torch.Tensor:
        # The dense MLP's part is not the experts', and the experts are not the model's.
        return torch.full_like(self.hidden(), torch.nan)


class _Ones(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(values)


class _NativeRouter(nn.Module):
    """Runs a router in the dtype that it has in the model, inside a block that is replayed in float64."""

    def __init__(self, router: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = router
        self.dtype = dtype
        self.gates_are_one = False
        self._as_now = autocast_as_now()

    def forward(self, hidden: torch.Tensor) -> tuple[Any, ...]:
        with self._as_now():
            order, rows, gates, sizes, logits = self.router(hidden.to(self.dtype))
        gates = gates.double()
        return order, rows, torch.ones_like(gates) if self.gates_are_one else gates, sizes, logits


KINDS: tuple[type[Kind], ...] = (
    ScaledInput, Stacked, StackedInRows, ExpertModules, HardChoice, SortedRows, SortedAttention, Embeddings,
)  # fmt: skip


def autocast_as_now() -> Callable[[], torch.autocast]:
    """Return what makes contexts with autocast on the CPU as it is at this call."""
    dtype, is_enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    return lambda: torch.autocast("cpu", dtype, enabled=is_enabled)


def find_sites(model: nn.Module, kinds: Sequence[type[Kind]]) -> Iterator[Site]:
    """Yield every place of `model` where experts compute, in the order of its modules."""
    for name, module in model.named_modules():
        for kind in kinds:
            if kind.fits(name, module):
                yield Site(name, module, kind, "reduce" if kind is SortedAttention else "forward")
                break


def _regress(values: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = (unit * unit).sum(-1)
    weight = (values * unit).sum(-1) / square.clamp_min(1e-300)
    rest = (values - weight.unsqueeze(-1) * unit).norm(dim=-1)
    return weight, rest / values.norm(dim=-1).clamp_min(1e-300)


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    value: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def rows_of(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor as rows of its last dimension, [T, H]."""
    return value.reshape(-1, value.shape[-1])


def _last(name: str) -> str:
    return name.rpartition(".")[2]
