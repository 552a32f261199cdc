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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._row_runs import distinct, load_of_runs, run_starts, sums_by_group
from moe_debugger.analysis.sketch import NUM_REGISTERS, combine, distinct_estimate, hash_strings, mix, observe
from moe_debugger.analysis.step_loads import LoadSeries, StepSample
from moe_debugger.analysis.token_sample import TokenSample
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerColumns, LayerCountColumns, RoutingColumns
from moe_debugger.wire.slots import SlotClasses

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

MAX_EXPERTS = 65_535
NUM_PHASES = len(pb.Phase.values())
# Token ids are counted in this many hashed classes: enough to tell a dozen kinds of tokens from a vocabulary.
NUM_TOKEN_CLASSES = 256
# Labels of workloads are counted in this many hashed classes.
NUM_WORKLOAD_CLASSES = 64
# Positions of a request that are one block where there are too few requests.
POSITIONS_PER_BLOCK = 64
# Means are kept as sums of round(value * 2**20): exact to 1e-6 a value, and independent of the order of addition.
_FIXED_POINT = 1 << 20
# Beyond this a router statistic is no statistic any more; the bound keeps a batch's sum inside int64.
_MAX_ABSOLUTE = float(1 << 26)

_U64 = npt.NDArray[np.uint64]


def num_blocks(num_experts: int) -> int:
    """Return how many blocks a layer with that many experts keeps: 64, down to 16 for wide layers (bounded memory)."""
    return max(16, min(64, 4096 // num_experts))


@dataclass(frozen=True, slots=True, order=True)
class LayerShape:
    """Identity and size of one MoE layer.

    Attributes:
        num_experts: E, the routed experts.
        num_identity_experts: Z, experts that compute nothing; their ids are E..E+Z-1 and they are no load.

    Raises:
        InvalidInputError: E + Z is not in 1..65535, or k not in 1..E+Z.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_identity_experts: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_identity_experts < 0 or self.num_ids > MAX_EXPERTS:
            raise InvalidInputError(
                f"layer {self.layer_index}: {self.num_experts} routed and {self.num_identity_experts} identity "
                f"experts, expected 1 to {MAX_EXPERTS} together, and at least one routed"
            )
        if not 1 <= self.top_k <= self.num_ids:
            raise InvalidInputError(
                f"layer {self.layer_index}: top_k is {self.top_k}, expected 1 to {self.num_ids} (its experts)"
            )
        if self.layer_index < 0:
            raise InvalidInputError(f"layer_index is {self.layer_index}, expected 0 or more")

    @property
    def num_ids(self) -> int:
        """E + Z: how many expert ids there are."""
        return self.num_experts + self.num_identity_experts


@dataclass(slots=True)
class FixedSum:
    """A sum of real values in fixed point, with its sample size."""

    total: int = 0
    num_values: int = 0

    def add(self, values: npt.NDArray[np.floating]) -> None:
        """Add the finite ones of `values`."""
        finite = values[np.isfinite(values)].astype(np.float64)
        clipped = np.clip(finite, -_MAX_ABSOLUTE, _MAX_ABSOLUTE)
        self.total += int(np.rint(clipped * _FIXED_POINT).astype(np.int64).sum())
        self.num_values += len(finite)

    def plus(self, other: "FixedSum") -> "FixedSum":
        """Return the sum of both."""
        return FixedSum(self.total + other.total, self.num_values + other.num_values)

    @property
    def mean(self) -> float:
        """The mean, NaN without a value."""
        return self.total / _FIXED_POINT / self.num_values if self.num_values else float("nan")


@dataclass(slots=True)
class LayerState:
    """What is kept of one layer.

    Attributes:
        counts: [E] uint64, load per expert.
        block_counts: [B, E] uint64, the part of `counts` whose request is known, per block.
        block_tokens: [B] uint64, valid tokens per block.
        position_counts: [B, E] uint64, as `block_counts`, per block of 64 positions of a request; None where the state
            keeps no history.
        load_series: loads over all steps; None likewise.
        step_sample: loads of single steps; None likewise.
        token_sample: routes of single tokens; None likewise.
        num_tokens: valid tokens.
        num_padding: padding rows; never part of anything else.
        num_dropped_slots, num_skipped_slots, num_identity_slots, num_unused_slots: slots of valid tokens that are no
            load, by what became of them. With the counts they add up to ``num_tokens * k``.
        router_entropy, top1_probability, margin, z_squared: sums over valid tokens, where captured.
            `z_squared` is the square of the logits' logsumexp (router z-loss).
        probability_sum: [E] int64, fixed-point sum of the router's probability per expert.
        num_probability_tokens: valid tokens in `probability_sum`.
        content_registers: [256] uint8, distinct counter over the tokens' fingerprints (position, experts, applied
            weights, router entropy, token id): a repeated prompt repeats its fingerprints.
        num_fingerprints: valid tokens that have a fingerprint.
        first_step, last_step: None before the first token.
    """

    shape: LayerShape
    counts: _U64
    block_counts: _U64
    block_tokens: _U64
    probability_sum: npt.NDArray[np.int64]
    content_registers: npt.NDArray[np.uint8]
    num_tokens: int = 0
    num_padding: int = 0
    num_dropped_slots: int = 0
    num_skipped_slots: int = 0
    num_identity_slots: int = 0
    num_unused_slots: int = 0
    num_probability_tokens: int = 0
    num_fingerprints: int = 0
    router_entropy: FixedSum = field(default_factory=FixedSum)
    top1_probability: FixedSum = field(default_factory=FixedSum)
    margin: FixedSum = field(default_factory=FixedSum)
    z_squared: FixedSum = field(default_factory=FixedSum)
    first_step: int | None = None
    last_step: int | None = None
    position_counts: _U64 | None = None
    load_series: LoadSeries | None = None
    step_sample: StepSample | None = None
    token_sample: TokenSample | None = None

    @classmethod
    def empty(cls, shape: LayerShape, *, with_history: bool = True) -> Self:
        """Return the state of a layer that has seen nothing."""
        blocks = num_blocks(shape.num_experts)
        return cls(
            shape=shape,
            counts=np.zeros(shape.num_experts, np.uint64),
            block_counts=np.zeros((blocks, shape.num_experts), np.uint64),
            block_tokens=np.zeros(blocks, np.uint64),
            probability_sum=np.zeros(shape.num_experts, np.int64),
            content_registers=np.zeros(NUM_REGISTERS, np.uint8),
            position_counts=np.zeros((blocks, shape.num_experts), np.uint64) if with_history else None,
            load_series=LoadSeries.empty(shape.num_experts) if with_history else None,
            step_sample=StepSample.empty(shape.num_experts) if with_history else None,
            token_sample=TokenSample.empty(shape.top_k) if with_history else None,
        )

    @property
    def num_assignments(self) -> int:
        """Load of all experts together."""
        return int(self.counts.sum())

    @property
    def num_occupied_blocks(self) -> int:
        """Blocks that hold at least one valid token."""
        return int((self.block_tokens > 0).sum())

    @property
    def num_distinct_fingerprints(self) -> int:
        """About how many different tokens (by fingerprint) the layer has seen."""
        return distinct_estimate(self.content_registers)

    @property
    def mean_probability(self) -> npt.NDArray[np.float64]:
        """[E] float64 mean router probability per expert; NaN where not captured."""
        if not self.num_probability_tokens:
            return np.full(self.shape.num_experts, np.nan)
        return self.probability_sum.astype(np.float64) / (_FIXED_POINT * self.num_probability_tokens)

    def merge(self, other: "LayerState") -> "LayerState":
        """Return the state of both sets of rows.

        Raises:
            InvalidInputError: the layers differ in E or k.
        """
        if self.shape != other.shape:
            raise InvalidInputError(
                f"layer {self.shape.layer_index}: {self.shape} cannot be merged with {other.shape}; "
                "they are layers of different models"
            )
        return LayerState(
            shape=self.shape,
            counts=self.counts + other.counts,
            block_counts=self.block_counts + other.block_counts,
            block_tokens=self.block_tokens + other.block_tokens,
            probability_sum=self.probability_sum + other.probability_sum,
            content_registers=np.maximum(self.content_registers, other.content_registers),
            num_tokens=self.num_tokens + other.num_tokens,
            num_padding=self.num_padding + other.num_padding,
            num_dropped_slots=self.num_dropped_slots + other.num_dropped_slots,
            num_skipped_slots=self.num_skipped_slots + other.num_skipped_slots,
            num_identity_slots=self.num_identity_slots + other.num_identity_slots,
            num_unused_slots=self.num_unused_slots + other.num_unused_slots,
            num_probability_tokens=self.num_probability_tokens + other.num_probability_tokens,
            num_fingerprints=self.num_fingerprints + other.num_fingerprints,
            router_entropy=self.router_entropy.plus(other.router_entropy),
            top1_probability=self.top1_probability.plus(other.top1_probability),
            margin=self.margin.plus(other.margin),
            z_squared=self.z_squared.plus(other.z_squared),
            first_step=_extreme(min, self.first_step, other.first_step),
            last_step=_extreme(max, self.last_step, other.last_step),
            position_counts=_sum(self.position_counts, other.position_counts),
            load_series=_merged(self.load_series, other.load_series),
            step_sample=_merged(self.step_sample, other.step_sample),
            token_sample=_merged(self.token_sample, other.token_sample),
        )

    def without_history(self) -> "LayerState":
        """Return a copy without blocks of positions, series and samples."""
        return self.merge(LayerState.empty(self.shape, with_history=False))

    def see_steps(self, first: int, last: int) -> None:
        """Widen the range of steps by `first`..`last`."""
        self.first_step = _extreme(min, self.first_step, first)
        self.last_step = _extreme(max, self.last_step, last)


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
            self._check(layer, columns.num_tokens)
        hashes, known = _blocks(columns)
        valid = ~columns.is_padding
        observe(self.request_registers, distinct(hashes[valid & known]))
        phases = np.minimum(columns.phase[valid], NUM_PHASES - 1)
        self.phase_tokens += np.bincount(phases, minlength=NUM_PHASES).astype(np.uint64)
        if columns.token_id is not None:
            classes = mix(columns.token_id[valid].astype(np.uint64)) % np.uint64(NUM_TOKEN_CLASSES)
            self.token_classes += np.bincount(classes.astype(np.intp), minlength=NUM_TOKEN_CLASSES).astype(np.uint64)
        batch = _Batch.of(columns, hashes, known, step_source)
        for layer in columns.layers:
            _fold_layer(self.layers[layer.layer_index], layer, batch)

    def _check(self, layer: LayerColumns, num_tokens: int) -> None:
        state = self.layers.get(layer.layer_index)
        if state is None:
            raise InvalidInputError(
                f"layer {layer.layer_index} is not among the layers {sorted(self.layers)} of this state"
            )
        where = f"layer {layer.layer_index}: "
        ids, shape = layer.expert_ids, state.shape
        if ids.ndim != 2 or (len(ids) and ids.shape[1] != shape.top_k):
            raise InvalidInputError(f"{where}expert_ids has shape {ids.shape}, expected (n, {shape.top_k})")
        if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < shape.num_ids:
            raise InvalidInputError(
                f"{where}expert ids reach from {int(ids.min())} to {int(ids.max())}, expected 0 to "
                f"{shape.num_ids - 1}, or -1 for no expert"
            )
        rows = len(ids)
        if layer.row_index is None:
            if rows != num_tokens:
                raise InvalidInputError(f"{where}{rows} rows without row_index in a batch of {num_tokens} tokens")
        elif len(layer.row_index) != rows or (rows and int(layer.row_index.max()) >= num_tokens):
            raise InvalidInputError(f"{where}row_index does not fit {rows} rows of a batch of {num_tokens} tokens")

    def fold_counts(self, columns: CountsColumns, *, step_source: int = 0) -> None:
        """Add sums of the `counts` level, in place; they belong to no request, so intervals come from steps alone.

        Of `phase_tokens` they tell the tokens of the layer that saw most. In the series, sums of several steps stand
        at their last one.

        Raises:
            InvalidInputError: a layer is unknown, its columns do not have E entries, or it accounts for more slots than
                its tokens have; nothing was added.
        """
        for layer in columns.layers:
            self._check_sums(layer)
        for layer in columns.layers:
            state = self.layers[layer.layer_index]
            if layer.probability_sum is not None:
                _add_probabilities(state, np.asarray(layer.probability_sum, np.float64), layer.num_tokens)
            state.counts += np.asarray(layer.expert_counts, np.uint64)
            state.num_padding += layer.num_padding
            state.num_tokens += layer.num_tokens
            state.num_dropped_slots += layer.dropped_slots
            state.num_skipped_slots += layer.skipped_slots
            state.num_identity_slots += layer.identity_slots
            state.num_unused_slots += layer.num_tokens * state.shape.top_k - _num_accounted(layer)
            if layer.num_tokens:
                state.see_steps(columns.first_step, columns.last_step)
                sums = (columns.last_step, np.asarray(layer.expert_counts, np.uint64), layer.num_tokens, step_source)
                if state.load_series is not None:
                    state.load_series.add_sums(*sums)
                if state.step_sample is not None and columns.first_step == columns.last_step:
                    state.step_sample.add_sums(*sums)
        self.phase_tokens[min(columns.phase, NUM_PHASES - 1)] += np.uint64(columns.num_tokens)

    def _check_sums(self, layer: LayerCountColumns) -> None:
        index = layer.layer_index
        state = self.layers.get(index)
        if state is None:
            raise InvalidInputError(f"layer {index} is not among the layers {sorted(self.layers)} of this state")
        shape = (state.shape.num_experts,)
        for name in ("expert_counts", "probability_sum"):
            column = getattr(layer, name)
            if column is not None and np.shape(column) != shape:
                raise InvalidInputError(f"layer {index}: {name} has shape {np.shape(column)}, expected {shape}")
        num_slots = layer.num_tokens * state.shape.top_k
        if _num_accounted(layer) > num_slots:
            raise InvalidInputError(
                f"layer {index}: the sums account for {_num_accounted(layer)} slots, {layer.num_tokens} tokens with "
                f"top-{state.shape.top_k} have {num_slots}"
            )

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


def _blocks(columns: RoutingColumns) -> tuple[_U64, npt.NDArray[np.bool_]]:
    """Hash of what each row belongs to (request; in training sequence and step), and whether that is known.

    Rows whose request has no name belong to their forward pass, except in decoding, where one forward holds single
    tokens of requests that go on: their block is unknown.
    """
    n = columns.num_tokens
    if not n:
        return np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    phase = columns.phase
    names = columns.request_ids or [""]
    index = columns.request_index if columns.request_ids else np.zeros(n, np.uint32)
    is_named = np.array([bool(name) for name in names])[index]
    hashes = hash_strings(names)[index]
    is_train = phase == pb.PHASE_TRAIN
    if is_train.any():
        # Names of rows ("row 3 of the batch") come again in every step with other text.
        hashes = np.where(is_train, combine(hashes, columns.step.reshape(-1, 1)), hashes)
    if is_named.all():
        return hashes, is_named
    forwards = combine(mix(np.ones(n, np.uint64)), np.column_stack([columns.step, columns.forward_index]))
    is_whole_forward = is_train | (phase == pb.PHASE_EVAL) | (phase == pb.PHASE_PREFILL)
    return np.where(is_named, hashes, forwards), is_named | is_whole_forward


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of a batch with the hashes that all its layers need.

    Attributes:
        blocks: [n] uint64, hash of what the row's block is made of: its request.
        known: [n] bool, whether that is known.
        stretches: [n] uint64, number of the row's stretch of positions within its request.
        keys: [n] uint64, hash of the token itself.
    """

    columns: RoutingColumns
    blocks: _U64
    known: npt.NDArray[np.bool_]
    stretches: _U64
    keys: _U64
    step_source: int

    @classmethod
    def of(cls, columns: RoutingColumns, hashes: _U64, known: npt.NDArray[np.bool_], step_source: int) -> "_Batch":
        position = columns.position.astype(np.uint64)
        stretches = position // np.uint64(POSITIONS_PER_BLOCK)
        return cls(columns, hashes, known, stretches, mix(hashes ^ mix(position)), step_source)


def _fold_layer(state: LayerState, layer: LayerColumns, batch: _Batch) -> None:
    columns = batch.columns
    rows = slice(None) if layer.row_index is None else layer.row_index
    padding = columns.is_padding[rows]
    num_padding = int(padding.sum())
    state.num_padding += num_padding
    if num_padding == len(padding):
        return
    valid = slice(None) if not num_padding else ~padding
    steps = columns.step[rows][valid]
    state.see_steps(int(steps.min()), int(steps.max()))
    state.num_tokens += len(steps)
    ids = layer.expert_ids[valid]
    status = None if layer.slot_status is None else layer.slot_status[valid]
    slots = SlotClasses.of(ids, status, state.shape.num_experts)
    state.num_dropped_slots += slots.num_dropped
    state.num_skipped_slots += slots.num_skipped
    state.num_identity_slots += slots.num_identity
    state.num_unused_slots += slots.num_unused
    is_load = None if slots.num_load == slots.is_load.size else slots.is_load
    known, blocks = batch.known[rows][valid], batch.blocks[rows][valid]
    _fold_load(state, ids, is_load, steps, blocks, batch.stretches[rows][valid], known, batch.step_source)
    if state.token_sample is not None:
        state.token_sample.fold(batch.keys[rows][valid], ids, slots.is_load)
    for name, total in (
        ("router_entropy", state.router_entropy),
        ("top1_probability", state.top1_probability),
        ("margin", state.margin),
    ):
        column = getattr(layer, name)
        if column is not None:
            total.add(column[valid])
    if layer.router_logsumexp is not None:
        state.z_squared.add(np.square(layer.router_logsumexp[valid].astype(np.float64)))
    if layer.probability_sum is not None:
        _add_probabilities(state, layer.probability_sum, len(steps))
    _fold_content(state, layer, ids, valid, columns, rows)


def _fold_load(
    state: LayerState,
    ids: npt.NDArray[np.int32],
    is_load: npt.NDArray[np.bool_] | None,
    steps: _U64,
    blocks: _U64,
    stretches: _U64,
    known: npt.NDArray[np.bool_],
    step_source: int,
) -> None:
    """Add the load of valid rows to every table of the layer; `is_load` None = all slots."""
    starts = run_starts(blocks, stretches, steps, known)
    if not _pays(starts, ids, state.shape.num_experts):
        _fold_load_by_row(state, ids, is_load, steps, blocks, stretches, known, step_source)
        return
    # Long runs, as texts that are read in one go have them: each slot is looked at once for all tables.
    table = load_of_runs(ids, is_load, starts, state.shape.num_experts)
    tokens = np.diff(starts, append=len(ids)).astype(np.uint64)
    steps, blocks, stretches, known = steps[starts], blocks[starts], stretches[starts], known[starts]
    if state.position_counts is not None:
        num = len(state.position_counts)
        block = _block_numbers(mix(blocks + stretches), known, num)
        state.position_counts += sums_by_group(table, block, num + 1)[:num]
    # What is left does not ask for positions, so whole requests are runs.
    starts = run_starts(blocks, steps, known)
    table, tokens = np.add.reduceat(table, starts, axis=0), np.add.reduceat(tokens, starts)
    num, block = len(state.block_tokens), _block_numbers(blocks[starts], known[starts], len(state.block_tokens))
    state.counts += table.sum(axis=0)
    state.block_counts += sums_by_group(table, block, num + 1)[:num]
    state.block_tokens += sums_by_group(tokens, block, num + 1)[:num]
    if state.load_series is not None:
        state.load_series.fold_runs(steps[starts], table, tokens, step_source)
    if state.step_sample is not None:
        state.step_sample.fold_runs(steps[starts], table, tokens, step_source)


def _fold_load_by_row(
    state: LayerState,
    ids: npt.NDArray[np.int32],
    is_load: npt.NDArray[np.bool_] | None,
    steps: _U64,
    blocks: _U64,
    stretches: _U64,
    known: npt.NDArray[np.bool_],
    step_source: int,
) -> None:
    """The same for rows of which no two neighbours agree, as in decoding."""
    experts = state.shape.num_experts

    def sums(block: npt.NDArray[np.intp], num: int) -> _U64:
        cells = block[:, None] * experts + ids
        flat = cells.ravel() if is_load is None else cells[is_load]
        return np.bincount(flat, minlength=(num + 1) * experts).astype(np.uint64).reshape(num + 1, experts)

    num, block = len(state.block_tokens), _block_numbers(blocks, known, len(state.block_tokens))
    table = sums(block, num)
    state.counts += table.sum(axis=0)
    state.block_counts += table[:num]
    state.block_tokens += np.bincount(block, minlength=num + 1)[:num].astype(np.uint64)
    if state.position_counts is not None:
        num = len(state.position_counts)
        state.position_counts += sums(_block_numbers(mix(blocks + stretches), known, num), num)[:num]
    histories = [history for history in (state.load_series, state.step_sample) if history is not None]
    starts = run_starts(steps)
    if histories and _pays(starts, ids, experts):
        table = load_of_runs(ids, is_load, starts, experts)
        tokens = np.diff(starts, append=len(ids)).astype(np.uint64)
        for history in histories:
            history.fold_runs(steps[starts], table, tokens, step_source)
    else:
        every = np.ones(ids.shape, np.bool_) if is_load is None else is_load
        for history in histories:
            history.fold(steps, ids, every, step_source)


def _pays(starts: npt.NDArray[np.intp], ids: npt.NDArray[np.int32], num_experts: int) -> bool:
    """Return whether a table of runs is worth it: not larger than the slots, and runs are no single rows."""
    return len(starts) * num_experts <= 2 * ids.size and 4 * len(starts) <= len(ids)


def _block_numbers(hashes: _U64, known: npt.NDArray[np.bool_], num: int) -> npt.NDArray[np.intp]:
    """Return each row's block; rows of unknown requests go to one more, which is dropped after counting."""
    return np.where(known, (hashes >> np.uint64(32)) % np.uint64(num), np.uint64(num)).astype(np.intp)


def _fold_content(
    state: LayerState,
    layer: LayerColumns,
    ids: npt.NDArray[np.int32],
    valid: npt.NDArray[np.bool_] | slice,
    columns: RoutingColumns,
    rows: slice | npt.NDArray[np.uint32],
) -> None:
    """Add the rows' fingerprints, where weights or token ids tell tokens apart."""
    parts: list[npt.NDArray[np.unsignedinteger]] = []
    if layer.gate_weights is not None:
        # As on the wire, so that a notebook and an analyzer tell the same tokens apart.
        with np.errstate(over="ignore"):
            parts.append(np.ascontiguousarray(layer.gate_weights[valid], np.float16).view(np.uint16))
    if columns.token_id is not None:
        parts.append(columns.token_id[rows][valid].reshape(-1, 1))
    if not parts:
        return
    if layer.router_entropy is not None:
        parts.append(layer.router_entropy[valid].astype(np.float16).view(np.uint16).reshape(-1, 1))
    position = columns.position[rows][valid]
    fingerprint = mix(position.astype(np.uint64))
    for part in (ids.astype(np.uint32), *parts):
        fingerprint = combine(fingerprint, part)
    observe(state.content_registers, fingerprint)
    state.num_fingerprints += len(ids)


def _add_probabilities(state: LayerState, sums: npt.NDArray[np.float64], num_tokens: int) -> None:
    if sums.shape != state.counts.shape:
        raise InvalidInputError(
            f"layer {state.shape.layer_index}: probability_sum has shape {sums.shape}, expected {state.counts.shape}"
        )
    if not np.isfinite(sums).all():
        return
    state.probability_sum += np.rint(np.clip(sums, 0, _MAX_ABSOLUTE) * _FIXED_POINT).astype(np.int64)
    state.num_probability_tokens += num_tokens


def _num_accounted(layer: LayerCountColumns) -> int:
    """Slots that the sums name; the rest was unused."""
    return (
        int(np.sum(layer.expert_counts, dtype=np.uint64))
        + layer.identity_slots
        + layer.skipped_slots
        + layer.dropped_slots
    )


def _extreme(choose: Callable[[list[int]], int], a: int | None, b: int | None) -> int | None:
    known = [x for x in (a, b) if x is not None]
    return choose(known) if known else None


_History = TypeVar("_History", LoadSeries, StepSample, TokenSample)


def _merged(a: _History | None, b: _History | None) -> _History | None:
    """Return the merge of both, None where one of them is not kept."""
    return None if a is None or b is None else a.merge(b)


def _sum(a: _U64 | None, b: _U64 | None) -> _U64 | None:
    return None if a is None or b is None else a + b
