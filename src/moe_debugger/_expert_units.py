"""The weights of experts as hidden units, whatever the layout in which a model stores them.

Layouts that are read:
    fused       one parameter for all experts, [E, a, b], or [E * a, b] one below the other: transformers 5's
                `gate_up_proj` and `down_proj`, transposed or not, gate and up in halves or interleaved.
    separate    a module for each expert with matrices `up`, `down` and perhaps `gate` by any name.

A matrix holds one weight (gate and up together: two) between each hidden unit and each number of the token, so one side
has the length H and the other I or 2 I. Which is which follows from H; where H = I, from what the module says of itself
(`is_transposed`, `is_concatenated`) or, for linear layers, from their names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import ModelNotSupportedError
from moe_debugger.training.parameters import LayerParameters, Slot, find_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ExpertUnits"]

_DOWN = re.compile(r"(?:^|[._])(?:down|w2|fc2|lin2|linear_2|wo|w_out|c_proj|out_proj|output|dense_4h_to_h)")
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "moe_latent_size")


@dataclass(frozen=True, slots=True)
class _Part:
    """One parameter: its name, the module that holds it, and a view of expert after expert, or one for each."""

    name: str
    owner: "nn.Module"
    slots: tuple[Slot, ...]
    num_rows: int

    def of(self, expert: int) -> "torch.Tensor":
        if not self.num_rows:
            tensor = self.slots[expert].tensor()
        else:
            fused = self.slots[0].tensor()
            tensor = None
            if fused is not None:
                # An expert's matrix, or where experts stand below one another in one matrix its rows.
                is_stacked = fused.shape[0] == self.num_rows
                tensor = fused[expert] if is_stacked else fused.chunk(self.num_rows)[expert]
        if tensor is None:
            raise ModelNotSupportedError(f"parameter {self.name} of expert {expert} is not there any more")
        return tensor

    @property
    def is_down(self) -> bool:
        return bool(_DOWN.search(self.name))


class ExpertUnits:
    """The hidden units of one layer's experts.

    Args:
        site: a capture site.
        model: the model it is of.

    Attributes:
        num_experts: E, routed ones.
        num_units: I, hidden units of an expert.

    Raises:
        ModelNotSupportedError: the weights are in no layout that is known, or are not there as plain numbers
            (quantised, on the meta device).
    """

    def __init__(self, site: Any, model: "nn.Module") -> None:
        self._where = f"layer {site.info.layer_index} ({site.info.module_name})"
        found = find_parameters(site, model)
        self.num_experts = found.num_experts
        self._parts = list(_parts(site, found))
        matrices = [part for part in self._parts if part.of(0).ndim == 2]
        for part in matrices:
            self._check(part)
        if len(matrices) < 2:
            raise ModelNotSupportedError(
                f"{self._where}: found {[part.name for part in self._parts]} as the experts' parameters, expected an "
                "up and a down matrix at least; compare the experts by their outputs instead (hidden_states=...)"
            )
        self._hidden, self.num_units = self._sizes(matrices, _hidden_sizes(site, model))
        self._unit_axis = self._axes(matrices)

    def of(self, expert: int) -> "torch.Tensor":
        """Return the units of an expert, [I, D] float32, D all weights and biases that touch a unit."""
        import torch

        columns = []
        for part in self._parts:
            tensor = part.of(expert).detach().float()
            if tensor.ndim == 2:
                rows = tensor if self._unit_axis[part.name] == 0 else tensor.T
            elif tensor.ndim == 1 and not part.is_down and tensor.numel() % self.num_units == 0:
                rows = tensor.reshape(-1, 1)
            else:
                # The bias of down belongs to no unit.
                continue
            num = len(rows) // self.num_units
            if num == 1:
                columns.append(rows)
            elif getattr(part.owner, "is_concatenated", True):
                columns.extend(rows.chunk(num))
            else:
                columns.extend(rows[start::num] for start in range(num))
        return torch.cat(columns, dim=1)

    def _check(self, part: _Part) -> None:
        tensor = part.of(0)
        if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelNotSupportedError(
                f"{self._where}: {part.name} is {tensor.dtype} on {tensor.device}, expected plain 16-bit numbers or "
                "wider; load the model unquantised, or compare the experts by their outputs (hidden_states=...)"
            )

    def _sizes(self, matrices: list[_Part], sizes: list[int]) -> tuple[int, int]:
        shapes = [tuple(part.of(0).shape) for part in matrices]
        common = set[int].intersection(*(set(shape) for shape in shapes))
        # Experts may work in a narrower space than the model's, whose width no setting has to name.
        for hidden in (*sizes, *(common if len(common) == 1 else ())):
            if all(hidden in shape for shape in shapes):
                # The other side of each: I, or 2 I where gate and up are one matrix.
                others = [a if b == hidden else b for a, b in shapes]
                units = min(others)
                if all(other in (units, 2 * units) for other in others):
                    return hidden, units
        raise ModelNotSupportedError(
            f"{self._where}: the experts' matrices have shapes {shapes}, none of whose sides is the token's width in "
            f"all of them (looked for {sizes}); compare the experts by their outputs instead (hidden_states=...)"
        )

    def _axes(self, matrices: list[_Part]) -> dict[str, int]:
        axes: dict[str, int] = {}
        unclear: list[_Part] = []
        for part in matrices:
            fits = self._fitting_axes(part)
            if len(fits) == 1:
                axes[part.name] = fits[0]
            else:
                unclear.append(part)
        for part in unclear:
            axes[part.name] = self._by_neighbours(part, axes, matrices)
        return axes

    def _fitting_axes(self, part: _Part) -> list[int]:
        shape = part.of(0).shape
        return [
            axis
            for axis in (0, 1)
            if shape[axis] in (self.num_units, 2 * self.num_units) and shape[1 - axis] == self._hidden
        ]

    def _by_neighbours(self, part: _Part, axes: dict[str, int], matrices: list[_Part]) -> int:
        """A square matrix: as its module says, or a module of its kind shows, or as linear layers are."""
        from torch import nn

        is_transposed = getattr(part.owner, "is_transposed", None)
        if is_transposed is None:
            for other in matrices:
                if type(other.owner) is type(part.owner) and other.name in axes:
                    is_transposed = (axes[other.name] == 0) == other.is_down
        if is_transposed is None and isinstance(part.owner, nn.Linear):
            is_transposed = False
        if is_transposed is None:
            raise ModelNotSupportedError(
                f"{self._where}: {part.name} is square, and nothing says which side the hidden units are on; compare "
                "the experts by their outputs instead (hidden_states=...)"
            )
        return int(bool(part.is_down) != bool(is_transposed))


def _parts(site: Any, found: LayerParameters) -> Iterator[_Part]:
    names = {id(module): name for name, module in site.experts.named_modules()}
    for slot in found.fused:
        tensor = slot.tensor()
        assert tensor is not None
        rows = found.num_experts + found.num_identity_experts
        num_rows = rows if tensor.shape[0] == rows else found.num_experts
        yield _Part(_joined(names.get(id(slot.owner), ""), slot.name), slot.owner, (slot,), num_rows)
    if found.separate:
        # The same parameter of each expert; the first tells names and owners.
        for slots in zip(*found.separate, strict=True):
            path = names.get(id(slots[0].owner), "").partition(".")[2]
            yield _Part(_joined(path, slots[0].name), slots[0].owner, tuple(slots), 0)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _hidden_sizes(site: Any, model: "nn.Module") -> list[int]:
    sizes: list[int] = []
    router = getattr(site, "router", None)
    if router is not None:
        sizes += [int(p.shape[-1]) for name, p in router.named_parameters() if p.ndim == 2 and "weight" in name]
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    for owner in (get_text_config() if callable(get_text_config) else None, config):
        sizes += [value for name in _HIDDEN_SIZES if isinstance(value := getattr(owner, name, None), int)]
    return list(dict.fromkeys(sizes))
