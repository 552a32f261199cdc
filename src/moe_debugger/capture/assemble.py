"""Turns what the hooks kept of one forward into columns, on the capture's own thread."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import WireFormatError
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

from .discovery import LayerInfo, Site
from .raw import PHASES, RawForward, RawLayer
from .scoring import RouterStatistics, SelectionRule, confirm_scoring, router_statistics

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
        self._infos = {site.info.layer_index: site.info for site in sites}
        self._rules = {site.info.layer_index: SelectionRule(site.router) for site in sites}
        self._proven: set[int] = set()
        self._with_tokens = with_tokens
        self._with_logits = with_logits
        self._sampling_rate = sampling_rate
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._finished: dict[str, None] = {}

    def layers(self) -> tuple[LayerInfo, ...]:
        """Return what is known about each layer by now."""
        return tuple(self._infos.values())

    def assemble(self, raw: RawForward) -> tuple[RoutingColumns, int]:
        """Return the columns of the sampled requests, and the number of decisions that sampling left out.

        Raises:
            WireFormatError: an expert id is out of range: the capture or the model is broken.
        """
        rows, columns = raw.num_rows, raw.num_columns
        num_tokens = rows * columns
        token_ids = None if raw.token_ids is None else _to_numpy(raw.token_ids).reshape(num_tokens)
        is_padding = self._padding(raw, token_ids)
        position = _positions(raw, is_padding)
        position[is_padding] = 0
        names = [name or "" for name in raw.request_ids]
        distinct = list(dict.fromkeys(name for name in names if name and is_sampled(name, self._sampling_rate)))
        # A dummy row belongs to no request: it goes with the first one, as padding.
        index_of = {name: index for index, name in enumerate(distinct)}
        kept_rows = np.array([not name or name in index_of for name in names]) & bool(distinct)
        row_request = np.array([index_of.get(name, 0) for name in names], dtype=np.uint32)
        keep = None if kept_rows.all() else np.repeat(kept_rows, columns)
        result = RoutingColumns(
            step=np.full(num_tokens, raw.step, np.uint64),
            forward_index=np.full(num_tokens, raw.forward_index, np.uint64),
            request_ids=distinct,
            request_index=np.repeat(row_request, columns),
            position=position.astype(np.uint32),
            phase=np.repeat(np.array(raw.phases, dtype=np.uint8), columns),
            is_padding=is_padding,
            token_id=token_ids.astype(np.uint32) if self._with_tokens and token_ids is not None else None,
            captured_at_unix_ns=raw.captured_at_unix_ns,
        )
        if keep is not None:
            for name in ("step", "forward_index", "request_index", "position", "phase", "is_padding", "token_id"):
                column = getattr(result, name)
                if column is not None:
                    setattr(result, name, column[keep])
        result.layers = [self._layer(layer, is_padding, keep) for layer in raw.layers]
        return result, raw.num_decisions - result.num_decisions

    def _padding(self, raw: RawForward, token_ids: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
        shape = (raw.num_rows, raw.num_columns)
        padding = np.zeros(shape, bool) if raw.is_padding is None else _to_numpy(raw.is_padding).astype(bool).copy()
        for row, name in enumerate(raw.request_ids):
            if name is None:
                padding[row] = True
        # A single row that ended is fed no more by generate(), so an end-of-text token there was fed on purpose.
        if raw.are_ids_minted and raw.num_rows > 1 and len(self._eos_token_ids) and token_ids is not None:
            fed = token_ids.reshape(shape)
            for row, name in enumerate(raw.request_ids):
                if raw.phases[row] != PHASES["decode"] or name is None:
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
        expert_ids = _to_numpy(raw.expert_ids).astype(np.int32)
        weights = _to_numpy(raw.gate_weights)
        logits = None if raw.logits is None else _to_numpy(raw.logits).astype(np.float32, copy=False)
        if keep is not None:
            expert_ids, weights, is_padding = expert_ids[keep], weights[keep], is_padding[keep]
            logits = None if logits is None else logits[keep]
        if expert_ids.size and not (int(expert_ids.min()) >= 0 and int(expert_ids.max()) < info.num_experts):
            raise WireFormatError(
                f"layer {raw.layer_index}: expert ids from {int(expert_ids.min())} to {int(expert_ids.max())} "
                f"in a layer with {info.num_experts} experts"
            )
        if info.top_k != expert_ids.shape[1]:
            self._infos[raw.layer_index] = info = replace(info, top_k=expert_ids.shape[1])
        layer = LayerColumns(
            layer_index=raw.layer_index,
            num_experts=info.num_experts,
            expert_ids=expert_ids,
            gate_weights=weights.astype(np.float16),
        )
        statistics = self._statistics(raw.layer_index, logits, expert_ids, weights)
        if statistics is not None:
            layer.margin = statistics.margin
            layer.router_entropy = statistics.entropy
            layer.router_logsumexp = statistics.logsumexp
            layer.top1_probability = statistics.top1_probability
            layer.probability_sum = statistics.probabilities[~is_padding].sum(axis=0, dtype=np.float64)
        if self._with_logits and logits is not None and logits.shape[1] == info.num_experts:
            layer.logits = logits.astype(np.float16)
        return layer

    def _statistics(
        self,
        layer_index: int,
        logits: npt.NDArray[np.float32] | None,
        expert_ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> RouterStatistics | None:
        info = self._infos[layer_index]
        if logits is None or not len(logits) or logits.shape[1] != info.num_experts:
            if logits is not None and len(logits) and not info.unavailable_reason:
                reason = f"the router has {logits.shape[1]} scores for {info.num_experts} experts"
                self._infos[layer_index] = replace(info, unavailable_reason=reason)
            return None
        scoring = info.scoring_function
        if layer_index not in self._proven:
            scoring, is_proven = confirm_scoring(logits, expert_ids, weights, scoring)
            if is_proven:
                self._proven.add(layer_index)
            if scoring == "unknown":
                info = replace(info, unavailable_reason="no reading of the router's logits gives the applied weights")
            self._infos[layer_index] = replace(info, scoring_function=scoring)
        if scoring == "unknown":
            return None
        return router_statistics(logits, expert_ids, scoring, self._rules[layer_index])


def _positions(raw: RawForward, is_padding: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    shape = (raw.num_rows, raw.num_columns)
    if raw.start_positions is not None:
        real = ~is_padding.reshape(shape)
        counted = np.maximum(real.cumsum(axis=1) - 1, 0)
        starts = np.array(raw.start_positions, dtype=np.int64)
        return np.ravel(counted + starts[:, None])
    if raw.position is not None:
        position: npt.NDArray[np.int64] = np.empty(shape, np.int64)
        position[:] = _to_numpy(raw.position)
        return position.reshape(-1)
    counted = np.arange(raw.past_length, raw.past_length + raw.num_columns, dtype=np.int64)
    return np.tile(counted, raw.num_rows)


def _to_numpy(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    host = tensor.cpu()
    # numpy has no bfloat16.
    values: npt.NDArray[Any] = (host.float() if host.is_floating_point() and host.itemsize < 4 else host).numpy()
    return values
