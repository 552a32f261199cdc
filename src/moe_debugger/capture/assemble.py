"""Turns what the hooks kept of one forward into columns, on the capture's own thread."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.wire.codec import LayerColumns, RoutingColumns

from .raw import PHASES, RawForward, RawLayer, TokenFrame
from .routes import Routes
from .scoring import RouterStatistics, SelectionRule, confirm_scoring, router_statistics
from .sites import LayerInfo, Site

if TYPE_CHECKING:
    import torch

__all__ = ["Assembler", "is_sampled"]

# Requests that ended with an end-of-text token are remembered while their batch goes on.
_MAX_FINISHED = 65536


def is_sampled(request_id: str, sampling_rate: float) -> bool:
    """Return whether a request is captured: the same answer in every process, for the whole request."""
    if sampling_rate >= 1:
        return True
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < sampling_rate * 2.0**64


class Assembler:
    """Builds `RoutingColumns` of forwards.

    Args:
        sites: the model's MoE layers.
        with_tokens: whether token ids are kept.
        with_logits: whether logits are kept.
        sampling_rate: share of the requests that are kept, by a hash of their id.
        eos_token_ids: ids that end a text. `generate` feeds padding to the rows of a batch that ended before the
            others, and says so in no mask; those rows are flagged as padding here.
    """

    def __init__(
        self,
        sites: Collection[Site],
        *,
        with_tokens: bool,
        with_logits: bool,
        sampling_rate: float = 1.0,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._sites = {site.info.layer_index: site for site in sites}
        self._infos = {index: site.info for index, site in self._sites.items()}
        self._rules = {index: SelectionRule(site.router) for index, site in self._sites.items()}
        self._proven: set[int] = set()
        self._with_tokens = with_tokens
        self._with_logits = with_logits
        self._sampling_rate = sampling_rate
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._finished: dict[str, None] = {}

    def layers(self) -> tuple[LayerInfo, ...]:
        """Return what is known about each layer by now."""
        return tuple(self._infos.values())

    def assemble(self, raw: RawForward) -> tuple[list[RoutingColumns], int]:
        """Return the columns of the sampled requests, one for each stack, and how many decisions were left out.

        Raises:
            ValueError: what a layer was called with cannot be read: the capture, the adapter or the model is broken.
        """
        results = [self._frame(raw, frame) for frame in raw.frames]
        columns = [each for each in results if each.num_tokens and each.layers]
        return columns, raw.num_decisions - sum(each.num_decisions for each in columns)

    def _frame(self, raw: RawForward, frame: TokenFrame) -> RoutingColumns:
        num_tokens = frame.num_tokens
        token_ids = None if frame.token_ids is None else _to_numpy(frame.token_ids).reshape(num_tokens)
        is_padding = self._padding(frame, token_ids)
        position = _positions(frame, is_padding)
        position[is_padding] = 0
        names = [name or "" for name in frame.request_ids]
        distinct = list(dict.fromkeys(name for name in names if name and is_sampled(name, self._sampling_rate)))
        # A dummy row belongs to no request: it goes with the first one, as padding.
        index_of = {name: index for index, name in enumerate(distinct)}
        kept_rows = np.array([not name or name in index_of for name in names]) & bool(distinct)
        row_request = np.array([index_of.get(name, 0) for name in names], dtype=np.uint32)
        keep = None if kept_rows.all() else np.repeat(kept_rows, frame.num_columns)
        result = RoutingColumns(
            step=np.full(num_tokens, raw.step, np.uint64),
            forward_index=np.full(num_tokens, raw.forward_index, np.uint64),
            request_ids=distinct,
            request_index=np.repeat(row_request, frame.num_columns),
            position=position.astype(np.uint32),
            phase=_phases(frame),
            is_padding=is_padding,
            token_id=token_ids.astype(np.uint32) if self._with_tokens and token_ids is not None else None,
            captured_at_unix_ns=raw.captured_at_unix_ns,
        )
        if keep is not None:
            for name in ("step", "forward_index", "request_index", "position", "phase", "is_padding", "token_id"):
                column = getattr(result, name)
                if column is not None:
                    setattr(result, name, column[keep])
        result.layers = [self._layer(layer, is_padding, keep) for layer in raw.layers if layer.frame is frame]
        return result

    def _padding(self, frame: TokenFrame, token_ids: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
        shape = (frame.num_rows, frame.num_columns)
        padding = np.zeros(shape, bool) if frame.is_padding is None else _to_numpy(frame.is_padding).astype(bool).copy()
        for row, name in enumerate(frame.request_ids):
            if name is None:
                padding[row] = True
        # A single row that ended is fed no more by generate(), so an end-of-text token there was fed on purpose.
        if frame.are_ids_minted and frame.num_rows > 1 and len(self._eos_token_ids) and token_ids is not None:
            fed = token_ids.reshape(shape)
            for row, name in enumerate(frame.request_ids):
                if frame.phases[row] != PHASES["decode"] or name is None:
                    continue
                if name in self._finished or bool(np.isin(fed[row, 0], self._eos_token_ids)):
                    self._finished[name] = None
                    padding[row] = True
            while len(self._finished) > _MAX_FINISHED:
                del self._finished[next(iter(self._finished))]
        return padding.reshape(-1)

    def _layer(
        self, raw: RawLayer, is_padding: npt.NDArray[np.bool_], keep: npt.NDArray[np.bool_] | None
    ) -> LayerColumns:
        info = self._infos[raw.layer_index]
        arrays = {name: _to_numpy(value) if hasattr(value, "detach") else value for name, value in raw.tensors.items()}
        routes = self._sites[raw.layer_index].interpret(arrays, info)
        if info.top_k != routes.expert_ids.shape[1]:
            self._infos[raw.layer_index] = info = replace(info, top_k=routes.expert_ids.shape[1])
        if keep is not None:
            routes = _only(routes, keep)
        if routes.row_index is not None:
            is_padding = is_padding[routes.row_index] if keep is None else is_padding[keep][routes.row_index]
        elif keep is not None:
            is_padding = is_padding[keep]
        layer = LayerColumns(
            layer_index=raw.layer_index,
            num_experts=info.num_experts,
            num_identity_experts=info.num_identity_experts,
            expert_ids=routes.expert_ids,
            gate_weights=routes.gate_weights,
            row_index=routes.row_index,
            slot_status=routes.slot_status,
            intended_expert_ids=routes.intended_expert_ids,
        )
        statistics = self._statistics(raw.layer_index, routes, is_padding)
        if statistics is not None:
            layer.margin = statistics.margin
            layer.router_entropy = statistics.entropy
            layer.router_logsumexp = statistics.logsumexp
            layer.top1_probability = statistics.top1_probability
            layer.probability_sum = statistics.probability_sum[: info.num_experts]
        if self._with_logits and routes.logits is not None and routes.logits.shape[1] >= info.num_experts:
            layer.logits = routes.logits[:, : info.num_experts].astype(np.float16)
        return layer

    def _statistics(
        self, layer_index: int, routes: Routes, is_padding: npt.NDArray[np.bool_]
    ) -> RouterStatistics | None:
        info = self._infos[layer_index]
        logits = routes.logits
        selected = routes.expert_ids if routes.selected is None else routes.selected
        weights = routes.gate_weights if routes.selected_weights is None else routes.selected_weights
        if logits is None or not len(logits):
            return None
        if logits.shape[1] not in (info.num_experts, info.num_experts + max(1, info.num_identity_experts)):
            if not info.unavailable_reason:
                reason = f"the router has {logits.shape[1]} scores for {info.num_experts} experts"
                self._infos[layer_index] = replace(info, unavailable_reason=reason)
            return None
        scoring = info.scoring_function
        if layer_index not in self._proven:
            scoring, is_proven = confirm_scoring(logits, selected, weights, scoring)
            if is_proven:
                self._proven.add(layer_index)
            if scoring == "unknown" and not info.unavailable_reason:
                info = replace(info, unavailable_reason="no reading of the router's logits gives the applied weights")
            self._infos[layer_index] = replace(info, scoring_function=scoring)
        if scoring == "unknown":
            return None
        return router_statistics(logits, selected, scoring, self._rules[layer_index], ~is_padding)


def _only(routes: Routes, keep: npt.NDArray[np.bool_]) -> Routes:
    """Return the rows of `routes` whose token is kept; a row index counts in the kept tokens afterwards."""
    of_rows = keep if routes.row_index is None else keep[routes.row_index]
    names = (
        "expert_ids", "gate_weights", "slot_status", "intended_expert_ids", "logits", "selected", "selected_weights",
    )  # fmt: skip
    kept = {name: None if (array := getattr(routes, name)) is None else array[of_rows] for name in names}
    row_index = None
    if routes.row_index is not None:
        row_index = (np.cumsum(keep) - 1)[routes.row_index[of_rows]].astype(np.uint32)
    return Routes(**kept, row_index=row_index)  # type: ignore[arg-type]


def _phases(frame: TokenFrame) -> npt.NDArray[np.uint8]:
    if frame.segment_ends is not None and frame.position is not None:
        # A text of one token that is not its first is generated; a longer one is (a part of) a prompt.
        ends = _to_numpy(frame.segment_ends).astype(np.int64)
        lengths = ends[1:] - ends[:-1]
        lengths = np.append(lengths, max(0, frame.num_columns - int(lengths.sum())))
        is_single = np.repeat(lengths, lengths) == 1
        is_later = _to_numpy(frame.position).reshape(-1) > 0
        return np.where(is_single & is_later, PHASES["decode"], PHASES["prefill"]).astype(np.uint8)
    phases = np.repeat(np.array(frame.phases, dtype=np.uint8), frame.num_columns)
    if frame.num_drafts:
        phases.reshape(frame.num_rows, frame.num_columns)[:, -frame.num_drafts :] = PHASES["decode"]
    return phases


def _positions(frame: TokenFrame, is_padding: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    shape = (frame.num_rows, frame.num_columns)
    if frame.start_positions is not None:
        real = ~is_padding.reshape(shape)
        counted = np.maximum(real.cumsum(axis=1) - 1, 0)
        starts = np.array(frame.start_positions, dtype=np.int64)
        return np.ravel(counted + starts[:, None])
    if frame.position is not None:
        position: npt.NDArray[np.int64] = np.empty(shape, np.int64)
        position[:] = _to_numpy(frame.position)
        return position.reshape(-1)
    counted = np.arange(frame.past_length, frame.past_length + frame.num_columns, dtype=np.int64)
    return np.tile(counted, frame.num_rows)


def _to_numpy(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    host = tensor.cpu()
    # numpy has no bfloat16.
    values: npt.NDArray[Any] = (host.float() if host.is_floating_point() and host.itemsize < 4 else host).numpy()
    return values
