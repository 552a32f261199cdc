"""What a check of an adapter found."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_debugger._tables import text_table
from moe_debugger.errors import ModelNotSupportedError

__all__ = ["AdapterCheck", "LayerCheck", "WeightProof"]

WeightProof = Literal["expert_output", "changed weights", "none"]

_HEADERS = ("layer", "experts", "checked", "top-k", "tokens", "slots", "empty", "weights by", "max error", "verdict")


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One layer: what was compared, and what differs.

    Attributes:
        module_name: the module that the adapter matches.
        num_experts: E as described.
        num_experts_checked: experts that were silenced, one at a time.
        top_k: slots of a token as described.
        num_tokens: rows of the layer's output, padded ones included.
        num_slots: slots whose expert was found to move exactly the tokens that the adapter said.
        num_empty_slots: slots that reach no expert; nothing moved there.
        weight_proof: "expert_output": the contributions are the weights times what the expert gives, up to nothing;
            "changed weights": the contributions follow the tensor that was read when it is changed; "none".
        max_weight_error: the largest relative difference between a weight that was read and the measured one; NaN
            where none was measured.
        weight_tolerance: what rounding in the model's dtype may make of it.
        problems: where adapter and experiment disagree.
        not_checked: what the experiment could not tell.
    """

    module_name: str
    num_experts: int
    num_experts_checked: int
    top_k: int
    num_tokens: int = 0
    num_slots: int = 0
    num_empty_slots: int = 0
    weight_proof: WeightProof = "none"
    max_weight_error: float = float("nan")
    weight_tolerance: float = float("nan")
    problems: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterCheck:
    """The result of `check_adapter`; prints as a table.

    Attributes:
        adapter: its name.
        layers: one for each module that the adapter matches, in the order of the model.
        problems: of the model or of all layers together.
    """

    adapter: str
    layers: tuple[LayerCheck, ...]
    problems: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether nothing disagrees."""
        return not self.all_problems

    @property
    def all_problems(self) -> tuple[str, ...]:
        """Every problem, those of a layer with its name."""
        of_layers = [f"{layer.module_name}: {text}" for layer in self.layers for text in layer.problems]
        return (*self.problems, *of_layers)

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What could not be told, each once, with the layers that it holds for."""
        where: dict[str, list[str]] = {}
        for layer in self.layers:
            for text in layer.not_checked:
                where.setdefault(text, []).append(layer.module_name)
        return tuple(f"{text} ({_names(names, len(self.layers))})" for text, names in where.items())

    def raise_if_wrong(self) -> None:
        """Raise where the adapter disagrees with the experiment.

        Raises:
            ModelNotSupportedError: the text holds every problem.
        """
        if not self.agrees:
            raise ModelNotSupportedError(self._refusal())

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "adapter": self.adapter,
            "agrees": self.agrees,
            "problems": list(self.all_problems),
            "not_checked": list(self.not_checked),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def _refusal(self) -> str:
        problems = "\n".join(f"  {text}" for text in self.all_problems)
        return f"adapter {self.adapter!r} is refused, {len(self.all_problems)} problem(s):\n{problems}"

    def __str__(self) -> str:
        rows = [
            [
                layer.module_name,
                layer.num_experts,
                layer.num_experts_checked,
                layer.top_k,
                layer.num_tokens,
                layer.num_slots,
                layer.num_empty_slots,
                layer.weight_proof,
                layer.max_weight_error,
                "wrong" if layer.problems else "agrees",
            ]
            for layer in self.layers
        ]
        parts = [text_table(_HEADERS, rows)] if rows else []
        if self.not_checked:
            parts.append("Not checked:\n" + "\n".join(f"  {text}" for text in self.not_checked))
        parts.append(f"adapter {self.adapter!r} agrees with the experiment" if self.agrees else self._refusal())
        return "\n\n".join(parts)

    __repr__ = __str__


def _names(names: list[str], num_layers: int) -> str:
    if len(names) == num_layers:
        return "every layer" if num_layers > 1 else names[0]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
