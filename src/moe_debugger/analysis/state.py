"""The foldable state of the analysis: bounded, and the same for any split and order of the rows.

Glossary:
    load    assignments of valid tokens whose slot was routed. Padding, dropped, skipped, identity and unused slots are
            none. Load and these add up to tokens times k (`moe_debugger.wire.slots`).
    rows    each layer counts the rows that it saw. Layers of an encoder and of a decoder see different ones, and so
            may layers of one stack: nothing here takes one layer's tokens for another's.
    block   a fixed group of whole requests. Tokens of one request resemble each other, so every variance comes from
            the differences between blocks, never from tokens as if they were independent. A request belongs to block
            ``hash(request id) mod num_blocks``; in training, where every step brings new sequences under old names, to
            ``hash(request id, step) mod num_blocks``. So a request lands in one block however its rows are split over
            batches, which is what makes the state the same for every split. Where there are too few requests for a
            variance, stretches of 64 positions of a request take their place: the same tables a second time.
    history the loads over steps, and samples of single steps and tokens (`moe_debugger.analysis.step_loads`,
            `token_sample`). A state may do without: one without a history makes every merge without.

Everything is an integer sum, a maximum or a minimum (means are kept as fixed-point sums), or a sample of what has the
smallest hashes, so ``merge`` is exactly associative and commutative. A layer's numbers come from its own rows only, and
what is said of all layers (`num_tokens`, `phase_tokens`...) is their maximum, taken when it is read: so rows may also
be split by layer.

Example: 3 tokens with k = 2 through 4 experts, the last one padding::

    state = RoutingState.empty([LayerShape(layer_index=0, num_experts=4, top_k=2)])
    state.fold(columns)                      # expert_ids [[0, 1], [0, 2], [3, 3]], is_padding [0, 0, 1]
    state.layers[0].counts                   # [2, 1, 1, 0]
    state.layers[0].num_tokens               # 2
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._folding import (
    POSITIONS_PER_BLOCK,
    Batch,
    check_rows,
    check_sums,
    fold_layer,
    fold_sums,
    row_blocks,
)
from moe_debugger.analysis._row_runs import distinct
from moe_debugger.analysis.layer_state import (
    MAX_EXPERTS,
    NUM_PHASES,
    NUM_TOKEN_CLASSES,
    LayerShape,
    LayerState,
    num_blocks,
)
from moe_debugger.analysis.sketch import NUM_REGISTERS, distinct_estimate, observe
from moe_debugger.errors import InvalidInputError
from moe_debugger.wire.codec import CountsColumns, RoutingColumns

__all__ = [
    "MAX_EXPERTS",
    "NUM_PHASES",
    "NUM_TOKEN_CLASSES",
    "POSITIONS_PER_BLOCK",
    "REQUEST_SAMPLE",
    "LayerShape",
    "LayerState",
    "RoutingState",
    "merge_all",
    "num_blocks",
]

# Bit of the last request register that says that rows named no request; ranks are at most 53. The maximum keeps it.
_UNNAMED = np.uint8(64)

# Requests up to which their number is exact.
REQUEST_SAMPLE = 256

_U64 = npt.NDArray[np.uint64]


class RoutingState:
    """The state of all MoE layers over any set of rows; see the module's text.

    Attributes:
        layers: `LayerState` by layer index.
        request_registers: [256] uint8, distinct counter over requests; the last one has 64 more where rows named none.
        request_sample: [up to 256] uint64 ascending, the smallest hashes of requests; older versions kept none.
    """

    __slots__ = ("layers", "request_registers", "request_sample")

    def __init__(
        self,
        layers: dict[int, LayerState],
        request_registers: npt.NDArray[np.uint8] | None = None,
        request_sample: _U64 | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.request_registers = np.zeros(NUM_REGISTERS, np.uint8) if request_registers is None else request_registers
        self.request_sample = np.zeros(0, np.uint64) if request_sample is None else request_sample

    @classmethod
    def empty(cls, shapes: Iterable[LayerShape], *, with_history: bool = True) -> "RoutingState":
        """Return a state that has seen nothing.

        Raises:
            InvalidInputError: a layer index occurs twice.
        """
        layers: dict[int, LayerState] = {}
        for shape in shapes:
            if shape.layer_index in layers:
                raise InvalidInputError(f"layer {shape.layer_index} is described twice")
            layers[shape.layer_index] = LayerState.empty(shape, with_history=with_history)
        return cls(layers)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Shapes of all layers, by layer index."""
        return tuple(layer.shape for layer in self.layers.values())

    @property
    def num_requests(self) -> int:
        """How many different requests (in training: sequences) were seen: exactly below 256, else to 6.5 %."""
        seen = self.request_registers % _UNNAMED
        if len(self.request_sample) < REQUEST_SAMPLE:
            # A sample without those of an older version leaves registers that none of its hashes has set.
            of_sample = np.zeros(NUM_REGISTERS, np.uint8)
            observe(of_sample, self.request_sample)
            if np.array_equal(of_sample, seen):
                return len(self.request_sample)
        return distinct_estimate(seen)

    @property
    def names_requests(self) -> bool:
        """False where rows named no request, so that runs of neighbours had to stand for them (`mark_unnamed`)."""
        return bool(self.request_registers[-1] < _UNNAMED)

    def mark_unnamed(self) -> None:
        """Note that requests of the rows so far are runs of neighbours, in place."""
        self.request_registers[-1] |= _UNNAMED

    @property
    def num_tokens(self) -> int:
        """Valid tokens of the layer that has seen most."""
        return max((layer.num_tokens for layer in self.layers.values()), default=0)

    @property
    def phase_tokens(self) -> _U64:
        """[5] uint64, valid tokens by `Phase`, of each phase in the layer that has seen most of it."""
        return _highest([layer.phase_tokens for layer in self.layers.values()], NUM_PHASES)

    @property
    def token_classes(self) -> _U64:
        """[256] uint64, valid tokens by a hash of their token id, where captured, likewise."""
        return _highest([layer.token_classes for layer in self.layers.values()], NUM_TOKEN_CLASSES)

    @property
    def first_step(self) -> int | None:
        """The first step that any layer has seen."""
        return min((x.first_step for x in self.layers.values() if x.first_step is not None), default=None)

    @property
    def last_step(self) -> int | None:
        """The last step that any layer has seen."""
        return max((x.last_step for x in self.layers.values() if x.last_step is not None), default=None)

    def num_workloads(self) -> int:
        """Return how many labelled kinds of text the layer with most has seen (`WorkloadSample`); 0 without labels."""
        return max((layer.workloads.num_workloads for layer in self.layers.values()), default=0)

    def without_history(self) -> "RoutingState":
        """Return a copy without the layers' history; what it is merged with has none either."""
        layers = {index: layer.without_history() for index, layer in self.layers.items()}
        return RoutingState(layers, self.request_registers.copy(), self.request_sample)

    def fold(self, columns: RoutingColumns, *, step_source: int = 0, workloads: _U64 | None = None) -> None:
        """Add the rows of one batch, in place.

        Args:
            columns: the rows.
            step_source: 0 where the steps are global; else a number for the independent source that counted them:
                equal steps of two sources are two steps.
            workloads: [n] uint64 hash of the label of each row's workload, 0 = none; None = no row has one.

        Raises:
            InvalidInputError: a layer, k or an expert id is not of this state's shapes; nothing was added.
        """
        for layer in columns.layers:
            check_rows(self.layers, layer, columns.num_tokens)
        hashes, known = row_blocks(columns)
        valid = ~columns.is_padding
        requests = distinct(hashes[valid & known])
        observe(self.request_registers, requests)
        self.request_sample = _smallest(self.request_sample, requests)
        batch = Batch.of(columns, hashes, known, step_source, workloads)
        for layer in columns.layers:
            fold_layer(self.layers[layer.layer_index], layer, batch)

    def fold_counts(self, columns: CountsColumns, *, step_source: int = 0) -> None:
        """Add sums of the `counts` level, in place; they belong to no request, so intervals come from steps alone.

        In the series, sums of several steps stand at their last one.

        Raises:
            InvalidInputError: a layer is unknown, its columns do not have E entries, or it accounts for more slots than
                its tokens have; nothing was added.
        """
        for layer in columns.layers:
            check_sums(self.layers, layer)
        for layer in columns.layers:
            fold_sums(self.layers[layer.layer_index], layer, columns, step_source)

    def merge(self, other: "RoutingState") -> "RoutingState":
        """Return the state of both sets of rows; layers that only one of them has are taken as they are.

        Raises:
            InvalidInputError: a layer differs in E or k.
        """
        layers = {**self.layers, **other.layers}
        for index in self.layers.keys() & other.layers.keys():
            layers[index] = self.layers[index].merge(other.layers[index])
        for index in self.layers.keys() ^ other.layers.keys():
            # A copy: folding into the result must not change its parts.
            alone = layers[index]
            layers[index] = alone.merge(LayerState.empty(alone.shape))
        registers = np.maximum(self.request_registers, other.request_registers)
        return RoutingState(layers, registers, _smallest(self.request_sample, other.request_sample))

    def copy(self) -> "RoutingState":
        """Return an independent copy."""
        return self.merge(RoutingState({}))

    def to_bytes(self) -> bytes:
        """Return a compact, versioned, checksummed form; `from_bytes` reads it."""
        from moe_debugger.analysis._state_codec import encode_state

        return encode_state(self)

    @staticmethod
    def from_bytes(data: bytes) -> "RoutingState":
        """Return the state that `to_bytes` wrote.

        Raises:
            WireFormatError: the bytes are damaged or cut.
            UnsupportedFormatError: written by a newer major version.
        """
        from moe_debugger.analysis._state_codec import decode_state

        return decode_state(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutingState) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RoutingState({len(self.layers)} layers, {self.num_tokens} tokens, ~{self.num_requests} requests)"


def _smallest(a: _U64, b: _U64) -> _U64:
    """Return the smallest different hashes of both."""
    return np.union1d(a, b)[:REQUEST_SAMPLE]


def _highest(tables: list[_U64], size: int) -> _U64:
    """Return the maximum of each cell, [size]; zeros without a table."""
    highest: _U64 = np.max([np.zeros(size, np.uint64), *tables], axis=0)
    return highest


def merge_all(states: Sequence[RoutingState]) -> RoutingState:
    """Return the merge of all `states`, an empty state for none."""
    merged = RoutingState({})
    for state in states:
        merged = merged.merge(state)
    return merged
