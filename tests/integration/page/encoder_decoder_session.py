"""A session with everything that the page tells apart, behind the gateway: an analyzer whose answers the tests know.

An encoder and a decoder of different E and k with equal model layer indexes, a layer of routed attention, zero and
shared experts, a layer that was not seen, four ranks of which one is a replica, a failed health check, and training
series.
"""

import math
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from contract.gateway.doubles import AnalyzerDouble

from moe_debugger.v1 import analyzer_pb2 as apb
from moe_debugger.v1 import routing_pb2 as rpb
from moe_debugger.v1 import session_pb2 as spb

ENCODER_TOKENS, DECODER_TOKENS = 600, 240
UNSEEN = 3
NUM_RANKS = 4
# layer_index, model_layer_index, module, stack, E, k, shared, zero experts, site
LAYERS = [
    (0, 0, "encoder.layers.0.mlp", "encoder", 16, 1, 0, 0, "mlp"),
    (1, 1, "encoder.layers.1.mlp", "encoder", 16, 1, 0, 0, "mlp"),
    (2, 0, "decoder.layers.0.mlp", "decoder", 8, 2, 1, 2, "mlp"),
    (3, 1, "decoder.layers.1.mlp", "decoder", 8, 2, 1, 2, "mlp"),
    (4, 2, "decoder.layers.2.self_attn", "decoder", 4, 2, 0, 0, "attention"),
]
ZERO_SLOTS = 60
HEALTH = ["conservation", "distinctness", "range", "weights", "layers", "gaps", "drops", "overhead"]


def expert_counts(layer: int) -> npt.NDArray[np.int64]:
    """Return [E] the assignments of one layer."""
    _, _, _, stack, num_experts, top_k, _, num_zero, _ = LAYERS[layer]
    if layer == UNSEEN:
        return np.zeros(num_experts, np.int64)
    slots = (ENCODER_TOKENS if stack == "encoder" else DECODER_TOKENS) * top_k - (ZERO_SLOTS if num_zero else 0)
    share = 1.0 / (1.0 + (np.arange(num_experts) * 5 + layer) % num_experts)
    if layer == 0:
        share[7] = 0.0
    counts: npt.NDArray[np.int64] = np.floor(share / share.sum() * slots).astype(np.int64)
    counts[int(counts.argmax())] += slots - counts.sum()
    return counts


class EncoderDecoderDouble(AnalyzerDouble):
    """Answers for one session; `num_steps` is how far its training is."""

    def __init__(self, session_id: str, *, level: "rpb.CaptureLevel.ValueType" = rpb.CAPTURE_LEVEL_ROUTES) -> None:
        super().__init__()
        self.level = level
        self.num_steps = 120
        self.has_series = True
        self.series_error = ""
        self.add_session(session_id, "pretrain-7")

    def snapshot(self, session_id: str) -> spb.SessionSnapshot:
        counts = [expert_counts(layer) for layer in range(len(LAYERS))]
        return spb.SessionSnapshot(
            session=self.sessions[session_id],
            sequence=7,
            layers=[self._layer(layer, own) for layer, own in enumerate(counts)],
            account=spb.Account(num_produced=2400, num_counted=2340, num_in_flight=60),
            sources=[self._source(rank) for rank in range(NUM_RANKS)],
            findings=[self._the_finding()],
            last_step=self.num_steps,
            recent_window_s=60,
        )

    def _layer(self, layer: int, counts: npt.NDArray[np.int64]) -> spb.LayerSnapshot:
        index, model_index, module, stack, num_experts, top_k, shared, zero, site = LAYERS[layer]
        tokens = 0 if layer == UNSEEN else ENCODER_TOKENS if stack == "encoder" else DECODER_TOKENS
        owners = [expert * 2 // num_experts for expert in range(num_experts)]
        return spb.LayerSnapshot(
            description=rpb.LayerDescription(
                layer_index=index,
                model_layer_index=model_index,
                module_name=module,
                stack=stack,
                num_experts=num_experts,
                top_k=top_k,
                num_shared_experts=shared,
                num_identity_experts=zero,
                expert_parallel_ranks=owners,
                site=site,
            ),
            num_tokens=tokens,
            expert_counts=counts.astype("<u8").tobytes(),
            recent_num_tokens=tokens,
            recent_expert_counts=counts.astype("<u8").tobytes(),
            num_identity_slots=ZERO_SLOTS if zero and tokens else 0,
            mean_router_entropy=math.nan if self.level == rpb.CAPTURE_LEVEL_COUNTS else 1.2,
            mean_top1_probability=math.nan if self.level == rpb.CAPTURE_LEVEL_COUNTS else 0.6,
            expert_parallel_counts=[int(counts[np.array(owners) == rank].sum()) for rank in range(2)],
        )

    def _source(self, rank: int) -> spb.Source:
        source = spb.Source(
            source_id=f"01k000000000000000000rank{rank}",
            kind="training",
            host_name="node",
            process_id=100 + rank,
            is_live=True,
            level=self.level,
            sampling_rate=1.0,
            num_counted=0 if rank == 3 else 780,
            hook_time_share=0.012,
            coordinates=rpb.ParallelCoordinates(
                global_rank=rank,
                world_size=NUM_RANKS,
                data_parallel_rank=rank // 2,
                tensor_parallel_rank=0,
                expert_parallel_rank=rank % 2,
                replica_of_rank=2 if rank == 3 else None,
            ),
        )
        for name in HEALTH:
            check = source.checks.add(name=name, status=rpb.CHECK_STATUS_OK, num_checked=1200, unit="slots")
            if name == "layers" and rank == 0:
                check.status, check.num_violations = rpb.CHECK_STATUS_FAILED, 24
                check.unit = "layers x forwards"
                check.example = "layer 3 (decoder.layers.1.mlp): its hook saw 0 of the 24 tokens that the decoder saw"
        return source

    def _the_finding(self) -> spb.Finding:
        return spb.Finding(
            rule_id="MOE-R012",
            kind=spb.FINDING_KIND_CAPTURE_UNHEALTHY,
            severity=spb.SEVERITY_CRITICAL,
            code="capture_unhealthy",
            args={"reasons": "1 check failed"},
            evidence=[spb.EvidenceRow(metric="capture_layers", value=24, rule="= 0", sample_size=1200, unit="")],
            last_seen_at_unix_ns=1_700_000_000_000_000_000,
            num_occurrences=3,
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
        if not self.has_series:
            return apb.AnalyzerServiceGetSeriesResponse()
        names = set(request.names)
        found = [one for one in self._series() if one.name in names or not (names or one.is_per_expert)]
        for one in found:
            width = 8 * one.num_values
            one.step, one.value = one.step[-8 * request.max_points :], one.value[-width * request.max_points :]
        return apb.AnalyzerServiceGetSeriesResponse(series=found, num_points_not_kept=5)

    def _series(self) -> list[spb.Series]:
        steps = np.arange(1, self.num_steps + 1)
        noise = np.sin(steps * 12.9898) * 0.05
        series = []
        for rank in range(2):
            model = {
                "loss": 2.0 + 8.0 * np.exp(-steps / 40) + noise * (1 + rank),
                "lr": np.where(steps < 20, steps / 20, 1.0) * 3e-4,
                "balance_loss": 1.0 + 0.6 * np.exp(-steps / 60) + noise / 4,
                "balance_coef": np.full(len(steps), 0.01),
                "grad_norm": 1.2 + np.abs(noise) * 8,
            }
            series += [_line(rank, name, steps, values) for name, values in model.items()]
        evaluations = steps[steps % 40 == 0]
        series.append(_line(0, "eval_loss", evaluations, 2.2 + 8.0 * np.exp(-evaluations / 40)))
        for layer, _, _, _, num_experts, *_ in LAYERS:
            norm = (0.4 + 0.15 * layer) * np.exp(-steps / 200) * (1 + 4 * np.abs(noise))
            if layer == UNSEEN:
                norm = np.full(len(steps), math.nan)
            series.append(_line(0, "router_gradient_norm", steps, norm, layer))
            series.append(_line(0, "router_weight_norm", steps, 3.0 + layer + steps / 400, layer))
            if layer == 2:
                series.append(_line(0, "selection_bias_min", steps, -steps / 5000, layer))
                series.append(_line(0, "selection_bias_max", steps, steps / 4000, layer))
            experts = np.outer(norm, 0.3 + 0.1 * np.arange(num_experts))
            series.append(_line(0, "expert_gradient_norm", steps, experts, layer, is_per_expert=True))
        return series


def _line(
    rank: int,
    name: str,
    steps: npt.NDArray[Any],
    values: npt.NDArray[Any],
    layer: int | None = None,
    *,
    is_per_expert: bool = False,
) -> spb.Series:
    return spb.Series(
        source_id=f"01k000000000000000000rank{rank}",
        global_rank=rank,
        name=name,
        layer_index=layer,
        num_values=values.shape[1] if is_per_expert else 1,
        is_per_expert=is_per_expert,
        step=steps.astype("<u8").tobytes(),
        value=values.astype("<f8").tobytes(),
    )
