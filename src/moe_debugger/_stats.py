"""What the library answers: routing, experts and performance of a session, as typed values."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_debugger._tables import bar, html_table, text_table, to_data_frame
from moe_debugger.analysis import LayerState
from moe_debugger.capture.discovery import LayerInfo

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ExpertMetrics",
    "ExpertRow",
    "LayerRoutingStats",
    "PerformanceMetrics",
    "RoutingStats",
    "layer_routing_stats",
]


@dataclass(frozen=True, slots=True, eq=False)
class LayerRoutingStats:
    """Load and confidence of one MoE layer, over valid (not padded) tokens.

    Attributes:
        expert_counts: [E] uint64, assignments per expert.
        load_entropy: entropy of the load over experts, in nats; ln(E) is perfectly even.
        effective_experts: exp(load_entropy), 1..E.
        hottest_load_ratio: share of the hottest expert over the fair share 1/E.
        unused_experts: experts without an assignment so far, which is not yet "dead".
        mean_router_entropy: mean per-token entropy of the router's probabilities, in nats; NaN where not known.
        mean_top1_probability: mean per-token probability of the first choice; NaN where not known.
        num_dropped_slots, num_skipped_slots, num_identity_slots, num_unused_slots: slots that are no load, by what
            became of them. The counts and these add up to ``num_tokens * top_k``.
        mean_probability: [E] float64, mean router probability of each expert; NaN where not known.
    """

    info: LayerInfo
    num_tokens: int
    num_padding_tokens: int
    expert_counts: npt.NDArray[np.uint64]
    load_entropy: float
    effective_experts: float
    hottest_expert: int
    hottest_load_ratio: float
    unused_experts: tuple[int, ...]
    mean_router_entropy: float
    mean_top1_probability: float
    mean_margin: float
    num_dropped_slots: int = 0
    num_skipped_slots: int = 0
    num_identity_slots: int = 0
    num_unused_slots: int = 0
    mean_probability: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def share_of_slots(self, num_slots: int) -> float:
        """Return the share of all slots of valid tokens; NaN before the first token."""
        total = self.num_tokens * max(1, self.info.top_k)
        return num_slots / total if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON but for NaN."""
        return {
            "layer_index": self.info.layer_index,
            "module_name": self.info.module_name,
            "num_experts": self.info.num_experts,
            "top_k": self.info.top_k,
            "num_tokens": self.num_tokens,
            "num_padding_tokens": self.num_padding_tokens,
            "expert_counts": [int(count) for count in self.expert_counts],
            "load_entropy": self.load_entropy,
            "effective_experts": self.effective_experts,
            "hottest_expert": self.hottest_expert,
            "hottest_load_ratio": self.hottest_load_ratio,
            "unused_experts": list(self.unused_experts),
            "mean_router_entropy": self.mean_router_entropy,
            "mean_top1_probability": self.mean_top1_probability,
            "mean_margin": self.mean_margin,
            "num_dropped_slots": self.num_dropped_slots,
            "num_skipped_slots": self.num_skipped_slots,
            "num_identity_slots": self.num_identity_slots,
            "num_unused_slots": self.num_unused_slots,
            "num_shared_experts": self.info.num_shared_experts,
            "num_identity_experts": self.info.num_identity_experts,
            "mean_probability": [float(value) for value in self.mean_probability],
        }


_ROUTING_HEADERS = (
    "layer", "module", "experts", "top-k", "tokens", "effective experts", "hottest", "hottest / fair", "unused",
    "router entropy", "top-1 probability",
)  # fmt: skip
# Shown only where a layer of the model has such a thing; none of them is load.
_SLOT_HEADERS = {
    "num_dropped_slots": "dropped",
    "num_skipped_slots": "skipped",
    "num_unused_slots": "unused slots",
    "num_identity_slots": "zero experts",
}


@dataclass(frozen=True, slots=True, eq=False)
class RoutingStats:
    """Routing of a session so far, per layer; layers are never pooled.

    Attributes:
        num_tokens: valid tokens of the layer that has seen most.
        num_requests: requests seen, right to a few per cent.
        sampling_rate: share of the requests that were captured.
    """

    session_name: str
    num_forwards: int
    num_tokens: int
    num_requests: int
    sampling_rate: float
    layers: tuple[LayerRoutingStats, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "session_name": self.session_name,
            "num_forwards": self.num_forwards,
            "num_tokens": self.num_tokens,
            "num_requests": self.num_requests,
            "sampling_rate": self.sampling_rate,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row per layer.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        rows = [layer.to_dict() for layer in self.layers]
        return to_data_frame({name: [row[name] for row in rows] for name in rows[0]} if rows else {})

    @property
    def _slot_names(self) -> list[str]:
        return [name for name in _SLOT_HEADERS if any(getattr(layer, name) for layer in self.layers)]

    @property
    def _headers(self) -> tuple[str, ...]:
        shared = ("shared experts",) if any(layer.info.num_shared_experts for layer in self.layers) else ()
        return (*_ROUTING_HEADERS, *shared, *(_SLOT_HEADERS[name] for name in self._slot_names))

    def _extra(self, layer: LayerRoutingStats) -> list[object]:
        values: list[object] = []
        if any(one.info.num_shared_experts for one in self.layers):
            # They run for every token: there is nothing to be hot or cold about.
            values.append(layer.info.num_shared_experts)
        for name in self._slot_names:
            share = layer.share_of_slots(getattr(layer, name))
            values.append(f"{share:.1%}" if share == share else "–")
        return values

    def _rows(self) -> list[list[object]]:
        return [
            [
                layer.info.layer_index,
                layer.info.module_name,
                layer.info.num_experts,
                layer.info.top_k,
                layer.num_tokens,
                layer.effective_experts,
                f"E{layer.hottest_expert}" if layer.num_tokens else "–",
                layer.hottest_load_ratio,
                len(layer.unused_experts),
                layer.mean_router_entropy,
                layer.mean_top1_probability,
                *self._extra(layer),
            ]
            for layer in self.layers
        ]

    @property
    def _title(self) -> str:
        sampled = "" if self.sampling_rate >= 1 else f", {self.sampling_rate:.0%} of the requests sampled"
        return (
            f"Routing of {self.session_name}: {self.num_tokens:,} tokens in {self.num_forwards:,} forwards, "
            f"about {self.num_requests:,} requests{sampled}"
        )

    def __str__(self) -> str:
        return f"{self._title}\n{text_table(self._headers, self._rows())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._title, self._headers, self._rows())


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One expert of one layer.

    Attributes:
        share: of the layer's assignments; NaN before the first.
        load_ratio: share over the fair share 1/E.
        mean_gate_weight: mean of the weights as applied; NaN where the expert was not used.
        mean_probability: mean router probability over all tokens; NaN where not known.
        expert_parallel_rank: the rank that computes the expert; None where every rank computes all of them.
    """

    layer_index: int
    expert_id: int
    num_assignments: int
    share: float
    load_ratio: float
    mean_gate_weight: float
    mean_probability: float
    expert_parallel_rank: int | None = None

    @property
    def is_unused(self) -> bool:
        """True where the expert has no assignment so far."""
        return self.num_assignments == 0


_EXPERT_HEADERS = ("layer", "expert", "assignments", "share", "load / fair", "load", "gate weight", "probability")


@dataclass(frozen=True, slots=True)
class ExpertMetrics:
    """Load of every routed expert of every MoE layer."""

    session_name: str
    experts: tuple[ExpertRow, ...]

    def layer(self, layer_index: int) -> tuple[ExpertRow, ...]:
        """Return the experts of one layer, by id."""
        return tuple(row for row in self.experts if row.layer_index == layer_index)

    def hottest(self, n: int = 10) -> tuple[ExpertRow, ...]:
        """Return the `n` experts with the highest load over the fair share."""
        used = [row for row in self.experts if row.num_assignments]
        return tuple(sorted(used, key=lambda row: -row.load_ratio)[:n])

    def unused(self) -> tuple[ExpertRow, ...]:
        """Return the experts without an assignment so far."""
        return tuple(row for row in self.experts if row.is_unused)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "session_name": self.session_name,
            "experts": [{name: getattr(row, name) for name in ExpertRow.__dataclass_fields__} for row in self.experts],
        }

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row per layer and expert.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        names = ExpertRow.__dataclass_fields__
        return to_data_frame({name: [getattr(row, name) for row in self.experts] for name in names})

    def _rows(self) -> list[list[object]]:
        peak = max((row.load_ratio for row in self.experts if row.num_assignments), default=1.0)
        return [
            [
                row.layer_index,
                row.expert_id,
                row.num_assignments,
                row.share,
                row.load_ratio,
                bar(row.load_ratio / peak if row.num_assignments else 0.0, 16),
                row.mean_gate_weight,
                row.mean_probability,
            ]
            for row in self.experts
        ]

    def __str__(self) -> str:
        return f"Experts of {self.session_name}\n{text_table(_EXPERT_HEADERS, self._rows())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(f"Experts of {self.session_name}", _EXPERT_HEADERS, self._rows())


@dataclass(frozen=True, slots=True)
class PerformanceMetrics:
    """What the model did and what watching it cost, measured by the capture itself.

    Attributes:
        num_tokens: tokens run through the model, padding included.
        forward_s: wall time within forwards of the model.
        tokens_per_s: num_tokens over forward_s; NaN before the first forward.
        hook_s: time within hooks, a part of forward_s.
        hook_time_share: hook_s over forward_s, 0..1.
        capture_s: time that the capture's own thread worked beside the model.
        num_dropped: decisions dropped, by reason.
        problems: what the capture could not read, with how often.
    """

    num_forwards: int = 0
    num_tokens: int = 0
    num_decisions: int = 0
    forward_s: float = 0.0
    tokens_per_s: float = float("nan")
    hook_s: float = 0.0
    hook_time_share: float = 0.0
    capture_s: float = 0.0
    buffer_peak_bytes: int = 0
    buffer_limit_bytes: int = 0
    num_rows_kept: int = 0
    num_rows_not_kept: int = 0
    num_dropped: dict[str, int] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        return to_data_frame({name: [value] for name, value in self.to_dict().items()})

    def _rows(self) -> list[list[object]]:
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in self.num_dropped.items()) or "none"
        problems = "; ".join(f"{text} ({number}x)" for text, number in self.problems.items()) or "none"
        return [
            ["forwards", f"{self.num_forwards:,}"],
            ["tokens", f"{self.num_tokens:,}"],
            ["decisions", f"{self.num_decisions:,}"],
            ["forward time", f"{self.forward_s:.3f} s"],
            ["tokens per second", f"{self.tokens_per_s:,.0f}"],
            ["time in hooks", f"{self.hook_s * 1e3:.2f} ms ({self.hook_time_share:.2%} of the forwards)"],
            ["time of the capture's thread", f"{self.capture_s * 1e3:.2f} ms, beside the model"],
            ["buffer, at most used", f"{self.buffer_peak_bytes:,} of {self.buffer_limit_bytes:,} bytes"],
            ["rows kept / not kept", f"{self.num_rows_kept:,} / {self.num_rows_not_kept:,}"],
            ["decisions dropped", dropped],
            ["problems", problems],
        ]

    def __str__(self) -> str:
        return f"Performance\n{text_table(('measure', 'value'), self._rows())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table("Performance", ("measure", "value"), self._rows())


def layer_routing_stats(info: LayerInfo, layer: LayerState) -> LayerRoutingStats:
    """Return load and confidence of one layer."""
    counts = layer.counts
    total = int(counts.sum())
    shares = counts.astype(np.float64) / total if total else np.zeros(len(counts))
    used = shares[shares > 0]
    entropy = float(-(used * np.log(used)).sum()) if total else float("nan")
    return LayerRoutingStats(
        info=info,
        num_tokens=layer.num_tokens,
        num_padding_tokens=layer.num_padding,
        expert_counts=counts.copy(),
        load_entropy=entropy,
        effective_experts=float(np.exp(entropy)),
        hottest_expert=int(counts.argmax()),
        hottest_load_ratio=float(shares.max()) * len(counts) if total else float("nan"),
        unused_experts=tuple(int(expert) for expert in np.flatnonzero(counts == 0)),
        mean_router_entropy=layer.router_entropy.mean,
        mean_top1_probability=layer.top1_probability.mean,
        mean_margin=layer.margin.mean,
        num_dropped_slots=layer.num_dropped_slots,
        num_skipped_slots=layer.num_skipped_slots,
        num_identity_slots=layer.num_identity_slots,
        num_unused_slots=layer.num_unused_slots,
        mean_probability=layer.mean_probability,
    )
