"""A tiny random Mixtral, a stand-in for the debugger that only names rows, and an independent recount."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM


class RowRecount:
    """Counts, inside the model, the valid tokens that each request's rows brought to the experts.

    It takes rows' names from `requests` as `MoEDebugger` does, and everything else from the tensors of the forward.
    """

    def __init__(self, model: Any) -> None:
        self.tokens: Counter[str] = Counter()
        self.routed: Counter[str] = Counter()
        self.positions: dict[str, list[int]] = {}
        self.phases: dict[str, list[str]] = {}
        self.batches: list[tuple[str, tuple[str, ...]]] = []
        self._names: list[str] = []
        self._phase = ""
        self._valid: torch.Tensor | None = None
        model.register_forward_pre_hook(self._on_model, with_kwargs=True)
        model.model.layers[0].mlp.gate.register_forward_hook(self._on_router)

    @contextlib.contextmanager
    def requests(self, request_ids: Sequence[str | None], *, phase: str | None = None) -> Iterator[None]:
        self._names, self._phase = [str(name) for name in request_ids], str(phase)
        self.batches.append((self._phase, tuple(self._names)))
        try:
            yield
        finally:
            self._names = []

    def _on_model(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._names:
            return
        num_new = kwargs["input_ids"].shape[1]
        valid_rows: torch.Tensor = kwargs["attention_mask"][:, -num_new:].bool()
        self._valid = valid_rows
        assert valid_rows.shape[0] == len(self._names)
        for row, name in enumerate(self._names):
            valid = valid_rows[row]
            self.tokens[name] += int(valid.sum())
            self.positions.setdefault(name, []).extend(kwargs["position_ids"][row][valid].tolist())
            self.phases.setdefault(name, []).append(self._phase)

    def _on_router(self, module: Any, args: Any, output: Any) -> None:
        if not self._names:
            return
        assert self._valid is not None
        rows = output[2].shape[0]
        assert rows == self._valid.numel()
        for row, name in enumerate(self._names):
            self.routed[name] += int(self._valid[row].sum())


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        initializer_range=0.5,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def recount(model: MixtralForCausalLM) -> Iterator[RowRecount]:
    before = [(module, dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()]
    yield RowRecount(model)
    for module, pre_hooks, hooks in before:
        for live, kept in ((module._forward_pre_hooks, pre_hooks), (module._forward_hooks, hooks)):
            for key in [key for key in live if key not in kept]:
                del live[key]
