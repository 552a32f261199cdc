"""torch.compile: taps leave compiled code whole, whether the debugger came before or after it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import VOCABULARY, build

from moe_debugger import Decisions, MoEDebugger
from moe_debugger.capture.compiled import reset_compiled_code

# torch's own code under its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    reset_compiled_code()
    yield
    reset_compiled_code()


def _batch() -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _compile(model: Any, **options: Any) -> Any:
    compiled: Any = torch.compile(model, **options)
    return compiled


def _model(implementation: str = "grouped_mm") -> Any:
    model = build("mixtral", num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    return model


def _rows(model: Any, run: Callable[[], Any], *, before_attach: Callable[[], Any] | None = None) -> Decisions:
    with torch.no_grad():
        if before_attach is not None:
            before_attach()
        with MoEDebugger(model) as debugger:
            run()
            session = debugger.session
            assert session is not None
            rows = session.decisions()
            assert debugger.get_performance_metrics().problems == {}
    return rows


def _assert_same(rows: Decisions, expected: Decisions) -> None:
    assert np.array_equal(rows.layer_index, expected.layer_index)
    assert np.array_equal(rows.expert_ids, expected.expert_ids)
    np.testing.assert_allclose(rows.gate_weights, expected.gate_weights, rtol=1e-4, atol=1e-6)
    assert np.array_equal(rows.is_padding, expected.is_padding)
    assert np.array_equal(rows.position, expected.position)
    assert np.array_equal(rows.phase, expected.phase)


@pytest.mark.parametrize(
    ("order", "is_full"),
    [("attached first", True), ("compiled first", True), ("compiled model given", False)],
)
def test_compiled_routes_equal_those_of_the_plain_model(order: str, is_full: bool) -> None:
    model, batch = _model(), _batch()
    expected = _rows(model, lambda: model(**batch))
    compiled = _compile(model, backend="aot_eager", fullgraph=is_full)
    watched = compiled if order == "compiled model given" else model
    warm_up = (lambda: compiled(**batch)) if order == "compiled first" else None
    _assert_same(_rows(watched, lambda: compiled(**batch), before_attach=warm_up), expected)


@pytest.mark.slow
def test_experts_that_break_the_graph_themselves() -> None:
    model, batch = _model("eager"), _batch()
    expected = _rows(model, lambda: model(**batch))
    compiled = _compile(model, backend="aot_eager")
    _assert_same(_rows(model, lambda: compiled(**batch)), expected)


@pytest.mark.slow
def test_layers_that_were_compiled_in_place() -> None:
    model, batch = _model(), _batch()
    expected = _rows(model, lambda: model(**batch))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    _assert_same(_rows(model, lambda: model(**batch), before_attach=lambda: model(**batch)), expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_keeps_the_taps() -> None:
    model, batch = _model(), _batch()
    expected = _rows(model, lambda: model(**batch))
    compiled = _compile(model, fullgraph=True)
    _assert_same(_rows(model, lambda: compiled(**batch)), expected)


def test_after_detach_compiled_code_calls_nothing_of_ours() -> None:
    model, batch = _model(), _batch()
    compiled = _compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(**batch).logits
        with MoEDebugger(model) as debugger:
            during = compiled(**batch).logits
            assert debugger.get_routing_stats().num_tokens == 23
        after = compiled(**batch).logits
    assert torch.equal(before, after)
    assert torch.equal(before, during)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
