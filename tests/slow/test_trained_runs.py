"""Early warning on really trained networks: every seed of every case, one test each.

A test is a run of 230 to 330 steps; docs/early-warning.md has the table. Single runs: ``-k "turned and 0.05"``.
"""

import pytest
from trained_runs import CASES, NUM_EXPERTS, TOP_K, TrainedRun, train_case

from moe_debugger.analysis import FindingKind, analyze

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _runs(*names: str) -> list[tuple[str, int]]:
    return [(name, seed) for name in names for seed in range(CASES[name].num_seeds)]


def _faulty(run: TrainedRun) -> tuple[int, int, int]:
    assert run.fault_step is not None
    assert run.warned_at is not None, "no warning"
    assert run.half_at is not None, "no layer lost half of its experts"
    return run.fault_step, run.warned_at, run.half_at


@pytest.mark.parametrize(("name", "seed"), _runs("loss turned, 0.3", "loss turned, 0.05", "bias turned"))
def test_a_fault_is_warned_of_before_any_layer_has_lost_half_and_collapse_follows(name: str, seed: int) -> None:
    run = train_case(name, seed)
    fault, warned, half = _faulty(run)
    assert fault < warned < half
    collapsed = run.collapsed_at()
    assert collapsed is not None
    assert collapsed > warned


@pytest.mark.parametrize(("name", "seed"), _runs("healthy, rate x 0.2", "healthy, rate x 2.5", "loss-free, rate x 0.2"))
def test_a_healthy_run_with_warm_up_and_a_change_of_the_rate_gives_neither(name: str, seed: int) -> None:
    run = train_case(name, seed)
    assert run.warned_at is None
    assert run.collapsed_at() is None


@pytest.mark.parametrize(("name", "seed"), _runs("no balancing"))
def test_no_balancing_is_imbalance_and_collapse_only_below_the_limit(name: str, seed: int) -> None:
    run = train_case(name, seed)
    found = analyze(run.window(len(run.loads) - 40, len(run.loads)), num_experts=NUM_EXPERTS, top_k=TOP_K).findings
    collapsed = {finding.layer_index for finding in found if finding.kind is FindingKind.ROUTER_COLLAPSE}
    assert FindingKind.LOAD_IMBALANCE in {finding.kind for finding in found}
    late = run.loads[-40:].sum(axis=0) / run.loads[-40:].sum(axis=(0, 2))[:, None]
    for layer, share in enumerate(late):
        inverse = 1 / (share**2).sum()
        # Effective experts of order 2 are never more than those of order 1, so a layer above the limit by them is fine.
        assert layer not in collapsed or inverse < 1.5 * TOP_K
