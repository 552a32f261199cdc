"""A really trained router whose balancing term changes its sign, watched as a user would watch it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_moe
import torch

from moe_debugger import Analysis, Finding, MoEDebugger, open_recording
from moe_debugger.analysis import FindingKind, Severity
from moe_debugger.analysis.explanation import explain, explain_recording, explanation_text, histories_from_decisions
from moe_debugger.demo.training import switch_balance_loss

FAULT_STEP = 20
NUM_STEPS = 90
TOP_K = 2


def balancing_loss(router_logits: Any) -> Any:
    return torch.stack([switch_balance_loss(logits.unsqueeze(0), TOP_K).mean() for logits in router_logits]).sum()


@dataclass
class Run:
    """A session's diagnosis, its rows and the folder of its recording."""

    analysis: Analysis
    rows: Any
    path: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train 90 steps of 8 rows, healthy for 20, then with the sign of the balancing term turned."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("run") / "recording"
    model = tiny_moe.build("mixtral", seed=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with MoEDebugger(model, step_domain="global", kind="training", gradients=True) as debugger:
        session = debugger.session
        assert session is not None
        recorder = session.record(path)
        for n in range(NUM_STEPS):
            coefficient = 0.05 if n < FAULT_STEP else -0.3
            ids = torch.randint(3, tiny_moe.VOCABULARY, (8, 32))
            with debugger.step(n) as step:
                output = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
                task, balance = output.loss, balancing_loss(output.router_logits)
                (task + coefficient * balance).backward()
                step.record(loss=task, balance_loss=balance, balance_coef=coefficient, lr=1e-2)
                optimizer.step()
                optimizer.zero_grad()
        recorder.stop()
        return Run(session.diagnose(), session.decisions(), path)


def skew_of(analysis: Analysis) -> Finding:
    """Return the skew of the whole run, healthy steps included."""
    found = [one for one in analysis.findings if one.kind is FindingKind.LOAD_IMBALANCE]
    assert found, [one.code for one in analysis.findings]
    return found[0]


def test_the_turned_sign_ranks_first_with_the_step_at_which_it_turned(run: Run) -> None:
    explanation = skew_of(run.analysis).explanation
    assert explanation is not None
    assert explanation.status == "ranked"
    cause = explanation.causes[0]
    assert (cause.code, cause.rule, cause.setting) == (
        "balancing_sign_turned",
        "balance.sign.coefficient",
        "balance_coef",
    )
    assert (cause.args["step"], cause.args["before"], cause.args["now"]) == ("20", "0.05", "-0.3")
    assert cause.weight > 0.4
    assert explanation.unexplained + sum(one.weight for one in explanation.causes) == pytest.approx(1)
    assert explanation.started_at is not None
    assert FAULT_STEP <= explanation.started_at.last_step <= FAULT_STEP + 30
    assert "router_aux_loss_coef: 0.05" in explanation.remedies[0].change
    assert any("turned from 0.05 to -0.3 at step 20" in line for line in explanation_text(explanation))


def test_without_series_the_cause_is_not_observable_and_no_setting_is_blamed(run: Run) -> None:
    analysis = run.analysis
    explanation = analysis.explain(
        skew_of(analysis), histories=histories_from_decisions(run.rows, [(layer, 8) for layer in range(3)])
    )
    assert explanation.status == "not_observable"
    assert explanation.causes == ()
    assert explanation.unexplained == 1
    assert "Cause not observable; supply balance_coef, balance_loss, lr" in "\n".join(explanation_text(explanation))
    assert [one.code for one in explanation.remedies] == ["supply_observations"]
    assert "debugger.step(n, balance_coef=balance_coef)" in explanation.remedies[0].change
    # The change itself is seen in the loads all the same.
    assert explanation.started_at is not None


def test_every_finding_is_explained_and_as_plain_values_holds_no_nan(run: Run) -> None:
    analysis = run.analysis
    assert all(one.explanation is not None for one in analysis.findings)
    text = repr([one.explanation.to_dict() for one in analysis.findings if one.explanation is not None])
    assert "nan" not in text
    assert "explanation" in analysis.findings[0].to_dict()


def test_a_recording_is_explained_like_the_session(run: Run) -> None:
    found = explain_recording(open_recording(run.path))
    expected = {one.rule_id: one.explanation for one in run.analysis.findings}
    assert expected
    assert {one.rule_id: one.explanation for one in found.findings} == expected


def test_the_queries_of_explanations_run_and_find_the_rows() -> None:
    model = tiny_moe.build("mixtral", seed=1)
    with MoEDebugger(model, level="routes+tokens") as debugger:
        model(input_ids=torch.arange(3, 43).reshape(2, 20), use_cache=False)
        session = debugger.session
        assert session is not None
        rows = session.decisions()
        busiest = int(rows.expert_ids[rows.layer_index == 1].ravel()[0])
        finding = Finding(FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 1, busiest)
        link = explain(finding, rows=rows, is_training=False).rows
        assert link is not None
        selected = ((rows.layer_index == 1) & (rows.expert_ids == busiest).any(axis=1)).sum()
        assert link.to_python() == f"(rows.layer_index == 1) & (rows.expert_ids == {busiest}).any(axis=1)"
        assert len(session.query(link.query)) == selected > 0
        for kind in (FindingKind.DEAD_EXPERT, FindingKind.ROUTER_COLLAPSE):
            place = explain(Finding(kind, Severity.WARNING, kind.value, 1, since_step=1)).rows
            assert place is not None
            session.query(place.query)
        for text in (
            "tokens where step >= 1 by token_id show count() order by count() desc limit 20",
            "tokens where layer = 1 and token_id = 7",
            'tokens where layer = 1 and request = "r1"',
        ):
            session.query(text)
