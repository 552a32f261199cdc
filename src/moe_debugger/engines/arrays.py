"""Checks an engine's arrays of routes, and turns them into columns: pure numpy.

Engines keep routes in buffers that begin as zeros, so an array may hold zeros where nothing was captured. Expert 0 is
an expert like any other, hence the rules, told by what top-k can give:

    k > 1   a token's k experts are distinct. A row whose k slots are all equal was never written: it is "not routed
            here", whatever the value.
    k = 1   an id of 0 may be a choice. A token with 0 at every layer is ambiguous, see `RouteChecker.check`.
    -1      is always "not routed here" (vLLM marks positions of its prefix cache so).

A token without a route at any layer is left out of the columns and counted; where some layers have routes and others
have none, the latter's slots are -1 with status SKIPPED. Neither is ever load of an expert.

Example: 3 tokens, 1 layer, k = 2, 4 experts; the first token came from the prefix cache::

    expert_ids = [[[0, 0]], [[2, 0]], [[1, 3]]]     # positions 0, 1, 2
    load       = [1, 1, 1, 1]                       # 2 tokens; position 0 is counted as not routed
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_debugger.capture import PHASES, LayerInfo
from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import NO_EXPERT, CountsColumns, LayerColumns, RoutingColumns

__all__ = [
    "CheckedRoutes",
    "RefusedRoutesError",
    "RouteChecker",
    "ZeroRows",
    "check_layers",
    "check_sums",
    "engine_layers",
    "pick_moe_layers",
]

ZeroRows = Literal["check", "routed", "not_routed"]
_ZERO_ROWS = ("check", "routed", "not_routed")
_MAX_U32 = 2**32 - 1
# The wire has two bytes an id, and the all-ones value is "no expert".
_MAX_EXPERTS = 65_535
_MAX_LAYERS = 4096

_I32 = npt.NDArray[np.int32]
_Bools = npt.NDArray[np.bool_]


def engine_layers(
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    model_layer_indices: Sequence[int] | None = None,
    num_shared_experts: int = 0,
    num_identity_experts: int = 0,
    stack: str = "decoder",
) -> tuple[LayerInfo, ...]:
    """Return descriptions of `num_layers` MoE layers of one size.

    Args:
        model_layer_indices: of each MoE layer, its index among all layers of the model; default 0, 1, 2...
        num_identity_experts: "zero" experts that compute nothing; their ids follow those of the `num_experts`.

    Raises:
        InvalidInputError: a size is out of range, or the indices are not rising.
    """
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise InvalidInputError(f"num_layers is {num_layers}; expected 1 to {_MAX_LAYERS} MoE layers")
    indices = list(range(num_layers)) if model_layer_indices is None else [int(index) for index in model_layer_indices]
    if len(indices) != num_layers or indices != sorted(set(indices)) or indices[0] < 0:
        raise InvalidInputError(
            f"model_layer_indices {indices[:8]}: expected {num_layers} rising indices of the MoE layers, from 0"
        )
    layers = tuple(
        LayerInfo(
            layer_index=index,
            model_layer_index=model_index,
            module_name=f"layers.{model_index}.mlp",
            stack=stack,
            num_experts=num_experts,
            top_k=top_k,
            num_shared_experts=num_shared_experts,
            num_identity_experts=num_identity_experts,
            weight_meaning="as the engine reports it",
            unavailable_reason="the engine returns the selected experts, not the router's scores",
        )
        for index, model_index in enumerate(indices)
    )
    check_layers(layers)
    return layers


def check_layers(layers: Sequence[LayerInfo]) -> None:
    """Refuse layers that routes cannot be checked against.

    Raises:
        InvalidInputError: there are none, an index is not its place, or E or k is out of range.
    """
    if not 1 <= len(layers) <= _MAX_LAYERS:
        raise InvalidInputError(f"{len(layers)} layers are described; expected 1 to {_MAX_LAYERS} MoE layers")
    for place, info in enumerate(layers):
        if info.layer_index != place:
            raise InvalidInputError(
                f"layer {place} of the list has layer_index {info.layer_index}; expected 0, 1, 2... in their order"
            )
        if info.num_experts < 1 or info.num_identity_experts < 0 or _num_ids(info) > _MAX_EXPERTS:
            raise InvalidInputError(f"layer {place}: {_num_ids(info)} experts; expected 1 to {_MAX_EXPERTS}")
        if not 1 <= info.top_k <= info.num_experts:
            raise InvalidInputError(f"layer {place}: top_k is {info.top_k}; expected 1 to {info.num_experts}")


def _num_ids(info: LayerInfo) -> int:
    return info.num_experts + info.num_identity_experts


class RefusedRoutesError(InvalidInputError):
    """Routes that cannot be those of top-k.

    Attributes:
        check: name of the check of capture health that refused them.
    """

    def __init__(self, check: str, text: str) -> None:
        super().__init__(text)
        self.check = check


def check_sums(layers: Sequence[LayerInfo], columns: CountsColumns) -> None:
    """Refuse sums that cannot be those of these layers.

    Raises:
        RefusedRoutesError: a layer is none of them, its sums are not [E], or have more slots than its tokens have.
    """
    for sums in columns.layers:
        known = layers[sums.layer_index] if 0 <= sums.layer_index < len(layers) else None
        if known is None or len(sums.expert_counts) != known.num_experts:
            raise RefusedRoutesError(
                "range",
                f"counts of layer {sums.layer_index} have {len(sums.expert_counts)} experts, which is no layer of this "
                f"source; its layers have {[info.num_experts for info in layers][:8]} experts",
            )
        num_slots = int(sums.expert_counts.sum()) + sums.identity_slots + sums.skipped_slots + sums.dropped_slots
        if num_slots > sums.num_tokens * known.top_k:
            raise RefusedRoutesError(
                "conservation",
                f"counts of layer {sums.layer_index} are {num_slots} slots of {sums.num_tokens} tokens, which have "
                f"{sums.num_tokens * known.top_k} with top_k {known.top_k}",
            )


@dataclass(frozen=True, slots=True)
class CheckedRoutes:
    """What an engine's array holds.

    Attributes:
        columns: rows of the tokens that were routed, padded ones included; None where no row is left.
        num_tokens: rows in `columns`.
        num_not_routed_tokens: tokens that were left out: from a prefix cache, or without a route at any layer.
        problems: what is suspicious, with how many tokens (or token rows of a layer) show it.
        num_missing_tokens: tokens that were left out and that no prefix cache explains.
        num_missing_layers: layers without routes for tokens that other layers have.
    """

    columns: RoutingColumns | None
    num_tokens: int
    num_not_routed_tokens: int
    problems: Mapping[str, int] = field(default_factory=dict)
    num_missing_tokens: int = 0
    num_missing_layers: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers of one size, which are checked together."""

    places: npt.NDArray[np.intp]
    num_ids: int
    top_k: int


class RouteChecker:
    """Checks arrays against a model's MoE layers.

    Args:
        layers: of the model, in the order of the arrays' layer axis.
        physical_to_logical: [layers, num_physical] integers: the logical expert of each physical replica. With it,
            ids are those of replicas. None: ids are logical.

    Raises:
        InvalidInputError: the layers or the map are wrong.
    """

    def __init__(self, layers: Sequence[LayerInfo], physical_to_logical: npt.ArrayLike | None = None) -> None:
        check_layers(layers)
        self.layers = tuple(layers)
        self.top_k = max(info.top_k for info in layers)
        sizes = sorted({(_num_ids(info), info.top_k) for info in layers})
        self._groups = [
            _Group(np.flatnonzero([(_num_ids(x), x.top_k) == size for x in layers]), *size) for size in sizes
        ]
        self._map = None if physical_to_logical is None else self.checked_map(physical_to_logical)

    def with_map(self, physical_to_logical: npt.ArrayLike | None) -> "RouteChecker":
        """Return a checker of the same layers for another placement of the replicas."""
        return RouteChecker(self.layers, physical_to_logical)

    def checked_map(self, physical_to_logical: npt.ArrayLike) -> _I32:
        """Return the map as [layers, num_physical] int32.

        Raises:
            InvalidInputError: its shape or an id is wrong, or a logical expert has no replica.
        """
        array = _integers("physical_to_logical", physical_to_logical)
        if any(info.num_identity_experts for info in self.layers):
            raise InvalidInputError(
                "physical_to_logical is given for layers with identity experts, whose ids among replicas are not "
                "known; map the ids before, and pass logical ones"
            )
        if array.ndim != 2 or len(array) != len(self.layers) or not array.shape[1]:
            raise InvalidInputError(
                f"physical_to_logical has shape {array.shape}; expected ({len(self.layers)} layers, number of replicas)"
            )
        for place, info in enumerate(self.layers):
            found = np.unique(array[place])
            if found[0] < 0 or found[-1] >= info.num_experts:
                raise InvalidInputError(
                    f"physical_to_logical of layer {place} reaches from {found[0]} to {found[-1]}; expected logical "
                    f"experts 0 to {info.num_experts - 1}"
                )
            if len(found) != info.num_experts:
                missing = sorted(set(range(info.num_experts)) - set(found.tolist()))
                raise InvalidInputError(
                    f"physical_to_logical of layer {place} has no replica of expert {missing[0]} "
                    f"({len(missing)} are missing); expected each logical expert at least once"
                )
        return array.astype(np.int32)

    def check(
        self,
        request_id: str,
        expert_ids: npt.ArrayLike,
        positions: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        *,
        phase: str | int | Sequence[str | int] | None = None,
        token_ids: npt.ArrayLike | None = None,
        is_padding: npt.ArrayLike | None = None,
        num_prompt_tokens: int | None = None,
        num_cached_tokens: int | None = None,
        num_expected_tokens: int | None = None,
        zero_rows: ZeroRows = "check",
        step: int = 0,
    ) -> CheckedRoutes:
        """Check one request's arrays; see `moe_debugger.Source.publish_routes` for the arguments.

        Top-1 (every layer has k = 1): a token with expert 0 at every layer is taken as routed, unless such tokens are
        more than could be by chance: two or more of them, and more than a share 1/E of the tokens (with a single layer:
        more than half). Then the array is refused, and `zero_rows` lets the caller say what they are.

        Raises:
            InvalidInputError: an array is zero-filled, cut, out of line or out of range; nothing of it is taken.
        """
        ids = self._checked_ids(expert_ids, num_expected_tokens)
        num_rows = ids.shape[1]
        padding = _flags("is_padding", is_padding, num_rows)
        position = _positions(positions, num_rows, padding)
        phases = _phases(phase, num_prompt_tokens, position, num_rows)
        tokens = _token_ids(token_ids, num_rows)
        gate_weights = self._checked_weights(weights, num_rows)
        if zero_rows not in _ZERO_ROWS:
            raise InvalidInputError(f"zero_rows {zero_rows!r}: expected one of {', '.join(_ZERO_ROWS)}")
        ids[:, padding] = NO_EXPERT
        cached = np.zeros(num_rows, np.bool_)
        if num_cached_tokens is not None:
            if num_cached_tokens < 0:
                raise InvalidInputError(f"num_cached_tokens is {num_cached_tokens}; expected 0 or more")
            cached = (position < num_cached_tokens) & ~padding
            # What an engine returns for them was routed, and counted, with the request that filled the cache.
            ids[:, cached] = NO_EXPERT
        unrouted = self._mark_unrouted(ids, padding | cached, zero_rows)
        for group in self._groups:
            self._map_and_check(ids, group)
        blank = unrouted.all(axis=0) & ~padding & ~cached
        problems = self._problems(unrouted, blank, cached, padding, is_told=num_cached_tokens is not None)
        keep = ~(blank | cached)
        columns = None
        if keep.any():
            columns = RoutingColumns(
                step=np.full(int(keep.sum()), step, np.uint64),
                forward_index=np.full(int(keep.sum()), step, np.uint64),
                request_ids=[request_id],
                request_index=np.zeros(int(keep.sum()), np.uint32),
                position=position[keep].astype(np.uint32),
                phase=phases[keep],
                is_padding=padding[keep],
                token_id=None if tokens is None else tokens[keep],
                layers=[self._layer_columns(place, ids, gate_weights, keep) for place in range(len(self.layers))],
                captured_at_unix_ns=time.time_ns(),
            )
        partly = unrouted & ~(blank | cached | padding)
        return CheckedRoutes(
            columns,
            num_tokens=int(keep.sum()),
            num_not_routed_tokens=int((~keep).sum()),
            problems=problems,
            num_missing_tokens=int(blank.sum()),
            num_missing_layers=int(partly.any(axis=1).sum()),
        )

    def _checked_ids(self, expert_ids: npt.ArrayLike, num_expected: int | None) -> _I32:
        """Return a copy as [layers, tokens, k] int32."""
        array = _integers("expert_ids", expert_ids)
        expected = f"(tokens, {len(self.layers)} layers, {self.top_k} experts)"
        if array.ndim != 3 or array.shape[1:] != (len(self.layers), self.top_k):
            raise InvalidInputError(
                f"expert_ids has shape {array.shape}; expected {expected}, as the source was opened with. Pass the MoE "
                "layers only, in their order, with all k choices of each token"
            )
        if num_expected is not None and len(array) != num_expected:
            what = "cut" if len(array) < num_expected else "too long"
            raise InvalidInputError(
                f"expert_ids has {len(array)} tokens, expected {num_expected}: it is {what}, and which position a row "
                "belongs to cannot be known; pass the rows of whole requests with their positions"
            )
        if array.size and (int(array.max()) > _MAX_EXPERTS or int(array.min()) < NO_EXPERT):
            bad = (array > _MAX_EXPERTS) | (array < NO_EXPERT)
            token, layer, slot = (int(axis[0]) for axis in np.nonzero(bad))
            raise RefusedRoutesError(
                "range",
                f"expert_ids[{token}, {layer}, {slot}] is {array[token, layer, slot]}; expected 0 to "
                f"{_num_ids(self.layers[layer]) - 1}, or -1 for not routed",
            )
        return np.array(array.transpose(1, 0, 2), np.int32, order="C")

    def _checked_weights(self, weights: npt.ArrayLike | None, num_rows: int) -> npt.NDArray[np.float32] | None:
        """Return a copy as [layers, tokens, k] float32."""
        if weights is None:
            return None
        array = _array("weights", weights)
        expected = (num_rows, len(self.layers), self.top_k)
        if array.dtype.kind != "f" or array.shape != expected:
            raise RefusedRoutesError(
                "weights",
                f"weights has dtype {array.dtype} and shape {array.shape}; expected floats of the shape of expert_ids, "
                f"{expected}",
            )
        return np.array(array.transpose(1, 0, 2), np.float32, order="C")

    def _mark_unrouted(self, ids: _I32, excluded: _Bools, zero_rows: ZeroRows) -> _Bools:
        """Set the slots of rows that were never written to -1, and return which [layers, tokens] have no route."""
        unrouted = np.zeros(ids.shape[:2], np.bool_)
        is_single = np.array([info.top_k == 1 for info in self.layers])
        for group in self._groups:
            part = ids[group.places, :, : group.top_k]
            if (ids[group.places, :, group.top_k :] > 0).any():
                raise InvalidInputError(
                    f"layers {group.places.tolist()[:8]} have top_k {group.top_k}, but expert_ids has experts in more "
                    f"slots; fill the slots from {group.top_k} on with -1"
                )
            is_equal = (part == part[:, :, :1]).all(axis=2)
            unrouted[group.places] = is_equal if group.top_k > 1 else part[:, :, 0] < 0
        zeros = ids[is_single, :, 0] == 0
        if not is_single.all():
            # The layers with several choices tell what the zeros of the others are.
            is_blank = unrouted[~is_single].all(axis=0)
            unrouted[is_single] |= zeros & is_blank
        elif zero_rows != "routed":
            is_zero = zeros.all(axis=0) & ~excluded
            if zero_rows == "check":
                self._check_zero_rows(is_zero, int((~excluded).sum()))
            else:
                unrouted |= is_zero
        ids[unrouted] = NO_EXPERT
        valid = ~excluded
        if valid.any() and unrouted[:, valid].all():
            raise InvalidInputError(
                f"none of the {int(valid.sum())} tokens has a route: every slot of a token is the same value (0 or "
                "another fill), so the engine did not capture them; switch its capture on, and where the tokens came "
                "from a prefix cache, say so with num_cached_tokens"
            )
        return unrouted

    def _check_zero_rows(self, is_zero: _Bools, num_tokens: int) -> None:
        number = int(is_zero.sum())
        limit = 0.5 if len(self.layers) == 1 else 1 / max(info.num_experts for info in self.layers)
        if number >= 2 and number > limit * num_tokens:
            raise InvalidInputError(
                f"{number} of {num_tokens} tokens have expert 0 at every layer, which top-1 routing does not give by "
                "chance: the array may be zero-filled. Say how many tokens came from the prefix cache with "
                'num_cached_tokens, or what the rows are with zero_rows="routed" or zero_rows="not_routed"'
            )

    def _map_and_check(self, ids: _I32, group: _Group) -> None:
        """Map replicas to logical experts in place, and refuse ids out of range and repeated experts."""
        part = ids[group.places, :, : group.top_k]
        limit = group.num_ids if self._map is None else self._map.shape[1]
        if part.size and int(part.max()) >= limit:
            layer, token, slot = (int(axis[0]) for axis in np.nonzero(part >= limit))
            what = "experts" if self._map is None else "physical replicas"
            raise RefusedRoutesError(
                "range",
                f"expert_ids[{token}, {group.places[layer]}, {slot}] is {part[layer, token, slot]}, and the layer has "
                f"{limit} {what} (0 to {limit - 1})"
                + ("; pass physical_to_logical where ids are those of replicas" if self._map is None else ""),
            )
        if self._map is not None:
            mapped = self._map[group.places[:, None, None], np.maximum(part, 0)]
            part = np.where(part < 0, NO_EXPERT, mapped).astype(np.int32)
            ids[group.places, :, : group.top_k] = part
        if group.top_k > 1:
            ordered = np.sort(part, axis=2)
            repeated = ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(axis=2)
            if repeated.any():
                layer, token = (int(axis[0]) for axis in np.nonzero(repeated))
                raise RefusedRoutesError(
                    "distinctness",
                    f"token {token}, layer {group.places[layer]}: experts {part[layer, token].tolist()} are not "
                    "distinct, which top-k cannot give; the rows are cut, out of line, or of another layer"
                    + ("" if self._map is None else ", or physical_to_logical is of another placement"),
                )

    def _problems(
        self, unrouted: _Bools, blank: _Bools, cached: _Bools, padding: _Bools, *, is_told: bool
    ) -> dict[str, int]:
        problems: dict[str, int] = {}
        if blank.any():
            valid = blank[~padding]
            num_leading = len(valid) if valid.all() else int(np.argmin(valid))
            num_inside = int(valid.sum()) - num_leading
            if is_told:
                problems["tokens beyond the cached prefix have no routes and were left out"] = int(blank.sum())
            else:
                if num_leading:
                    problems[
                        "tokens at the start of a request have no routes and were left out: a prefix cache, if "
                        "num_cached_tokens says so"
                    ] = num_leading
                if num_inside:
                    problems["tokens inside a request have no routes and were left out"] = num_inside
        partly = unrouted & ~(blank | cached | padding)
        for place in np.flatnonzero(partly.any(axis=1)).tolist():
            problems[f"layer {place} has no routes for tokens that other layers have: is it a MoE layer?"] = int(
                partly[place].sum()
            )
        return problems

    def _layer_columns(
        self, place: int, ids: _I32, weights: npt.NDArray[np.float32] | None, keep: _Bools
    ) -> LayerColumns:
        info = self.layers[place]
        kept = np.ascontiguousarray(ids[place, keep, : info.top_k])
        is_empty = kept < 0
        gate_weights = None
        if weights is not None:
            gate_weights = np.ascontiguousarray(weights[place, keep, : info.top_k])
            if not np.isfinite(gate_weights[~is_empty]).all():
                row, slot = (int(axis[0]) for axis in np.nonzero(~np.isfinite(gate_weights) & ~is_empty))
                raise RefusedRoutesError(
                    "weights",
                    f"layer {place}: the weight of a routed slot is {gate_weights[row, slot]}; expected finite numbers",
                )
            gate_weights[is_empty] = np.nan
        status = None
        is_identity = kept >= info.num_experts
        if is_empty.any() or is_identity.any():
            status = np.where(is_empty, pb.SLOT_STATUS_SKIPPED, pb.SLOT_STATUS_ROUTED).astype(np.uint8)
            status[is_identity] = pb.SLOT_STATUS_IDENTITY
        return LayerColumns(
            layer_index=place,
            num_experts=info.num_experts,
            expert_ids=kept,
            gate_weights=gate_weights,
            slot_status=status,
            num_identity_experts=info.num_identity_experts,
        )


def _array(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        # numpy has no bfloat16, in which engines keep their weights.
        if getattr(value, "is_floating_point", bool)():
            value = value.detach().float()  # type: ignore[union-attr]
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{name} cannot be read as an array ({error}); pass a numpy array or a tensor on the CPU"
        ) from error


def _integers(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    array = _array(name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise InvalidInputError(f"{name} has dtype {array.dtype}; expected integers")
    return array if array.dtype.kind in "iu" else array.astype(np.int32)


def _flags(name: str, value: npt.ArrayLike | None, num_rows: int) -> _Bools:
    if value is None:
        return np.zeros(num_rows, np.bool_)
    array = _array(name, value)
    if array.shape != (num_rows,) or (array.size and not np.isin(array, (0, 1)).all()):
        raise InvalidInputError(f"{name} has shape {array.shape}; expected {num_rows} values that are true or false")
    return array.astype(np.bool_)


def _positions(value: npt.ArrayLike, num_rows: int, padding: _Bools) -> npt.NDArray[np.int64]:
    array = _integers("positions", value)
    if array.shape != (num_rows,):
        raise InvalidInputError(
            f"positions has shape {array.shape}, and expert_ids has {num_rows} tokens; expected one position for each"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) > _MAX_U32):
        raise InvalidInputError(
            f"positions reach from {array.min()} to {array.max()}; expected places in the request, from 0"
        )
    position = array.astype(np.int64)
    valid = position[~padding]
    falls = np.flatnonzero(np.diff(valid) <= 0)
    if len(falls):
        first = int(falls[0])
        raise InvalidInputError(
            f"positions do not rise: {int(valid[first])} is followed by {int(valid[first + 1])}; pass the rows of one "
            "request in the order of its tokens, each once"
        )
    position[padding] = 0
    return position


def _phases(
    phase: str | int | Sequence[str | int] | None,
    num_prompt_tokens: int | None,
    position: npt.NDArray[np.int64],
    num_rows: int,
) -> npt.NDArray[np.uint8]:
    if phase is None:
        if num_prompt_tokens is None:
            return np.full(num_rows, pb.PHASE_UNSPECIFIED, np.uint8)
        return np.where(position < num_prompt_tokens, pb.PHASE_PREFILL, pb.PHASE_DECODE).astype(np.uint8)
    if isinstance(phase, str | int):
        return np.full(num_rows, _phase(phase), np.uint8)
    values = [_phase(one) for one in phase]
    if len(values) != num_rows:
        raise InvalidInputError(f"phase has {len(values)} values; expected one, or {num_rows}")
    return np.array(values, np.uint8)


def _phase(value: str | int) -> int:
    if isinstance(value, str) and value in PHASES:
        return int(PHASES[value])
    if not isinstance(value, str) and int(value) in pb.Phase.values():
        return int(value)
    raise InvalidInputError(f"phase {value!r}: expected one of {', '.join(PHASES)}")


def _token_ids(value: npt.ArrayLike | None, num_rows: int) -> npt.NDArray[np.uint32] | None:
    if value is None:
        return None
    array = _integers("token_ids", value)
    if array.shape != (num_rows,) or (array.size and not 0 <= int(array.min()) <= int(array.max()) <= _MAX_U32):
        raise InvalidInputError(
            f"token_ids has shape {array.shape}; expected {num_rows} token ids of the vocabulary, 0 or more"
        )
    return array.astype(np.uint32)


def pick_moe_layers(
    array: npt.NDArray[Any], layers: Sequence[LayerInfo], num_model_layers: int | None
) -> npt.NDArray[Any]:
    """Return the MoE layers of an array [tokens, layers, k] that may have a place for every layer of the model.

    Raises:
        InvalidInputError: the layer axis is neither, or a layer that is not described has routes.
    """
    if array.ndim != 3 or array.shape[1] == len(layers):
        return array
    if array.shape[1] != num_model_layers:
        known = f"{len(layers)} MoE layers"
        known += "" if num_model_layers is None else f" of {num_model_layers} layers"
        raise InvalidInputError(
            f"the engine's array has shape {array.shape}, and the source was opened with {known}; where the engine has "
            "a place for every layer, open the source with num_model_layers and model_layer_indices"
        )
    indices = [info.model_layer_index for info in layers]
    others = np.delete(array, indices, axis=1)
    has_routes = (others != others[:, :, :1]).any(axis=2) if array.shape[2] > 1 else others[:, :, 0] > 0
    if has_routes.any():
        place = int(np.flatnonzero(has_routes.any(axis=0))[0])
        missing = sorted(set(range(array.shape[1])) - set(indices))[place]
        raise InvalidInputError(
            f"layer {missing} of the model has routes, but the source was opened without it; add it to "
            "model_layer_indices"
        )
    return array[:, indices]
