"""Rows drawn at random, and the same rows as plain Python tokens for slow references."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

ROUTED, DROPPED, SKIPPED, IDENTITY, UNUSED = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Case:
    """Columns, and E, k and Z by layer."""

    columns: dict[str, Any]
    num_experts: list[int]
    top_k: list[int]
    num_identity_experts: list[int]

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_identity_experts": self.num_identity_experts,
        }


@dataclass(frozen=True)
class Token:
    """One valid row."""

    request: str
    forward: int
    position: int
    phase: int
    token_id: int
    experts: frozenset[int]
    slots: tuple[tuple[int, int, int], ...]  # id, status, intended id


def tokens_of(case: Case, layer: int) -> list[Token]:
    """Return the valid rows of a layer in order, read one by one."""
    c, k, num = case.columns, case.top_k[layer], case.num_experts[layer]
    found = []
    for row in range(len(c["layer_index"])):
        if c["layer_index"][row] != layer or c["is_padding"][row]:
            continue
        slots = tuple(
            (int(c["expert_ids"][row][s]), int(c["slot_status"][row][s]), int(c["intended_expert_ids"][row][s]))
            for s in range(k)
        )
        found.append(
            Token(
                request=str(c["request_id"][row]),
                forward=int(c["forward_index"][row]),
                position=int(c["position"][row]),
                phase=int(c["phase"][row]),
                token_id=int(c["token_id"][row]),
                experts=frozenset(e for e, status, _ in slots if status == ROUTED and 0 <= e < num),
                slots=slots,
            )
        )
    return found


@st.composite
def cases(draw: st.DrawFn, *, max_layers: int = 2, min_top_k: int = 1) -> Case:
    """Draw layers of different E, k and Z over the same and over other tokens, with every kind of slot."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers = draw(st.integers(1, max_layers))
    num_tokens = draw(st.integers(0, 60))
    is_ragged = draw(st.booleans())
    num_experts = [draw(st.integers(max(2, min_top_k), 7)) for _ in range(layers)]
    top_k = [draw(st.integers(min_top_k, min(4, num))) for num in num_experts]
    identity = [draw(st.integers(0, 2)) for _ in range(layers)]
    width = max(top_k)
    names = np.array(["b", "a", ""], dtype=object)[: draw(st.integers(1, 3))]
    token = {
        "request_id": names[np.sort(rng.integers(0, len(names), num_tokens))],
        "forward_index": rng.integers(0, draw(st.integers(1, 3)), num_tokens).astype(np.uint64) + 5,
        "phase": np.full(num_tokens, draw(st.integers(0, 4)), np.uint8),
        # Repeated, missing and unordered positions, as of beams and of chunks.
        "position": rng.permutation(np.arange(num_tokens) % max(1, num_tokens * 3 // 4)).astype(np.uint32),
        "token_id": rng.integers(-1, 4, num_tokens).astype(np.int32),
        "is_padding": rng.random(num_tokens) < 0.1,
    }
    parts: list[dict[str, Any]] = []
    for layer in range(layers):
        own = (
            rng.permutation(num_tokens)[: num_tokens - draw(st.integers(0, 5))] if is_ragged else np.arange(num_tokens)
        )
        n, k, num = len(own), top_k[layer], num_experts[layer]
        scores = rng.random((n, num)) + 0.5 * rng.random(num)
        ids = np.full((n, width), -1, np.int32)
        ids[:, :k] = np.argsort(-scores, axis=1)[:, :k]
        intended = ids.copy()
        status = np.where(ids >= 0, ROUTED, UNUSED).astype(np.uint8)
        lost = rng.random(ids.shape) < 0.15
        kind = rng.choice([DROPPED, SKIPPED, UNUSED], ids.shape).astype(np.uint8)
        status = np.where(lost & (ids >= 0), kind, status).astype(np.uint8)
        ids = np.where(status == ROUTED, ids, -1).astype(np.int32)
        if identity[layer]:
            is_identity = (rng.random(ids.shape) < 0.1) & (status == ROUTED)
            ids = np.where(is_identity, num + rng.integers(0, identity[layer], ids.shape), ids).astype(np.int32)
            status = np.where(is_identity, IDENTITY, status).astype(np.uint8)
        part = {name: column[own] for name, column in token.items()}
        # Now and then another token at the same place, as where an encoder and a decoder meet.
        part["token_id"] = np.where(rng.random(n) < 0.05, 9, part["token_id"]).astype(np.int32)
        part |= {
            "layer_index": np.full(n, layer, np.uint32),
            "expert_ids": ids,
            "slot_status": status,
            "intended_expert_ids": intended,
        }
        parts.append(part)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Case(columns, num_experts, top_k, identity)


def shuffled(case: Case, seed: int = 7) -> Case:
    """Return the same rows in another order."""
    order = np.random.default_rng(seed).permutation(len(case.columns["layer_index"]))
    columns = {name: column[order] for name, column in case.columns.items()}
    return Case(columns, case.num_experts, case.top_k, case.num_identity_experts)
