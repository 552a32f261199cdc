"""A real model, watched by the library, through NATS and an analyzer: what its snapshot says of the capture."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from analyzer_process import Analyzer
from servers import NatsServer, eventually
from tiny_moe import build, recount

from moe_debugger import MoEDebugger, new_id
from moe_debugger.capture import is_sampled
from moe_debugger.v1 import analyzer_pb2 as pb
from moe_debugger.v1 import routing_pb2 as routing
from moe_debugger.v1 import session_pb2
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def _ids(rows: int = 2, columns: int = 6, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 90, (rows, columns), generator=torch.Generator().manual_seed(seed))


def snapshot(analyzer: Analyzer, session_id: str) -> session_pb2.SessionSnapshot:
    request = pb.AnalyzerServiceGetSnapshotRequest(tenant="default", session_id=session_id)
    return analyzer.stub.GetSnapshot(request, timeout=5).snapshot


def settled(analyzer: Analyzer, session_id: str) -> session_pb2.SessionSnapshot:
    """Return the snapshot once the source has said goodbye and every decision has its place."""

    def is_settled() -> session_pb2.SessionSnapshot | None:
        view = snapshot(analyzer, session_id)
        return view if view.sources and view.sources[0].said_goodbye and not view.account.num_in_flight else None

    view = eventually(is_settled, 40)
    assert isinstance(view, session_pb2.SessionSnapshot)
    account = view.account
    assert account.num_produced == account.num_counted + sum(one.num_decisions for one in account.dropped)
    return view


def counts(view: session_pb2.SessionSnapshot) -> list[list[int]]:
    return [np.frombuffer(layer.expert_counts, "<u8").tolist() for layer in view.layers]


def checks(view: session_pb2.SessionSnapshot) -> dict[str, routing.HealthCheck]:
    return {check.name: check for check in view.sources[0].checks}


def watch(
    nats: NatsServer, model: Any, run: Callable[[MoEDebugger], object], **options: Any
) -> tuple[str, Callable[[Analyzer], session_pb2.SessionSnapshot]]:
    """Run the model in a session of its own; return the session's id."""
    with torch.no_grad(), MoEDebugger(model, fleet=nats.url, session_name=new_id(), **options) as debugger:
        run(debugger)
        assert debugger.session is not None
        session_id = debugger.session.session_id
    assert session_id is not None
    return session_id, lambda analyzer: settled(analyzer, session_id)


def _out_of_range(layers: list[LayerColumns]) -> None:
    layers[1].expert_ids = layers[1].expert_ids.copy()
    layers[1].expert_ids[4, 1] = NUM_EXPERTS + 4


def _duplicate(layers: list[LayerColumns]) -> None:
    layers[1].expert_ids = layers[1].expert_ids.copy()
    layers[1].expert_ids[4, 1] = layers[1].expert_ids[4, 0]


def _lost_layer(layers: list[LayerColumns]) -> None:
    layers.pop(1)


def _lost_rows(layers: list[LayerColumns]) -> None:
    layers[1].expert_ids = layers[1].expert_ids[:-5]


def _wrong_weights(layers: list[LayerColumns]) -> None:
    assert layers[1].gate_weights is not None
    layers[1].gate_weights = layers[1].gate_weights[:, :1]


@pytest.mark.parametrize(
    ("fault", "name", "num_dropped", "layer_tokens"),
    [
        (None, "", 0, 36),
        (_duplicate, "distinctness", 0, 36),
        (_out_of_range, "range", 1, 35),
        (_lost_layer, "layers", 0, 24),
        (_lost_rows, "conservation", 12, 24),
        (_wrong_weights, "weights", 12, 24),
    ],
)
def test_a_planted_fault_is_red_in_the_fleet_and_loses_nothing_else(
    nats: NatsServer,
    analyzer: Analyzer,
    model: Any,
    fault: Callable[[list[LayerColumns]], None] | None,
    name: str,
    num_dropped: int,
    layer_tokens: int,
) -> None:
    def run(debugger: MoEDebugger) -> None:
        session = debugger.session
        assert session is not None
        whole = session._assembler.assemble

        def assemble(raws: Any) -> Any:
            groups = [group for raw in raws for group in whole([raw])]
            for group in groups:
                if group.raws[0].forward_index == 1 and fault is not None:
                    (columns,) = group.columns
                    assert isinstance(columns, RoutingColumns)
                    fault(columns.layers)
            return groups

        session._assembler.assemble = assemble  # type: ignore[method-assign]
        for _ in range(3):
            model(_ids())

    _, view_of = watch(nats, model, run)
    view = view_of(analyzer)
    red = {one.name for one in view.sources[0].checks if one.status == routing.CHECK_STATUS_FAILED} - {"overhead"}
    assert red == ({name} if name else set()) | ({"drops"} if num_dropped else set())
    assert view.sources[0].is_healthy == (fault is None)
    assert [layer.num_tokens for layer in view.layers] == [36, layer_tokens, 36]
    dropped = {one.reason: one.num_decisions for one in view.account.dropped}
    assert dropped == ({routing.DROP_REASON_CAPTURE_ERROR: num_dropped} if num_dropped else {})
    unhealthy = [one for one in view.findings if one.kind == session_pb2.FINDING_KIND_CAPTURE_UNHEALTHY]
    if fault is None:
        assert not unhealthy
        assert checks(view)["range"].num_checked == 3 * 3 * 12 * 2
    else:
        assert f"{name}: " in unhealthy[0].args["reasons"]
        assert checks(view)[name].example


def test_a_model_whose_hooks_never_fire_is_said_and_not_shown_as_idle(
    nats: NatsServer, analyzer: Analyzer, model: Any
) -> None:
    """As fused kernels or the replay of a graph do it: forwards run, no MoE layer is seen, nothing is ever sent."""

    def run(debugger: MoEDebugger) -> None:
        with contextlib.ExitStack() as stack:
            for layer in model.model.layers:
                for module in (layer.mlp, layer.mlp.experts, layer.mlp.gate):
                    for hooks in (module._forward_pre_hooks, module._forward_hooks):
                        kept = dict(hooks)
                        hooks.clear()
                        stack.callback(hooks.update, kept)
            for _ in range(3):
                model(_ids())

    session_id, _ = watch(nats, model, run)

    def is_said() -> session_pb2.SessionSnapshot | None:
        view = snapshot(analyzer, session_id)
        return view if view.findings else None

    view = eventually(is_said, 40)
    assert isinstance(view, session_pb2.SessionSnapshot)
    check = checks(view)["layers"]
    assert (check.status, check.num_violations, check.num_checked) == (routing.CHECK_STATUS_FAILED, 9, 9)
    assert "its hook saw 0 of the 12 tokens that the decoder saw" in view.findings[0].args["reasons"]


def test_the_counts_level_counts_exactly_and_sends_no_row(nats: NatsServer, analyzer: Analyzer, model: Any) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0

    def run(debugger: MoEDebugger) -> None:
        model(_ids(), attention_mask=mask)
        model.generate(_ids(1, 5, seed=9), max_new_tokens=4, do_sample=False)

    with recount(model) as truth:
        session_id, view_of = watch(nats, model, run, level="counts")
    view = view_of(analyzer)
    valid = mask.reshape(-1).bool().numpy()
    for layer, name in zip(view.layers, sorted(truth.ids), strict=True):
        first, *rest = truth.ids[name]
        ids = np.concatenate([first[valid], *rest]).reshape(-1)
        assert np.frombuffer(layer.expert_counts, "<u8").tolist() == np.bincount(ids, minlength=8).tolist()
        assert (layer.num_tokens, layer.num_padding_tokens) == (10 + 5 + 3, 2)
        probability = np.frombuffer(layer.mean_probability, "<f4")
        assert probability.sum() == pytest.approx(1, abs=1e-4)
    assert view.sources[0].level == routing.CAPTURE_LEVEL_COUNTS
    assert checks(view)["range"].status == routing.CHECK_STATUS_OK
    requests = analyzer.stub.ListRequests(
        pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=session_id), timeout=5
    ).requests
    assert not requests, "at counts no request has a name on the wire"


@pytest.mark.parametrize("level", ["counts", "routes"])
def test_sampling_takes_whole_requests_and_nothing_of_the_others(
    nats: NatsServer, analyzer: Analyzer, model: Any, level: Any
) -> None:
    names = [new_id() for _ in range(12)]
    sampled = [name for name in names if is_sampled(name, 0.5)]
    assert 0 < len(sampled) < len(names)

    def run(debugger: MoEDebugger) -> None:
        for start in range(0, 12, 4):
            with debugger.requests(names[start : start + 4]):
                model.generate(
                    _ids(4, 5, seed=start), attention_mask=torch.ones(4, 5, dtype=torch.long), max_new_tokens=4,
                    min_new_tokens=4, do_sample=False,
                )  # fmt: skip

    session_id, view_of = watch(nats, model, run, level=level, sampling_rate=0.5)
    view = view_of(analyzer)
    assert [layer.num_tokens for layer in view.layers] == [len(sampled) * (5 + 3)] * 3
    dropped = {one.reason: one.num_decisions for one in view.account.dropped}
    assert dropped == {routing.DROP_REASON_SAMPLED_OUT: (12 - len(sampled)) * (5 + 3) * 3}
    assert view.sources[0].is_healthy
    requests = analyzer.stub.ListRequests(
        pb.AnalyzerServiceListRequestsRequest(tenant="default", session_id=session_id), timeout=5
    ).requests
    if level == "counts":
        assert not requests
        return
    assert {one.request_id: one.num_tokens for one in requests} == dict.fromkeys(sampled, 8)
    for name in sampled:
        routes = analyzer.stub.GetRequestRoutes(
            pb.AnalyzerServiceGetRequestRoutesRequest(tenant="default", session_id=session_id, request_id=name),
            timeout=5,
        ).routes
        assert np.frombuffer(routes.position, "<u4").tolist() == list(range(8))
        assert [sum(np.frombuffer(layer.expert_counts, "<u8")) for layer in routes.layers] == [16, 16, 16]


def _switch() -> Any:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        expert_capacity=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).eval()


def _longcat() -> Any:
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    torch.manual_seed(0)
    config = LongcatFlashConfig(
        vocab_size=96, hidden_size=32, ffn_hidden_size=32, expert_ffn_hidden_size=16, num_layers=2, head_dim=8,
        num_attention_heads=4, n_routed_experts=8, zero_expert_num=4, moe_topk=3, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return LongcatFlashForCausalLM(config).eval()


def _slots(layer: session_pb2.LayerSnapshot) -> int:
    return (
        int(np.frombuffer(layer.expert_counts, "<u8").sum())
        + layer.num_dropped_slots
        + layer.num_identity_slots
        + layer.num_skipped_slots
        + layer.num_unused_slots
    )


@pytest.mark.parametrize("level", ["counts", "routes"])
def test_zero_experts_are_counted_apart_and_are_no_load(nats: NatsServer, analyzer: Analyzer, level: Any) -> None:
    model = _longcat()
    chosen: list[list[int]] = [[], []]

    def run(debugger: MoEDebugger) -> None:
        handles = [
            layer.mlp.router.register_forward_hook(
                lambda module, args, output, own=own: own.extend(output[-1].reshape(-1).tolist())
            )
            for layer, own in zip(model.model.layers, chosen, strict=True)
        ]
        model(_ids(3, 9))
        for handle in handles:
            handle.remove()

    _, view_of = watch(nats, model, run, level=level)
    view = view_of(analyzer)
    assert view.sources[0].is_healthy, view.sources[0].problems
    for layer, ids in zip(view.layers, chosen, strict=True):
        assert (layer.description.num_experts, layer.description.num_identity_experts) == (8, 4)
        truth = np.bincount(ids, minlength=12)
        assert np.frombuffer(layer.expert_counts, "<u8").tolist() == truth[:8].tolist()
        assert layer.num_identity_slots == truth[8:].sum() > 0
        assert _slots(layer) == layer.num_tokens * 3 == 27 * 3


@pytest.mark.parametrize("level", ["counts", "routes"])
def test_an_encoders_and_a_decoders_rows_are_counted_apart(nats: NatsServer, analyzer: Analyzer, level: Any) -> None:
    model = _switch()
    names = [new_id(), new_id()]
    masks: list[torch.Tensor] = []

    def run(debugger: MoEDebugger) -> None:
        router = model.encoder.block[1].layer[1].mlp.router
        handle = router.register_forward_hook(lambda module, args, output: masks.append(output[0]))
        with debugger.requests(names):
            model.generate(_ids(2, 9), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        handle.remove()

    session_id, view_of = watch(nats, model, run, level=level)
    view = view_of(analyzer)
    assert view.sources[0].is_healthy, view.sources[0].problems
    encoder, decoder = view.layers
    assert (encoder.description.stack, decoder.description.stack) == ("encoder", "decoder")
    assert (encoder.num_tokens, decoder.num_tokens) == (18, 8)
    # A token whose one-hot row of experts is empty found its expert full.
    (mask,) = masks
    assert encoder.num_dropped_slots == int((mask.reshape(18, -1).sum(dim=1) == 0).sum()) > 0
    for layer in view.layers:
        assert _slots(layer) == layer.num_tokens
    if level == "counts":
        return
    routes = analyzer.stub.GetRequestRoutes(
        pb.AnalyzerServiceGetRequestRoutesRequest(tenant="default", session_id=session_id, request_id=names[0]),
        timeout=5,
    ).routes
    assert routes.summary.num_tokens == 4
    assert list(routes.stacks) == ["decoder", "encoder"]
    assert np.frombuffer(routes.position, "<u4").tolist() == [*range(4), *range(9)]
