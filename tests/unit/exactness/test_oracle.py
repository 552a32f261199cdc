"""The oracle itself: on experts whose routing is written down here, and on planted faults of the capture."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracle.causal import Oracle, SiteCall
from oracle.compare import Comparison, compare
from oracle.expectations import forward_problems, generate_problems
from oracle.observe import is_same, observed, state_of
from torch import nn
from zoo.build import ALL

from moe_debugger import MoEDebugger
from moe_debugger.v1 import routing_pb2 as pb

IDS = torch.tensor([[0, 2], [3, 1], [2, 2], [1, 0]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, -0.125], [0.3, 0.2], [1.0, 0.0]])


class Experts(nn.Module):
    """Four experts that each multiply by a matrix, called as the library's are."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outputs = torch.einsum("tkij,tj->tki", self.down_proj[ids], hidden.to(self.down_proj.dtype))
        return (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(1).to(hidden.dtype)


class Model(nn.Module):
    """One MoE layer whose routing is `IDS` and `WEIGHTS`."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.experts(hidden, IDS, WEIGHTS)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def test_the_oracle_finds_the_experts_and_weights_from_outputs_alone(hidden: torch.Tensor) -> None:
    model = Model()
    with Oracle(model) as oracle:
        model(hidden)
    (call,) = oracle.calls["experts"]
    expected = np.zeros((4, 4))
    for row in range(4):
        for expert, weight in zip(IDS[row].tolist(), WEIGHTS[row].tolist(), strict=True):
            expected[row, expert] += weight
    # Row 2 has one expert in two slots, row 3 a slot of weight 0, which moves nothing.
    np.testing.assert_array_equal(call.used, expected != 0)
    np.testing.assert_allclose(call.weights, expected, rtol=1e-12)
    assert not call.identity_weights.any()
    assert call.replay_error < 1e-6
    assert call.unexplained < 1e-12


def test_the_oracle_leaves_outputs_modules_and_random_numbers_as_they_were(hidden: torch.Tensor) -> None:
    model = Model()
    before, expected = state_of(model), model(hidden)
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    with Oracle(model):
        assert is_same(expected, model(hidden))
        assert torch.equal(torch.rand(3), drawn)
    assert state_of(model) == before
    assert "forward" not in vars(model.experts)


def test_the_oracle_sees_routing_that_the_experts_invent_for_themselves(hidden: torch.Tensor) -> None:
    class Stubborn(Experts):
        def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden, (ids + 1) % 4, weights)

    model = Model()
    model.experts = Stubborn()
    with Oracle(model) as oracle:
        model(hidden)
    (call,) = oracle.calls["experts"]
    assert np.flatnonzero(call.used[0]).tolist() == [1, 3]


def test_a_recomputation_in_the_backward_pass_is_no_call(hidden: torch.Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    model = Model()
    with Oracle(model) as oracle:
        output: Any = checkpoint(model, hidden.requires_grad_(), use_reentrant=False)
        output.sum().backward()
    assert len(oracle.calls["experts"]) == 1
    assert oracle.num_recomputed["experts"] == 1


def _captured() -> tuple[Any, dict[str, list[SiteCall]]]:
    build = ALL["mixtral"]
    model = build.make()
    with torch.no_grad(), Oracle(model) as oracle, MoEDebugger(model, level="routes+tokens") as debugger:
        model(**build.inputs(model))
        assert debugger.session is not None
        return debugger.session.decisions(), oracle.calls


def _compared(decisions: Any, calls: dict[str, list[SiteCall]]) -> Comparison:
    return compare(decisions, calls, weight_rounding=1e-6)


def test_what_was_captured_is_exact() -> None:
    decisions, calls = _captured()
    comparison = _compared(decisions, calls)
    assert comparison.is_exact, comparison.summary()
    assert comparison.num_rows == 3 * 21
    assert comparison.num_slots == 2 * comparison.num_rows


def test_one_wrong_id_in_one_row_is_found() -> None:
    decisions, calls = _captured()
    taken = set(decisions.expert_ids[17].tolist())
    decisions.expert_ids[17, 0] = next(expert for expert in range(8) if expert not in taken)
    comparison = _compared(decisions, calls)
    assert comparison.num_wrong_ids == 2
    assert not comparison.is_exact


def test_a_weight_that_is_off_by_a_ten_thousandth_is_found() -> None:
    decisions, calls = _captured()
    decisions.gate_weights[40, 1] *= 1.0001
    comparison = _compared(decisions, calls)
    assert not comparison.is_exact
    assert comparison.num_wrong_ids == 0
    assert comparison.max_weight_error == pytest.approx(1e-4, rel=0.01)


def test_weights_of_the_wrong_slots_are_found() -> None:
    decisions, calls = _captured()
    decisions.gate_weights[:] = decisions.gate_weights[:, ::-1].copy()
    assert not _compared(decisions, calls).is_exact


def test_swapped_rows_are_found() -> None:
    decisions, calls = _captured()
    decisions.expert_ids[[3, 4]] = decisions.expert_ids[[4, 3]]
    decisions.gate_weights[[3, 4]] = decisions.gate_weights[[4, 3]]
    assert not _compared(decisions, calls).is_exact


def test_a_missing_layer_a_missing_call_and_no_rows_at_all_are_found() -> None:
    decisions, calls = _captured()
    assert not _compared(decisions, {**calls, "other.experts": []}).is_exact
    assert not _compared(decisions, {name: [*sites, sites[0]] for name, sites in calls.items()}).is_exact
    assert not _compared(decisions, {}).is_exact
    assert not Comparison().is_exact


def test_a_slot_that_names_an_expert_at_weight_0_is_unseen_and_a_dropped_one_that_computed_is_wrong() -> None:
    decisions, calls = _captured()
    (name, (call,)) = next(iter(calls.items()))
    row = int(np.flatnonzero(decisions.layer_index == 0)[0])
    expert = int(decisions.expert_ids[row, 0])
    used, weights = call.used.copy(), call.weights.copy()
    used[0, expert], weights[0, expert] = False, 0.0
    decisions.gate_weights[row, 0] = 0.0
    comparison = _compared(decisions, {**calls, name: [replace(call, used=used, weights=weights)]})
    assert comparison.num_unseen_slots == 1
    assert comparison.num_wrong_ids == 0
    # The expert did compute for that token: then a captured weight of 0 is wrong, and so is a slot called dropped.
    assert _compared(decisions, calls).max_weight_error == pytest.approx(1.0)
    decisions.expert_ids[row, 0], decisions.slot_status[row, 0] = -1, pb.SLOT_STATUS_DROPPED
    assert _compared(decisions, calls).num_wrong_ids == 1


def test_an_output_that_changes_and_a_hook_that_stays_are_found() -> None:
    build = ALL["mixtral"]
    model = build.make()
    inputs = build.inputs(model)
    outputs = iter([0.0, 1.0])

    def run(model: nn.Module) -> Any:
        model.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
        with torch.no_grad():
            return model(**inputs).logits + next(outputs)

    problems = "\n".join(observed(model, run).comparison.problems)
    assert "the outputs with the debugger differ" in problems
    assert "'model.layers.0' is not as it was" in problems


def test_wrong_padding_positions_tokens_phases_and_requests_are_found() -> None:
    decisions, _ = _captured()
    build = ALL["mixtral"]
    inputs = build.inputs(build.make())
    assert list(forward_problems(decisions, inputs)) == []
    changes: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("is_padding", lambda values: ~values),
        ("position", lambda values: values + 1),
        ("token_id", lambda values: values + 1),
        ("phase", lambda values: values * 0 + 2),
        ("request_index", lambda values: values * 0),
    )
    for column, change in changes:
        kept = getattr(decisions, column)
        setattr(decisions, column, change(kept))
        assert list(forward_problems(decisions, inputs)), column
        setattr(decisions, column, kept)
    # One forward is no generate of four tokens.
    output = torch.zeros(3, 11, dtype=torch.int64)
    assert any(
        "1 forwards captured, generate ran 4" in text
        for text in generate_problems(decisions, inputs, output, is_encoder_decoder=False)
    )
