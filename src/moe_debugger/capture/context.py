"""What a forward is about: which request each batch row belongs to, its positions, its padding and its phase."""

import inspect
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from moe_debugger.wire.ids import new_id

from .raw import PHASES, TokenFrame

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "CacheLength",
    "RequestScope",
    "RequestTracker",
    "fallback_frame",
    "input_names",
    "read_frame",
    "traced_inputs",
]

_TRACED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
# The loops of transformers' generate, which call the model for one token after another.
_GENERATING = frozenset({"_sample", "_beam_search", "_assisted_decoding", "generate"})
_MAIN_INPUTS = ("input_ids", "inputs_embeds")
_DECODER = "decoder_"


@dataclass(frozen=True, slots=True)
class RequestScope:
    """What the caller said about the batch rows of the next forwards (`MoEDebugger.requests`)."""

    request_ids: tuple[str | None, ...]
    phases: tuple[int, ...] | None = None
    start_positions: tuple[int, ...] | None = None


class RequestTracker:
    """Continues the request ids of batch rows over the forwards that share one object: a cache, an encoder's output."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], tuple[str, ...]]] = {}
        # Tokens fed, and whether the cache has ever said a length of its own.
        # The newest drafts of each cache, until its next length tells how many were accepted.
        self._drafts: weakref.WeakKeyDictionary[Any, TokenFrame] = weakref.WeakKeyDictionary()
        self._fed: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()

    def ids(self, carrier: Any, num_rows: int) -> tuple[str, ...] | None:
        """Return the ids that `carrier` brings, None where it is not known or has another number of rows."""
        known = self._known.get(id(carrier)) if carrier is not None else None
        if known is not None and known[0]() is carrier and len(known[1]) == num_rows:
            return known[1]
        return None

    def remember(self, carrier: Any, ids: tuple[str, ...]) -> None:
        """Bind `ids` to a carrier for as long as it lives."""
        key = id(carrier)
        known = self._known
        held = known.get(key)
        if held is not None and held[1] == ids and held[0]() is carrier:
            return

        def forget(reference: "weakref.ref[Any]") -> None:
            # Another object may have got the same address meanwhile.
            if key in known and known[key][0] is reference:
                del known[key]

        known[key] = (weakref.ref(carrier, forget), ids)

    def await_verification(self, cache: Any, frame: TokenFrame) -> None:
        """Have the next length of `cache` say how many of the drafts in `frame` were rejected."""
        if isinstance(cache, CacheLength):
            return
        try:
            self._drafts[cache] = frame
            frame.is_unverified = True
        except TypeError:  # neither hashable nor weakly referenced: they stay as they are
            pass

    def past_length(self, cache: Any, num_columns: int) -> int:
        """Return how many tokens the cache holds, and note that `num_columns` more are fed."""
        if cache is None:
            return 0
        get_length = getattr(cache, "get_seq_length", None)
        length = get_length() if callable(get_length) else None
        try:
            fed, has_length = self._fed.get(cache, (0, False))
            # A cache of linear attention alone has no length, and one whose length is a tensor must not be waited for.
            if isinstance(length, int) and (length or has_length):
                past, has_length = length, True
            else:
                past = fed
            self._fed[cache] = (past + num_columns, has_length)
            drafted = self._drafts.pop(cache, None)
            if drafted is not None:
                drafted.num_rejected = max(0, min(drafted.num_columns - 1, fed - past))
                drafted.is_unverified = False
        except TypeError:  # neither hashable nor weakly referenced
            past = length if isinstance(length, int) else 0
        return past


@dataclass(frozen=True)
class CacheLength:
    """Stands for a cache that compiled code did not hand over: its length is known, its requests are not."""

    length: int

    def get_seq_length(self) -> int:
        """Return how many tokens the cache holds."""
        return self.length


def traced_inputs(inputs: Mapping[str, Any], *, is_training: bool) -> dict[str, Any]:
    """Return what may leave compiled code of a forward's inputs: tensors, and plain numbers."""
    kept: dict[str, Any] = {}
    for name in (*_TRACED, *(_DECODER + each for each in _TRACED)):
        value: Any = inputs.get(name)
        if hasattr(value, "detach"):
            kept[name] = value.detach()
    cache = inputs.get("past_key_values")
    kept["past_length"] = -1 if cache is None else cache.get_seq_length()
    kept["is_training"] = int(is_training)
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, int):
        kept["logits_to_keep"] = keep
    return kept


def input_names(module: "nn.Module") -> tuple[str, ...]:
    """Return the names of a module's positional inputs."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def read_frame(
    inputs: Mapping[str, Any],
    outer: Mapping[str, Any],
    *,
    stack: str,
    is_training: bool,
    tracker: RequestTracker,
    scope: RequestScope | None,
    minted: dict[int, tuple[str, ...]],
    keeps_token_ids: bool = True,
) -> tuple[TokenFrame | None, str]:
    """Return the tokens that a stack runs over, and what could not be read ("" where all was).

    Only small copies are made: the caller may reuse the buffers of its inputs.

    Args:
        inputs: of the stack's own call.
        outer: of the outermost call of this forward; gives what a stack is not told (token ids, masks).
        minted: ids that this forward's other stacks got, by number of rows; a new entry is added.
        keeps_token_ids: whether they are wanted also of a single text.
    """
    is_decoder = _is_decoder(inputs, outer, stack)
    main, input_ids = _main_input(inputs, outer, is_decoder=is_decoder)
    if main is None:
        return None, f"the {stack} was given neither input_ids nor inputs_embeds of shape [batch, sequence, ...]"
    num_rows, num_columns = int(main.shape[0]), int(main.shape[1])
    cache = _first(inputs, outer, "past_key_values")
    past_length = 0 if stack == "encoder" else tracker.past_length(cache, num_columns)
    problem = ""
    if scope is not None and len(scope.request_ids) != num_rows:
        problem = f"requests() named {len(scope.request_ids)} rows, the forward has {num_rows}; its ids were minted"
        scope = None
    ids: tuple[str | None, ...]
    if scope is not None:
        ids = scope.request_ids
    else:
        ids = _request_ids(tracker, minted, outer, cache if past_length else None, num_rows)
        if cache is not None and stack != "encoder":
            tracker.remember(cache, tuple(name for name in ids if name is not None))
    phase = _phase(is_training, cache, past_length, num_columns, outer, stack, is_outermost=inputs is outer)
    frame = TokenFrame(
        stack=stack,
        num_rows=num_rows,
        num_columns=num_columns,
        request_ids=ids,
        are_ids_minted=scope is None,
        phases=scope.phases if scope is not None and scope.phases is not None else (phase,) * num_rows,
        past_length=past_length,
        num_drafts=_num_drafts(outer, cache, num_columns) if phase == PHASES["prefill"] else 0,
        start_positions=scope.start_positions if scope is not None else None,
    )
    if cache is not None and (frame.num_drafts or (phase == PHASES["decode"] and num_columns > 1)):
        frame.has_drafts = True
        tracker.await_verification(cache, frame)
    mask, is_unknown = _mask(inputs, outer, num_rows, num_columns, is_decoder=is_decoder)
    if mask is not None:
        frame.is_padding = mask[:, -num_columns:] == 0
    elif is_unknown and _first(inputs, outer, "cu_seq_lens_q") is None:
        # Packed texts are not padded, and their keys may stand in another order than the tokens.
        prepared = (each for source in (inputs, outer) for each in _prepared(source, is_decoder=is_decoder))
        past = None if stack == "encoder" else past_length
        padding = (_diagonal(each, num_rows, num_columns, past) for each in prepared)
        frame.is_padding = next((each for each in padding if each is not None), None)
        if frame.is_padding is None and not problem:
            problem = "attention_mask is neither [batch, length] nor [batch, 1, tokens, keys], so padding is not known"
    ends = _first(inputs, outer, "cu_seq_lens_q")
    # Continuous batching has a paged cache of its own; packed rows without one are plain evaluation.
    if ends is not None and num_rows == 1 and not is_training and _first(inputs, outer, "cache") is not None:
        frame.segment_ends = ends.detach().clone()
    if mask is None and frame.is_padding is not None and not past_length:
        mask = ~frame.is_padding
    frame.position = _position(_first(inputs, outer, "position_ids"), mask, num_rows, num_columns)
    # The end of a text is told by its token where others of its batch go on.
    if input_ids is not None and (keeps_token_ids or num_rows > 1):
        frame.token_ids = input_ids.clone()
    return frame, problem


def fallback_frame(
    num_tokens: int,
    hidden: Any,
    outer_frames: list[TokenFrame],
    *,
    stack: str,
    is_training: bool,
    scope: RequestScope | None,
    minted: dict[int, tuple[str, ...]],
) -> TokenFrame:
    """Return a frame for a stack whose inputs say nothing about tokens (patches of images).

    The caller's names are for rows of text, so they count here only where there are as many rows.
    """
    num_rows, num_columns = 1, num_tokens
    if getattr(hidden, "ndim", 0) == 3 and int(hidden.shape[0]) * int(hidden.shape[1]) == num_tokens:
        num_rows, num_columns = int(hidden.shape[0]), int(hidden.shape[1])
    phase = PHASES["train"] if is_training else PHASES["prefill"] if outer_frames else PHASES["eval"]
    phases = (phase,) * num_rows
    if scope is not None and len(scope.request_ids) == num_rows:
        phases = phases if scope.phases is None else scope.phases
        return TokenFrame(stack, num_rows, num_columns, scope.request_ids, are_ids_minted=False, phases=phases)
    ids = next((frame.request_ids for frame in outer_frames if frame.num_rows == num_rows), None)
    if ids is None:
        ids = minted.setdefault(num_rows, tuple(new_id() for _ in range(num_rows)))
    return TokenFrame(stack, num_rows, num_columns, ids, are_ids_minted=True, phases=phases)


def _is_decoder(inputs: Mapping[str, Any], outer: Mapping[str, Any], stack: str) -> bool:
    """Whether this is the decoder of a model that has an encoder as well."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs", "encoder_hidden_states")
    return stack == "decoder" and any(each.get(name) is not None for each in (inputs, outer) for name in names)


def _main_input(inputs: Mapping[str, Any], outer: Mapping[str, Any], *, is_decoder: bool) -> tuple[Any, Any]:
    """Return the tensor whose first two dimensions are the tokens', and the token ids where they are known."""
    prefixes = (_DECODER, "") if is_decoder else ("",)
    main: Any = None
    for prefix in prefixes:
        main = next((v for name in _MAIN_INPUTS if (v := inputs.get(prefix + name)) is not None), None)
        if main is not None:
            break
    if main is None:
        # Code of one's own names its inputs as it likes: token ids [batch, sequence], else hidden states.
        tensors = [value for value in inputs.values() if hasattr(value, "is_floating_point")]
        ids = [each for each in tensors if each.ndim == 2 and not (each.is_floating_point() or each.dtype.itemsize < 4)]
        main = next(iter(ids), None)
        if main is None:
            main = next((each for each in tensors if each.ndim == 3 and each.is_floating_point()), None)
    if main is None or main.ndim < 2 or (main.ndim == 2 and main.is_floating_point()):
        return None, None
    if main.ndim == 2:
        return main, main
    outer_ids = outer.get(_DECODER + "input_ids" if is_decoder else "input_ids")
    is_same = outer_ids is not None and getattr(outer_ids, "ndim", 0) == 2 and outer_ids.shape == main.shape[:2]
    return main, outer_ids if is_same else None


def _request_ids(
    tracker: RequestTracker, minted: dict[int, tuple[str, ...]], outer: Mapping[str, Any], cache: Any, num_rows: int
) -> tuple[str, ...]:
    known = minted.get(num_rows) or tracker.ids(cache, num_rows)
    if known is None:
        encoded = outer.get("encoder_outputs")
        state = getattr(encoded, "last_hidden_state", None)
        if state is None and isinstance(encoded, tuple | list) and encoded:
            state = encoded[0]
        known = tracker.ids(state, num_rows)
    if known is None:
        known = tuple(new_id() for _ in range(num_rows))
    minted[num_rows] = known
    return known


def _first(inputs: Mapping[str, Any], outer: Mapping[str, Any], name: str) -> Any:
    value = inputs.get(name)
    return outer.get(name) if value is None else value


def _mask(
    inputs: Mapping[str, Any], outer: Mapping[str, Any], num_rows: int, num_columns: int, *, is_decoder: bool
) -> tuple[Any, bool]:
    """Return the padding mask [num_rows, >= num_columns] (None where there is none), and whether one was not read."""
    # The plain mask of an encoder-decoder model belongs to its encoder.
    candidates = [inputs.get("attention_mask"), outer.get("decoder_attention_mask" if is_decoder else "attention_mask")]
    given = [mask for mask in candidates if mask is not None]
    for mask in given:
        if getattr(mask, "ndim", 0) == 2 and mask.shape[0] == num_rows and mask.shape[1] >= num_columns:
            return mask, False
    return None, bool(given)


def _prepared(source: Mapping[str, Any], *, is_decoder: bool) -> list[Any]:
    """Return the masks of attention that a call was given; a model with several kinds of layers has one for each."""
    masks = [source.get(_DECODER + "attention_mask") if is_decoder else None, source.get("attention_mask")]
    by_kind = [mask if isinstance(mask, Mapping) else {"full_attention": mask} for mask in masks]
    # The keys of full attention stand where the tokens do.
    return [mask[kind] for mask in by_kind for kind in sorted(mask, key=lambda kind: kind != "full_attention")]


def _diagonal(mask: Any, num_rows: int, num_columns: int, past_length: int | None) -> Any:
    """Return which tokens may not attend to themselves: in a mask [batch, 1, tokens, keys] those are the padded ones.

    `generate` prepares such masks, for static caches with keys that are not there yet. The keys of a sliding window are
    not told apart: None.

    Args:
        past_length: number of keys before those of the tokens; None = all that there are.
    """
    if getattr(mask, "ndim", 0) != 4 or mask.shape[0] not in (1, num_rows):
        return None
    first = mask.shape[3] - num_columns if past_length is None else past_length
    own = mask[:, 0].diagonal(offset=first, dim1=1, dim2=2)
    if own.shape[1] != num_columns:
        return None
    return ((own < 0) if own.is_floating_point() else (own == 0)).expand(num_rows, num_columns).clone()


def _phase(
    is_training: bool,
    cache: Any,
    past_length: int,
    num_columns: int,
    outer: Mapping[str, Any],
    stack: str,
    *,
    is_outermost: bool,
) -> int:
    if is_training:
        return PHASES["train"]
    if stack == "encoder" and is_outermost:
        # generate() runs the encoder by itself, for the tokens that will follow.
        return PHASES["prefill"]
    if cache is None and outer.get("use_cache") is True:
        # The model will make the cache itself, for the tokens that follow.
        return PHASES["prefill"]
    if cache is None:
        return PHASES["eval"]
    if past_length > 0 and num_columns == 1:
        return PHASES["prefill" if _is_called_by_prefill() else "decode"]
    if past_length > 0 and _num_logits(outer) == num_columns:
        # Several columns whose logits are all asked for: drafts of assisted decoding that are verified.
        return PHASES["decode"]
    # A prompt in chunks continues a cache with more than one token at a time.
    return PHASES["prefill"]


def _is_called_by_prefill() -> bool:
    """Return whether `generate` is still at the prompt.

    The last chunk of a prompt may be a single token, and its call is then like a decode step in every argument: only
    the caller tells. The walk ends at the loop that generates, a few dozen frames up; without `generate` at the bottom.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "_prefill":
            return True
        if name in _GENERATING:
            return False
        frame = frame.f_back
    return False


def _num_drafts(outer: Mapping[str, Any], cache: Any, num_columns: int) -> int:
    wanted = _num_logits(outer)
    # The prompt itself ends with the token before the first draft.
    return wanted - 1 if cache is not None and 1 < wanted < num_columns else 0


def _num_logits(outer: Mapping[str, Any]) -> int:
    value = outer.get("logits_to_keep")
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _position(
    position_ids: "torch.Tensor | None", mask: "torch.Tensor | None", num_rows: int, num_columns: int
) -> "torch.Tensor | None":
    if getattr(position_ids, "ndim", 0) >= 2:
        assert position_ids is not None
        # Multimodal rope gives [3 or 4, batch, sequence]: its first plane is the position in time.
        plane = position_ids[0] if position_ids.ndim == 3 else position_ids
        if plane.ndim == 2 and plane.shape[1] == num_columns and plane.shape[0] in (1, num_rows):
            return plane.detach().clone()
    if mask is not None:
        return (mask.long().cumsum(-1) - 1)[:, -num_columns:].clamp_(min=0)
    return None
