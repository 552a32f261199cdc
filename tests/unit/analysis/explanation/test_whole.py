"""All findings of an analysis at once: what each source of loads gives, and what planning gets of them."""

from typing import Any

import numpy as np

from moe_debugger.analysis import Analysis, Finding, FindingKind, LayerShape, RoutingState, Severity
from moe_debugger.analysis.explanation import PlacementOptions, explain_analysis
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

PREFILL, DECODE = pb.PHASE_PREFILL, pb.PHASE_DECODE
UNEVEN = np.array([0.3, 0.3, *[0.4 / 6] * 6])


def state_of(num_steps: int, *, seed: int = 0) -> RoutingState:
    """Return a state of steps of 1,000 top-1 tokens, whose two busy experts stand next to each other."""
    rng, state = np.random.default_rng(seed), RoutingState.empty([LayerShape(0, 8, 1)])
    for step in range(num_steps):
        load = rng.multinomial(1000, UNEVEN).astype(np.uint64)
        columns = [LayerCountColumns(0, 8, 0, 1000, 0, load)]
        state.fold_counts(CountsColumns(step, step, DECODE, 1000, columns))
    return state


def rows_of(num_forwards: int, phase: int, *, first: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    n = num_forwards * 200
    return {
        "layer_index": np.zeros(n, int),
        "expert_ids": rng.choice(8, (n, 1), p=UNEVEN),
        "forward_index": first + np.repeat(np.arange(num_forwards), 200),
        "phase": np.full(n, phase),
        "step": np.zeros(n, int),
    }


def explained(state: RoutingState, **given: Any) -> Analysis:
    findings = tuple(Finding(FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 0, expert) for expert in range(2))
    analysis = Analysis(metrics={}, findings=findings, num_requests=0)
    return explain_analysis(analysis, state=state, placement=PlacementOptions(num_ranks=4), **given)


def placement_of(analysis: Analysis) -> Any:
    explanation = analysis.findings[0].explanation
    assert explanation is not None
    return next(one for one in explanation.remedies if one.code in ("apply_placement", "keep_placement"))


def test_single_steps_of_the_history_are_planned_with() -> None:
    remedy = placement_of(explained(state_of(120)))
    assert remedy.code == "apply_placement"
    # Half of 120 steps are held out.
    assert remedy.args["steps"] == "60"


def test_where_buckets_are_wider_than_a_step_the_sample_of_single_steps_is_used() -> None:
    # 5,000 steps are 2,500 buckets of two, and 64 single steps are kept.
    assert placement_of(explained(state_of(5000))).args["steps"] == "32"


def test_rows_give_the_forwards_of_the_phase_that_has_most_of_them() -> None:
    decode, prefill = rows_of(100, DECODE), rows_of(8, PREFILL, first=100)
    rows = {name: np.concatenate([prefill[name], decode[name]]) for name in decode}
    assert placement_of(explained(RoutingState.empty([LayerShape(0, 8, 1)]), rows=rows)).args["steps"] == "50"


def test_only_the_most_severe_findings_are_explained() -> None:
    found = explained(state_of(10), max_findings=1)
    assert [one.explanation is not None for one in found.findings] == [True, False]


def test_training_tokens_make_it_a_training_unless_that_is_said() -> None:
    of_training = explained(state_of(10), is_training=True).findings[0].explanation
    of_inference = explained(state_of(10)).findings[0].explanation
    assert of_training is not None
    assert of_inference is not None
    assert "balance_coef" in [one.name for one in of_training.missing]
    assert "balance_coef" not in [one.name for one in of_inference.missing]
