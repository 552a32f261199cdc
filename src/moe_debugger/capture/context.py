"""What a forward is about: which request each batch row belongs to, its positions, its padding and its phase."""

import inspect
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_debugger.wire.ids import new_id

from .raw import PHASES, RawForward

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["RequestScope", "RequestTracker", "input_names", "read_forward"]

_MAIN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True, slots=True)
class RequestScope:
    """What the caller said about the batch rows of the next forwards (`MoEDebugger.requests`)."""

    request_ids: tuple[str | None, ...]
    phases: tuple[int, ...] | None = None
    start_positions: tuple[int, ...] | None = None


class RequestTracker:
    """Continues the request ids of batch rows over the forwards that share one cache object."""

    def __init__(self) -> None:
        self._by_cache: dict[int, tuple[weakref.ref[Any], tuple[str, ...]]] = {}

    def ids(self, cache: Any, past_length: int, num_rows: int) -> tuple[str, ...]:
        """Return the ids of `num_rows` rows: those of the cache where it is a continuation, else new ones."""
        known = self._by_cache.get(id(cache)) if cache is not None else None
        if known is not None and known[0]() is cache and past_length > 0 and len(known[1]) == num_rows:
            return known[1]
        ids = tuple(new_id() for _ in range(num_rows))
        if cache is not None:
            self.remember(cache, ids)
        return ids

    def remember(self, cache: Any, ids: tuple[str, ...]) -> None:
        """Bind `ids` to a cache for as long as it lives."""
        key = id(cache)
        by_cache = self._by_cache

        def forget(reference: "weakref.ref[Any]") -> None:
            # Another cache may have got the same address meanwhile.
            if key in by_cache and by_cache[key][0] is reference:
                del by_cache[key]

        by_cache[key] = (weakref.ref(cache, forget), ids)


def input_names(module: "nn.Module") -> tuple[str, ...]:
    """Return the names of a module's positional inputs."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def read_forward(
    inputs: dict[str, Any],
    *,
    forward_index: int,
    step: int,
    is_training: bool,
    tracker: RequestTracker,
    scope: RequestScope | None,
) -> tuple[RawForward | None, str]:
    """Return the frame of a forward from the model's inputs, and what could not be read ("" where all was).

    Only small copies are made: the caller may reuse the buffers of its inputs.
    """
    main = next((inputs[name] for name in _MAIN_INPUTS if inputs.get(name) is not None), None)
    if main is None or getattr(main, "ndim", 0) < 2:
        return None, "the forward has neither input_ids nor inputs_embeds of shape [batch, sequence, ...]"
    num_rows, num_columns = int(main.shape[0]), int(main.shape[1])
    cache = inputs.get("past_key_values")
    past_length = _past_length(cache)
    problem = ""
    request_ids: Sequence[str | None]
    if scope is not None and len(scope.request_ids) != num_rows:
        problem = f"requests() named {len(scope.request_ids)} rows, the forward has {num_rows}; its ids were minted"
        scope = None
    request_ids = scope.request_ids if scope is not None else tracker.ids(cache, past_length, num_rows)
    if scope is not None and scope.phases is not None:
        phases = scope.phases
    else:
        phases = (_phase(is_training, cache, past_length, num_columns),) * num_rows
    raw = RawForward(
        forward_index=forward_index,
        step=step,
        num_rows=num_rows,
        num_columns=num_columns,
        request_ids=request_ids,
        are_ids_minted=scope is None,
        phases=phases,
        past_length=past_length,
        captured_at_unix_ns=time.time_ns(),
        start_positions=scope.start_positions if scope is not None else None,
    )
    mask = inputs.get("attention_mask")
    if (
        mask is not None
        and getattr(mask, "ndim", 0) == 2
        and mask.shape[0] == num_rows
        and mask.shape[1] >= num_columns
    ):
        raw.is_padding = mask[:, -num_columns:] == 0
    elif mask is not None:
        problem = problem or "attention_mask is not [batch, length], so padding is not known"
        mask = None
    raw.position = _position(inputs.get("position_ids"), mask, num_rows, num_columns)
    input_ids = inputs.get("input_ids")
    if input_ids is not None and main is input_ids and main.ndim == 2:
        raw.token_ids = main.detach().clone()
    return raw, problem


def _past_length(cache: Any) -> int:
    get_length = getattr(cache, "get_seq_length", None)
    if not callable(get_length):
        return 0
    length = get_length()
    # A tensor here would have to be read back from the device; the cache is then told apart by being known.
    return length if isinstance(length, int) else 1


def _phase(is_training: bool, cache: Any, past_length: int, num_columns: int) -> int:
    if is_training:
        return PHASES["train"]
    if cache is None:
        return PHASES["eval"]
    # A prompt in chunks continues a cache with more than one token at a time.
    return PHASES["decode"] if past_length > 0 and num_columns == 1 else PHASES["prefill"]


def _position(
    position_ids: "torch.Tensor | None", mask: "torch.Tensor | None", num_rows: int, num_columns: int
) -> "torch.Tensor | None":
    if position_ids is not None:
        # Multimodal rope gives [3, batch, sequence]: its first plane is the position in time.
        plane = position_ids[0] if position_ids.ndim == 3 else position_ids
        if plane.ndim == 2 and plane.shape[1] == num_columns and plane.shape[0] in (1, num_rows):
            return plane.detach().clone()
    if mask is not None:
        return (mask.long().cumsum(-1) - 1)[:, -num_columns:].clamp_(min=0)
    return None
