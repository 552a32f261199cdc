"""Capture health: a healthy session is green, and every planted fault turns its check red, through the real session."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import build

from moe_debugger import MoEDebugger, Session
from moe_debugger._health_monitor import ForwardSeen, HealthMonitor, _has_equals
from moe_debugger.analysis import FindingKind
from moe_debugger.capture_health import CHECK_NAMES, CaptureHealth, CheckStatus, HealthCheck, merge_checks
from moe_debugger.publish.batching import reduce_to_counts
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

# The check of a session; the model has 3 layers, top-2 of 8, and each forward 2 x 6 tokens.
_ROWS = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def _ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(3))


def _twice(layer: LayerColumns) -> None:
    layer.expert_ids = layer.expert_ids.copy()
    layer.expert_ids[4, 1] = layer.expert_ids[4, 0]


def _out_of_range(layer: LayerColumns) -> None:
    layer.expert_ids = layer.expert_ids.copy()
    layer.expert_ids[4:7, 1] = [8, 99, -7]


def _lost_rows(layer: LayerColumns) -> None:
    layer.expert_ids = layer.expert_ids[:-5]


def _lost_slot(layer: LayerColumns) -> None:
    layer.expert_ids = layer.expert_ids.copy()
    layer.expert_ids[4, 1] = -1


def _wrong_weight_count(layer: LayerColumns) -> None:
    assert layer.gate_weights is not None
    layer.gate_weights = layer.gate_weights[:, :1]


def _infinite_weight(layer: LayerColumns) -> None:
    assert layer.gate_weights is not None
    layer.gate_weights = layer.gate_weights.copy()
    layer.gate_weights[4, 1] = np.inf


@dataclass(frozen=True)
class Fault:
    """A fault planted in layer 1 of one forward: the check it turns red, and the decisions that cannot be counted."""

    plant: Callable[[LayerColumns], None]
    check: str
    num_violations: int
    num_dropped: int
    example: str


FAULTS = {
    "duplicate": Fault(_twice, "distinctness", 1, 0, "a row has the experts"),
    "out of range": Fault(_out_of_range, "range", 3, 3, "expert 8 of a layer whose ids are 0 to 7"),
    "lost rows": Fault(_lost_rows, "conservation", 10, _ROWS, "7 routed rows for 12 tokens"),
    "lost slot": Fault(_lost_slot, "conservation", 1, 0, "1 of 24 slots reached no expert"),
    "wrong weight count": Fault(_wrong_weight_count, "weights", 24, _ROWS, "shape (12, 1) for ids of shape (12, 2)"),
    "infinite weight": Fault(_infinite_weight, "weights", 1, 0, "a gate weight is inf"),
}


def plant(session: Session, forward: int, fault: Callable[[RoutingColumns], object]) -> None:
    """Corrupt what the capture makes of one forward, as a broken hook or adapter would."""
    whole = session._assembler.assemble

    def assemble(raws: Any) -> Any:
        groups = [group for raw in raws for group in whole([raw])]
        for group in groups:
            if group.raws[0].forward_index == forward:
                for part in group.columns:
                    assert isinstance(part, RoutingColumns)
                    fault(part)
        return groups

    session._assembler.assemble = assemble  # type: ignore[method-assign]


def _run(model: Any, fault: Callable[[RoutingColumns], object] | None) -> tuple[CaptureHealth, Any, Any]:
    """Run three forwards, the second one corrupted; return health, statistics and findings."""
    with torch.no_grad(), MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        if fault is not None:
            plant(session, 1, fault)
        bare = None
        for _ in range(3):
            logits = model(_ids()).logits
            assert bare is None or torch.equal(bare, logits), "a fault of the capture never reaches the model"
            bare = logits
        return session.capture_health(), debugger.get_routing_stats(), debugger.analyze().findings


def test_a_healthy_session_is_green_and_says_what_it_checked(model: Any) -> None:
    health, _, findings = _run(model, None)
    assert [check.name for check in health.checks] == list(CHECK_NAMES)
    assert health.is_healthy
    assert not [check for check in health.checks if check.status is not CheckStatus.OK and check.name != "overhead"]
    assert health.check("conservation").num_checked == health.check("range").num_checked == 3 * 3 * _ROWS * 2
    assert health.check("distinctness").num_checked == health.num_produced == 3 * 3 * _ROWS
    assert health.check("layers").num_checked == 9
    assert health.check("gaps").num_checked == 3
    assert not [finding for finding in findings if finding.kind is FindingKind.CAPTURE_UNHEALTHY]
    assert "Capture health: healthy" in str(health)
    with pytest.raises(KeyError, match="there are: conservation"):
        health.check("nonsense")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_turns_its_check_red_and_loses_no_other_forward(model: Any, name: str) -> None:
    fault = FAULTS[name]
    health, stats, findings = _run(model, lambda columns: fault.plant(columns.layers[1]))
    check = health.check(fault.check)
    assert (check.status, check.num_violations) == (CheckStatus.FAILED, fault.num_violations)
    assert fault.example in check.example
    assert "layer 1, forward 1" in check.example
    red = {one.name for one in health.failed} - {"overhead"}
    assert red == {fault.check} | ({"drops"} if fault.num_dropped else set())
    assert not health.is_healthy
    assert (health.dropped or {}).get("capture_error", 0) == fault.num_dropped
    assert [layer.num_tokens for layer in stats.layers] == [3 * _ROWS, 3 * _ROWS - fault.num_dropped, 3 * _ROWS]
    (finding,) = [one for one in findings if one.kind is FindingKind.CAPTURE_UNHEALTHY]
    assert f"{fault.check}: " in finding.args["reasons"]
    assert f"capture_{fault.check}" in [row.metric for row in finding.evidence]


def test_a_layer_that_is_lost_after_its_hook_is_said_by_name(model: Any) -> None:
    health, stats, _ = _run(model, lambda columns: columns.layers.pop(1))
    check = health.check("layers")
    assert (check.status, check.num_violations, check.num_checked) == (CheckStatus.FAILED, 1, 9)
    assert check.example.startswith("layer 1 (model.layers.1.mlp): captured in forward 1, but lost")
    assert [layer.num_tokens for layer in stats.layers] == [36, 24, 36]


def test_a_layer_whose_hook_does_not_fire_is_said_and_not_shown_as_idle(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        model(_ids())
        experts = model.model.layers[1].mlp.experts
        router = model.model.layers[1].mlp.gate
        saved = [(module, dict(hooks)) for module in (experts, router) for hooks in (module._forward_pre_hooks,)]
        kept = [(module, dict(module._forward_hooks)) for module in (experts, router)]
        for module, _ in saved:
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        model(_ids())
        for module, hooks in saved:
            module._forward_pre_hooks.update(hooks)
        for module, hooks in kept:
            module._forward_hooks.update(hooks)
        check = session.capture_health().check("layers")
    assert check.status is CheckStatus.FAILED
    assert "layer 1 (model.layers.1.mlp): its hook saw 0 of the 12 tokens that the decoder saw in forward 1" in (
        check.example
    )


def test_a_forward_that_cannot_be_read_is_dropped_alone(model: Any) -> None:
    def broken(columns: RoutingColumns) -> None:
        raise ValueError("the adapter is broken")

    health, stats, _ = _run(model, broken)
    assert health.dropped == {"capture_error": 3 * _ROWS}
    assert any("the adapter is broken" in problem for problem in health.problems)
    assert [layer.num_tokens for layer in stats.layers] == [24, 24, 24]


def test_sums_are_counted_and_checked_like_rows(model: Any) -> None:
    """At level "counts" the capture hands over sums, with no row behind them."""
    results = []
    for level in ("routes", "counts"):
        with torch.no_grad(), MoEDebugger(model, level=level) as debugger:
            session = debugger.session
            assert session is not None
            model(_ids())
            assert session.capture_health().is_healthy
            results.append((debugger.get_routing_stats(), debugger.get_expert_metrics()))
    (rows, _), (sums, experts) = results
    for by_rows, by_sums in zip(rows.layers, sums.layers, strict=True):
        assert by_sums.expert_counts.tolist() == by_rows.expert_counts.tolist()
        assert by_sums.mean_probability.tolist() == pytest.approx(by_rows.mean_probability.tolist(), abs=1e-6)
    assert all(np.isnan(row.mean_gate_weight) for row in experts.experts)


# -- the monitor alone -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    layer_index: int
    module_name: str
    stack: str
    top_k: int = 2


LAYERS = [Layer(0, "encoder.0", "encoder"), Layer(1, "decoder.0", "decoder"), Layer(2, "decoder.1", "decoder")]


def _columns(layers: list[int], num_tokens: int, *, phase: int = pb.PHASE_PREFILL) -> RoutingColumns:
    return RoutingColumns(
        step=np.zeros(num_tokens, np.uint64),
        forward_index=np.zeros(num_tokens, np.uint64),
        request_ids=["r"],
        request_index=np.zeros(num_tokens, np.uint32),
        position=np.arange(num_tokens, dtype=np.uint32),
        phase=np.full(num_tokens, phase, np.uint8),
        is_padding=np.zeros(num_tokens, bool),
        layers=[LayerColumns(i, 4, np.tile(np.array([0, 1], np.int32), (num_tokens, 1))) for i in layers],
    )


def _outcome(monitor: HealthMonitor, name: str, *, is_live: bool = False) -> HealthCheck:
    checks = monitor.checks(num_produced=1, dropped={}, hook_ns=1, forward_ns=100, is_live=is_live)
    return next(check for check in checks if check.name == name)


def _seen(index: int, **changes: Any) -> ForwardSeen:
    seen = ForwardSeen(index, {"encoder": 7, "decoder": 3}, {0: 7, 1: 3, 2: 3})
    return replace(seen, **changes)


def test_stacks_may_see_other_numbers_of_tokens_and_may_not_run_at_all() -> None:
    monitor = HealthMonitor(LAYERS)
    monitor.check_rows([_seen(0)], [_columns([0], 7), _columns([1, 2], 3)])
    # With a cache the encoder runs once.
    monitor.check_rows([_seen(1, model_tokens={"decoder": 1}, layer_tokens={1: 1, 2: 1})], [_columns([1, 2], 1)])
    check = _outcome(monitor, "layers")
    assert (check.status, check.num_checked) == (CheckStatus.OK, 3 + 2)


@pytest.mark.parametrize(
    ("changes", "layers", "expected"),
    [
        ({"layer_tokens": {0: 7, 1: 3}}, [1], "layer 2 (decoder.1): its hook saw 0 of the 3 tokens"),
        ({"layer_tokens": {0: 7, 1: 3, 2: 2}}, [1, 2], "layer 2 (decoder.1): its hook saw 2 of the 3 tokens"),
        ({"layer_tokens": {0: 7, 1: 3, 2: 2}, "explained": {2: "some of the tokens"}}, [1, 2], ""),
        ({"layer_tokens": {0: 7, 1: 3}, "unseen": frozenset()}, [1], ""),
        ({"num_left_out": 9}, None, ""),
        ({}, None, "layer 1 (decoder.0): captured in forward 0, but lost"),
    ],
)
def test_layers_are_compared_with_the_tokens_that_the_model_saw(
    changes: dict[str, Any], layers: list[int] | None, expected: str
) -> None:
    monitor = HealthMonitor(LAYERS)
    monitor.check_rows([_seen(0, **changes)], [_columns([0], 7)] + ([] if layers is None else [_columns(layers, 3)]))
    check = _outcome(monitor, "layers")
    assert check.example.startswith(expected) if expected else check.status is CheckStatus.OK


def test_tokens_that_are_not_known_leave_the_layers_unknown() -> None:
    monitor = HealthMonitor(LAYERS)
    monitor.check_rows([ForwardSeen(0, {"encoder": None, "decoder": None}, {})], [])
    check = _outcome(monitor, "layers")
    assert (check.status, check.example) == (
        CheckStatus.UNKNOWN,
        "how many tokens the model saw is not known (decoder, encoder)",
    )


def test_a_forward_that_never_came_is_a_gap_and_one_that_was_dropped_is_not() -> None:
    monitor = HealthMonitor(LAYERS, first_forward=10)
    nothing: Any = {"model_tokens": {}, "layer_tokens": {}}
    for index in (10, 12, 11, 14):
        monitor.check_rows([_seen(index, **nothing)], [])
    assert _outcome(monitor, "gaps").example == "forward 13 was not captured, forward 14 was"
    assert _outcome(monitor, "gaps", is_live=True).status is CheckStatus.OK, "it may still be under way"
    monitor.forward_dropped(13)
    check = _outcome(monitor, "gaps")
    assert (check.status, check.num_checked) == (CheckStatus.OK, 5)
    for index in range(16, 3000):
        monitor.check_rows([_seen(index, **nothing)], [])
    check = _outcome(monitor, "gaps", is_live=True)
    assert (check.num_violations, check.num_checked) == (1, 2990)
    assert len(monitor._early) <= 1024


def test_padding_is_checked_for_its_range_alone() -> None:
    monitor = HealthMonitor(LAYERS)
    columns = _columns([1, 2], 3)
    columns.is_padding[0] = True
    columns.layers[0].expert_ids[0] = [1, 1]
    columns.layers[0].gate_weights = np.array([[np.nan, 1], [1, 1], [1, 1]], np.float32)
    monitor.check_rows([_seen(0)], [_columns([0], 7), columns])
    assert _outcome(monitor, "distinctness").status is _outcome(monitor, "weights").status is CheckStatus.OK


def test_a_row_with_a_bad_id_leaves_its_layer_and_no_other() -> None:
    monitor = HealthMonitor(LAYERS)
    columns = _columns([1, 2], 3)
    columns.layers[1].expert_ids[1, 0] = 4
    columns.layers[1].num_identity_experts = 0
    (clean,), dropped = monitor.check_rows([_seen(0)], [columns])
    assert dropped == 1
    assert clean.layers[0].row_index is None
    assert clean.layers[1].row_index is not None
    assert clean.layers[1].row_index.tolist() == [0, 2]
    columns.layers[1].num_identity_experts = 1
    assert monitor.check_rows([_seen(1)], [columns])[1] == 0, "with an identity expert, 4 is its id"


@pytest.mark.parametrize("top_k", [1, 2, 8, 16, 17, 24])
def test_repeated_experts_are_found_whatever_k(top_k: int) -> None:
    random = np.random.default_rng(top_k)
    ids = random.integers(-1, 3 * top_k, (200, top_k)).astype(np.int32)
    expected = [len({x for x in row if x >= 0}) < sum(x >= 0 for x in row) for row in ids.tolist()]
    assert _has_equals(ids).tolist() == expected


def test_sums_are_checked_for_what_sums_can_tell() -> None:
    monitor = HealthMonitor(LAYERS)
    (whole,) = reduce_to_counts(_columns([1, 2], 3))
    seen = _seen(0, model_tokens={"decoder": 3}, layer_tokens={1: 3, 2: 3})
    assert monitor.check_counts([seen], [whole]) == ([whole], 0)
    assert _outcome(monitor, "conservation").status is CheckStatus.OK
    assert _outcome(monitor, "weights").example == "no weights are captured at this level"
    for change, name in (
        ({"expert_counts": np.array([3, 2, 0, 0], np.uint64)}, "conservation"),
        ({"expert_counts": np.array([4, 2, 0, 0], np.uint64)}, "distinctness"),
        ({"expert_counts": np.array([3, 3, 0], np.uint64)}, "range"),
    ):
        broken = replace(whole, layers=[whole.layers[0], replace(whole.layers[1], **change)])  # type: ignore[arg-type]
        fresh = HealthMonitor(LAYERS)
        (clean,), dropped = fresh.check_counts([seen], [broken])
        assert _outcome(fresh, name).status is CheckStatus.FAILED
        assert (len(clean.layers), dropped) == ((1, 3) if name == "range" else (2, 0))


def test_hooks_that_take_most_of_the_time_are_red_and_the_capture_stays_trusted() -> None:
    monitor = HealthMonitor(LAYERS)
    checks = monitor.checks(num_produced=1, dropped={}, hook_ns=60_000_000, forward_ns=100_000_000)
    assert checks[-1].status is CheckStatus.FAILED
    assert checks[-1].example == "hooks took 60.0% of the forwards' time (limit 50%)"
    assert CaptureHealth(checks=checks).is_healthy


def test_checks_of_several_sources_become_one_of_each_name() -> None:
    one = HealthCheck("range", CheckStatus.OK, 10, 0, "slots")
    two = HealthCheck("range", CheckStatus.FAILED, 5, 2, "slots", "expert 9")
    none = HealthCheck("range", CheckStatus.UNKNOWN, 0, 0, "slots", "nothing was captured yet")
    assert merge_checks([none, one, two, none]) == (
        HealthCheck("range", CheckStatus.FAILED, 15, 2, "slots", "expert 9"),
    )
    assert merge_checks([none, one]) == (one,)
    assert merge_checks([none, none]) == (none,)
