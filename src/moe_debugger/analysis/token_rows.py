"""The rows of each layer as sets of experts, and what tells which token, text and forward a row belongs to.

Words:
    set         the distinct routed experts that computed a token at a layer. Dropped, skipped, identity and unused
                slots are in none. A token with fewer than k is partial.
    token       rank, request, forward and position together: the same token has the same code at every layer.
    text        what has consecutive positions: a request; in training and evaluation, whose names come again with
                other text, a request in one forward. Rows without a request belong to their forward.
    ambiguous   a code that several rows of one layer share (beams, a text that was computed again): which of them is
                meant cannot be told, so all of them are left out, and counted.

Example: E = 4, k = 2, ids [[2, 0], [3, -1], [1, 2]], the last one padding: sets {0, 2} and {3}, stored as
[[0, 2], [3, 4]], where 4 = E stands for "no expert".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis._columns import checked_columns, neighbour_blocks
from moe_debugger.analysis._folding import row_blocks
from moe_debugger.analysis.intervals import MIN_BLOCKS, Interval, student_quantile
from moe_debugger.analysis.row_set import RowSet
from moe_debugger.analysis.state import LayerShape, num_blocks
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import RoutingColumns

__all__ = [
    "DecisionRows",
    "LayerRows",
    "block_sums",
    "chance_of_common_expert",
    "expert_sets",
    "plain",
    "ratio_interval",
    "unique_rows",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_LARGEST_CODE = 2**62
_USED = (
    "request_id",
    "rank",
    "forward_index",
    "step",
    "phase",
    "position",
    "token_id",
    "is_padding",
    "slot_status",
    "intended_expert_ids",
)


@dataclass(frozen=True, slots=True, eq=False)
class LayerRows:
    """Valid rows of one layer, in the order given.

    Attributes:
        row: [n] int64, index into the columns that were given.
        expert_ids: [n, k] int32 as captured.
        slot_status: [n, k] uint8, None where it was not captured.
        is_load: [n, k] bool, slots that reached a routed expert.
        experts: [n, k] int32, each row its set: ascending, distinct, E where there is none.
        num_routed: [n] int64, size of the set.
        block: [n] int64, the block of whole requests that every variance comes from; -1 = unknown.
        num_blocks: blocks are 0..num_blocks - 1.
        num_padding: padded rows, part of nothing else.
    """

    shape: LayerShape
    row: Ints
    expert_ids: npt.NDArray[np.int32]
    slot_status: npt.NDArray[np.uint8] | None
    is_load: npt.NDArray[np.bool_]
    experts: npt.NDArray[np.int32]
    num_routed: Ints
    block: Ints
    num_blocks: int
    num_padding: int

    @property
    def num_partial(self) -> int:
        """Tokens with fewer than k routed experts."""
        return int(np.count_nonzero(self.num_routed < self.shape.top_k))


class DecisionRows:
    """Checked columns, layer by layer.

    Args:
        decisions: columns of equal length as `session.decisions()` gives them. Required: `layer_index`, `expert_ids`.
        num_experts: E, or one per layer index.
        top_k: k, or one per layer index.
        num_identity_experts: Z, or one per layer index.

    Raises:
        InvalidInputError: a column is missing or of another length, or ids are out of range.
    """

    def __init__(
        self,
        decisions: Mapping[str, Any],
        *,
        num_experts: int | Sequence[int],
        top_k: int | Sequence[int],
        num_identity_experts: int | Sequence[int] = 0,
    ) -> None:
        self._columns = checked_columns(decisions, _USED)
        self._rows = RowSet.of(
            self._columns, num_experts=num_experts, top_k=top_k, num_identity_experts=num_identity_experts
        )
        self.layer_index: Ints = self._columns["layer_index"]
        self.num_rows = len(self.layer_index)
        infos = getattr(decisions, "layers", None) or {}
        self._stacks = {index: getattr(info, "stack", "") for index, info in dict(infos).items()}
        self.shapes = dict(sorted((self._rows.shapes | self._rows.padded_shapes).items()))
        # Padding belongs to no request here: its rows are in no result.
        self._request = np.zeros(self.num_rows, np.int64)
        self._request[self._rows.row] = self._rows.document + 1
        self._has_requests = self.column("request_id") is not None
        hashes, known = row_blocks(self._routing())
        self._hashes = np.where(known, hashes >> np.uint64(32), np.uint64(0)).astype(np.int64)
        self._is_known = known

    def column(self, name: str) -> npt.NDArray[Any] | None:
        """Return a column, None where it was not given."""
        return self._columns.get(name)

    def is_one_stack(self, first: int, second: int) -> bool:
        """Return False where layers are known to route other tokens: an encoder's and a decoder's."""
        return self._stacks.get(first) == self._stacks.get(second)

    def layer(self, layer_index: int) -> LayerRows:
        """Return the valid rows of a layer."""
        shape, bound = self.shapes[layer_index], self._rows.bounds.get(layer_index, slice(0, 0))
        valid = self._rows.row[bound]
        column = self.column("slot_status")
        is_load = self._rows.is_load[bound][:, : shape.top_k]
        ids = np.ascontiguousarray(self._rows.expert_ids[bound][:, : shape.top_k])
        experts = expert_sets(ids, is_load, shape.num_experts)
        blocks = num_blocks(shape.num_experts)
        if not self._has_requests:
            # Without requests neighbours stand for one, as in `analyze`.
            rows = np.flatnonzero(self.layer_index == layer_index)
            step = self.column("step")
            block = neighbour_blocks(len(rows), None if step is None else step[rows])
            block = block[np.searchsorted(rows, valid)] % blocks
        else:
            block = np.where(self._is_known[valid], self._hashes[valid] % blocks, -1)
        return LayerRows(
            shape=shape,
            row=valid,
            expert_ids=ids,
            slot_status=None if column is None else np.ascontiguousarray(column[valid][:, : shape.top_k], np.uint8),
            is_load=is_load,
            experts=experts,
            num_routed=(experts < shape.num_experts).sum(axis=1, dtype=np.int64),
            block=block.astype(np.int64),
            num_blocks=blocks,
            num_padding=self._rows.num_padding[layer_index],
        )

    def forward_codes(self) -> Ints | None:
        """Return [rows] one number for each forward of each process, None without `forward_index`."""
        forward, rank = self.column("forward_index"), self.column("rank")
        if forward is None:
            return None
        return _dense(forward) if rank is None else _packed([_dense(rank), _dense(forward)])

    def token_codes(self) -> Ints:
        """Return [rows] one number for each token: equal where rank, request, forward and position are.

        Raises:
            InvalidInputError: `request_id` or `position` is missing.
        """
        forward = self.column("forward_index")
        parts = [self._request_code(), np.zeros(self.num_rows, np.int64) if forward is None else _dense(forward)]
        return _packed([*parts, self._position()])

    def text_codes(self) -> Ints:
        """Return [rows] numbers that are consecutive exactly where positions of one text are.

        Raises:
            InvalidInputError: `request_id` or `position` is missing.
        """
        request, position = self._request_code(), self._position()
        forward, phase = self.column("forward_index"), self.column("phase")
        if forward is not None:
            # Names of training batches come again with other text, and a row without a name has its forward alone.
            is_apart = np.zeros(self.num_rows, np.bool_)
            if phase is not None:
                is_apart |= (phase == pb.PHASE_TRAIN) | (phase == pb.PHASE_EVAL)
            if self._has_requests:
                is_apart |= self._request == 0
            request = _packed([request, np.where(is_apart, _dense(forward) + 1, 0)])
        return _packed([_dense(request), position], gap=1)

    def _request_code(self) -> Ints:
        if not self._has_requests:
            raise InvalidInputError(
                "tokens cannot be told apart without the column request_id; add the id of each row's request"
            )
        rank = self.column("rank")
        # Each process numbers its own forwards.
        return self._request if rank is None else _packed([self._request, _dense(rank)])

    def _position(self) -> Ints:
        position = self.column("position")
        if position is None:
            raise InvalidInputError("tokens cannot be matched without the column position (place in the request)")
        return position.astype(np.int64)

    def _routing(self) -> RoutingColumns:
        def values(name: str, dtype: str) -> npt.NDArray[Any]:
            column = self.column(name)
            return np.zeros(self.num_rows, dtype) if column is None else column.astype(dtype)

        return RoutingColumns(
            step=values("step", "<u8"),
            forward_index=values("forward_index", "<u8"),
            request_ids=["", *self._rows.documents] if self._has_requests else [],
            request_index=self._request.astype(np.uint32),
            position=np.zeros(self.num_rows, np.uint32),
            phase=values("phase", "u1"),
            is_padding=np.zeros(self.num_rows, np.bool_),
        )


def expert_sets(ids: npt.NDArray[np.int32], is_load: npt.NDArray[np.bool_], num_experts: int) -> npt.NDArray[np.int32]:
    """Return each row's set of routed experts, [n, k]: ascending, distinct, `num_experts` where there is none."""
    experts = np.sort(np.where(is_load, ids, num_experts).astype(np.int32), axis=1)
    is_repeated = (experts[:, 1:] == experts[:, :-1]) & (experts[:, 1:] < num_experts)
    if is_repeated.any():
        experts[:, 1:][is_repeated] = num_experts
        experts.sort(axis=1)
    return experts


def _dense(values: npt.NDArray[Any]) -> Ints:
    """Return numbers from 0 on that are equal and ordered as `values` are, and at most about twice as many."""
    if not len(values):
        return np.zeros(0, np.int64)
    low, high = int(values.min()), int(values.max())
    if high - low > 2 * len(values):
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    dense: Ints = (values - values.dtype.type(low)).astype(np.int64)
    return dense


def _packed(columns: Sequence[Ints], *, gap: int = 0) -> Ints:
    """Return one number for each row, equal only where all columns are; `gap` numbers stay free behind the last one."""
    code = columns[0]
    for column in columns[1:]:
        size = int(column.max(initial=0)) + 1 + gap
        if (int(code.max(initial=0)) + 1) * size >= _LARGEST_CODE:
            code = np.unique(code, return_inverse=True)[1].astype(np.int64)
        code = code * size + column
    return code


def unique_rows(codes: Ints) -> tuple[Ints, int]:
    """Return the indices that sort `codes`, without those that occur more than once, and how many those are."""
    order = np.arange(len(codes)) if (codes[1:] > codes[:-1]).all() else np.argsort(codes, kind="stable")
    is_repeat = codes[order][1:] == codes[order][:-1]
    if not is_repeat.any():
        return order, 0
    is_ambiguous = np.r_[is_repeat, False] | np.r_[False, is_repeat]
    return order[~is_ambiguous], int(np.count_nonzero(is_ambiguous))


def block_sums(block: Ints, num_blocks: int, values: npt.NDArray[Any] | None = None) -> Floats:
    """Return the sum of `values` (None = number of rows) of each block, [num_blocks]; unknown blocks are left out."""
    sums = np.bincount(block + 1, None if values is None else values, minlength=num_blocks + 1)
    return sums[1:].astype(np.float64)


def ratio_interval(numerator: Floats, denominator: Floats) -> Interval:
    """Return the 95 % interval of sum(numerator) / sum(denominator), a share in 0..1, from its blocks.

    Ratio estimator (Cochran 1977, eq. 6.13) with Student's t for Kish's effective number of blocks - 1. Where all or
    nothing was seen, whole blocks count as single trials. NaN below 4 effective blocks.
    """
    is_occupied = denominator > 0
    numerator, denominator = numerator[is_occupied], denominator[is_occupied]
    total = float(denominator.sum())
    kish = total**2 / float(np.square(denominator).sum()) if total else 0.0
    if kish < MIN_BLOCKS:
        return Interval(math.nan, math.nan)
    ratio, num = float(numerator.sum()) / total, len(numerator)
    bound = 1 - 0.025 ** (1 / kish)
    if ratio <= 0:
        return Interval(0.0, bound)
    if ratio >= 1:
        return Interval(1 - bound, 1.0)
    error = math.sqrt(num / (num - 1) * float(np.square(numerator - ratio * denominator).sum())) / total
    width = student_quantile(kish - 1) * error
    return Interval(max(ratio - width, 0.0), min(ratio + width, 1.0))


def chance_of_common_expert(num_experts: int, sizes: Sequence[int]) -> float:
    """Return the chance that sets of these sizes, drawn evenly from E experts, all have an expert in common.

    By inclusion and exclusion over the experts in common, in exact integers:
    sum over j >= 1 of (-1)^(j+1) C(E, j) prod_t C(E - j, a_t - j) / C(E, a_t). For two sets of K this is
    1 - C(E - K, K) / C(E, K): 46.4 % at 8/2.
    """
    total = math.prod(math.comb(num_experts, size) for size in sizes)
    common = sum(
        (-1) ** (j + 1) * math.comb(num_experts, j) * math.prod(math.comb(num_experts - j, size - j) for size in sizes)
        for j in range(1, min(sizes) + 1)
    )
    return float(common / total)


def plain(result: Any) -> dict[str, Any]:
    """Return a result (a dataclass) as plain values: arrays as lists."""

    def value(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return item.tolist()
        if isinstance(item, dict):
            return {key: value(each) for key, each in item.items()}
        return tuple(value(each) for each in item) if isinstance(item, tuple) else item

    return {key: value(item) for key, item in asdict(result).items()}
