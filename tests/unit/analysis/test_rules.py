"""Findings: what is planted is found at its place, and what is healthy is left alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis import (
    Analysis,
    CaptureHealth,
    FindingKind,
    RoutingState,
    Severity,
    Thresholds,
    analyze,
    finding_from_proto,
    findings_to_proto,
    finish,
    fold_decisions,
)
from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import catalogue, render_finding
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

Simulate = Callable[..., dict[str, Any]]
TOKENS = 4096


def loud(analysis: Analysis) -> list[tuple[str, int | None, int | None]]:
    """Return kind and place of every finding above info."""
    return [
        (str(finding.kind), finding.layer_index, finding.expert_id)
        for finding in analysis.findings
        if finding.severity is not Severity.INFO
    ]


def planted(simulate: Simulate, seed: int = 0, **options: Any) -> dict[str, Any]:
    return simulate(np.random.default_rng(seed), num_tokens=TOKENS, **options)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (6, 2), (8, 4), (8, 2)])
def test_in_a_small_layer_the_expert_of_nearly_every_token_is_hot(
    simulate: Simulate, num_experts: int, top_k: int
) -> None:
    rows = planted(simulate, num_experts=num_experts, top_k=top_k, num_layers=1, skew=0.3)
    assert loud(analyze(rows, num_experts=num_experts, top_k=top_k)) == []
    others = np.random.default_rng(0).random((TOKENS, num_experts - 1)).argsort(axis=1)[:, : top_k - 1]
    rows["expert_ids"] = np.column_stack([others, np.full(TOKENS, num_experts - 1)])
    assert loud(analyze(rows, num_experts=num_experts, top_k=top_k)) == [("hot_expert", 0, num_experts - 1)]


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 3), (2, 2), (4, 4)])
def test_where_tokens_use_most_experts_none_is_hot(simulate: Simulate, num_experts: int, top_k: int) -> None:
    rows = planted(simulate, num_experts=num_experts, top_k=top_k, num_layers=1)
    rows["expert_ids"] = np.column_stack([np.full(TOKENS, top_k - 1), *([e] * TOKENS for e in range(top_k - 1))])
    found = analyze(rows, num_experts=num_experts, top_k=top_k)
    assert not [f for f in found.findings if f.kind is FindingKind.HOT_EXPERT and f.severity is not Severity.INFO]


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (256, 8)])
@pytest.mark.parametrize("num_tokens", [16, 256, 4096])
@pytest.mark.parametrize("topic_strength", [0.0, 0.7, 1.5])
def test_healthy_routing_gives_nothing_above_info(
    simulate: Simulate, num_experts: int, top_k: int, num_tokens: int, topic_strength: float
) -> None:
    for seed in range(4):
        rows = simulate(
            np.random.default_rng(seed),
            num_experts=num_experts,
            top_k=top_k,
            num_tokens=num_tokens,
            topic_strength=topic_strength,
        )
        assert loud(analyze(rows, num_experts=num_experts, top_k=top_k)) == []
        # Training and two workloads lift the reserve that one workload brings.
        rows["phase"] = np.full(len(rows["layer_index"]), 3, np.uint8)
        rows["workload"] = np.arange(len(rows["layer_index"])) % 2
        assert loud(analyze(rows, num_experts=num_experts, top_k=top_k)) == []


def test_natural_skew_inside_the_floors_gives_nothing_above_info(simulate: Simulate) -> None:
    for seed in range(10):
        rows = planted(simulate, seed, skew=0.3, topic_strength=0.5)
        rows["workload"] = np.arange(len(rows["layer_index"])) % 2
        assert loud(analyze(rows, num_experts=8, top_k=2)) == []


def test_collapse_is_found_in_its_layer_only(simulate: Simulate) -> None:
    rows = planted(simulate)
    rows["expert_ids"][TOKENS : 2 * TOKENS] = [5, 2]
    found = analyze(rows, num_experts=8, top_k=2)
    assert loud(found) == [("router_collapse", 1, None)]
    [finding] = found.findings
    assert finding.severity is Severity.CRITICAL
    assert finding.statistic == pytest.approx(2)


def test_opposite_collapses_that_pool_to_perfect_are_found_in_each_layer(simulate: Simulate) -> None:
    rows = planted(simulate)
    for layer in range(4):
        rows["expert_ids"][layer * TOKENS : (layer + 1) * TOKENS] = [2 * layer, 2 * layer + 1]
    assert np.ptp(np.bincount(rows["expert_ids"].ravel())) == 0
    assert loud(analyze(rows, num_experts=8, top_k=2)) == [("router_collapse", layer, None) for layer in range(4)]


def test_partial_collapse_is_found_with_its_noise(simulate: Simulate) -> None:
    rng = np.random.default_rng(5)
    rows = planted(simulate)
    # 2.6 effective experts: two take nearly everything, the rest what is left.
    stray = rng.random(TOKENS) < 0.12
    rows["expert_ids"][:TOKENS] = [0, 1]
    rows["expert_ids"][:TOKENS][stray, 1] = rng.integers(2, 8, int(stray.sum()))
    found = analyze(rows, num_experts=8, top_k=2)
    assert 2.2 < found.metrics[0].effective_experts < 2.9
    assert loud(found) == [("router_collapse", 0, None)]


def test_collapse_in_few_requests_is_critical_only_where_their_tokens_are_known_to_differ(simulate: Simulate) -> None:
    rows = planted(simulate, num_requests=5)
    rows["expert_ids"][:TOKENS] = [5, 2]
    found = analyze(rows, num_experts=8, top_k=2)
    # Stretches of positions stand for the requests that are missing.
    assert found.metrics[0].blocks_of == "positions"
    assert [(f.code, f.layer_index, f.severity) for f in found.findings] == [("router_collapse", 0, Severity.WARNING)]
    rows["token_id"] = np.random.default_rng(0).integers(0, 5000, len(rows["request_id"]))
    found = analyze(rows, num_experts=8, top_k=2)
    assert [(f.code, f.layer_index, f.severity) for f in found.findings] == [("router_collapse", 0, Severity.CRITICAL)]


def test_collapse_is_not_claimed_where_no_blocks_tell_how_sure_it_is(simulate: Simulate) -> None:
    rows = planted(simulate, num_requests=5)
    rows["expert_ids"][:TOKENS] = [5, 2]
    found = finish(fold_decisions(rows, num_experts=8, top_k=2).without_history())
    assert loud(found) == []
    assert [(f.code, f.layer_index) for f in found.findings] == [("insufficient_evidence", 0)]
    assert "requests of at least 20" in found.findings[0].args["missing"]


@pytest.mark.parametrize("column", ["token_id", "gate_weights"])
def test_one_prompt_sent_thirty_times_is_no_evidence_and_thirty_prompts_are(column: str) -> None:
    rng = np.random.default_rng(6)
    length, repeats = 128, 30

    def rows(num_texts: int) -> dict[str, Any]:
        texts = rng.integers(0, 96, (num_texts, length))
        chosen = texts[np.arange(repeats) % num_texts].ravel()
        weights = np.sort(np.random.default_rng(7).random((96, length, 2)), axis=2)[:, :, ::-1]
        position = np.tile(np.arange(length), repeats)
        return {
            "layer_index": np.zeros(length * repeats, np.int64),
            "expert_ids": np.tile(np.array([[3, 4]]), (length * repeats, 1)),
            "request_id": np.repeat([f"r{index}" for index in range(repeats)], length),
            "position": position,
            column: chosen if column == "token_id" else weights[chosen, position],
        }

    repeated = analyze(rows(1), num_experts=8, top_k=2)
    assert loud(repeated) == []
    assert [f.code for f in repeated.findings] == ["insufficient_evidence"]
    assert "the input repeats itself" in repeated.findings[0].args["missing"]
    assert loud(analyze(rows(repeats), num_experts=8, top_k=2)) == [("router_collapse", 0, None)]


@pytest.mark.parametrize("columns", [("request_id",), ("request_id", "position"), ("request_id", "token_id")])
def test_a_prompt_that_is_sent_again_and_again_is_said_to_be_no_evidence(columns: tuple[str, ...]) -> None:
    rng = np.random.default_rng(21)
    length, repeats = 64, 60
    # Expert 3 is hot in this prompt, which is far from collapse.
    ids = np.column_stack([np.full(length, 3), rng.choice([0, 1, 2, 4, 5, 6, 7], length)])
    rows = {
        "layer_index": np.zeros(length * repeats, np.int64),
        "expert_ids": np.tile(ids, (repeats, 1)),
        "request_id": np.repeat([f"r{index}" for index in range(repeats)], length),
        "position": np.tile(np.arange(length), repeats),
        "token_id": np.tile(rng.integers(0, 5000, length), repeats),
    }
    found = analyze({name: rows[name] for name in ("layer_index", "expert_ids", *columns)}, num_experts=8, top_k=2)
    assert [(f.code, f.severity, f.layer_index) for f in found.findings] == [
        ("insufficient_evidence", Severity.INFO, 0)
    ]
    assert found.metrics[0].effective_tokens <= 1.1 * length


def test_an_expert_that_is_nearly_proved_dead_says_what_is_missing(simulate: Simulate) -> None:
    rows = planted(simulate, num_experts=64, top_k=8, num_layers=1)
    rows["expert_ids"][rows["expert_ids"] == 6] = -1
    [finding] = [f for f in analyze(rows, num_experts=64, top_k=8).findings if f.expert_id == 6]
    assert (finding.code, finding.rule_id) == ("cold_expert_unused", "cold_expert.l0.e6")
    [row] = [row for row in finding.evidence if row.metric == "effective_tokens"]
    # ln(0.01 / 64) / ln(1 - 0.01 * 8 / 64)
    assert row.rule == "> 7007 to be dead"
    assert "more than 7007" in render_finding(finding.code, finding.args)


@pytest.mark.parametrize(("column", "since"), [("step", 7), ("forward_index", 7), (None, None)])
def test_since_step_is_the_step_else_the_forward_else_unknown(column: str | None, since: int | None) -> None:
    rng = np.random.default_rng(22)
    rows: dict[str, Any] = {"layer_index": np.zeros(4096, int), "expert_ids": rng.integers(0, 8, (4096, 1))}
    rows["expert_ids"][1024:] = 3
    if column:
        rows[column] = 5 + np.arange(4096) // 512
    [finding] = [f for f in analyze(rows, num_experts=8, top_k=1).findings if f.kind is FindingKind.HOT_EXPERT]
    assert finding.since_step == since


def test_text_of_ten_kinds_of_tokens_is_no_evidence(simulate: Simulate) -> None:
    rng = np.random.default_rng(15)
    rows = planted(simulate, num_layers=1)
    rows["expert_ids"][:] = [5, 2]
    rows["token_id"] = rng.integers(48, 58, TOKENS)
    found = analyze(rows, num_experts=8, top_k=2)
    assert [(f.code, f.severity) for f in found.findings] == [("insufficient_evidence", Severity.INFO)]
    assert "kinds of tokens" in found.findings[0].args["missing"]
    rows["token_id"] = rng.integers(0, 90, TOKENS)
    assert loud(analyze(rows, num_experts=8, top_k=2)) == [("router_collapse", 0, None)]


def test_expert_that_is_second_for_every_token_is_hot(simulate: Simulate) -> None:
    rng = np.random.default_rng(8)
    rows = planted(simulate, num_layers=2)
    others = rng.choice([0, 1, 2, 4, 5, 6, 7], TOKENS)
    rows["expert_ids"][:TOKENS] = np.column_stack([others, np.full(TOKENS, 3)])
    one_workload = analyze(rows, num_experts=8, top_k=2)
    assert [(str(f.kind), f.layer_index, f.expert_id) for f in one_workload.findings] == [("hot_expert", 0, 3)]
    assert one_workload.findings[0].statistic == pytest.approx(4)
    rows["workload"] = np.where(np.arange(2 * TOKENS) % 2, "code", "prose")
    assert loud(analyze(rows, num_experts=8, top_k=2)) == [("hot_expert", 0, 3)]


def test_expert_that_is_never_first_but_gets_its_fair_share_is_left_alone(simulate: Simulate) -> None:
    rows = planted(simulate, num_layers=1)
    rows["expert_ids"] = np.where(rows["expert_ids"][:, :1] == 3, rows["expert_ids"][:, ::-1], rows["expert_ids"])
    assert not (rows["expert_ids"][:, 0] == 3).any()
    assert analyze(rows, num_experts=8, top_k=2).findings == ()


def test_unused_expert_is_a_warning_on_one_workload_and_critical_on_two(
    simulate: Simulate,
) -> None:
    rows = planted(simulate)
    ids = rows["expert_ids"][:TOKENS]
    # Expert 6's tokens go to the next one that the token does not use already.
    ids[:] = np.where(ids == 6, (ids.sum(axis=1, keepdims=True) - 6 + 1) % 8, ids)
    ids[:] = np.where(ids == 6, 7, ids)
    assert 6 not in ids
    found = analyze(rows, num_experts=8, top_k=2)
    assert [(str(f.kind), f.severity, f.layer_index, f.expert_id) for f in found.findings] == [
        ("dead_expert", Severity.WARNING, 0, 6)
    ]
    assert "this workload" in render_finding(found.findings[0].code, found.findings[0].args)
    rows["workload"] = np.arange(len(rows["layer_index"])) % 2
    [finding] = analyze(rows, num_experts=8, top_k=2).findings
    assert (finding.severity, finding.layer_index, finding.expert_id) == (Severity.CRITICAL, 0, 6)
    assert "2 workloads" in render_finding(finding.code, finding.args)
    few_requests = dict(rows, request_id=np.repeat(["a", "b"], len(rows["layer_index"]) // 2))
    del few_requests["workload"]
    assert [f.severity for f in analyze(few_requests, num_experts=8, top_k=2).findings] == [Severity.INFO]
    few = {name: column[:512] for name, column in rows.items()}
    assert analyze(few, num_experts=8, top_k=2).findings == ()


def test_skew_is_never_more_than_a_warning_and_none_where_the_baseline_has_it(simulate: Simulate) -> None:
    rng = np.random.default_rng(9)
    rows = planted(simulate, num_layers=1)
    healthy = dict(rows)
    skewed = dict(rows, expert_ids=np.argsort(rng.random((TOKENS, 4)), axis=1)[:, :2])
    for extra, baseline, expected in (
        ({}, None, Severity.INFO),
        ({"phase": np.full(TOKENS, 3, np.uint8)}, None, Severity.WARNING),
        ({}, healthy, Severity.WARNING),
        ({}, skewed, Severity.INFO),
    ):
        found = analyze({**skewed, **extra}, num_experts=8, top_k=2, baseline=baseline)
        [finding] = [f for f in found.findings if f.kind is FindingKind.LOAD_IMBALANCE]
        assert finding.severity is expected
        assert finding.severity is not Severity.CRITICAL


def test_fall_to_less_than_half_of_the_baseline_is_collapse(simulate: Simulate) -> None:
    rng = np.random.default_rng(10)
    rows = planted(simulate, num_layers=1)
    # 3.6 of 8: above the limit of 3 without a baseline, below half of 8.
    fallen = dict(rows, expert_ids=np.argsort(rng.random((TOKENS, 4)) * [1, 1, 1.4, 2], axis=1)[:, :2])
    assert all(kind != "router_collapse" for kind, *_ in loud(analyze(fallen, num_experts=8, top_k=2)))
    found = analyze(fallen, num_experts=8, top_k=2, baseline=rows)
    assert loud(found)[0] == ("router_collapse", 0, None)
    assert found.findings[0].code == "router_collapse_from_baseline"


def test_padding_of_91_percent_changes_nothing(simulate: Simulate) -> None:
    rows = planted(simulate)
    count = len(rows["layer_index"])
    pads = count * 10
    rng = np.random.default_rng(11)
    order = rng.permutation(count + pads)
    padded = {
        "layer_index": np.r_[rows["layer_index"], rng.integers(0, 4, pads)][order],
        "expert_ids": np.r_[rows["expert_ids"], np.tile([[0, 1]], (pads, 1))][order],
        "request_id": np.r_[rows["request_id"], rng.choice(rows["request_id"], pads)][order],
        "is_padding": np.r_[np.zeros(count, bool), np.ones(pads, bool)][order],
    }
    clean, got = analyze(rows, num_experts=8, top_k=2), analyze(padded, num_experts=8, top_k=2)
    assert got.findings == clean.findings == ()
    for layer in range(4):
        assert got.metrics[layer].share == clean.metrics[layer].share
        assert got.metrics[layer].num_tokens == clean.metrics[layer].num_tokens


def test_undecided_router_is_a_warning_only_over_several_workloads_outside_training(simulate: Simulate) -> None:
    rows = planted(simulate, num_layers=1)
    rows["router_entropy"] = np.full(TOKENS, 0.999 * np.log(8), np.float32)
    workloads = np.arange(TOKENS) % 2
    train = np.full(TOKENS, 3, np.uint8)
    for extra, expected in (
        ({"workload": workloads}, Severity.WARNING),
        ({}, Severity.INFO),
        ({"workload": workloads, "phase": train}, Severity.INFO),
    ):
        found = analyze({**rows, **extra}, num_experts=8, top_k=2)
        assert [(str(f.kind), f.severity) for f in found.findings] == [("low_confidence", expected)]


def test_dropped_slots_are_capacity_overflow_and_no_load(simulate: Simulate) -> None:
    rows = planted(simulate, num_layers=1)
    status = np.ones((TOKENS, 2), np.uint8)
    status[::10, 1] = 2
    rows["slot_status"] = status
    found = analyze(rows, num_experts=8, top_k=2)
    assert loud(found) == [("capacity_overflow", 0, None)]
    assert found.metrics[0].dropped_share == pytest.approx(0.05, abs=0.001)
    assert found.metrics[0].num_assignments == 2 * TOKENS - 410


def test_incomplete_capture_is_said(simulate: Simulate) -> None:
    state = fold_decisions(planted(simulate), num_experts=8, top_k=2)
    assert finish(state, health=CaptureHealth(num_produced=10)).findings == ()
    health = CaptureHealth(num_produced=100, dropped={"buffer_full": 7, "closed": 0}, num_missing_messages=2)
    [finding] = finish(state, health=health).findings
    assert (finding.kind, finding.severity) == (FindingKind.CAPTURE_UNHEALTHY, Severity.WARNING)
    assert "7 decisions dropped (buffer_full); 2 messages missing" in render_finding(finding.code, finding.args)


def test_counts_alone_claim_nothing_that_needs_requests() -> None:
    state = fold_decisions({"layer_index": [], "expert_ids": []}, num_experts=8, top_k=2)
    assert finish(state).findings == ()
    counted = RoutingState.empty(fold_one().shapes)
    counts = np.array([5000, 5000, 0, 0, 0, 0, 0, 0], np.uint64)
    counted.fold_counts(CountsColumns(0, 9, 0, 0, [LayerCountColumns(0, 8, 0, 5000, 0, counts)]))
    assert [(f.code, f.severity) for f in finish(counted).findings] == [("insufficient_evidence", Severity.INFO)]


def fold_one() -> RoutingState:
    return fold_decisions({"layer_index": [0], "expert_ids": [[0, 1]]}, num_experts=8, top_k=2)


def test_analysis_of_rows_equals_that_of_merged_parts(simulate: Simulate) -> None:
    rows = planted(simulate, topic_strength=1.0)
    rows["expert_ids"][:TOKENS] = [5, 2]
    rng = np.random.default_rng(12)
    part = rng.integers(0, 3, len(rows["layer_index"]))
    state = RoutingState({})
    for index in range(3):
        mine = {name: np.asarray(column)[part == index] for name, column in rows.items()}
        state = state.merge(fold_decisions(mine, num_experts=8, top_k=2))
    whole = analyze(rows, num_experts=8, top_k=2)
    # By their text, because a NaN does not equal itself.
    assert repr(finish(RoutingState.from_bytes(state.to_bytes()))) == repr(whole)
    assert loud(whole) == [("router_collapse", 0, None)]


def test_experts_and_top_k_may_differ_by_layer() -> None:
    rng = np.random.default_rng(13)
    ids = np.full((2000, 2), -1)
    ids[:1000] = np.argsort(rng.random((1000, 8)), axis=1)[:, :2]
    ids[1000:, 0] = rng.integers(0, 4, 1000)
    found = analyze({"layer_index": np.repeat([0, 1], 1000), "expert_ids": ids}, num_experts=[8, 4], top_k=[2, 1])
    assert (found.metrics[1].num_experts, found.metrics[1].num_assignments) == (4, 1000)
    assert found.findings == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": None}, "no column"),
        ({"expert_ids": [[0, 9]] * 4}, "reach from 0 to 9"),
        ({"margin": [0.1]}, "other lengths"),
        ({"expert_ids": [[0, 1, 2]] * 4}, "expected top_k = 2"),
    ],
)
def test_decisions_that_do_not_fit_are_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    rows = {"layer_index": [0] * 4, "expert_ids": [[0, 1]] * 4, **change}
    with pytest.raises(InvalidInputError, match=message):
        analyze({name: column for name, column in rows.items() if column is not None}, num_experts=8, top_k=2)


def test_thresholds_name_every_value_that_is_out_of_range() -> None:
    with pytest.raises(InvalidInputError, match=r"dead_expert is 2, .*hot_expert is 0.5, .*min_requests is 0"):
        Thresholds(dead_expert=2, hot_expert=0.5, min_requests=0)


def test_baseline_of_another_model_is_refused() -> None:
    other = fold_decisions({"layer_index": [0], "expert_ids": [[0, 1]]}, num_experts=16, top_k=2)
    with pytest.raises(InvalidInputError, match="same model"):
        finish(fold_one(), baseline=other)


def test_findings_survive_the_wire_and_have_all_their_words(simulate: Simulate) -> None:
    rng = np.random.default_rng(14)
    rows = planted(simulate)
    rows["expert_ids"][:TOKENS] = [5, 2]
    rows["expert_ids"][TOKENS : 2 * TOKENS] = np.column_stack([rng.choice([0, 1, 2, 4, 5, 6, 7], TOKENS), [3] * TOKENS])
    rows["expert_ids"][2 * TOKENS : 3 * TOKENS] = np.argsort(rng.random((TOKENS, 4)), axis=1)[:, :2]
    rows["router_entropy"] = np.full(len(rows["layer_index"]), np.log(8), np.float32)
    rows["slot_status"] = rng.choice(np.array([1, 2], np.uint8), (len(rows["layer_index"]), 2), p=[0.9, 0.1])
    state = fold_decisions(rows, num_experts=8, top_k=2)
    findings = finish(state, health=CaptureHealth(problems=("a hook failed",))).findings
    assert {f.kind for f in findings} >= {
        FindingKind.ROUTER_COLLAPSE,
        FindingKind.HOT_EXPERT,
        FindingKind.LOAD_IMBALANCE,
        FindingKind.DEAD_EXPERT,
        FindingKind.LOW_CONFIDENCE,
        FindingKind.CAPACITY_OVERFLOW,
        FindingKind.CAPTURE_UNHEALTHY,
    }
    assert tuple(finding_from_proto(message) for message in findings_to_proto(findings)) == findings
    assert len({finding.rule_id for finding in findings}) == len(findings)
    for finding in findings:
        for part in ("title", "summary", "remedy"):
            assert f"finding.{finding.code}.{part}" in catalogue()
            assert "{{" not in render_finding(finding.code, finding.args, part)
