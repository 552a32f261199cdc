"""`MoEDebugger` alone, as a notebook or a script uses it."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_moe import build

import moe_debugger
from moe_debugger import DependencyMissingError, InvalidInputError, MoEDebugger, SessionClosedError, new_id
from moe_debugger.capture import is_sampled
from moe_debugger.v1 import routing_pb2 as pb


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def _ids(rows: int = 2, columns: int = 6) -> torch.Tensor:
    return torch.randint(3, 90, (rows, columns), generator=torch.Generator().manual_seed(3))


def test_the_documented_notebook_flow_works(model: Any) -> None:
    debugger = MoEDebugger(model)
    session = debugger.start_session("mine")
    with debugger.profile() as profile:
        model.generate(_ids(), attention_mask=torch.ones(2, 6, dtype=torch.long), max_new_tokens=3, do_sample=False)
    stats, experts = debugger.get_routing_stats(), debugger.get_expert_metrics()
    performance = debugger.get_performance_metrics()
    assert session.name == stats.session_name == "mine"
    assert (stats.num_forwards, stats.num_tokens, stats.num_requests) == (3, 16, 2)
    assert sum(row.num_assignments for row in experts.layer(1)) == 16 * 2
    assert abs(sum(row.share for row in experts.layer(0)) - 1) < 1e-9
    assert profile.performance.num_forwards == performance.num_forwards == 3
    assert performance.tokens_per_s > 0
    assert 0 < performance.hook_time_share < 1
    assert profile.wall_s >= profile.performance.forward_s
    debugger.close()


def test_results_print_convert_and_render(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model, session_name="<script>alert(1)</script>") as debugger:
        model(_ids())
        session = debugger.session
        assert session is not None
        results: list[Any] = [
            debugger.get_routing_stats(),
            debugger.get_expert_metrics(),
            debugger.get_performance_metrics(),
            session.decisions(),
        ]
        for result in results:
            assert len(str(result).splitlines()) > 3
            assert isinstance(result.to_dict(), dict)
            page = result._repr_html_()
            assert page.startswith("<table>")
            assert "<script>" not in page
        frame = results[3].to_pandas()
        assert len(frame) == len(results[3]) == 2 * 6 * 3
        assert list(results[0].to_pandas()["layer_index"]) == [0, 1, 2]
        assert len(results[1].to_pandas()) == 3 * 8
        table = results[3].to_arrow()
        assert table.num_rows == 36
        assert table.column("expert_ids")[0].as_py() == results[3].expert_ids[0].tolist()


def test_a_missing_pandas_is_named_with_its_extra(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(_ids())
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(DependencyMissingError, match=r"moe-debugger\[pandas\]"):
            debugger.get_routing_stats().to_pandas()


def test_importing_the_package_needs_no_torch() -> None:
    code = (
        "import sys, moe_debugger; assert 'torch' not in sys.modules; moe_debugger.MoEDebugger; "
        "assert 'torch' not in sys.modules; print(sorted(moe_debugger.__all__) == list(moe_debugger.__all__))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


def test_every_public_name_can_be_imported_and_an_unknown_one_cannot() -> None:
    for name in moe_debugger.__all__:
        assert getattr(moe_debugger, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = moe_debugger.Nothing


def test_closed_sessions_and_debuggers_say_what_to_do(model: Any) -> None:
    debugger = MoEDebugger(model)
    with pytest.raises(SessionClosedError, match="start_session"):
        debugger.get_routing_stats()
    session = debugger.start_session()
    with pytest.raises(InvalidInputError, match=r"session\.close\(\)"):
        debugger.start_session()
    session.close()
    for call in (session.decisions, session.layers, session.get_routing_stats, debugger.get_expert_metrics):
        with pytest.raises(SessionClosedError, match="start"):
            call()
    debugger.start_session().close()
    debugger.close()
    debugger.close()
    with pytest.raises(SessionClosedError, match=r"MoEDebugger\(model\)"):
        debugger.start_session()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"level": "everything"}, "routes\\+tokens"),
        ({"sampling_rate": 1.5}, "0 to 1"),
        ({"sampling_rate": float("nan")}, "0 to 1"),
        ({"buffer_bytes": 10}, "at least 65536"),
        ({"max_rows_bytes": -1}, "0 or more"),
        ({"max_disk_bytes": -1}, "0 or more"),
        ({"rows_dir": "/no/such/folder"}, "a folder that is there"),
        ({"fleet": "http://127.0.0.1:8080"}, "NATS URL"),
        ({"tenant": "No Such"}, "tenant"),
        ({"step_domain": "mine"}, "source, global"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_expected(model: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        MoEDebugger(model, **arguments)
    MoEDebugger(model).close()


def test_requests_name_rows_phases_positions_and_dummies(model: Any) -> None:
    names = [new_id(), new_id()]
    with torch.no_grad(), MoEDebugger(model) as debugger:
        with debugger.requests([names[0], None, names[1]], phase=["prefill", "decode", "decode"], positions=[0, 9, 40]):
            model(_ids(3, 4))
        model(_ids(1, 2))
        session = debugger.session
        assert session is not None
        rows, stats = session.decisions(), debugger.get_routing_stats()
    first = (rows.layer_index == 0) & (rows.forward_index == 0)
    assert rows.request_id[first].tolist() == [names[0]] * 8 + [names[1]] * 4
    assert rows.is_padding[first].tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert rows.position[first].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 40, 41, 42, 43]
    assert rows.phase[first].tolist() == [pb.PHASE_PREFILL] * 4 + [pb.PHASE_DECODE] * 8
    assert set(rows.request_id[rows.forward_index == 1]).isdisjoint(names)
    assert stats.num_tokens == 10


def test_wrong_requests_are_refused_and_a_wrong_number_of_rows_is_a_problem(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        wrong: list[dict[str, Any]] = [
            {"request_ids": ["moe.>"]},
            {"request_ids": [new_id()], "phase": "sleep"},
            {"request_ids": [new_id()], "phase": ["decode", "decode"]},
            {"request_ids": [new_id()], "positions": [1, 2]},
            {"request_ids": [new_id()], "positions": [-1]},
        ]
        for arguments in wrong:
            with pytest.raises(InvalidInputError):
                debugger.requests(**arguments)
        with debugger.requests([new_id()]):
            model(_ids(2, 3))
        performance = debugger.get_performance_metrics()
        assert any("named 1 rows, the forward has 2" in text for text in performance.problems)
        assert debugger.get_routing_stats().num_tokens == 6


def test_step_labels_forwards_and_refuses_what_is_no_number(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        for step in (5, 6):
            debugger.step(step)
            model(_ids(1, 3))
            model(_ids(1, 3))
        with pytest.raises(InvalidInputError, match="step -1: expected an integer"):
            debugger.step(-1)
        with pytest.raises(InvalidInputError, match="no number"):
            debugger.step(1, loss="high")  # type: ignore[arg-type]
        session = debugger.session
        assert session is not None
        rows = session.decisions()
    assert sorted(set(zip(rows.step.tolist(), rows.forward_index.tolist(), strict=True))) == [
        (5, 0), (5, 1), (6, 2), (6, 3)
    ]  # fmt: skip


def test_levels_keep_what_they_say(model: Any) -> None:
    expected = {"counts": (False, False, False), "routes": (True, False, False)}
    expected |= {"routes+tokens": (True, True, False), "full": (True, True, True)}
    counts = []
    for level, (has_rows, has_tokens, has_logits) in expected.items():
        with torch.no_grad(), MoEDebugger(model, level=level) as debugger:  # type: ignore[arg-type]
            model(_ids())
            session = debugger.session
            assert session is not None
            rows = session.decisions()
            counts.append([layer.expert_counts.tolist() for layer in debugger.get_routing_stats().layers])
        assert (len(rows) > 0, rows.token_id is not None, rows.logits is not None) == (has_rows, has_tokens, has_logits)
    assert all(count == counts[0] for count in counts)


def test_rows_are_bounded_while_counts_stay_exact(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model, max_rows_bytes=20_000, max_disk_bytes=0) as debugger:
        for _ in range(40):
            model(_ids(2, 6))
        session = debugger.session
        assert session is not None
        rows, performance = session.decisions(), debugger.get_performance_metrics()
        assert session.row_statistics().memory_bytes <= 20_000
        assert {layer.num_tokens for layer in debugger.get_routing_stats().layers} == {40 * 12}
    assert performance.num_rows_not_kept > 0
    assert performance.num_rows_kept + performance.num_rows_not_kept == 40 * 12 * 3
    assert int(rows.forward_index.max()) == 39, "the newest rows are kept"


def test_analyze_of_rows_equals_analyze_of_the_session(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        for _ in range(4):
            model(_ids(8, 12))
        session = debugger.session
        assert session is not None
        by_rows = moe_debugger.analyze(session.decisions(), num_experts=8, top_k=2)
        by_state = session.analyze()
    for index, metrics in by_state.metrics.items():
        ours, theirs = metrics.to_dict(), by_rows.metrics[index].to_dict()
        # Sums of all probabilities are in the state, not in the rows.
        assert (ours.pop("num_probability_tokens"), theirs.pop("num_probability_tokens")) == (metrics.num_tokens, 0)
        del ours["switch_balancing_loss"], theirs["switch_balancing_loss"]
        np.testing.assert_equal(theirs, ours)


def test_iterating_by_batch_gives_the_same_rows(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(_ids())
        model(_ids())
        session = debugger.session
        assert session is not None
        whole = session.decisions()
        assert [len(part) for part in session.iter_decisions()] == [72]
        parts = list(session.iter_decisions(batch_rows=1))
    assert [len(part) for part in parts] == [36, 36]
    assert np.array_equal(np.concatenate([part.expert_ids for part in parts]), whole.expert_ids)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**80 - 1))
def test_sampling_is_nested(low: float, high: float, value: int) -> None:
    low, high = sorted((low, high))
    name = f"request-{value}"
    assert is_sampled(name, 1.0)
    assert not is_sampled(name, 0.0)
    assert not is_sampled(name, low) or is_sampled(name, high), "a request kept at a low rate is kept at a higher one"
