"""What the hooks keep of one forward: references to tensors, nothing computed yet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["PHASES", "PhaseName", "RawForward", "RawLayer", "TokenFrame", "phase_number"]

PhaseName = Literal["prefill", "decode", "train", "eval"]
# The numbers of moe_debugger.v1.Phase.
PHASES: dict[str, int] = {"prefill": 1, "decode": 2, "train": 3, "eval": 4}


def phase_number(name: str) -> int:
    """Return the `Phase` of a name."""
    return PHASES[name]


@dataclass(slots=True)
class TokenFrame:
    """The [num_rows, num_columns] tokens that one stack ran over.

    Attributes:
        stack: which stack; encoder and decoder of one forward run over different tokens.
        request_ids: one for each batch row; None is a row that belongs to no request (a dummy).
        are_ids_minted: True where the caller named none.
        phases: `Phase` of each batch row.
        num_drafts: the last columns are drafts of assisted decoding, whose phase is decode.
        start_positions: position of each row's first real token, where the caller gave it.
        position: [num_rows or 1, num_columns] tensor; None = counted from `past_length`.
        is_padding: [num_rows, num_columns] bool tensor; None = no padding.
        token_ids: [num_rows, num_columns] integer tensor, None where the stack was given embeddings.
        root: name of the stack's module in the model; a model may hold several stacks of one kind.
        has_drafts: some columns are drafts of assisted decoding, also where all are of phase decode.
        is_unverified: nothing is known yet of which drafts were accepted.
        num_rejected: the last columns are drafts that were rejected; they are no part of the text.
        segment_ends: [n + 1] integer tensor, where each text of a packed row ends (and 0 first); None = not packed.
    """

    stack: str
    num_rows: int
    num_columns: int
    request_ids: Sequence[str | None]
    are_ids_minted: bool
    phases: Sequence[int]
    past_length: int = 0
    num_drafts: int = 0
    start_positions: Sequence[int] | None = None
    position: "torch.Tensor | None" = None
    is_padding: "torch.Tensor | None" = None
    token_ids: "torch.Tensor | None" = None
    segment_ends: "torch.Tensor | None" = None
    root: str = ""
    has_drafts: bool = False
    is_unverified: bool = False
    num_rejected: int = 0

    @property
    def is_of_one_phase(self) -> bool:
        """Whether each batch row has one phase, that of `phases`."""
        return not self.num_drafts and self.segment_ends is None

    @property
    def num_tokens(self) -> int:
        """Rows times columns, padded ones included."""
        return self.num_rows * self.num_columns


@dataclass(slots=True)
class RawLayer:
    """What the taps of one site kept of one call: tensors by name, and the number of rows that were routed."""

    layer_index: int
    frame: TokenFrame
    tensors: dict[str, Any]
    num_rows: int


@dataclass(slots=True)
class RawForward:
    """One forward of the model: its frames of tokens, and what was kept at each MoE layer.

    Attributes:
        copied: CUDA events after which the tensors are on the host, else None.
        unseen: tokens that the model saw at an MoE layer whose hooks did not fire, by layer index.
    """

    forward_index: int
    step: int
    captured_at_unix_ns: int
    frames: list[TokenFrame] = field(default_factory=list)
    layers: list[RawLayer] = field(default_factory=list)
    unseen: dict[int, int] = field(default_factory=dict)
    copied: Any = None
    duration_ns: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all frames, padded ones included."""
        return sum(frame.num_tokens for frame in self.frames)

    @property
    def num_decisions(self) -> int:
        """Token rows of all layers, padded ones included."""
        return sum(layer.num_rows for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that this forward keeps alive."""
        held: list[Any] = [value for layer in self.layers for value in layer.tensors.values()]
        for frame in self.frames:
            held += [frame.position, frame.is_padding, frame.token_ids, frame.segment_ends]
        return sum(getattr(value, "nbytes", 0) for value in held)
