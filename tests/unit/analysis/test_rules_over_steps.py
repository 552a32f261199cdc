"""Findings that need steps, a baseline, ranks or pairs: what is planted is found, and what is healthy is left alone."""

from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis import Analysis, FindingKind, Severity, analyze, fold_decisions
from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import render_finding

STEPS, PER_STEP = 80, 256


def loud(analysis: Analysis) -> list[tuple[str, int | None, int | None]]:
    return [(str(f.kind), f.layer_index, f.expert_id) for f in analysis.findings if f.severity is not Severity.INFO]


def choose(rng: np.random.Generator, preference: np.ndarray, top_k: int) -> np.ndarray:
    return np.argpartition(-(preference + rng.gumbel(size=preference.shape)), top_k - 1, axis=1)[:, :top_k]


def steps_of(num_experts: int, top_k: int, seed: int, hot: float = 0.0, **columns: Any) -> dict[str, Any]:
    """Return one layer in steps of four requests; in each step the next expert is preferred by `hot`."""
    rng = np.random.default_rng(seed)
    step = np.repeat(np.arange(STEPS), PER_STEP)
    preference = np.zeros((len(step), num_experts))
    preference[np.arange(len(step)), step % num_experts] = hot
    return {
        "layer_index": np.zeros(len(step), int),
        "expert_ids": choose(rng, preference, top_k),
        "step": step,
        "request_id": np.array([f"r{index}" for index in range(STEPS * 4)])[np.arange(len(step)) // 64],
        **columns,
    }


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8)])
@pytest.mark.parametrize("has_requests", [True, False])
def test_a_hot_expert_that_rotates_from_step_to_step_is_imbalance_of_steps(
    num_experts: int, top_k: int, has_requests: bool
) -> None:
    rows = steps_of(num_experts, top_k, 1, hot=5.0)
    if not has_requests:
        del rows["request_id"]
    found = analyze(rows, num_experts=num_experts, top_k=top_k)
    # Summed over all steps nothing is to be seen.
    assert found.metrics[0].max_over_mean < 1.3
    assert loud(found) == [("load_imbalance", 0, None)]
    [finding] = found.findings
    assert finding.code == "load_imbalance_steps"
    assert finding.statistic > 2
    assert "of a step in turn" in render_finding(finding.code, finding.args)
    assert loud(analyze(steps_of(num_experts, top_k, 1), num_experts=num_experts, top_k=top_k)) == []


def test_steps_that_differ_only_by_their_requests_are_no_warning() -> None:
    rng = np.random.default_rng(2)
    rows = steps_of(8, 2, 2)
    # One request a step, each with a strong preference of its own: what differs is the requests.
    rows["request_id"] = np.array([f"r{index}" for index in range(STEPS)])[rows["step"]]
    rows["expert_ids"] = choose(rng, rng.normal(0, 2.5, (STEPS, 8))[rows["step"]], 2)
    assert loud(analyze(rows, num_experts=8, top_k=2)) == []


def test_a_training_that_collapses_at_its_end_is_collapse_since_then() -> None:
    rng = np.random.default_rng(3)
    num_steps, per_step, fault = 240, 64, 180
    step = np.repeat(np.arange(num_steps), per_step)
    # From the fault on two experts are preferred more with every step.
    slope = np.clip((step - fault) / 8, 0, 6)[:, None] * np.isin(np.arange(8), [2, 5])
    rows = {
        "layer_index": np.zeros(len(step), int),
        "expert_ids": choose(rng, slope.astype(float), 2),
        "step": step,
        "request_id": np.array([f"row {index}" for index in range(4)])[np.arange(len(step)) // 16 % 4],
        "phase": np.full(len(step), 3),
    }
    found = analyze(rows, num_experts=8, top_k=2)
    assert found.metrics[0].effective_experts > 4
    collapse = [f for f in found.findings if f.kind is FindingKind.ROUTER_COLLAPSE]
    assert [(f.code, f.severity, f.layer_index) for f in collapse] == [
        ("router_collapse_in_training", Severity.CRITICAL, 0)
    ]
    assert collapse[0].since_step is not None
    assert fault + 5 < collapse[0].since_step < fault + 50
    [warning] = [f for f in found.findings if f.kind is FindingKind.COLLAPSE_WARNING]
    assert warning.since_step is not None
    assert fault - 10 < warning.since_step < collapse[0].since_step
    assert found.early_warning is not None
    assert found.early_warning.warned == (0,)
    # A baseline does not hide it: over the whole run the layer has lost less than half.
    healthy = {name: column[: 100 * per_step] for name, column in rows.items()}
    against = analyze(rows, num_experts=8, top_k=2, baseline=healthy).findings
    assert [f.since_step for f in against if f.kind is FindingKind.ROUTER_COLLAPSE] == [collapse[0].since_step]
    # The same shift in serving is a change of text, not of the router.
    rows["phase"] = np.full(len(step), 2)
    assert not [f for f in analyze(rows, num_experts=8, top_k=2).findings if f.kind is FindingKind.ROUTER_COLLAPSE]


@pytest.mark.parametrize("healthy", [5, 20, 40, 60, 100])
@pytest.mark.parametrize("phase", [0, 3])
def test_a_training_that_collapses_early_is_collapse(healthy: int, phase: int) -> None:
    step = np.repeat(np.arange(200), 64)
    slope = np.clip((step - healthy) / 4, 0, 10)[:, None] * np.isin(np.arange(8), [2, 5])
    rows = {
        "layer_index": np.zeros(len(step), int),
        "expert_ids": choose(np.random.default_rng(healthy), slope.astype(float), 2),
        "step": step,
        "request_id": np.array([f"row {index}" for index in range(4)])[np.arange(len(step)) // 16 % 4],
        "phase": np.full(len(step), phase),
    }
    kinds = {kind for kind, _, _ in loud(analyze(rows, num_experts=8, top_k=2))}
    assert "router_collapse" in kinds
    assert kinds <= {"router_collapse", "collapse_warning"}


def tokens_with_ids(seed: int, num_experts: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    num = 4096
    return {
        "layer_index": np.zeros(num, int),
        "expert_ids": choose(rng, np.zeros((num, num_experts)), 2),
        "request_id": np.array([f"r{index}" for index in range(64)])[np.arange(num) // 64],
        "position": np.arange(num) % 64,
    }


def test_the_same_tokens_with_experts_permuted_are_drift_though_loads_are_equal() -> None:
    rows = tokens_with_ids(4)
    moved = dict(rows, expert_ids=(rows["expert_ids"] + 3) % 8)
    found = analyze(moved, num_experts=8, top_k=2, baseline=rows)
    assert loud(found) == [("drift", 0, None)]
    assert found.findings[0].code == "drift_tokens"
    assert analyze(rows, num_experts=8, top_k=2, baseline=rows).findings == ()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 2), (64, 8), (256, 8)])
@pytest.mark.parametrize("columns", [("request_id", "position"), (), ("request_id", "token_id")])
def test_two_experts_that_changed_places_are_drift(num_experts: int, top_k: int, columns: tuple[str, ...]) -> None:
    rng = np.random.default_rng(num_experts)
    rows = tokens_with_ids(4)
    rows["token_id"] = rng.integers(0, 5000, 4096)
    topic = rng.normal(0, 0.5, (64, num_experts))[np.arange(4096) // 64]
    rows["expert_ids"] = choose(rng, topic, top_k)
    rows = {name: rows[name] for name in ("layer_index", "expert_ids", *columns)}
    swapped = np.arange(num_experts)
    swapped[[2, 5]] = [5, 2]
    sizes: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k}
    found = analyze(dict(rows, expert_ids=swapped[rows["expert_ids"]]), baseline=rows, **sizes)
    assert loud(found) == [("drift", 0, None)]
    finding = next(f for f in found.findings if f.code == "drift_experts")
    assert finding.args["lost"] == "2, 5"
    # Half of the near ties that fall the other way are none.
    wobble = rng.random(4096) < 0.1
    ids = np.where(wobble[:, None], choose(rng, topic, top_k), rows["expert_ids"])
    assert loud(analyze(dict(rows, expert_ids=ids), baseline=rows, **sizes)) == []


@pytest.mark.parametrize("columns", [("request_id",), ("request_id", "position"), (), ("request_id", "token_id")])
def test_other_text_is_no_drift_and_the_same_with_experts_permuted_is(columns: tuple[str, ...]) -> None:
    def text(seed: int) -> dict[str, Any]:
        rows = tokens_with_ids(seed)
        # Many spaces: some tokens stand at the same place in any text.
        tokens = np.random.default_rng(seed).integers(0, 60, 4096)
        rows["token_id"] = np.where(np.random.default_rng(seed + 100).random(4096) < 0.5, 32, tokens)
        return {name: rows[name] for name in ("layer_index", "expert_ids", *columns)}

    rows = text(4)
    moved = dict(rows, expert_ids=np.random.default_rng(0).permutation(8)[rows["expert_ids"]])
    assert loud(analyze(moved, num_experts=8, top_k=2, baseline=rows)) == [("drift", 0, None)]
    for seed in range(5, 10):
        assert analyze(text(seed), num_experts=8, top_k=2, baseline=rows).findings == ()


def test_tokens_that_are_known_by_their_ids_need_no_renumbering_to_be_rerouted() -> None:
    rows = tokens_with_ids(4)
    elsewhere = dict(rows, expert_ids=tokens_with_ids(5)["expert_ids"])
    assert analyze(elsewhere, num_experts=8, top_k=2, baseline=rows).findings == ()
    ids = {"token_id": np.random.default_rng(1).integers(0, 5000, 4096)}
    assert loud(analyze({**elsewhere, **ids}, num_experts=8, top_k=2, baseline={**rows, **ids})) == [("drift", 0, None)]


@pytest.mark.parametrize("names", [1, 4, 0])
def test_other_topics_are_no_change_where_few_requests_stand_for_them(names: int) -> None:
    def topics(seed: int, num_topics: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        topic = np.arange(4096) * num_topics // 4096
        rows = {
            "layer_index": np.zeros(4096, int),
            "expert_ids": choose(rng, rng.normal(0, 2, (num_topics, 8))[topic], 2),
            "request_id": np.char.add(f"{seed} ", topic.astype(str)),
        }
        if not names:
            del rows["request_id"]
        return rows

    found = [
        analyze(topics(s, names or 3), num_experts=8, top_k=2, baseline=topics(s + 100, names or 3)) for s in (1, 2)
    ]
    assert "drift" in {finding.kind for each in found for finding in each.findings}
    assert [loud(each) for each in found] == [[], []]


def test_a_few_tokens_that_wobble_are_no_drift_and_moved_loads_are() -> None:
    rng = np.random.default_rng(6)
    rows = tokens_with_ids(6)
    ids = rows["expert_ids"].copy()
    wobble = rng.random(len(ids)) < 0.06
    ids[wobble] = choose(rng, np.zeros((int(wobble.sum()), 8)), 2)
    assert analyze(dict(rows, expert_ids=ids), num_experts=8, top_k=2, baseline=rows).findings == ()
    skewed = tokens_with_ids(7)
    skewed["request_id"] = np.char.add("other ", skewed["request_id"])
    skewed["expert_ids"] = choose(rng, np.tile(np.linspace(0, 1.4, 8), (4096, 1)), 2)
    found = analyze(skewed, num_experts=8, top_k=2, baseline=rows)
    assert [f.code for f in found.findings if f.kind is FindingKind.DRIFT] == ["drift"]


def test_the_rank_that_holds_the_loaded_experts_is_a_straggler() -> None:
    rng = np.random.default_rng(8)
    rows = steps_of(16, 2, 8)
    preference = np.where(np.arange(16) < 4, 0.8, 0.0)
    rows["expert_ids"] = choose(rng, np.tile(preference, (len(rows["step"]), 1)), 2)
    ranks = {0: np.arange(16) // 4}
    found = analyze(rows, num_experts=16, top_k=2, expert_ranks=ranks)
    assert [(f.kind, f.args["rank"], f.rule_id) for f in found.findings] == [
        (FindingKind.RANK_STRAGGLER, "0", "rank_straggler.l0.r0")
    ]
    load = np.bincount(rows["expert_ids"].ravel() // 4, minlength=4)
    assert found.findings[0].statistic == pytest.approx(load[0] / load.mean())
    spread = {0: np.arange(16) % 4}
    assert analyze(rows, num_experts=16, top_k=2, expert_ranks=spread).findings == ()
    with pytest.raises(InvalidInputError, match="expert_ranks of layer 0"):
        analyze(rows, num_experts=16, top_k=2, expert_ranks={0: [0, 1]})


def test_two_experts_that_the_same_tokens_choose_are_duplicates() -> None:
    rng = np.random.default_rng(9)
    rows = tokens_with_ids(9, num_experts=16)
    ids = rows["expert_ids"]
    # Whoever chooses expert 3 chooses 11, and the other way round.
    either = np.isin(ids, [3, 11]).any(axis=1)
    ids[either] = [3, 11]
    ids[~either] = choose(rng, np.where(np.isin(np.arange(16), [3, 11]), -50.0, 0.0) + np.zeros((4096, 16)), 2)[~either]
    found = analyze(rows, num_experts=16, top_k=2)
    assert [(str(f.kind), f.expert_id, f.args["other"], f.rule_id) for f in found.findings] == [
        ("duplicate_experts", 3, "11", "duplicate_experts.l0.e3.e11")
    ]


@pytest.mark.parametrize(("phase", "severity"), [(0, Severity.WARNING), (3, Severity.CRITICAL)])
def test_counts_of_single_steps_give_what_counts_allow(phase: int, severity: Severity) -> None:
    from moe_debugger.analysis import RoutingState, finish
    from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

    rows = steps_of(8, 2, 10)
    rows["expert_ids"] = np.where(rows["expert_ids"] % 2 == 0, 2, 5)
    rows["expert_ids"][:, 1] = 7 - rows["expert_ids"][:, 0]
    state = fold_decisions(rows, num_experts=8, top_k=2)
    counted = RoutingState.empty(state.shapes)
    for step in range(STEPS):
        mine = rows["expert_ids"][rows["step"] == step]
        counts = np.bincount(mine.ravel(), minlength=8).astype(np.uint64)
        layer = LayerCountColumns(0, 8, 0, len(mine), 0, counts)
        counted.fold_counts(CountsColumns(step, step, phase, len(mine), [layer]))
    found = finish(counted)
    assert found.metrics[0].blocks_of == "steps"
    assert [(f.kind, f.severity) for f in found.findings] == [(FindingKind.ROUTER_COLLAPSE, severity)]
