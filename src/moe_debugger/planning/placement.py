"""Which rank holds which expert.

Glossary:
    logical expert      an expert of the model, 0..E-1.
    slot                room for one expert's weights on a rank ("physical expert"). Rank r of R has the slots
                        r * S .. (r + 1) * S - 1; all ranks have the same number S.
    copy (replica)      a slot that holds an expert; an expert with several copies has its tokens split among them.

Example: 3 experts on 2 ranks of 2 slots: physical_to_logical = [[0, 1, 2, 0]] gives expert 0 a copy on each rank, so
each rank computes half of its tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning.loads import Floats

__all__ = ["Placement", "contiguous_placement"]

Ints = npt.NDArray[np.int64]

# Beyond any engine's; tables of ranks by ranks, and of slots by layers, stay within memory.
MAX_RANKS, MAX_SLOTS = 4096, 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A placement of the experts of all MoE layers on the ranks; valid by construction.

    Attributes:
        strategy: how it was made.
        num_experts: E, logical experts of each layer.
        num_ranks: R.
        physical_to_logical: [num_layers, R * S] int64, the expert of each slot; read-only.
        num_nodes: ranks stand in nodes of R / num_nodes.

    Raises:
        InvalidInputError: an expert has no slot, an id is out of range, ranks have unequal slots, nodes unequal
            ranks, or there are more than 4,096 ranks or 65,536 slots.
    """

    strategy: str
    num_experts: int
    num_ranks: int
    physical_to_logical: Ints
    num_nodes: int = 1

    def __post_init__(self) -> None:
        table = np.array(self.physical_to_logical)
        if table.ndim != 2 or not table.size or table.dtype.kind not in "iu":
            raise InvalidInputError(
                f"physical_to_logical: shape {table.shape} of {table.dtype}, expected integers [num_layers, num_slots]"
            )
        check_ranks(table.shape[1], self.num_experts, self.num_ranks, self.num_nodes)
        table = table.astype(np.int64)
        if table.min() < 0 or table.max() >= self.num_experts:
            raise InvalidInputError(
                f"physical_to_logical holds expert {table.min() if table.min() < 0 else table.max()}, expected 0 to "
                f"{self.num_experts - 1}"
            )
        counts = _count_copies(table, self.num_experts)
        if (counts == 0).any():
            layer, expert = (int(i) for i in np.argwhere(counts == 0)[0])
            raise InvalidInputError(f"layer {layer}: expert {expert} has no slot; every expert needs one at least")
        table.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", table)

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots of all ranks, of one layer."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots of each rank, of one layer."""
        return self.num_slots // self.num_ranks

    @property
    def slot_ranks(self) -> Ints:
        """[num_slots] int64, the rank of each slot."""
        return np.arange(self.num_slots) // self.slots_per_rank

    @property
    def num_copies(self) -> Ints:
        """[num_layers, num_experts] int64, slots that hold each expert, 1 or more."""
        return _count_copies(self.physical_to_logical, self.num_experts)

    @property
    def num_doubled_slots(self) -> int:
        """Slots, over all layers, whose rank holds the same expert in another slot: memory without any effect."""
        table = np.sort(self.physical_to_logical.reshape(self.num_layers, self.num_ranks, -1), axis=2)
        return int((np.diff(table, axis=2) == 0).sum())

    def copies_on_ranks(self) -> Ints:
        """Return [num_layers, num_experts, num_ranks] int64, how many copies of each expert each rank holds."""
        result = np.zeros((self.num_layers, self.num_experts, self.num_ranks), np.int64)
        np.add.at(result, (np.arange(self.num_layers)[:, None], self.physical_to_logical, self.slot_ranks), 1)
        return result

    def shares(self) -> Floats:
        """Return [num_layers, num_experts, num_ranks] float64, the share of an expert's load that a rank computes.

        Copies share evenly; rows sum to 1.
        """
        copies = self.copies_on_ranks()
        result: Floats = copies / copies.sum(axis=2, keepdims=True)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` reads them."""
        return {
            "strategy": self.strategy,
            "num_experts": self.num_experts,
            "num_ranks": self.num_ranks,
            "num_nodes": self.num_nodes,
            "slots_per_rank": self.slots_per_rank,
            "physical_to_logical": self.physical_to_logical.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Placement":
        """Return the placement that `to_dict` gave.

        Raises:
            InvalidInputError: a value is missing or not valid.
        """
        expected = "expected what Placement.to_dict() gives"
        if not isinstance(values, Mapping):
            raise InvalidInputError(f"not a placement: a {type(values).__name__}; {expected}")
        try:
            table = np.array(values["physical_to_logical"])
            names = ("strategy", "num_experts", "num_ranks")
            strategy, num_experts, num_ranks = (values[name] for name in names)
        except (KeyError, ValueError) as error:
            raise InvalidInputError(f"not a placement: {error}; {expected}") from error
        return cls(str(strategy), num_experts, num_ranks, table, values.get("num_nodes", 1))

    def to_sglang(self, model_layer_indices: Sequence[int], num_model_layers: int) -> dict[str, list[list[int]]]:
        """Return the object that SGLang's `--init-expert-location` reads from a .json file.

        It has a row for every layer of the model, dense layers too (their rows are not used; they hold the trivial
        placement), and no other key: SGLang passes every key on as an argument.

        Args:
            model_layer_indices: for each of this placement's layers, its index among all layers of the model.
            num_model_layers: the model's `num_hidden_layers`.

        Raises:
            InvalidInputError: the indices do not fit.
        """
        indices = [int(index) for index in model_layer_indices]
        fits = len(indices) == len(set(indices)) == self.num_layers
        if not fits or min(indices) < 0 or max(indices) >= num_model_layers:
            raise InvalidInputError(
                f"model_layer_indices {indices}: expected {self.num_layers} different ones below {num_model_layers}"
            )
        table = np.tile(np.arange(self.num_slots) % self.num_experts, (num_model_layers, 1))
        table[indices] = self.physical_to_logical
        return {"physical_to_logical_map": table.tolist()}


def contiguous_placement(
    num_layers: int, num_experts: int, num_ranks: int, *, num_slots: int | None = None, num_nodes: int = 1
) -> Placement:
    """Return the placement that frameworks start from: slot i holds expert i, and from E on expert i - E again.

    Raises:
        InvalidInputError: the slots are fewer than the experts, or not the same number for each rank.
    """
    slots = num_experts if num_slots is None else num_slots
    check_ranks(slots, num_experts, num_ranks, num_nodes)
    table = np.tile(np.arange(slots) % num_experts, (num_layers, 1))
    return Placement("contiguous", num_experts, num_ranks, table, num_nodes)


def check_whole(name: str, value: Any, least: int) -> None:
    """Check that a value is a whole number of `least` or more.

    Raises:
        InvalidInputError: it is not.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise InvalidInputError(f"{name} {value!r}: expected a whole number, {least} or more")


def check_ranks(num_slots: int, num_experts: int, num_ranks: int, num_nodes: int) -> None:
    """Check that slots can be dealt to ranks, and ranks to nodes.

    Raises:
        InvalidInputError: they can not, or there are more than `MAX_RANKS` or `MAX_SLOTS`.
    """
    for name, value in (("num_experts", num_experts), ("num_ranks", num_ranks), ("num_nodes", num_nodes)):
        check_whole(name, value, 1)
    for name, number, most in (("ranks", num_ranks, MAX_RANKS), ("slots of all ranks", num_slots, MAX_SLOTS)):
        if number > most:
            raise InvalidInputError(f"{number:,} {name}: expected {most:,} at most")
    if num_ranks % num_nodes:
        raise InvalidInputError(f"{num_ranks} ranks on {num_nodes} nodes: expected the same number on each node")
    if num_slots < num_experts:
        raise InvalidInputError(f"{num_slots} slots for {num_experts} experts: every expert needs one at least")
    if num_slots % num_ranks:
        raise InvalidInputError(
            f"{num_slots} slots on {num_ranks} ranks: expected the same number on each; add "
            f"{-num_slots % num_ranks} redundant slots"
        )


def _count_copies(table: Ints, num_experts: int) -> Ints:
    keys = np.arange(len(table))[:, None] * num_experts + table
    return np.bincount(keys.ravel(), minlength=len(table) * num_experts).reshape(len(table), num_experts)
