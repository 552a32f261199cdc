"""Small MoE models whose cost is known: experts as modules that may take longer, and a clock that only they move."""

import time
from typing import Any

import torch
from torch import nn

__all__ = ["FakeTime", "ListModel", "SlowExpert"]


class FakeTime:
    """A clock in nanoseconds that stands still until somebody moves it."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000

    def mark(self, *_: Any) -> int:
        return self.now_ns

    def advance(self, ns: int) -> None:
        self.now_ns += ns


class SlowExpert(nn.Module):
    """A linear expert that also sleeps, or moves a clock, for each call and each row."""

    def __init__(self, size: int, clock: FakeTime | None = None, call_ns: int = 0, row_ns: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        self.clock, self.call_ns, self.row_ns = clock, call_ns, row_ns

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        took_ns = self.call_ns + self.row_ns * hidden.shape[0]
        if self.clock is not None:
            self.clock.advance(took_ns)
        elif took_ns:
            time.sleep(took_ns / 1e9)
        return self.linear(hidden)  # type: ignore[no-any-return]


class _Gate(nn.Linear):
    def __init__(self, size: int, num_experts: int, clock: FakeTime | None, took_ns: int) -> None:
        super().__init__(size, num_experts, bias=False)
        self.clock, self.took_ns = clock, took_ns

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.clock is not None:
            self.clock.advance(self.took_ns)
        return super().forward(input)


class ListBlock(nn.Module):
    """Mixtral's first code: a gate, and a loop over the modules of a list."""

    def __init__(self, size: int, experts: list[nn.Module], top_k: int, clock: FakeTime | None) -> None:
        super().__init__()
        self.top_k = top_k
        self.clock = clock
        self.gate = _Gate(size, len(experts), clock, 1000)
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = torch.topk(torch.softmax(self.gate(rows), dim=-1), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        self._glue(20)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(ids == index)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
            self._glue(3)
        self._glue(7)
        return out.reshape(hidden.shape)

    def _glue(self, took_ns: int) -> None:
        if self.clock is not None:
            self.clock.advance(took_ns)


class ListModel(nn.Module):
    """Layers of `ListBlock`; `costs` gives (ns a call, ns a row) of an expert by (layer, expert)."""

    def __init__(
        self,
        num_layers: int = 2,
        num_experts: int = 4,
        top_k: int = 2,
        size: int = 16,
        clock: FakeTime | None = None,
        costs: dict[tuple[int, int], tuple[int, int]] | None = None,
        default: tuple[int, int] = (0, 0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        found = costs or {}
        self.embed = nn.Embedding(64, size)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mlp": ListBlock(
                        size,
                        [SlowExpert(size, clock, *found.get((layer, e), default)) for e in range(num_experts)],
                        top_k,
                        clock,
                    )
                }
            )
            for layer in range(num_layers)
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer["mlp"](hidden)  # type: ignore[index]
        return hidden
