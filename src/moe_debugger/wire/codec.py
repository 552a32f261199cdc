"""The columnar codec: numpy columns to `RoutingBatch` and `CountsBatch` and back, without an object per decision.

Glossary:
    token row   one token in one forward pass; a batch has ``num_tokens`` of them.
    decision    one token row at one MoE layer: k expert ids and weights.
    slot        one of the k choices of a decision; its status says what became of it.
    identity expert   a "zero" expert that computes nothing. A layer with E routed and Z identity experts has the ids
                0..E-1 for the routed ones and E..E+Z-1 for these.

A batch of 2 tokens at 2 layers with k = 2 holds 4 decisions: the token columns have 2 entries, and each of the two
`LayerColumns` has ``expert_ids`` of shape [2, 2].
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import UnsupportedFormatError, WireFormatError
from moe_debugger.v1 import routing_pb2 as pb

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "MAX_MESSAGE_BYTES",
    "NO_EXPERT",
    "CountsColumns",
    "LayerColumns",
    "LayerCountColumns",
    "RoutingColumns",
    "check_format_version",
    "decode_batch",
    "decode_counts",
    "encode_batch",
    "encode_counts",
    "format_version",
]

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
# NATS's default max_payload is 1 MiB; half of it keeps a fetch of 16 messages below the server's pending limit.
MAX_MESSAGE_BYTES = 512 * 1024
# Expert id of a slot that reached no expert, in decoded columns.
NO_EXPERT = -1

_TOKEN_COLUMNS = (
    ("step_offset", "<u4"),
    ("forward_offset", "<u4"),
    ("request_index", "<u4"),
    ("position", "<u4"),
    ("phase", "u1"),
    ("is_padding", "u1"),
    ("token_id", "<u4"),
)
_LAYER_ROW_COLUMNS = ("margin", "router_entropy", "router_logsumexp", "top1_probability")


@dataclass(slots=True)
class LayerColumns:
    """Routes of one MoE layer; n rows, k slots.

    Attributes:
        num_experts: E, the routed experts; identity experts are none of them.
        num_identity_experts: Z; their ids follow, E..E+Z-1, with status IDENTITY.
        expert_ids: [n, k] int32, -1 where a slot reached no expert (dropped, skipped, unused).
        gate_weights: [n, k] float32, as the experts' outputs were multiplied; None where not captured. The wire rounds
            them to float16.
        row_index: [n] uint32 rows of the batch that this layer saw; None = all of them, in order.
        slot_status: [n, k] uint8 of `SlotStatus`; None = routed wherever there is an id.
        intended_expert_ids: [n, k] int32, what the router chose, where that differs from what the experts computed.
        margin, router_entropy, router_logsumexp, top1_probability: [n] float32 or None. Entropy in nats.
        logits: [n, E] float16 or None.
        probability_sum: [E] float64 or None, over valid rows.
    """

    layer_index: int
    num_experts: int
    expert_ids: npt.NDArray[np.int32]
    gate_weights: npt.NDArray[np.float32] | None = None
    row_index: npt.NDArray[np.uint32] | None = None
    slot_status: npt.NDArray[np.uint8] | None = None
    intended_expert_ids: npt.NDArray[np.int32] | None = None
    margin: npt.NDArray[np.float32] | None = None
    router_entropy: npt.NDArray[np.float32] | None = None
    router_logsumexp: npt.NDArray[np.float32] | None = None
    top1_probability: npt.NDArray[np.float32] | None = None
    logits: npt.NDArray[np.float16] | None = None
    probability_sum: npt.NDArray[np.float64] | None = None
    num_identity_experts: int = 0


@dataclass(slots=True)
class RoutingColumns:
    """Decisions of one or more forwards as columns.

    Attributes:
        step: [T] uint64, the forward's step.
        forward_index: [T] uint64.
        request_ids: the distinct requests of this batch.
        request_index: [T] uint32 into `request_ids`.
        position: [T] uint32, position of the token in its request.
        phase: [T] uint8 of `Phase`.
        is_padding: [T] bool.
        token_id: [T] uint32 or None.
        captured_at_unix_ns: the source's clock; shown as skew, keys nothing.
    """

    step: npt.NDArray[np.uint64]
    forward_index: npt.NDArray[np.uint64]
    request_ids: list[str]
    request_index: npt.NDArray[np.uint32]
    position: npt.NDArray[np.uint32]
    phase: npt.NDArray[np.uint8]
    is_padding: npt.NDArray[np.bool_]
    token_id: npt.NDArray[np.uint32] | None = None
    layers: list[LayerColumns] = field(default_factory=list)
    captured_at_unix_ns: int = 0

    @property
    def num_tokens(self) -> int:
        """Token rows in this batch, padded ones included."""
        return len(self.position)

    @property
    def num_decisions(self) -> int:
        """Rows of all layers, padded ones included."""
        return sum(len(layer.expert_ids) for layer in self.layers)


@dataclass(slots=True)
class LayerCountColumns:
    """Sums of one MoE layer over the valid tokens that it saw.

    Attributes:
        num_tokens: valid tokens; padding is none.
        num_padding: padded rows, part of nothing else.
        expert_counts: [E] uint64, slots that were routed, per expert.
        identity_slots, skipped_slots, dropped_slots, unused_slots: slots that reached no routed expert, by what became
            of them; with the counts they add up to ``num_tokens * k``. The wire leaves out the last: it is the rest.
        bad_slots: slots with an id that the layer does not have, where a capture is broken; the wire has none.
        probability_sum: [E] float64, sum of the router's probabilities; None where it has none.
    """

    layer_index: int
    num_experts: int
    num_identity_experts: int
    num_tokens: int
    num_padding: int
    expert_counts: npt.NDArray[np.uint64]
    identity_slots: int = 0
    skipped_slots: int = 0
    dropped_slots: int = 0
    probability_sum: npt.NDArray[np.float64] | None = None
    unused_slots: int = 0
    bad_slots: int = 0


@dataclass(slots=True)
class CountsColumns:
    """Sums of one or more forwards of one phase and one stack: what the level "counts" sends instead of rows."""

    first_step: int
    last_step: int
    phase: int
    captured_at_unix_ns: int
    layers: list[LayerCountColumns] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Valid tokens of the layer that saw most."""
        return max((layer.num_tokens for layer in self.layers), default=0)

    @property
    def num_decisions(self) -> int:
        """Valid tokens of all layers: padding is no part of the account at this level."""
        return sum(layer.num_tokens for layer in self.layers)


def format_version() -> pb.FormatVersion:
    """Return the version that this program writes."""
    return pb.FormatVersion(major=FORMAT_MAJOR, minor=FORMAT_MINOR)


def check_format_version(version: pb.FormatVersion, what: str) -> None:
    """Refuse a version that this program cannot read.

    Raises:
        WireFormatError: no version is given.
        UnsupportedFormatError: a newer major.
    """
    if version.major == 0:
        raise WireFormatError(f"{what} has no format_version; expected major {FORMAT_MAJOR}")
    if version.major > FORMAT_MAJOR:
        raise UnsupportedFormatError(
            f"{what} has format version {version.major}.{version.minor}, this program reads up to major "
            f"{FORMAT_MAJOR}; upgrade the analyzer"
        )


def encode_batch(columns: RoutingColumns) -> pb.RoutingBatch:
    """Return `columns` as a `RoutingBatch` with its checksum."""
    first_step = int(columns.step.min()) if columns.num_tokens else 0
    first_forward = int(columns.forward_index.min()) if columns.num_tokens else 0
    batch = pb.RoutingBatch(
        format_version=format_version(),
        num_tokens=columns.num_tokens,
        captured_at_unix_ns=columns.captured_at_unix_ns,
        first_step=first_step,
        step_offset=(columns.step - np.uint64(first_step)).astype("<u4").tobytes(),
        first_forward_index=first_forward,
        forward_offset=(columns.forward_index - np.uint64(first_forward)).astype("<u4").tobytes(),
        request_ids=columns.request_ids,
        request_index=columns.request_index.astype("<u4").tobytes(),
        position=columns.position.astype("<u4").tobytes(),
        phase=columns.phase.astype("u1").tobytes(),
        is_padding=columns.is_padding.astype("u1").tobytes(),
        token_id=b"" if columns.token_id is None else columns.token_id.astype("<u4").tobytes(),
        layers=[_encode_layer(layer) for layer in columns.layers],
    )
    batch.crc32 = _checksum(batch)
    return batch


# Slots of these statuses reached no expert: whatever id they came with is no id.
_WITHOUT_EXPERT = (pb.SLOT_STATUS_DROPPED, pb.SLOT_STATUS_SKIPPED, pb.SLOT_STATUS_UNUSED)


def _encode_layer(layer: LayerColumns) -> pb.LayerRoutes:
    # The all-ones value means "no expert", so one byte serves up to 255 experts.
    width = 1 if layer.num_experts + layer.num_identity_experts <= 255 else 2
    expert_ids = layer.expert_ids
    if layer.slot_status is not None:
        expert_ids = np.where(np.isin(layer.slot_status, _WITHOUT_EXPERT), np.int32(NO_EXPERT), expert_ids)
    routes = pb.LayerRoutes(
        layer_index=layer.layer_index,
        num_rows=layer.expert_ids.shape[0],
        top_k=layer.expert_ids.shape[1],
        expert_ids=_narrow(expert_ids, width),
        expert_id_width=width,
    )
    if layer.row_index is not None:
        routes.row_index = layer.row_index.astype("<u4").tobytes()
    if layer.gate_weights is not None:
        routes.gate_weights = _half(layer.gate_weights)
    if layer.slot_status is not None:
        routes.slot_status = layer.slot_status.astype("u1").tobytes()
    if layer.intended_expert_ids is not None:
        routes.intended_expert_ids = _narrow(layer.intended_expert_ids, width)
    for name in _LAYER_ROW_COLUMNS:
        column = getattr(layer, name)
        if column is not None:
            setattr(routes, name, column.astype("<f4").tobytes())
    if layer.logits is not None:
        routes.logits = _half(layer.logits)
    if layer.probability_sum is not None:
        routes.probability_sum = layer.probability_sum.astype("<f8").tobytes()
    return routes


def _half(values: npt.NDArray[np.floating]) -> bytes:
    # What is beyond float16 (65504) becomes infinite, which a reader sees; a clipped value would pass for a true one.
    with np.errstate(over="ignore"):
        return values.astype("<f2").tobytes()


def _narrow(ids: npt.NDArray[np.int32], width: int) -> bytes:
    # -1 becomes the all-ones value by two's complement.
    return ids.astype("u1" if width == 1 else "<u2").tobytes()


def decode_batch(
    batch: pb.RoutingBatch, num_experts: Mapping[int, int], num_identity_experts: Mapping[int, int] | None = None
) -> RoutingColumns:
    """Return the columns of `batch`; they are read-only views where no conversion is needed.

    Args:
        batch: a parsed message.
        num_experts: E of each layer index, from the source's manifest.
        num_identity_experts: Z of each layer index that has identity experts; None = no layer has any.

    Raises:
        WireFormatError: a checksum, a column's length, a layer or an expert id does not fit.
        UnsupportedFormatError: written by a newer major version.
    """
    check_format_version(batch.format_version, "RoutingBatch")
    if batch.crc32 != _checksum(batch):
        raise WireFormatError(f"RoutingBatch: checksum {_checksum(batch):#010x}, expected {batch.crc32:#010x}")
    n = batch.num_tokens
    columns = {
        name: _column(getattr(batch, name), dtype, (n,), name)
        for name, dtype in _TOKEN_COLUMNS
        if name != "token_id" or batch.token_id
    }
    request_index = columns["request_index"]
    if n and (not batch.request_ids or int(request_index.max()) >= len(batch.request_ids)):
        raise WireFormatError(f"request_index goes past the {len(batch.request_ids)} request ids of the batch")
    return RoutingColumns(
        step=columns["step_offset"].astype(np.uint64) + np.uint64(batch.first_step),
        forward_index=columns["forward_offset"].astype(np.uint64) + np.uint64(batch.first_forward_index),
        request_ids=list(batch.request_ids),
        request_index=request_index,
        position=columns["position"],
        phase=columns["phase"],
        is_padding=columns["is_padding"].astype(np.bool_),
        token_id=columns.get("token_id"),
        layers=[_decode_layer(layer, n, num_experts, num_identity_experts or {}) for layer in batch.layers],
        captured_at_unix_ns=batch.captured_at_unix_ns,
    )


def _decode_layer(
    layer: pb.LayerRoutes, num_tokens: int, num_experts: Mapping[int, int], num_identity_experts: Mapping[int, int]
) -> LayerColumns:
    if layer.layer_index not in num_experts:
        raise WireFormatError(f"layer {layer.layer_index} is not in the source's manifest")
    experts, identity = num_experts[layer.layer_index], num_identity_experts.get(layer.layer_index, 0)
    rows, k = layer.num_rows, layer.top_k
    where = f"layer {layer.layer_index}: "

    def optional(name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        data = getattr(layer, name)
        return _column(data, dtype, shape, where + name) if data else None

    row_index = optional("row_index", "<u4", (rows,))
    if not rows and num_tokens:
        row_index = np.zeros(0, np.uint32)  # an empty column, which is not the same as none
    if row_index is None and rows != num_tokens:
        raise WireFormatError(f"{where}{rows} rows without row_index in a batch of {num_tokens} tokens")
    if row_index is not None and rows and int(row_index.max()) >= num_tokens:
        raise WireFormatError(f"{where}row_index goes past the {num_tokens} tokens of the batch")
    width, intended = layer.expert_id_width, layer.intended_expert_ids
    weights = optional("gate_weights", "<f2", (rows, k))

    def ids(data: bytes, what: str) -> npt.NDArray[np.int32]:
        return _widen(data, width, (rows, k), experts + identity, where + what)

    return LayerColumns(
        layer_index=layer.layer_index,
        num_experts=experts,
        expert_ids=ids(layer.expert_ids, "expert_ids"),
        gate_weights=None if weights is None else weights.astype(np.float32),
        row_index=row_index,
        slot_status=optional("slot_status", "u1", (rows, k)),
        intended_expert_ids=ids(intended, "intended_expert_ids") if intended else None,
        logits=optional("logits", "<f2", (rows, experts)),
        probability_sum=optional("probability_sum", "<f8", (experts,)),
        num_identity_experts=identity,
        **{name: optional(name, "<f4", (rows,)) for name in _LAYER_ROW_COLUMNS},
    )


def _widen(data: bytes, width: int, shape: tuple[int, int], num_experts: int, what: str) -> npt.NDArray[np.int32]:
    if width not in (1, 2):
        raise WireFormatError(f"{what}: expert_id_width is {width}, expected 1 or 2")
    ids = _column(data, "u1" if width == 1 else "<u2", shape, what).astype(np.int32)
    ids[ids == (0xFF if width == 1 else 0xFFFF)] = NO_EXPERT
    if ids.size and int(ids.max()) >= num_experts:
        raise WireFormatError(f"{what}: expert {int(ids.max())} of a layer with {num_experts} experts")
    return ids


def encode_counts(columns: CountsColumns) -> pb.CountsBatch:
    """Return `columns` as a `CountsBatch` with its checksum."""
    batch = pb.CountsBatch(
        format_version=format_version(),
        captured_at_unix_ns=columns.captured_at_unix_ns,
        first_step=columns.first_step,
        last_step=columns.last_step,
        phase=pb.Phase.ValueType(columns.phase),
        layers=[
            pb.LayerCounts(
                layer_index=layer.layer_index,
                num_tokens=layer.num_tokens,
                expert_counts=layer.expert_counts.astype("<u8").tobytes(),
                probability_sum=b"" if layer.probability_sum is None else layer.probability_sum.astype("<f8").tobytes(),
                num_dropped_slots=layer.dropped_slots,
                num_identity_slots=layer.identity_slots,
                num_skipped_slots=layer.skipped_slots,
                num_padding_tokens=layer.num_padding,
            )
            for layer in columns.layers
        ],
    )
    batch.crc32 = _counts_checksum(batch)
    return batch


def decode_counts(
    batch: pb.CountsBatch, num_experts: Mapping[int, int], num_identity_experts: Mapping[int, int] | None = None
) -> CountsColumns:
    """Return the sums in `batch`; the arrays are read-only views.

    Args:
        batch: a parsed message.
        num_experts: E of each layer index, from the source's manifest.
        num_identity_experts: Z of each layer index that has identity experts; None = no layer has any.

    Raises:
        WireFormatError: a checksum, a column's length or a layer does not fit.
        UnsupportedFormatError: written by a newer major version.
    """
    check_format_version(batch.format_version, "CountsBatch")
    if batch.crc32 != _counts_checksum(batch):
        raise WireFormatError(f"CountsBatch: checksum {_counts_checksum(batch):#010x}, expected {batch.crc32:#010x}")
    layers = []
    for layer in batch.layers:
        index = layer.layer_index
        if index not in num_experts:
            raise WireFormatError(f"layer {index} is not in the source's manifest")
        shape, where = (num_experts[index],), f"layer {index}: "
        layers.append(
            LayerCountColumns(
                layer_index=index,
                num_experts=num_experts[index],
                num_identity_experts=(num_identity_experts or {}).get(index, 0),
                num_tokens=layer.num_tokens,
                num_padding=layer.num_padding_tokens,
                expert_counts=_column(layer.expert_counts, "<u8", shape, where + "expert_counts"),
                identity_slots=layer.num_identity_slots,
                skipped_slots=layer.num_skipped_slots,
                dropped_slots=layer.num_dropped_slots,
                probability_sum=(
                    _column(layer.probability_sum, "<f8", shape, where + "probability_sum")
                    if layer.probability_sum
                    else None
                ),
            )
        )
    return CountsColumns(batch.first_step, batch.last_step, batch.phase, batch.captured_at_unix_ns, layers)


def _column(data: bytes, dtype: str, shape: tuple[int, ...], what: str) -> npt.NDArray[Any]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise WireFormatError(f"{what} has {len(data)} bytes, expected {expected} for shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape)


def _checksum(batch: pb.RoutingBatch) -> int:
    crc = 0
    for name, _ in _TOKEN_COLUMNS:
        crc = zlib.crc32(getattr(batch, name), crc)
    for layer in batch.layers:
        crc = zlib.crc32(layer.row_index, crc)
        for name in ("expert_ids", "gate_weights", "slot_status", "intended_expert_ids", *_LAYER_ROW_COLUMNS):
            crc = zlib.crc32(getattr(layer, name), crc)
        crc = zlib.crc32(layer.logits, crc)
        crc = zlib.crc32(layer.probability_sum, crc)
    return crc


def _counts_checksum(batch: pb.CountsBatch) -> int:
    """CRC-32 over expert_counts, then probability_sum, of each layer in order."""
    crc = 0
    for layer in batch.layers:
        crc = zlib.crc32(layer.probability_sum, zlib.crc32(layer.expert_counts, crc))
    return crc
