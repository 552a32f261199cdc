"""The token rows of forwards that are read together: whose they are, where they stand, and which of them count."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger.wire.codec import RoutingColumns

from .raw import PHASES, RawForward, TokenFrame

if TYPE_CHECKING:
    import torch

__all__ = ["GroupTokens", "TokenReader", "is_sampled", "to_numpy"]

# Requests that ended with an end-of-text token are remembered while their batch goes on.
_MAX_FINISHED = 65536
_COLUMNS = ("step", "forward_index", "request_index", "position", "phase", "is_padding", "token_id")

Bools = npt.NDArray[np.bool_]


def is_sampled(request_id: str, sampling_rate: float) -> bool:
    """Return whether a request is captured: the same answer in every process, for the whole request."""
    if sampling_rate >= 1:
        return True
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < sampling_rate * 2.0**64


@dataclass(slots=True)
class GroupTokens:
    """The tokens of one stack in one or more forwards: N tokens in R batch rows, forward after forward.

    Attributes:
        columns: of the tokens that are kept, without layers.
        is_padding: [N] bool, of all tokens.
        keep: [N] bool, tokens whose request is sampled; None = all.
        row_lengths: [R] int64, columns of each batch row.
    """

    columns: RoutingColumns
    is_padding: Bools
    keep: Bools | None
    row_lengths: npt.NDArray[np.int64]


class TokenReader:
    """Reads the token rows of forwards.

    Args:
        with_tokens: whether token ids are kept.
        sampling_rate: share of the requests that are kept, by a hash of their id.
        eos_token_ids: ids that end a text. `generate` feeds padding to the rows of a batch that ended before the
            others, and says so in no mask; those rows are flagged as padding here.
    """

    def __init__(self, *, with_tokens: bool, sampling_rate: float, eos_token_ids: Collection[int]) -> None:
        self._with_tokens = with_tokens
        self._sampling_rate = sampling_rate
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        # The forward in which a request's end was fed: reading a forward again must give the same rows.
        self._finished: dict[str, int] = {}

    def read(self, raws: Sequence[RawForward], frames: Sequence[TokenFrame]) -> GroupTokens:
        """Return the tokens of one stack.

        Args:
            raws: the forwards.
            frames: the stack's frame in each of them.
        """
        token_ids: list[npt.NDArray[np.int64]] = []
        paddings: list[Bools] = []
        positions: list[npt.NDArray[np.int64]] = []
        index_of: dict[str, int] = {}
        row_request: list[int] = []
        row_phase: list[int] = []
        row_is_kept: list[bool] = []
        for raw, frame in zip(raws, frames, strict=True):
            fed = None if frame.token_ids is None else to_numpy(frame.token_ids).reshape(frame.num_tokens)
            padding = self._padding(raw.forward_index, frame, fed)
            paddings.append(padding)
            positions.append(_positions(frame, padding))
            if fed is not None:
                token_ids.append(fed)
            is_kept = [name is not None and name != "" and is_sampled(name, self._sampling_rate)
                       for name in frame.request_ids]  # fmt: skip
            # A dummy row belongs to no request: it goes with the first one of its forward, as padding.
            first = next((name for name, kept in zip(frame.request_ids, is_kept, strict=True) if kept), "") or ""
            for name, kept in zip(frame.request_ids, is_kept, strict=True):
                row_request.append(index_of.setdefault((name or "") if kept else first, len(index_of)) if first else 0)
                row_is_kept.append(bool(first) and (kept or not name))
            row_phase += frame.phases
        lengths = np.array([frame.num_columns for frame in frames for _ in range(frame.num_rows)], dtype=np.int64)
        tokens_of = np.array([frame.num_tokens for frame in frames])
        is_padding = _join(paddings)
        position = _join(positions)
        position[is_padding] = 0
        if all(frame.is_of_one_phase for frame in frames):
            phase = np.repeat(np.array(row_phase, dtype=np.uint8), lengths)
        else:
            phase = _join([_phases(frame) for frame in frames])
        columns = RoutingColumns(
            step=np.repeat(np.array([raw.step for raw in raws], dtype=np.uint64), tokens_of),
            forward_index=np.repeat(np.array([raw.forward_index for raw in raws], dtype=np.uint64), tokens_of),
            request_ids=list(index_of),
            request_index=np.repeat(np.array(row_request, dtype=np.uint32), lengths),
            position=position.astype(np.uint32),
            phase=phase,
            is_padding=is_padding,
            token_id=_join(token_ids).astype(np.uint32) if self._with_tokens and token_ids else None,
            captured_at_unix_ns=raws[-1].captured_at_unix_ns,
        )
        keep = None
        if not all(row_is_kept):
            keep = np.repeat(np.array(row_is_kept, dtype=bool), lengths)
            for name in _COLUMNS:
                column = getattr(columns, name)
                if column is not None:
                    setattr(columns, name, column[keep])
        return GroupTokens(columns, is_padding, keep, lengths)

    def _padding(self, forward_index: int, frame: TokenFrame, fed: npt.NDArray[np.int64] | None) -> Bools:
        shape = (frame.num_rows, frame.num_columns)
        padding = np.zeros(shape, bool) if frame.is_padding is None else to_numpy(frame.is_padding).astype(bool)
        if frame.num_rejected:
            padding[:, -frame.num_rejected :] = True
        for row, name in enumerate(frame.request_ids):
            if name is None:
                padding[row] = True
        # A single row that ended is fed no more by generate(), so an end-of-text token there was fed on purpose.
        if frame.are_ids_minted and frame.num_rows > 1 and len(self._eos_token_ids) and fed is not None:
            first_fed = fed.reshape(shape)[:, 0]
            for row, name in enumerate(frame.request_ids):
                if frame.phases[row] != PHASES["decode"] or name is None:
                    continue
                if bool(np.isin(first_fed[row], self._eos_token_ids)):
                    self._finished.setdefault(name, forward_index)
                padding[row] |= self._finished.get(name, forward_index + 1) <= forward_index
            while len(self._finished) > _MAX_FINISHED:
                del self._finished[next(iter(self._finished))]
        return padding.reshape(-1)


def _phases(frame: TokenFrame) -> npt.NDArray[np.uint8]:
    if frame.segment_ends is not None and frame.position is not None:
        # A text of one token that is not its first is generated; a longer one is (a part of) a prompt.
        ends = to_numpy(frame.segment_ends).astype(np.int64)
        lengths = ends[1:] - ends[:-1]
        lengths = np.append(lengths, max(0, frame.num_columns - int(lengths.sum())))
        is_single = np.repeat(lengths, lengths) == 1
        is_later = to_numpy(frame.position).reshape(-1) > 0
        return np.where(is_single & is_later, PHASES["decode"], PHASES["prefill"]).astype(np.uint8)
    phases = np.repeat(np.array(frame.phases, dtype=np.uint8), frame.num_columns)
    if frame.num_drafts:
        phases.reshape(frame.num_rows, frame.num_columns)[:, -frame.num_drafts :] = PHASES["decode"]
    return phases


def _positions(frame: TokenFrame, is_padding: Bools) -> npt.NDArray[np.int64]:
    shape = (frame.num_rows, frame.num_columns)
    if frame.start_positions is not None:
        real = ~is_padding.reshape(shape)
        counted = np.maximum(real.cumsum(axis=1) - 1, 0)
        starts = np.array(frame.start_positions, dtype=np.int64)
        return np.ravel(counted + starts[:, None])
    if frame.position is not None:
        position: npt.NDArray[np.int64] = np.empty(shape, np.int64)
        position[:] = to_numpy(frame.position)
        return position.reshape(-1)
    counted = np.arange(frame.past_length, frame.past_length + frame.num_columns, dtype=np.int64)
    return np.tile(counted, frame.num_rows)


def _join(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def to_numpy(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    """Return a tensor as numpy, bfloat16 and float16 as float32; without a copy where it is on the host already."""
    host = tensor.cpu()
    # numpy has no bfloat16.
    values: npt.NDArray[Any] = (host.float() if host.is_floating_point() and host.itemsize < 4 else host).numpy()
    return values
