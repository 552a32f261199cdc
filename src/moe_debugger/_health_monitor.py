"""Checks each forward's columns before they are counted; pure numpy, on the capture's own thread.

What cannot be counted (an expert id that the layer does not have, a layer whose columns do not fit each other) is taken
out here and reported as dropped, so that one bad row neither spoils the sums nor loses the forwards around it.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from moe_debugger.capture_health import CHECK_NAMES, CheckStatus, HealthCheck
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import NO_EXPERT, CountsColumns, LayerColumns, LayerCountColumns, RoutingColumns
from moe_debugger.wire.slots import SlotClasses

if TYPE_CHECKING:
    from moe_debugger.capture.raw import RawForward

__all__ = ["OVERHEAD_LIMIT", "ForwardSeen", "HealthMonitor", "MonitoredLayer", "forwards_seen"]

# Hooks that take more than this share of the forwards' time distort what is watched. Capture costs a few per cent on
# models of real proportions; tiny test models, whose layers take microseconds, come near to this.
OVERHEAD_LIMIT = 0.5
# Forwards of several threads end out of order: while the model runs, a hole is one only behind this many newer ones.
_LIVE_SLACK = 64
_MAX_PAIRED_SLOTS = 16
# Beyond this many early ones the oldest hole is a gap for good, and the set stays small.
_MAX_EARLY = 1024
_UNITS = {
    "conservation": "slots",
    "distinctness": "rows",
    "range": "slots",
    "weights": "slots",
    "layers": "layer forwards",
    "gaps": "forwards",
    "drops": "decisions",
    "overhead": "ms of forwards",
}
_ROW_COLUMNS = (
    "expert_ids", "gate_weights", "slot_status", "intended_expert_ids", "margin", "router_entropy", "router_logsumexp",
    "top1_probability", "logits",
)  # fmt: skip


class MonitoredLayer(Protocol):
    """What is known of a layer beforehand; `LayerInfo` is one."""

    @property
    def layer_index(self) -> int: ...
    @property
    def module_name(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def top_k(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ForwardSeen:
    """What was seen of one forward apart from its columns, sampling aside.

    Attributes:
        model_tokens: token rows that each stack ran over, padding included. A stack that did not run has 0 or is
            missing; one whose tokens are not known is None, and its layers cannot be checked.
        layer_tokens: token rows that each layer's hook saw; a layer without a call is missing.
        explained: layers that were right to see fewer rows, with the reason.
        num_left_out: decisions that sampling left out of the columns.
        unseen: layers that should have been called and were not; None where only the tokens tell.
        also: other forwards of which the very same was seen.
    """

    forward_index: int
    model_tokens: Mapping[str, int | None]
    layer_tokens: Mapping[int, int]
    explained: Mapping[int, str] = field(default_factory=dict)
    num_left_out: int = 0
    unseen: Set[int] | None = None
    also: tuple[int, ...] = ()


def forwards_seen(raws: "Sequence[RawForward]", numbers: Mapping[int, int], num_left_out: int) -> list[ForwardSeen]:
    """Return what the capture saw of forwards of one structure.

    Args:
        raws: the forwards as the hooks kept them.
        numbers: layer index of each of the capture's layers, where that is another one (pipeline stages).
        num_left_out: decisions of all of them that sampling left out.
    """
    alike: dict[tuple[object, ...], list[RawForward]] = {}
    for raw in raws:
        key = (tuple(frame.num_tokens for frame in raw.frames), tuple(layer.num_rows for layer in raw.layers))
        alike.setdefault((*key, *raw.unseen), []).append(raw)
    return [_forward_seen(same, numbers, num_left_out) for same in alike.values()]


def _forward_seen(raws: "Sequence[RawForward]", numbers: Mapping[int, int], num_left_out: int) -> ForwardSeen:
    raw = raws[0]
    model_tokens: dict[str, int | None] = {}
    for frame in raw.frames:
        model_tokens[frame.stack] = (model_tokens.get(frame.stack) or 0) + frame.num_tokens
    root_tokens: dict[str, int] = {}
    for frame in raw.frames:
        root_tokens[frame.root] = root_tokens.get(frame.root, 0) + frame.num_tokens
    layer_tokens: dict[int, int] = {}
    explained: dict[int, str] = {}
    for layer in raw.layers:
        index = numbers.get(layer.layer_index, layer.layer_index)
        layer_tokens[index] = layer_tokens.get(index, 0) + layer.num_rows
        if layer.num_rows < layer.frame.num_tokens:
            explained[index] = "the layer is given some of the tokens"
        elif layer_tokens[index] == root_tokens[layer.frame.root]:
            explained[index] = "another stack of that kind saw the other tokens"
    return ForwardSeen(
        raw.forward_index,
        model_tokens,
        layer_tokens,
        explained,
        num_left_out,
        unseen={numbers.get(index, index) for index in raw.unseen},
        also=tuple(each.forward_index for each in raws[1:]),
    )


@dataclass(slots=True)
class _Tally:
    num_checked: int = 0
    num_violations: int = 0
    example: str = ""

    def add(self, checked: int, violations: int = 0, example: str = "") -> None:
        self.num_checked += int(checked)
        if violations:
            self.num_violations += int(violations)
            self.example = self.example or example


class HealthMonitor:
    """The running checks of one session.

    Args:
        layers: the layers that the model has.
        first_forward: index of the session's first forward.
    """

    def __init__(self, layers: Iterable[MonitoredLayer], *, first_forward: int = 0) -> None:
        self._layers = {layer.layer_index: layer for layer in layers}
        self._tallies = {name: _Tally() for name in CHECK_NAMES}
        self._lock = threading.Lock()
        self._first_forward = first_forward
        # All forwards below are accounted for; above it the set holds those that came early.
        self._next_forward = first_forward
        self._early: set[int] = set()
        self._missing = _Tally()
        self._unknown_stacks: set[str] = set()

    def forward_dropped(self, forward_index: int) -> None:
        """Note a forward that was dropped whole and is counted among the drops: it is no gap besides."""
        with self._lock:
            self._arrive(forward_index)

    def check(
        self, seen: Sequence[ForwardSeen], parts: Sequence[RoutingColumns | CountsColumns]
    ) -> tuple[list[RoutingColumns | CountsColumns], int]:
        """Check forwards, whose columns are all rows or all sums; see `check_rows` and `check_counts`."""
        sums = [part for part in parts if isinstance(part, CountsColumns)]
        if sums:
            clean_sums, num_dropped = self.check_counts(seen, sums)
            return list(clean_sums), num_dropped
        clean_rows, num_dropped = self.check_rows(seen, [part for part in parts if isinstance(part, RoutingColumns)])
        return list(clean_rows), num_dropped

    def check_rows(
        self, seen: Sequence[ForwardSeen], parts: Sequence[RoutingColumns]
    ) -> tuple[list[RoutingColumns], int]:
        """Check forwards at a level with rows.

        Args:
            seen: what the hooks and the model's entrance saw of each of them.
            parts: their columns, one for each stack.

        Returns:
            The columns without what cannot be counted, and how many decisions that were.
        """
        with self._lock:
            # Before anything is taken out: a layer whose columns are wrong was seen all the same.
            for each in seen:
                self._check_layers(each, parts)
            clean, num_dropped = [], 0
            for part in parts:
                layers = []
                for layer in part.layers:
                    kept, dropped = self._check_layer(layer, part)
                    num_dropped += dropped
                    if kept is not None:
                        layers.append(kept)
                clean.append(replace(part, layers=layers))
            return clean, num_dropped

    def check_counts(
        self, seen: Sequence[ForwardSeen], parts: Sequence[CountsColumns]
    ) -> tuple[list[CountsColumns], int]:
        """Check forwards at level "counts"; see `check_rows`.

        Sums hide which row an id belonged to: distinctness is checked by its consequence that no expert can have more
        assignments than there are tokens, and single weights are not checked.
        """
        with self._lock:
            for each in seen:
                self._check_layers(each, parts)
            where = _forwards(index for each in seen for index in (each.forward_index, *each.also))
            clean, num_dropped = [], 0
            for part in parts:
                layers = []
                for layer in part.layers:
                    if self._check_sums(layer, where):
                        layers.append(layer)
                    else:
                        num_dropped += layer.num_tokens
                clean.append(replace(part, layers=layers))
            return clean, num_dropped

    def checks(
        self, *, num_produced: int, dropped: Mapping[str, int], hook_ns: int, forward_ns: int, is_live: bool = False
    ) -> tuple[HealthCheck, ...]:
        """Return the outcome of all checks.

        Args:
            num_produced: decisions that the hooks saw.
            dropped: decisions lost by reason, sampling aside.
            hook_ns: time in hooks; forward_ns: time in forwards, hooks included.
            is_live: forwards may be under way that end after younger ones.
        """
        with self._lock:
            result = {name: self._outcome(name, tally) for name, tally in self._tallies.items()}
            result["gaps"] = self._gaps(is_live)
        total = sum(dropped.values())
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items()) if number)
        result["drops"] = _check("drops", num_produced, total, reasons)
        result["overhead"] = _overhead(hook_ns, forward_ns)
        return tuple(result[name] for name in CHECK_NAMES)

    # -- layers and forwards ---------------------------------------------------------------------------------------

    def _arrive(self, forward_index: int) -> None:
        self._early.add(forward_index)
        while self._next_forward in self._early or len(self._early) > _MAX_EARLY:
            if self._next_forward in self._early:
                self._early.remove(self._next_forward)
            else:
                self._missing.add(1, 1, f"forward {self._next_forward} was not captured, later ones were")
            self._next_forward += 1

    def _gaps(self, is_live: bool) -> HealthCheck:
        newest = max(self._early, default=self._next_forward - 1)
        end = newest - _LIVE_SLACK if is_live else newest
        missing = [index for index in range(self._next_forward, end) if index not in self._early]
        example = f"forward {missing[0]} was not captured, forward {newest} was" if missing else ""
        num_missing = self._missing.num_violations + len(missing)
        return _check("gaps", newest + 1 - self._first_forward, num_missing, self._missing.example or example)

    def _check_layers(self, seen: ForwardSeen, parts: Sequence[RoutingColumns | CountsColumns]) -> None:
        times = 1 + len(seen.also)
        for index in (seen.forward_index, *seen.also):
            self._arrive(index)
        in_columns = {layer.layer_index for part in parts for layer in part.layers}
        # A stack whose requests were all sampled out has no columns, and that is right.
        captured = {self._layers[index].stack for index in in_columns if index in self._layers}
        tally = self._tallies["layers"]
        for index, layer in self._layers.items():
            model_tokens = seen.model_tokens.get(layer.stack, 0)
            hook_tokens = seen.layer_tokens.get(index, 0)
            where = f"layer {index} ({layer.module_name}): "
            if model_tokens is None and not hook_tokens:
                self._unknown_stacks.add(layer.stack)
                continue
            if not model_tokens and not hook_tokens:
                continue
            if seen.unseen is not None and not hook_tokens and index not in seen.unseen:
                continue  # it was right not to be called: its sibling took the tokens
            if model_tokens is not None and hook_tokens < model_tokens and index not in seen.explained:
                example = (
                    f"{where}its hook saw {hook_tokens} of the {model_tokens} tokens that the {layer.stack} saw "
                    f"in forward {seen.forward_index}"
                )
                tally.add(times, times, example)
            elif hook_tokens and index not in in_columns and (layer.stack in captured or not seen.num_left_out):
                text = f"{where}captured in forward {seen.forward_index}, but lost before it was counted"
                tally.add(times, times, text)
            else:
                tally.add(times)

    # -- rows ------------------------------------------------------------------------------------------------------

    def _check_layer(self, layer: LayerColumns, part: RoutingColumns) -> tuple[LayerColumns | None, int]:
        """Return the layer without what cannot be counted (None: all of it), and the decisions taken out."""
        ids = layer.expert_ids
        num_rows = part.num_tokens if layer.row_index is None else len(layer.row_index)
        if ids.ndim != 2:
            text = f"{_where(layer, part)}expert_ids has shape {ids.shape}"
            self._tallies["range"].add(ids.size, max(1, ids.size), text)
            return None, num_rows
        k = ids.shape[1]
        if len(ids) != num_rows or (num_rows and not _is_within(layer.row_index, part.num_tokens)):
            lost = abs(num_rows - len(ids)) * k or num_rows * k
            text = f"{_where(layer, part)}{len(ids)} routed rows for {num_rows} tokens"
            self._tallies["conservation"].add(num_rows * k, max(1, lost), text)
            return None, num_rows
        for name in _ROW_COLUMNS[1:]:
            column = getattr(layer, name)
            if column is not None and not _fits(column, name, ids.shape):
                check = "weights" if name == "gate_weights" else "conservation"
                text = f"{_where(layer, part)}{name} has shape {column.shape} for ids of shape {ids.shape}"
                self._tallies[check].add(ids.size, max(1, ids.size), text)
                return None, num_rows
        padding = part.is_padding if layer.row_index is None else part.is_padding[layer.row_index]
        self._check_slots(layer, part, ~padding)
        return self._without_bad_ids(layer, part)

    def _check_slots(self, layer: LayerColumns, part: RoutingColumns, valid: npt.NDArray[np.bool_]) -> None:
        ids, status = layer.expert_ids, layer.slot_status
        num_valid = int(np.count_nonzero(valid))
        routed = ids
        is_load: npt.NDArray[np.bool_] | None = None
        missing, text = 0, ""
        # Nearly always every slot was routed, and then nothing has to be told apart.
        if status is not None or not _is_in_range(ids, 0, layer.num_experts - 1):
            is_load = SlotClasses.of(ids, status, layer.num_experts).is_load
            routed = np.where(is_load, ids, NO_EXPERT)
            unaccounted = ids == NO_EXPERT
            if status is not None:
                is_routed = (status == pb.SLOT_STATUS_ROUTED) | (status == pb.SLOT_STATUS_UNSPECIFIED)
                unaccounted = (is_routed & unaccounted) | (status > pb.SLOT_STATUS_UNUSED)
            missing = int(np.count_nonzero(unaccounted))
            if missing:
                where = _where(layer, part, _in_rows(unaccounted))
                text = f"{where}{missing} of {ids.size} slots reached no expert, and no status says why"
        self._tallies["conservation"].add(ids.size, missing, text)
        twice = _has_equals(routed) & valid
        num_twice, text = int(np.count_nonzero(twice)), ""
        if num_twice:
            experts = sorted(routed[int(twice.argmax())].tolist())
            text = f"{_where(layer, part, twice)}a row has the experts {experts}"
        self._tallies["distinctness"].add(num_valid, num_twice, text)
        if layer.gate_weights is not None:
            wrong = ~np.isfinite(layer.gate_weights)
            num_wrong, text = 0, ""
            if wrong.any():
                wrong &= valid[:, None] if is_load is None else is_load & valid[:, None]
                num_wrong = int(np.count_nonzero(wrong))
                if num_wrong:
                    where = _where(layer, part, _in_rows(wrong))
                    text = f"{where}a gate weight is {layer.gate_weights[wrong][0]}"
            num_weights = num_valid * ids.shape[1] if is_load is None else int(np.count_nonzero(is_load[valid]))
            self._tallies["weights"].add(num_weights, num_wrong, text)

    def _without_bad_ids(self, layer: LayerColumns, part: RoutingColumns) -> tuple[LayerColumns, int]:
        last = layer.num_experts + layer.num_identity_experts - 1
        columns = [ids for ids in (layer.expert_ids, layer.intended_expert_ids) if ids is not None]
        if all(_is_in_range(ids, NO_EXPERT, last) for ids in columns):
            self._tallies["range"].add(layer.expert_ids.size)
            return layer, 0
        bad = np.zeros(layer.expert_ids.shape, np.bool_)
        examples: list[int] = []
        for ids in columns:
            wrong = (ids < NO_EXPERT) | (ids > last)
            examples += ids[wrong][:1].tolist()
            bad |= wrong
        is_bad_row = _in_rows(bad)
        example = f"{_where(layer, part, is_bad_row)}expert {examples[0]} of a layer whose ids are 0 to {last}"
        self._tallies["range"].add(bad.size, int(np.count_nonzero(bad)), example)
        keep = np.logical_not(is_bad_row)
        rows = np.arange(len(keep), dtype=np.uint32) if layer.row_index is None else layer.row_index
        kept = replace(
            layer,
            row_index=rows[keep],
            # The sum was over all rows; what the bad ones added to it is not known.
            probability_sum=None,
            **{name: column[keep] for name in _ROW_COLUMNS if (column := getattr(layer, name)) is not None},
        )
        return kept, int(np.count_nonzero(~keep))

    # -- sums ------------------------------------------------------------------------------------------------------

    def _check_sums(self, layer: LayerCountColumns, forwards: str) -> bool:
        where = f"layer {layer.layer_index}, {forwards}: "
        counts, expected = layer.expert_counts, layer.num_experts
        if counts.shape != (expected,):
            self._tallies["range"].add(
                expected, max(1, abs(counts.size - expected)), f"{where}{counts.size} counts for {expected} experts"
            )
            return False
        found = int(counts.sum()) + layer.identity_slots + layer.skipped_slots + layer.dropped_slots
        found += layer.unused_slots + layer.bad_slots
        text = f"{where}{layer.bad_slots} slots have an expert that the layer does not have"
        self._tallies["range"].add(found, layer.bad_slots, text)
        most = int(counts.max(initial=0))
        text = f"{where}expert {int(counts.argmax())} has {most} assignments from {layer.num_tokens} tokens"
        self._tallies["distinctness"].add(layer.num_tokens, max(0, most - layer.num_tokens), text)
        known = self._layers.get(layer.layer_index)
        if known is not None and known.top_k:
            slots = layer.num_tokens * known.top_k
            text = f"{where}{found} slots are accounted for, {layer.num_tokens} tokens have {slots}"
            self._tallies["conservation"].add(slots, abs(slots - found), text)
        return True

    def _outcome(self, name: str, tally: _Tally) -> HealthCheck:
        example = tally.example
        if not tally.num_checked:
            example = "nothing was captured yet"
            if name == "layers" and self._unknown_stacks:
                example = f"how many tokens the model saw is not known ({', '.join(sorted(self._unknown_stacks))})"
            elif name == "weights" and self._tallies["range"].num_checked:
                example = "no weights are captured at this level"
        return _check(name, tally.num_checked, tally.num_violations, example)


def _where(layer: LayerColumns, part: RoutingColumns, is_wrong: npt.NDArray[np.bool_] | None = None) -> str:
    """Return the layer, and the forward of the first wrong row, of which there is one, or all of its forwards."""
    if is_wrong is None:
        return f"layer {layer.layer_index}, {_forwards(part.forward_index.tolist())}: "
    row = int(is_wrong.argmax())
    token = row if layer.row_index is None else int(layer.row_index[row])
    return f"layer {layer.layer_index}, forward {int(part.forward_index[token])}: "


def _forwards(indexes: Iterable[int]) -> str:
    known = sorted(set(indexes))
    if len(known) == 1:
        return f"forward {known[0]}"
    return f"forwards {known[0]} to {known[-1]}" if known else "no forward"


def _check(name: str, num_checked: int, num_violations: int, example: str) -> HealthCheck:
    status = CheckStatus.OK if num_checked else CheckStatus.UNKNOWN
    if num_violations:
        status = CheckStatus.FAILED
    if status is CheckStatus.UNKNOWN:
        example = example or "nothing was captured yet"
    return HealthCheck(name, status, num_checked, num_violations, _UNITS[name], example)


def _overhead(hook_ns: int, forward_ns: int) -> HealthCheck:
    hook_ms, forward_ms = round(hook_ns / 1e6), round(forward_ns / 1e6)
    if forward_ns <= 0:
        return _check("overhead", 0, 0, "")
    share = hook_ns / forward_ns
    status = CheckStatus.FAILED if share > OVERHEAD_LIMIT else CheckStatus.OK
    example = f"hooks took {share:.1%} of the forwards' time (limit {OVERHEAD_LIMIT:.0%})"
    violations = hook_ms if status is CheckStatus.FAILED else 0
    return HealthCheck("overhead", status, forward_ms, violations, _UNITS["overhead"], example)


def _is_in_range(ids: npt.NDArray[np.int32], first: int, last: int) -> bool:
    return not ids.size or (int(ids.min()) >= first and int(ids.max()) <= last)


def _in_rows(slots: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return for each row whether it holds for any of its slots."""
    found: npt.NDArray[np.bool_] = np.logical_or.reduce(slots, axis=1)
    return found


def _has_equals(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Return for each row whether two of its entries are the same expert; -1 is none.

    For few slots comparing all pairs of columns is several times faster than sorting the rows.
    """
    k = ids.shape[1]
    if k > _MAX_PAIRED_SLOTS:
        in_order = np.sort(ids, axis=1)
        return _in_rows((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NO_EXPERT))
    columns = np.ascontiguousarray(ids.T)
    found = np.zeros(len(ids), np.bool_)
    for slot in range(1, k):
        equal = (columns[:slot] == columns[slot]).any(axis=0)
        if equal.any():
            found |= equal & (columns[slot] != NO_EXPERT)
    return found


def _fits(column: npt.NDArray[np.generic], name: str, shape: tuple[int, ...]) -> bool:
    if name in ("gate_weights", "slot_status", "intended_expert_ids"):
        return column.shape == shape
    return column.shape[:1] == shape[:1]


def _is_within(row_index: npt.NDArray[np.uint32] | None, num_tokens: int) -> bool:
    return row_index is None or not len(row_index) or int(row_index.max()) < num_tokens
