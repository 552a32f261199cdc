"""A source for tests with a ledger of its own: it counts what it sends, slot by slot, without the product's code."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import nats
import numpy as np

from moe_debugger.v1 import control_pb2 as control
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns, encode_batch, format_version
from moe_debugger.wire.ids import new_id
from moe_debugger.wire.subjects import event_subject, open_session_subject

__all__ = ["LedgerSource", "connect", "open_session", "publish"]


async def open_session(client: Any, name: str, model: str = "test-model") -> str:
    """Ask an analyzer for a session, as the publisher does."""
    request = control.OpenSessionRequest(format_version=format_version(), name=name, model_name=model)
    answer = await client.request(open_session_subject("default"), request.SerializeToString(), timeout=10)
    response = control.OpenSessionResponse.FromString(answer.data)
    assert not response.error, response.error
    return str(response.session_id)


class LedgerSource:
    """Makes messages and keeps the truth about them: `load[layer, expert]`, `request_load[request, layer, expert]`."""

    def __init__(self, session_id: str, *, layers: int = 3, experts: int = 8, top_k: int = 2, seed: int = 0) -> None:
        self.session_id, self.source_id = session_id, new_id()
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.load: Counter[tuple[int, int]] = Counter()
        self.request_load: Counter[tuple[str, int, int]] = Counter()
        self.request_tokens: Counter[str] = Counter()
        self.routes: dict[tuple[str, int], list[list[int]]] = {}
        self.num_decisions = 0
        self.num_padding = 0
        self.sequence = 0
        self.step = 0
        self._positions: Counter[str] = Counter()
        self._random = np.random.default_rng(seed)

    @property
    def subject(self) -> str:
        return event_subject("default", self.session_id, self.source_id)

    def message(self, **payload: Any) -> tuple[str, bytes, str]:
        """Return (subject, payload, message id) of the next message."""
        self.sequence += 1
        message = pb.SourceMessage(
            format_version=format_version(), source_id=self.source_id, sequence=self.sequence, **payload
        )
        return self.subject, message.SerializeToString(), f"{self.source_id}-{self.sequence}"

    def manifest(self, expert_ranks: Sequence[int] = ()) -> tuple[str, bytes, str]:
        return self.message(
            manifest=pb.SourceManifest(
                format_version=format_version(),
                source_id=self.source_id,
                session_id=self.session_id,
                model_name="test-model",
                model_type="mixtral",
                layers=[
                    pb.LayerDescription(
                        layer_index=i,
                        num_experts=self.experts,
                        top_k=self.top_k,
                        module_name=f"l{i}",
                        expert_parallel_ranks=expert_ranks,
                    )
                    for i in range(self.layers)
                ],
                level=pb.CAPTURE_LEVEL_ROUTES_TOKENS,
                sampling_rate=1.0,
                kind="test",
                started_at_unix_ns=1_000,
            )
        )

    def status(self) -> tuple[str, bytes, str]:
        counters = pb.SourceCounters(num_produced=self.num_decisions, num_published=self.num_decisions)
        return self.message(
            status=pb.SourceStatus(
                counters=counters,
                last_step=self.step,
                is_healthy=True,
                series={"loss": 0.5},
                series_points=[pb.SeriesPoint(step=self.step, name="loss", values=[0.5])],
            )
        )

    def goodbye(self, *, closes_session: bool = False) -> tuple[str, bytes, str]:
        counters = pb.SourceCounters(num_produced=self.num_decisions, num_published=self.num_decisions)
        return self.message(goodbye=pb.SourceGoodbye(counters=counters, closes_session=closes_session))

    def batch(self, requests: list[str] | None = None, tokens: int = 12) -> tuple[str, bytes, str]:
        """Return a batch of random routes over `requests`; about one row in eight is padding."""
        requests = requests or ["request-a", "request-b"]
        self.step += 1
        index = self._random.integers(0, len(requests), tokens).astype(np.uint32)
        padding = self._random.random(tokens) < 0.125
        position = np.zeros(tokens, np.uint32)
        for row in range(tokens):
            name = requests[int(index[row])]
            if not padding[row]:
                position[row] = self._positions[name]
                self._positions[name] += 1
                self.request_tokens[name] += 1
        token_id = self._random.integers(0, 256, tokens).astype(np.uint32)
        layers = []
        for layer in range(self.layers):
            scores = self._random.random((tokens, self.experts))
            ids = np.argsort(scores, axis=1)[:, : self.top_k].astype(np.int32)
            layers.append(
                LayerColumns(
                    layer_index=layer,
                    num_experts=self.experts,
                    expert_ids=ids,
                    gate_weights=np.full((tokens, self.top_k), 0.5, np.float32),
                    router_entropy=np.full(tokens, 1.25, np.float32),
                    top1_probability=np.full(tokens, 0.5, np.float32),
                )
            )
            for row in range(tokens):
                self.num_decisions += 1
                if padding[row]:
                    self.num_padding += 1
                    continue
                name = requests[int(index[row])]
                self.routes.setdefault((name, int(position[row])), []).append(ids[row].tolist())
                for expert in ids[row].tolist():
                    self.load[layer, expert] += 1
                    self.request_load[name, layer, expert] += 1
        columns = RoutingColumns(
            step=np.full(tokens, self.step, np.uint64),
            forward_index=np.full(tokens, self.step, np.uint64),
            request_ids=requests,
            request_index=index,
            position=position,
            phase=np.where(position < 4, pb.PHASE_PREFILL, pb.PHASE_DECODE).astype(np.uint8),
            is_padding=padding,
            token_id=token_id,
            layers=layers,
        )
        batch = encode_batch(columns)
        batch.counters.CopyFrom(pb.SourceCounters(num_produced=self.num_decisions))
        return self.message(batch=batch)

    def expected_counts(self) -> dict[int, list[int]]:
        return {layer: [self.load[layer, e] for e in range(self.experts)] for layer in range(self.layers)}


async def connect(url: str) -> Any:
    """Return a client that reconnects quickly and for ever, and says nothing about it."""

    async def quiet(_: Exception) -> None:
        return

    return await nats.connect(url, error_cb=quiet, max_reconnect_attempts=-1, reconnect_time_wait=0.1)  # type: ignore[arg-type, unused-ignore]


async def publish(js: Any, message: tuple[str, bytes, str], *, retry_s: float = 30.0) -> None:
    """Publish until the broker has acknowledged it, under one message id, as the publisher does."""
    subject, payload, message_id = message
    deadline = time.monotonic() + retry_s
    while True:
        try:
            await js.publish(subject, payload, headers={"Nats-Msg-Id": message_id}, timeout=2)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
