"""The foldable state of one layer; see `moe_debugger.analysis.state` for the words and the algebra."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.fixed_sums import FixedSums
from moe_debugger.analysis.sketch import NUM_REGISTERS, distinct_estimate
from moe_debugger.analysis.step_loads import LoadSeries, StepSample
from moe_debugger.analysis.token_sample import TokenSample
from moe_debugger.analysis.workloads import WorkloadSample
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb

__all__ = [
    "FIXED_POINT",
    "MAX_ABSOLUTE",
    "MAX_EXPERTS",
    "NUM_PHASES",
    "NUM_TOKEN_CLASSES",
    "LayerShape",
    "LayerState",
    "even_squares",
    "num_blocks",
]

MAX_EXPERTS = 65_535
NUM_PHASES = len(pb.Phase.values())
# Token ids are counted in this many hashed classes: enough to tell a dozen kinds of tokens from a vocabulary.
NUM_TOKEN_CLASSES = 256
# Probabilities are kept as sums of round(value * 2**20): exact to 1e-6, and independent of the order of addition.
FIXED_POINT = 1 << 20
# A batch's sum of an expert's probabilities is at most its tokens; the bound keeps the sum inside int64.
MAX_ABSOLUTE = float(1 << 26)

_U64 = npt.NDArray[np.uint64]


def num_blocks(num_experts: int) -> int:
    """Return how many blocks a layer with that many experts keeps: 64, down to 16 for wide layers (bounded memory)."""
    return max(16, min(64, 4096 // num_experts))


def even_squares(num_slots: int, num_tokens: int) -> int:
    """Return the least sum of squares of `num_tokens` whole numbers that add up to `num_slots`: of equal ones."""
    if not num_tokens:
        return 0
    each, more = divmod(num_slots, num_tokens)
    return num_tokens * each**2 + more * (2 * each + 1)


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

    def __str__(self) -> str:
        identity = f" and {self.num_identity_experts} identity experts" if self.num_identity_experts else ""
        return f"{self.num_experts} experts{identity}, top-{self.top_k}"

    @property
    def num_ids(self) -> int:
        """E + Z: how many expert ids there are."""
        return self.num_experts + self.num_identity_experts


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
        phase_tokens: [5] uint64, valid tokens by `Phase`.
        token_classes: [256] uint64, valid tokens by a hash of their token id, where captured.
        workloads: labels of a sample of requests.
        num_dropped_slots, num_skipped_slots, num_identity_slots, num_unused_slots: slots of valid tokens that are no
            load, by what became of them. With the counts they add up to ``num_tokens * k``.
        squared_loads: sum over valid tokens of the square of their number of routed slots, ``num_tokens * k**2`` where
            every slot is routed. Of sums, which do not tell single tokens, that of tokens with as equal numbers as
            there can be.
        router_entropy, top1_probability, margin, z_squared: sums over valid tokens, where captured, by groups of
            requests. `z_squared` is the square of the logits' logsumexp (router z-loss).
        dropped: dropped slots of valid tokens whose slots have a status, likewise; of no sums of the `counts` level.
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
    phase_tokens: _U64 = field(default_factory=lambda: np.zeros(NUM_PHASES, np.uint64))
    token_classes: _U64 = field(default_factory=lambda: np.zeros(NUM_TOKEN_CLASSES, np.uint64))
    workloads: WorkloadSample = field(default_factory=WorkloadSample.empty)
    num_tokens: int = 0
    num_padding: int = 0
    num_dropped_slots: int = 0
    num_skipped_slots: int = 0
    num_identity_slots: int = 0
    num_unused_slots: int = 0
    squared_loads: int = 0
    num_probability_tokens: int = 0
    num_fingerprints: int = 0
    router_entropy: FixedSums = field(default_factory=FixedSums)
    top1_probability: FixedSums = field(default_factory=FixedSums)
    margin: FixedSums = field(default_factory=FixedSums)
    z_squared: FixedSums = field(default_factory=FixedSums)
    dropped: FixedSums = field(default_factory=FixedSums)
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
    def routed_per_token(self) -> float:
        """Routed slots of a token, tokens weighted by that number: sum of a^2 / sum of a; k where every slot is routed.

        It is what takes the place of k in the variance of the load of independent tokens. k without load.
        """
        load = self.num_assignments
        return self.squared_loads / load if load else float(self.shape.top_k)

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
        return self.probability_sum.astype(np.float64) / (FIXED_POINT * self.num_probability_tokens)

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
            phase_tokens=self.phase_tokens + other.phase_tokens,
            token_classes=self.token_classes + other.token_classes,
            workloads=self.workloads.merge(other.workloads),
            num_tokens=self.num_tokens + other.num_tokens,
            num_padding=self.num_padding + other.num_padding,
            num_dropped_slots=self.num_dropped_slots + other.num_dropped_slots,
            num_skipped_slots=self.num_skipped_slots + other.num_skipped_slots,
            num_identity_slots=self.num_identity_slots + other.num_identity_slots,
            num_unused_slots=self.num_unused_slots + other.num_unused_slots,
            squared_loads=self.squared_loads + other.squared_loads,
            num_probability_tokens=self.num_probability_tokens + other.num_probability_tokens,
            num_fingerprints=self.num_fingerprints + other.num_fingerprints,
            router_entropy=self.router_entropy.plus(other.router_entropy),
            top1_probability=self.top1_probability.plus(other.top1_probability),
            margin=self.margin.plus(other.margin),
            z_squared=self.z_squared.plus(other.z_squared),
            dropped=self.dropped.plus(other.dropped),
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


def _extreme(choose: Callable[[list[int]], int], a: int | None, b: int | None) -> int | None:
    known = [x for x in (a, b) if x is not None]
    return choose(known) if known else None


_History = TypeVar("_History", LoadSeries, StepSample, TokenSample)


def _merged(a: _History | None, b: _History | None) -> _History | None:
    """Return the merge of both, None where one of them is not kept."""
    return None if a is None or b is None else a.merge(b)


def _sum(a: _U64 | None, b: _U64 | None) -> _U64 | None:
    return None if a is None or b is None else a + b
