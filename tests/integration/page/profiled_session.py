"""A session of three layers that is profiled: its times are known, and one layer is slow."""

import math
from typing import Any

import grpc
import numpy as np
from contract.gateway.doubles import AnalyzerDouble

from moe_debugger.v1 import analyzer_pb2 as apb
from moe_debugger.v1 import routing_pb2 as rpb
from moe_debugger.v1 import session_pb2 as spb

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
SOURCE = "01k000000000000000000rank0"
# Milliseconds of a block's parts, by layer; the last one's experts take five times as long.
PARTS = [
    {"router": 0.06, "experts": 0.41, "shared": 0.08, "rest": 0.05},
    {"router": 0.07, "experts": 0.43, "shared": 0.08, "rest": 0.04},
    {"router": 0.06, "experts": 2.10, "shared": 0.08, "rest": 0.06},
]


class ProfiledDouble(AnalyzerDouble):
    """Answers for one session."""

    def __init__(self, session_id: str) -> None:
        super().__init__()
        self.is_profiled = True
        self.is_measured = False
        self.has_slow_layer = True
        self.series_error = ""
        self.add_session(session_id, "demo")

    def snapshot(self, session_id: str) -> spb.SessionSnapshot:
        counts = np.full(NUM_EXPERTS, 100, "<u8")
        return spb.SessionSnapshot(
            session=self.sessions[session_id],
            sequence=3,
            layers=[
                spb.LayerSnapshot(
                    description=rpb.LayerDescription(
                        layer_index=index,
                        model_layer_index=index,
                        module_name=f"model.layers.{index}.mlp",
                        stack="decoder",
                        num_experts=NUM_EXPERTS,
                        top_k=TOP_K,
                        site="mlp",
                    ),
                    num_tokens=400,
                    expert_counts=counts.tobytes(),
                    recent_num_tokens=400,
                    recent_expert_counts=counts.tobytes(),
                    mean_router_entropy=1.2,
                    mean_top1_probability=0.6,
                )
                for index in range(NUM_LAYERS)
            ],
            account=spb.Account(num_produced=2400, num_counted=2400),
            sources=[spb.Source(source_id=SOURCE, kind="worker", is_live=True, sampling_rate=1.0, num_counted=2400)],
            last_step=90,
            recent_window_s=60,
        )

    async def GetHistory(self, request: Any, context: Any) -> apb.AnalyzerServiceGetHistoryResponse:
        await self._check(request, context)
        return apb.AnalyzerServiceGetHistoryResponse()

    async def ListRequests(self, request: Any, context: Any) -> apb.AnalyzerServiceListRequestsResponse:
        await self._check(request, context)
        return apb.AnalyzerServiceListRequestsResponse()

    async def GetSeries(self, request: Any, context: Any) -> apb.AnalyzerServiceGetSeriesResponse:
        await self._check(request, context)
        if self.series_error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.series_error)
        if not self.is_profiled:
            return apb.AnalyzerServiceGetSeriesResponse()
        names = set(request.names)
        found = [one for one in self._series() if one.name in names or not (names or one.is_per_expert)]
        return apb.AnalyzerServiceGetSeriesResponse(series=found)

    def _series(self) -> list[spb.Series]:
        model = {
            "forward_ms": 6.4, "num_forwards": 256.0, "overhead_share": 0.023, "step_experts": 18.0,
            "step_bytes": 5.3e6, "intensity": 0.5,
            "gflops": 1.8, "gbps": 3.6, "peak_gflops": 38.0, "peak_gbps": 9.5,
        }  # fmt: skip
        series = [_line(name, [value]) for name, value in model.items()]
        for layer, parts in enumerate(PARTS):
            total = sum(parts.values())
            own = {f"{name}_ms": value for name, value in parts.items()} | {
                "layer_ms": total, "layer_p95_ms": 1.4 * total, "layer_share": total / 6.4,
                "layer_distinct_experts": 6.0, "layer_intensity": 0.5 + 0.2 * layer,
                "layer_gflops": 2.0 / (1 + 3 * (layer == 2)), "layer_gbps": 4.0 / (1 + 3 * (layer == 2)),
                "layer_calls": 256.0, "estimate_error": 0.12, "estimate_fitted": 205.0, "estimate_held_out": 49.0,
                "estimate_worst": 1.3, "estimate_worst_rows": 1200.0, "estimate_unknown_rows": 64.0,
                "estimate_merged": 4.0,
            }  # fmt: skip
            series += [_line(name, [value], layer) for name, value in own.items()]
            times = 0.04 + 0.01 * np.arange(NUM_EXPERTS)
            times[5] = math.nan
            kind = "expert_ms" if self.is_measured else "expert_ms_estimated"
            series.append(_line(kind, times.tolist(), layer, is_per_expert=True))
        last = 5.0 if self.has_slow_layer else math.nan
        for ending, values in {"": [5.1, last], "_low": [4.2, last - 1], "_calls": [256.0, last * 0 + 256]}.items():
            series.append(_line(f"bottleneck_slow_layer{ending}", values, 2))
        if self.is_measured:
            slow = {"": {1: 2.5, 6: 8.0}, "_low": {1: 2.2, 6: 7.0}, "_calls": {1: 90.0, 6: 120.0}}
            for ending, known in slow.items():
                row = [known.get(expert, math.nan) for expert in range(NUM_EXPERTS)]
                series.append(_line(f"bottleneck_slow_expert{ending}", row, 0, is_per_expert=True))
        for ending, value in {"": 0.95, "_low": 0.93, "_calls": 256.0}.items():
            series.append(_line(f"bottleneck_below_roof{ending}", [value]))
        return series


def _line(name: str, values: list[float], layer: int | None = None, *, is_per_expert: bool = False) -> spb.Series:
    num_values = len(values) if is_per_expert else 1
    steps = np.arange(len(values) // num_values, dtype="<u8") + 80
    return spb.Series(
        source_id=SOURCE,
        name=f"profile_{name}",
        layer_index=layer,
        num_values=num_values,
        is_per_expert=is_per_expert,
        step=steps.tobytes(),
        value=np.array(values, "<f8").tobytes(),
    )
