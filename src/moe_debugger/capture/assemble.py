"""Turns what the hooks kept of forwards into columns or sums, on the capture's own thread.

Forwards of the same structure are read together: a decode step is a few rows, and what numpy does with them costs
hardly more for fifty steps than for one.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.wire.codec import CountsColumns, LayerColumns, LayerCountColumns, RoutingColumns

from .raw import RawForward, RawLayer
from .routes import Routes
from .scoring import SelectionRule, confirm_scoring, router_statistics
from .sites import LayerInfo, Site
from .sums import ROW_COUNTS, ROW_PROBABILITIES, CountedRows, add_row_sums, counted_rows, layer_sums
from .tokens import GroupTokens, TokenReader, is_sampled, to_numpy

__all__ = ["Assembled", "Assembler", "is_sampled"]

# Beyond this many rows at a layer the arrays leave the processor's cache, and more forwards save nothing.
_MAX_GROUP_TOKENS = 4096
# Of tensors that torch joins on one thread: its grain is 32,768 values.
_MAX_JOINED_BYTES = 32_768
# Tensors that are read against others of the same forward.
_WHOLE_FORWARD = ("row_mask", "intended_expert_ids")


@dataclass(frozen=True, slots=True)
class Assembled:
    """What became of some forwards that were read together.

    Attributes:
        raws: the forwards.
        columns: rows, one item for each stack; at level "counts" sums, one for each stack and phase.
        num_left_out: decisions that sampling left out.
    """

    raws: Sequence[RawForward]
    columns: Sequence[RoutingColumns | CountsColumns]
    num_left_out: int


class Assembler:
    """Builds columns of forwards.

    Args:
        sites: the model's MoE layers.
        with_tokens: whether token ids are kept.
        with_logits: whether logits are kept.
        sums_only: whether sums are given instead of rows.
        sampling_rate: share of the requests that are kept, by a hash of their id.
        eos_token_ids: ids that end a text; see `TokenReader`.
    """

    def __init__(
        self,
        sites: Collection[Site],
        *,
        with_tokens: bool,
        with_logits: bool,
        sums_only: bool = False,
        sampling_rate: float = 1.0,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._sites = {site.info.layer_index: site for site in sites}
        self._infos = {index: site.info for index, site in self._sites.items()}
        self._rules = {index: SelectionRule(site.router) for index, site in self._sites.items()}
        self._scoring: dict[int, str | None] = {}
        self._with_logits = with_logits
        self._sums_only = sums_only
        self._tokens = TokenReader(with_tokens=with_tokens, sampling_rate=sampling_rate, eos_token_ids=eos_token_ids)

    def layers(self) -> tuple[LayerInfo, ...]:
        """Return what is known about each layer by now."""
        return tuple(self._infos.values())

    @property
    def known_scoring(self) -> Mapping[int, str | None]:
        """How the logits of each layer are read, None where it has no statistics; only layers where that is settled."""
        return self._scoring

    def assemble(self, raws: Sequence[RawForward]) -> list[Assembled]:
        """Return what became of forwards, in their order.

        Raises:
            ValueError: what a layer was called with cannot be read: the capture, the adapter or the model is broken.
                Nothing has changed then, so that the forwards may be given again one by one.
        """
        return [self._group(group) for group in self._groups(raws)]

    def _groups(self, raws: Sequence[RawForward]) -> Iterator[list[RawForward]]:
        group: list[RawForward] = []
        structure, num_tokens = None, 0
        for raw in raws:
            mine = self._structure(raw)
            if group and (mine is None or mine != structure or num_tokens + raw.num_tokens > _MAX_GROUP_TOKENS):
                yield group
                group, num_tokens = [], 0
            group.append(raw)
            structure, num_tokens = mine, num_tokens + raw.num_tokens
        if group:
            yield group

    def _structure(self, raw: RawForward) -> tuple[Any, ...] | None:
        """Return what forwards must have in common to be read together; None where this one is read alone."""
        place_of = {id(frame): place for place, frame in enumerate(raw.frames)}
        key: list[Any] = [(frame.stack, frame.token_ids is None) for frame in raw.frames]
        for layer in raw.layers:
            if not self._sites[layer.layer_index].is_row_wise:
                return None
            key += (layer.layer_index, place_of[id(layer.frame)])
            for name, tensor in layer.tensors.items():
                is_sums = name in (ROW_COUNTS, ROW_PROBABILITIES)
                # Not len(): torch's is written in Python.
                if name in _WHOLE_FORWARD or tensor.shape[0] != (layer.frame.num_rows if is_sums else layer.num_rows):
                    return None
                key += (name, tensor.dtype)
        return tuple(key)

    def _group(self, raws: Sequence[RawForward]) -> Assembled:
        columns: list[RoutingColumns | CountsColumns] = []
        num_left_out = 0
        for place, frame in enumerate(raws[0].frames):
            layers = [
                [raw.layers[index] for raw in raws]
                for index, layer in enumerate(raws[0].layers)
                if layer.frame is frame
            ]
            if not layers:
                continue
            tokens = self._tokens.read(raws, [raw.frames[place] for raw in raws])
            kept = tokens.columns
            if self._sums_only:
                columns += self._sums(layers, tokens)
            else:
                kept.layers = [self._layer(each, tokens) for each in layers]
                if kept.num_tokens:
                    columns.append(kept)
            if tokens.keep is not None:
                num_left_out += self._num_left_out(layers, tokens, kept)
        return Assembled(raws, columns, num_left_out)

    def _num_left_out(self, layers: Sequence[Sequence[RawLayer]], tokens: GroupTokens, kept: RoutingColumns) -> int:
        if kept.layers:
            return sum(raw.num_rows for each in layers for raw in each) - kept.num_decisions
        # Sums do not tell; a layer that saw some of the tokens is read forward by forward, and then by its mask.
        assert tokens.keep is not None
        num_left_out = 0
        for each in layers:
            left_out = ~tokens.keep
            if sum(raw.num_rows for raw in each) != len(left_out):
                left_out &= to_numpy(each[0].tensors["row_mask"]).astype(bool)
            num_left_out += int(np.count_nonzero(left_out))
        return num_left_out

    # -- rows ------------------------------------------------------------------------------------------------------

    def _routes(self, raws: Sequence[RawLayer]) -> Routes:
        """Return what one layer did in each of the forwards."""
        index = raws[0].layer_index
        info = self._infos[index]
        routes = self._sites[index].interpret(_arrays(raws), info)
        num_rows = sum(raw.num_rows for raw in raws)
        if len(raws) > 1 and len(routes.expert_ids) != num_rows:
            raise ValueError(f"{info.module_name}: {len(routes.expert_ids)} routed rows of {num_rows}")
        if info.top_k != routes.expert_ids.shape[1]:
            self._infos[index] = info = replace(info, top_k=routes.expert_ids.shape[1])
        meaning = self._sites[index].info.weight_meaning
        if routes.weights_reason:
            meaning = f"not known: {routes.weights_reason}"
        if info.weight_meaning != meaning:
            self._infos[index] = replace(info, weight_meaning=meaning)
        return routes

    def _layer(self, raws: Sequence[RawLayer], tokens: GroupTokens) -> LayerColumns:
        index = raws[0].layer_index
        routes = self._routes(raws)
        if tokens.keep is not None:
            routes = _only(routes, tokens.keep)
        info = self._infos[index]
        layer = LayerColumns(
            layer_index=index,
            num_experts=info.num_experts,
            num_identity_experts=info.num_identity_experts,
            expert_ids=routes.expert_ids,
            gate_weights=routes.gate_weights,
            row_index=routes.row_index,
            slot_status=routes.slot_status,
            intended_expert_ids=routes.intended_expert_ids,
        )
        logits = routes.logits
        scoring = self._scoring_of(index, routes)
        if scoring is not None and logits is not None:
            is_padding = tokens.columns.is_padding
            is_valid = ~(is_padding if routes.row_index is None else is_padding[routes.row_index])
            selected = routes.expert_ids if routes.selected is None else routes.selected
            found = router_statistics(logits, selected, scoring, self._rules[index], is_valid)
            layer.margin = found.margin
            layer.router_entropy = found.entropy
            layer.router_logsumexp = found.logsumexp
            layer.top1_probability = found.top1_probability
            layer.probability_sum = found.probability_sum[: info.num_experts]
        if self._with_logits and logits is not None and logits.shape[1] >= info.num_experts:
            layer.logits = logits[:, : info.num_experts].astype(np.float16)
        return layer

    def _scoring_of(self, layer_index: int, routes: Routes) -> str | None:
        """Return how the layer's logits are read, None where it has no statistics."""
        info, logits = self._infos[layer_index], routes.logits
        if logits is None or not len(logits):
            if info.unavailable_reason:
                self._scoring[layer_index] = None
            return None
        if layer_index in self._scoring:
            return self._scoring[layer_index]
        if logits.shape[1] not in (info.num_experts, info.num_experts + max(1, info.num_identity_experts)):
            reason = f"the router has {logits.shape[1]} scores for {info.num_experts} experts"
            self._infos[layer_index] = replace(info, unavailable_reason=info.unavailable_reason or reason)
            self._scoring[layer_index] = None
            return None
        selected = routes.expert_ids if routes.selected is None else routes.selected
        weights = routes.gate_weights if routes.selected_weights is None else routes.selected_weights
        scoring, is_proven = confirm_scoring(logits, selected, weights, info.scoring_function)
        is_known = scoring != "unknown"
        reason = "" if is_known else "no reading of the router's logits gives the applied weights"
        self._infos[layer_index] = replace(
            info, scoring_function=scoring, unavailable_reason=info.unavailable_reason or reason
        )
        if is_proven:
            self._scoring[layer_index] = scoring if is_known else None
        return scoring if is_known else None

    # -- sums ------------------------------------------------------------------------------------------------------

    def _sums(self, layers: Sequence[Sequence[RawLayer]], tokens: GroupTokens) -> Iterator[CountsColumns]:
        # Read once, counted once for each phase.
        routes = [None if ROW_COUNTS in each[0].tensors else self._routes(each) for each in layers]
        for found in routes:
            if found is not None:
                _check_rows(found, len(tokens.is_padding))
        for rows in counted_rows(tokens):
            yield CountsColumns(
                first_step=rows.first_step,
                last_step=rows.last_step,
                phase=rows.phase,
                captured_at_unix_ns=tokens.columns.captured_at_unix_ns,
                layers=[self._layer_sums(each, found, rows) for each, found in zip(layers, routes, strict=True)],
            )

    def _layer_sums(self, raws: Sequence[RawLayer], routes: Routes | None, rows: CountedRows) -> LayerCountColumns:
        index = raws[0].layer_index
        if routes is not None:
            scoring = self._scoring_of(index, routes)
            return layer_sums(self._infos[index], routes, rows, scoring)
        arrays = _arrays(raws)
        return add_row_sums(self._infos[index], arrays[ROW_COUNTS], arrays.get(ROW_PROBABILITIES), rows)


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


def _check_rows(routes: Routes, num_tokens: int) -> None:
    """Check before rows become sums, which nobody can tell rows from that do not fit."""
    rows = routes.row_index
    expected = num_tokens if rows is None else len(rows)
    if len(routes.expert_ids) != expected or (rows is not None and len(rows) and int(rows.max()) >= num_tokens):
        raise ValueError(f"{len(routes.expert_ids)} routed rows for {expected} tokens")


def _arrays(raws: Sequence[RawLayer]) -> dict[str, Any]:
    """Return the tensors of one layer's calls as numpy arrays, row after row; what is no tensor is of a single call."""
    if len(raws) == 1:
        return {name: to_numpy(value) if hasattr(value, "detach") else value for name, value in raws[0].tensors.items()}
    return {name: _joined([raw.tensors[name] for raw in raws]) for name in raws[0].tensors}


def _joined(tensors: list[Any]) -> npt.NDArray[Any]:
    import torch

    # By torch, which needs no numpy array of each; but beyond a size its `cat` takes threads, and with them the cores
    # that the model runs on.
    if sum(tensor.nbytes for tensor in tensors) <= _MAX_JOINED_BYTES:
        return to_numpy(torch.cat(tensors))
    return np.concatenate([to_numpy(tensor) for tensor in tensors])
