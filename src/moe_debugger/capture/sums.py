"""Level "counts": a layer's rows become sums, on the device before they are copied, or here where they are.

Glossary:
    row sums   sums over the columns of one batch row, [R, ...]: which rows count is decided on the host, where it is
               known whose row it is, so the device only leaves out the padding that the attention mask names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.wire.codec import LayerCountColumns
from moe_debugger.wire.slots import SlotClasses

from .raw import RawForward, RawLayer, TokenFrame
from .routes import Routes
from .scoring import probability_sum
from .sites import LayerInfo, Site
from .tokens import GroupTokens

if TYPE_CHECKING:
    import torch

__all__ = [
    "ROW_COUNTS",
    "ROW_PROBABILITIES",
    "CountedRows",
    "add_row_sums",
    "counted_rows",
    "layer_sums",
    "reduce_on_device",
]

# Row sums by these names stand in place of a layer's tensors.
ROW_COUNTS, ROW_PROBABILITIES = "row_counts", "row_probabilities"
# Of the counts' last columns: slots that skip the experts, and ids that the layer does not have.
_NUM_EXTRA = 2
# Bound on the values that are stacked at a time: 64 MiB of float32.
_MAX_STACKED = 16 * 1024 * 1024

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CountedRows:
    """Which of a group's tokens count in one phase.

    Attributes:
        is_valid: [N] bool; None = all.
        is_padding: [N] bool, padding of this phase; None = none.
        is_valid_row: [R] bool, batch rows with a valid token.
        num_tokens, num_padding: of the whole stack.
    """

    phase: int
    first_step: int
    last_step: int
    is_valid: Bools | None
    is_padding: Bools | None
    is_valid_row: Bools
    num_tokens: int
    num_padding: int


def counted_rows(tokens: GroupTokens) -> Iterator[CountedRows]:
    """Yield the rows of each phase."""
    kept = tokens.columns
    starts = np.cumsum(tokens.row_lengths) - tokens.row_lengths
    phases = np.unique(kept.phase).tolist()
    for phase in phases:
        of_phase = kept.phase == phase
        step = kept.step if len(phases) == 1 else kept.step[of_phase]
        chosen = np.ones(len(tokens.is_padding), bool) if tokens.keep is None else tokens.keep.copy()
        chosen[chosen] = of_phase
        is_valid, is_padding = chosen & ~tokens.is_padding, chosen & tokens.is_padding
        num_tokens, num_padding = int(np.count_nonzero(is_valid)), int(np.count_nonzero(is_padding))
        yield CountedRows(
            phase=phase,
            first_step=int(step.min()),
            last_step=int(step.max()),
            is_valid=None if num_tokens == len(is_valid) else is_valid,
            is_padding=is_padding if num_padding else None,
            is_valid_row=np.logical_or.reduceat(is_valid, starts),
            num_tokens=num_tokens,
            num_padding=num_padding,
        )


def layer_sums(info: LayerInfo, routes: Routes, rows: CountedRows, scoring: str | None) -> LayerCountColumns:
    """Return the sums of a layer's valid rows.

    Args:
        info: the layer.
        routes: of all rows that it saw.
        rows: which of them count.
        scoring: how its logits are read; None = no probabilities.
    """
    is_valid, is_padding = rows.is_valid, rows.is_padding
    if routes.row_index is not None:
        is_valid = None if is_valid is None else is_valid[routes.row_index]
        is_padding = None if is_padding is None else is_padding[routes.row_index]
    ids, status = routes.expert_ids, routes.slot_status
    if is_valid is not None:
        ids, status = ids[is_valid], None if status is None else status[is_valid]
    last = info.num_experts + info.num_identity_experts - 1
    bad_slots = 0
    if status is None and ids.size and int(ids.min()) >= 0 and int(ids.max()) <= last:
        # Nearly always each slot has an expert, and nothing has to be told apart.
        table = np.bincount(ids.reshape(-1), minlength=last + 1)
        counts, lost = table[: info.num_experts], (int(table[info.num_experts :].sum()), 0, 0, 0)
    else:
        is_bad = (ids < -1) | (ids > last)
        bad_slots = int(np.count_nonzero(is_bad))
        slots = SlotClasses.of(np.where(is_bad, -1, ids) if bad_slots else ids, status, info.num_experts)
        counts = np.bincount(ids[slots.is_load], minlength=info.num_experts)
        lost = (slots.num_identity, slots.num_skipped, slots.num_dropped, slots.num_unused - bad_slots)
    sums = None
    if scoring is not None and routes.logits is not None:
        sums = probability_sum(routes.logits, scoring, is_valid)[: info.num_experts]
    return LayerCountColumns(
        layer_index=info.layer_index,
        num_experts=info.num_experts,
        num_identity_experts=info.num_identity_experts,
        num_tokens=len(ids),
        num_padding=0 if is_padding is None else int(np.count_nonzero(is_padding)),
        expert_counts=counts.astype(np.uint64),
        identity_slots=lost[0],
        skipped_slots=lost[1],
        dropped_slots=lost[2],
        unused_slots=lost[3],
        bad_slots=bad_slots,
        probability_sum=sums,
    )


def add_row_sums(
    info: LayerInfo, counts: npt.NDArray[Any], probabilities: npt.NDArray[Any] | None, rows: CountedRows
) -> LayerCountColumns:
    """Return the sums of a layer that was reduced on its device.

    Args:
        info: the layer.
        counts: [R, E + Z + 2] integers of `reduce_on_device`.
        probabilities: [R, C] floats, None where the layer has none.
        rows: which of the batch rows count.
    """
    table = counts[rows.is_valid_row].sum(axis=0, dtype=np.int64)
    skipped, bad = (int(number) for number in table[-_NUM_EXTRA:])
    routed, identity = table[: info.num_experts], int(table[info.num_experts : -_NUM_EXTRA].sum())
    sums = None
    if probabilities is not None:
        sums = probabilities[rows.is_valid_row, : info.num_experts].sum(axis=0, dtype=np.float64)
    return LayerCountColumns(
        layer_index=info.layer_index,
        num_experts=info.num_experts,
        num_identity_experts=info.num_identity_experts,
        num_tokens=rows.num_tokens,
        num_padding=rows.num_padding,
        expert_counts=routed.astype(np.uint64),
        identity_slots=identity,
        skipped_slots=skipped,
        unused_slots=rows.num_tokens * info.top_k - int(routed.sum()) - identity - skipped - bad,
        bad_slots=bad,
        probability_sum=sums,
    )


def reduce_on_device(raw: RawForward, sites: Sequence[Site], scoring: Mapping[int, str | None]) -> None:
    """Replace the tensors of a forward's layers by row sums where that is less to copy; nothing waits for the device.

    Args:
        raw: the forward; layers whose rows are not those of its batch are left as they are.
        sites: the model's layers, by layer index.
        scoring: how the logits of each layer are read, None where it has no statistics. A layer that is missing is left
            as it is: its weights are still needed to find out.
    """
    alike: dict[tuple[Any, ...], list[RawLayer]] = {}
    frame_of: dict[int, TokenFrame] = {}
    for layer in raw.layers:
        site = sites[layer.layer_index]
        if layer.layer_index in scoring and _is_worth_it(layer, site):
            shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in layer.tensors.items())
            sizes = (site.info.num_experts, site.info.num_identity_experts)
            frame_of[id(layer.frame)] = layer.frame
            key = (id(layer.frame), site.reduces, sizes, scoring[layer.layer_index], shapes)
            alike.setdefault(key, []).append(layer)
    for (frame, reduces, (num_experts, num_identity), how, _), layers in alike.items():
        largest = max(tensor.numel() for tensor in layers[0].tensors.values())
        at_once = max(1, _MAX_STACKED // max(1, largest))
        for first in range(0, len(layers), at_once):
            part = layers[first : first + at_once]
            # A forward has dozens of layers, and each operation costs the model's thread a launch: all layers at once.
            _reduce(part, frame_of[frame], reduces == "scores", num_experts, num_identity, how)


def _is_worth_it(layer: RawLayer, site: Site) -> bool:
    frame, tensors = layer.frame, layer.tensors
    if (
        site.reduces is None
        or not frame.is_of_one_phase
        or frame.has_drafts
        or "row_mask" in tensors
        or layer.num_rows != frame.num_tokens
    ):
        return False
    if any(tensor.ndim != 2 or tensor.shape[0] != layer.num_rows for tensor in tensors.values()):
        return False
    num_ids = site.info.num_experts + site.info.num_identity_experts
    return bool(frame.num_columns * max(1, site.info.top_k) > num_ids)


def _reduce(
    layers: Sequence[RawLayer],
    frame: TokenFrame,
    is_dense: bool,
    num_experts: int,
    num_identity: int,
    scoring: str | None,
) -> None:
    """Reduce layers whose tensors are alike; [L, R, C, ...] are layers, batch rows, columns."""
    import torch

    shape = (len(layers), frame.num_rows, frame.num_columns)

    def stacked(name: str) -> "torch.Tensor":
        return torch.stack([layer.tensors[name] for layer in layers]).view(*shape, -1)

    names = layers[0].tensors.keys()
    is_padding = None if frame.is_padding is None else frame.is_padding.bool().view(1, *shape[1:], 1)
    logits = stacked("logits") if "logits" in names else None
    if is_dense:
        counts = _count_dense(stacked("scores"), is_padding)
    else:
        ids, is_skipped = stacked("expert_ids"), None
        if logits is not None and not num_identity and logits.shape[-1] == num_experts + 1 and ids.shape[-1] == 1:
            # The class after the experts skips them, which the weights say by being 0 (see readers/standard.py).
            is_skipped = stacked("gate_weights") == 0
        counts = _count_ids(ids, num_experts + num_identity, is_padding, is_skipped)
    probabilities = None
    if logits is not None and scoring is not None:
        found = _probabilities(logits.float(), scoring)
        if is_padding is not None:
            # Not by multiplication: what padding computes may be no number.
            found = found.masked_fill(is_padding, 0)
        probabilities = found.sum(dim=2)
    for place, layer in enumerate(layers):
        layer.tensors = {ROW_COUNTS: counts[place]}
        if probabilities is not None:
            layer.tensors[ROW_PROBABILITIES] = probabilities[place]


def _count_ids(
    ids: "torch.Tensor", num_ids: int, is_padding: "torch.Tensor | None", is_skipped: "torch.Tensor | None"
) -> "torch.Tensor":
    """Return [L, R, num_ids + 2] int32; `bincount` would ask the device for the largest id."""
    import torch

    skips, bad, nothing = num_ids, num_ids + 1, num_ids + 2
    cells = ids.long()
    cells = torch.where((cells >= -1) & (cells < num_ids), cells, bad)
    cells = cells.masked_fill(cells == -1, nothing)
    if is_skipped is not None:
        cells = cells.masked_fill(is_skipped, skips)
    if is_padding is not None:
        cells = cells.masked_fill(is_padding, nothing)
    counts = torch.zeros((*ids.shape[:2], num_ids + _NUM_EXTRA + 1), dtype=torch.int32, device=ids.device)
    ones = torch.ones((1, 1, 1), dtype=torch.int32, device=ids.device)
    cells = cells.flatten(2)
    return counts.scatter_add_(2, cells, ones.expand_as(cells))[:, :, :-1]


def _count_dense(scores: "torch.Tensor", is_padding: "torch.Tensor | None") -> "torch.Tensor":
    import torch

    is_chosen = scores != 0
    if is_padding is not None:
        is_chosen = is_chosen & ~is_padding
    counts = is_chosen.sum(dim=2, dtype=torch.int32)
    return torch.nn.functional.pad(counts, (0, _NUM_EXTRA))


def _probabilities(logits: "torch.Tensor", scoring: str) -> "torch.Tensor":
    """Return what `scoring.router_statistics` sums, for torch."""
    import torch

    if scoring == "softmax":
        return torch.softmax(logits, dim=-1)
    if scoring == "probabilities":
        scores = logits
    elif scoring == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = torch.nn.functional.softplus(logits).sqrt()
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
