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

Everything is an integer sum, a maximum or a minimum (means are kept as fixed-point sums), so ``merge`` is exactly
associative and commutative.

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
from moe_debugger.analysis.layer_state import MAX_EXPERTS, FixedSum, LayerShape, LayerState, num_blocks
from moe_debugger.analysis.sketch import NUM_REGISTERS, distinct_estimate, mix, observe
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, RoutingColumns

__all__ = [
    "MAX_EXPERTS",
    "NUM_PHASES",
    "NUM_TOKEN_CLASSES",
    "NUM_WORKLOAD_CLASSES",
    "POSITIONS_PER_BLOCK",
    "FixedSum",
    "LayerShape",
    "LayerState",
    "RoutingState",
    "merge_all",
    "num_blocks",
]

NUM_PHASES = len(pb.Phase.values())
# Token ids are counted in this many hashed classes: enough to tell a dozen kinds of tokens from a vocabulary.
NUM_TOKEN_CLASSES = 256
# Labels of workloads are counted in this many hashed classes.
NUM_WORKLOAD_CLASSES = 64

_U64 = npt.NDArray[np.uint64]


class RoutingState:
    """The state of all MoE layers over any set of rows; see the module's text.

    Attributes:
        layers: `LayerState` by layer index.
        request_registers: [256] uint8, distinct counter over requests.
        phase_tokens: [5] uint64, valid token rows by `Phase`, of all stacks.
        token_classes: [256] uint64, valid token rows by a hash of their token id, where captured.
        workload_tokens: [64] uint64, valid token rows by a hash of their workload's label, where labelled.
    """

    __slots__ = ("layers", "phase_tokens", "request_registers", "token_classes", "workload_tokens")

    def __init__(
        self,
        layers: dict[int, LayerState],
        request_registers: npt.NDArray[np.uint8] | None = None,
        phase_tokens: _U64 | None = None,
        token_classes: _U64 | None = None,
        workload_tokens: _U64 | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.request_registers = np.zeros(NUM_REGISTERS, np.uint8) if request_registers is None else request_registers
        self.phase_tokens = np.zeros(NUM_PHASES, np.uint64) if phase_tokens is None else phase_tokens
        self.token_classes = np.zeros(NUM_TOKEN_CLASSES, np.uint64) if token_classes is None else token_classes
        none = np.zeros(NUM_WORKLOAD_CLASSES, np.uint64)
        self.workload_tokens = none if workload_tokens is None else workload_tokens

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
        """About how many different requests (in training: sequences) were seen; right to a few per cent."""
        return distinct_estimate(self.request_registers)

    @property
    def num_tokens(self) -> int:
        """Valid tokens of the layer that has seen most."""
        return max((layer.num_tokens for layer in self.layers.values()), default=0)

    @property
    def first_step(self) -> int | None:
        """The first step that any layer has seen."""
        return min((x.first_step for x in self.layers.values() if x.first_step is not None), default=None)

    @property
    def last_step(self) -> int | None:
        """The last step that any layer has seen."""
        return max((x.last_step for x in self.layers.values() if x.last_step is not None), default=None)

    def num_workloads(self, min_share: float = 0.05) -> int:
        """Return how many labelled workloads hold at least `min_share` of the labelled tokens; 0 without labels."""
        total = int(self.workload_tokens.sum())
        return int((self.workload_tokens >= max(min_share * total, 1)).sum()) if total else 0

    def without_history(self) -> "RoutingState":
        """Return a copy without the layers' history; what it is merged with has none either."""
        layers = {index: layer.without_history() for index, layer in self.layers.items()}
        return RoutingState(
            layers,
            self.request_registers.copy(),
            self.phase_tokens.copy(),
            self.token_classes.copy(),
            self.workload_tokens.copy(),
        )

    def fold(self, columns: RoutingColumns, *, step_source: int = 0) -> None:
        """Add the rows of one batch, in place.

        Args:
            columns: the rows.
            step_source: 0 where the steps are global; else a number for the independent source that counted them:
                equal steps of two sources are two steps.

        Raises:
            InvalidInputError: a layer, k or an expert id is not of this state's shapes; nothing was added.
        """
        for layer in columns.layers:
            check_rows(self.layers, layer, columns.num_tokens)
        hashes, known = row_blocks(columns)
        valid = ~columns.is_padding
        observe(self.request_registers, distinct(hashes[valid & known]))
        phases = np.minimum(columns.phase[valid], NUM_PHASES - 1)
        self.phase_tokens += np.bincount(phases, minlength=NUM_PHASES).astype(np.uint64)
        if columns.token_id is not None:
            classes = mix(columns.token_id[valid].astype(np.uint64)) % np.uint64(NUM_TOKEN_CLASSES)
            self.token_classes += np.bincount(classes.astype(np.intp), minlength=NUM_TOKEN_CLASSES).astype(np.uint64)
        batch = Batch.of(columns, hashes, known, step_source)
        for layer in columns.layers:
            fold_layer(self.layers[layer.layer_index], layer, batch)

    def fold_counts(self, columns: CountsColumns, *, step_source: int = 0) -> None:
        """Add sums of the `counts` level, in place; they belong to no request, so intervals come from steps alone.

        Of `phase_tokens` they tell the tokens of the layer that saw most. In the series, sums of several steps stand
        at their last one.

        Raises:
            InvalidInputError: a layer is unknown, its columns do not have E entries, or it accounts for more slots than
                its tokens have; nothing was added.
        """
        for layer in columns.layers:
            check_sums(self.layers, layer)
        for layer in columns.layers:
            fold_sums(self.layers[layer.layer_index], layer, columns, step_source)
        self.phase_tokens[min(columns.phase, NUM_PHASES - 1)] += np.uint64(columns.num_tokens)

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
        return RoutingState(
            layers,
            np.maximum(self.request_registers, other.request_registers),
            self.phase_tokens + other.phase_tokens,
            self.token_classes + other.token_classes,
            self.workload_tokens + other.workload_tokens,
        )

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


def merge_all(states: Sequence[RoutingState]) -> RoutingState:
    """Return the merge of all `states`, an empty state for none."""
    merged = RoutingState({})
    for state in states:
        merged = merged.merge(state)
    return merged
