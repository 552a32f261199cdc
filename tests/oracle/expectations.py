"""What the columns beside ids and weights must hold, worked out from a model's arguments alone."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_debugger import Decisions
from moe_debugger.v1 import routing_pb2 as pb

__all__ = ["forward_problems", "generate_problems"]

_Rows = npt.NDArray[Any]
_TEXT = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
# The pools of a model with one for each kind of token, and that kind in `moe_mm_token_type_ids`.
_POOLS = {"text_moe": 0, "vision_moe": 1}


def forward_problems(decisions: Decisions, inputs: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with padding, tokens, positions, phases and requests after one forward of `inputs`."""
    for layer_index, info in decisions.layers.items():
        rows = decisions.layer_index == layer_index
        where = f"layer {layer_index} ({info.module_name})"
        if not rows.any():
            # A pool without a token of its kind.
            continue
        if set(decisions.phase[rows].tolist()) - {pb.PHASE_PREFILL, pb.PHASE_EVAL}:
            yield f"{where}: a forward's phases are {sorted(set(decisions.phase[rows].tolist()))}"
        if info.stack == "vision" or not _TEXT & set(inputs):
            if decisions.is_padding[rows].any():
                yield f"{where}: {int(decisions.is_padding[rows].sum())} rows of padding where there is none"
            continue
        token_ids, mask = _texts(inputs, info.stack)
        subset = _subset(inputs, info.module_name)
        yield from _text_problems(decisions, rows, token_ids, mask, subset, where, has_positions=_is_text(inputs))


def generate_problems(
    decisions: Decisions,
    inputs: Mapping[str, Any],
    output: torch.Tensor,
    *,
    is_encoder_decoder: bool,
    takes_positions: bool = True,
) -> Iterator[str]:
    """Yield what is wrong after a greedy `generate` that gave `output`: the forwards, their phases and positions.

    The first forward runs the prompts, each other one a token of each text. After a prompt that ends in padding,
    generate goes on counting from the padding's position, 0: these are the positions of a model that takes positions.
    """
    if len(decisions.request_ids) != len(output):
        yield f"{len(decisions.request_ids)} request ids for {len(output)} texts"
    if "input_ids" not in inputs:
        # Started from embeddings: `output` holds the new tokens only.
        return
    for layer_index, info in decisions.layers.items():
        where = f"layer {layer_index} ({info.module_name})"
        rows = decisions.layer_index == layer_index
        if info.stack == "vision" or not rows.any():
            continue
        forwards = np.unique(decisions.forward_index[rows])
        if is_encoder_decoder and info.stack == "encoder":
            if len(forwards) != 1:
                yield f"{where}: the encoder ran once, {len(forwards)} forwards are captured"
            prompt, mask = _texts(inputs, "encoder")
            steps: list[tuple[torch.Tensor | None, torch.Tensor, int]] = [(prompt, mask, pb.PHASE_PREFILL)]
        else:
            start = {"input_ids": output[:, :1]} if is_encoder_decoder else inputs
            prompt, mask = _texts(start, "")
            assert prompt is not None
            new = output[:, 1:-1] if is_encoder_decoder else output[:, prompt.shape[1] : -1]
            steps = [(prompt, mask, pb.PHASE_PREFILL)]
            for step in range(new.shape[1]):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                steps.append((new[:, step : step + 1], mask, pb.PHASE_DECODE))
        ends_in_padding = takes_positions and bool((steps[0][1][:, -1] == 0).any())
        subset = _subset(inputs, info.module_name)
        if len(forwards) != len(steps) and subset is None:
            yield f"{where}: {len(forwards)} forwards captured, generate ran {len(steps)}"
            continue
        for number, (token_ids, mask, phase) in enumerate(steps[: len(forwards)]):
            these = rows & (decisions.forward_index == forwards[number])
            if set(decisions.phase[these].tolist()) != {phase}:
                yield f"{where}, forward {number}: phases {sorted(set(decisions.phase[these].tolist()))}, not {phase}"
            yield from _text_problems(
                decisions,
                these,
                token_ids,
                mask,
                subset if number == 0 else None,
                f"{where}, forward {number}",
                has_positions=_is_text(inputs) and (number == 0 or not ends_in_padding),
            )
            if number > 0 and ends_in_padding and not is_encoder_decoder:
                position = steps[0][1].sum(-1) * steps[0][1][:, -1] + number - steps[0][1][:, -1]
                if not np.array_equal(decisions.position[these], position.numpy()):
                    yield f"{where}, forward {number}: positions {decisions.position[these].tolist()}, not {position}"


def _text_problems(
    decisions: Decisions,
    rows: _Rows,
    token_ids: torch.Tensor | None,
    mask: torch.Tensor,
    subset: _Rows | None,
    where: str,
    *,
    has_positions: bool,
) -> Iterator[str]:
    """Compare rows with the tokens [B, S] of one forward; `mask` [B, >= S] covers what was cached before, too."""
    num_texts, width = len(mask), mask.shape[1] if token_ids is None else token_ids.shape[1]
    mask = mask.long()
    padding = (mask[:, -width:] == 0).reshape(-1).numpy()
    position = ((mask.cumsum(-1) - 1)[:, -width:] * mask[:, -width:]).reshape(-1).numpy()
    batch_row = np.repeat(np.arange(num_texts), width)
    tokens = None if token_ids is None else token_ids.reshape(-1).numpy()
    if subset is not None:
        padding, position, batch_row = padding[subset], position[subset], batch_row[subset]
        tokens = None if tokens is None else tokens[subset]
    if int(rows.sum()) != len(padding):
        yield f"{where}: {int(rows.sum())} rows for {len(padding)} tokens"
        return
    if not np.array_equal(decisions.is_padding[rows], padding):
        num_wrong = int((decisions.is_padding[rows] != padding).sum())
        yield f"{where}: is_padding differs from the attention mask in {num_wrong} rows"
    if has_positions and not np.array_equal(decisions.position[rows], position):
        yield f"{where}: positions {decisions.position[rows].tolist()}, expected {position.tolist()}"
    if tokens is not None and (
        decisions.token_id is None or not np.array_equal(decisions.token_id[rows][~padding], tokens[~padding])
    ):
        yield f"{where}: token ids are not those of the input"
    # The n-th row of the batch has one request, and no other row has it.
    pairs = set(zip(batch_row.tolist(), decisions.request_index[rows].tolist(), strict=True))
    if not len(pairs) == len({row for row, _ in pairs}) == len({request for _, request in pairs}):
        yield f"{where}: requests are not one for each row of the batch: {sorted(pairs)}"


def _texts(inputs: Mapping[str, Any], stack: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the token ids [B, S] of a stack (None for a model that is given embeddings) and its attention mask."""
    prefix = "decoder_" if stack == "decoder" and "decoder_input_ids" in inputs else ""
    token_ids = inputs.get(f"{prefix}input_ids")
    mask = inputs.get(f"{prefix}attention_mask")
    if mask is None:
        assert token_ids is not None
        mask = torch.ones_like(token_ids)
    return token_ids, mask


def _subset(inputs: Mapping[str, Any], module_name: str) -> _Rows | None:
    kinds, pool = inputs.get("moe_mm_token_type_ids"), module_name.rpartition(".")[2]
    if kinds is None or pool not in _POOLS:
        return None
    subset: _Rows = np.flatnonzero((kinds.reshape(-1) == _POOLS[pool]).numpy())
    return subset


def _is_text(inputs: Mapping[str, Any]) -> bool:
    """Whether positions count tokens: with images in between, many models count otherwise."""
    return set(inputs) <= _TEXT
