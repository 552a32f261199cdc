"""Forwards that are read together give what they give one by one, and a bad one among them is lost alone."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import build

from moe_debugger import Decisions, MoEDebugger
from moe_debugger.capture import Assembled, Intake, RawForward, TokenFrame
from moe_debugger.capture import intake as intake_module
from moe_debugger.capture.raw import RawLayer


def _run(model: Any, *, one_by_one: bool, level: str = "full", fault: int | None = None) -> tuple[Decisions, Any, Any]:
    """Run prompts and steps of a batch with padding; return the rows, the statistics and how forwards were grouped."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    groups: list[int] = []
    with torch.no_grad(), MoEDebugger(model, level=level, sampling_rate=1.0) as debugger:  # type: ignore[arg-type]
        session = debugger.session
        assert session is not None
        # So long that only a flush ends it.
        session._intake._rest_s = 0 if one_by_one else 60.0
        assemble = session._assembler.assemble

        def counted(raws: Sequence[RawForward]) -> list[Assembled]:
            found = assemble(raws)
            groups.extend(len(group.raws) for group in found)
            return found

        session._assembler.assemble = counted  # type: ignore[method-assign]
        if fault is not None:
            _break(session, fault)
        for _ in range(2):
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            attended = mask
            for _ in range(5):
                attended = torch.cat([attended, torch.ones(3, 1, dtype=torch.int64)], dim=1)
                step = torch.randint(3, 90, (3, 1), generator=generator)
                model(step, attention_mask=attended, past_key_values=cache)
                if one_by_one:
                    session.flush()
        decisions, stats = session.decisions(), debugger.get_routing_stats()
        assert session.capture_health().is_healthy == (fault is None)
        dropped = debugger.get_performance_metrics().num_dropped
    return decisions, stats, (groups, dropped)


def _break(session: Any, forward: int) -> None:
    """Have one layer's tensors of one forward not fit each other."""
    start = session._capture._transfer.start

    def started(raw: RawForward) -> None:
        if raw.forward_index == forward:
            tensors = raw.layers[1].tensors
            tensors["expert_ids"] = tensors["expert_ids"][:-1]
        start(raw)

    session._capture._transfer.start = started


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_forwards_that_are_read_together_give_the_rows_of_single_ones_in_the_same_order(name: str) -> None:
    model = build(name)
    together, stats, (groups, _) = _run(model, one_by_one=False)
    alone, expected, (singles, _) = _run(model, one_by_one=True)
    assert sum(groups) == sum(singles) == 12
    assert max(groups) >= 5, "steps of the same structure are read together"
    assert np.all(np.diff(together.forward_index.astype(np.int64)) >= 0), "forward after forward"
    mine_by_name = together.columns()
    for column, theirs in alone.columns().items():
        ours = mine_by_name[column]
        if column == "request_id":
            continue  # minted anew in each run; request_index tells the same
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=column)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=column)
    for mine, other in zip(stats.layers, expected.layers, strict=True):
        assert mine.expert_counts.tolist() == other.expert_counts.tolist()
        assert mine.mean_probability.tolist() == pytest.approx(other.mean_probability.tolist(), abs=1e-6)


@pytest.mark.parametrize("level", ["counts", "routes"])
def test_a_forward_that_cannot_be_read_is_lost_alone(level: str) -> None:
    model = build("mixtral")
    _, stats, (groups, dropped) = _run(model, one_by_one=False, level=level, fault=4)
    assert 1 in groups
    # A batch of 3 texts; at level "counts" the whole step is lost, with rows the layer that is broken.
    lost = [3, 3, 3] if level == "counts" else [0, 3, 0]
    assert dropped["capture_error"] == sum(lost)
    assert [layer.num_tokens for layer in stats.layers] == [2 * (16 + 15) - tokens for tokens in lost]


# -- the intake alone --------------------------------------------------------------------------------------------------


def _raw(index: int, num_tokens: int = 4, num_bytes: int = 64) -> RawForward:
    frame = TokenFrame("decoder", 1, num_tokens, ["a"], are_ids_minted=True, phases=(2,))
    tensor = torch.zeros(num_bytes, dtype=torch.uint8)
    return RawForward(index, index, 0, [frame], [RawLayer(0, frame, {"expert_ids": tensor}, num_tokens)])


def test_forwards_wait_for_each_other_and_a_flush_ends_the_wait() -> None:
    seen: list[list[int]] = []
    intake = Intake(lambda raws: seen.append([raw.forward_index for raw in raws]), lambda raw, error: None, 1 << 20)
    intake._rest_s = 60.0
    for index in range(50):
        assert intake.offer(_raw(index))
    time.sleep(0.05)
    assert seen == []
    assert intake.flush(10)
    assert seen == [list(range(50))]
    intake.close(10)


@pytest.mark.parametrize("bound", ["tokens", "bytes"])
def test_enough_forwards_end_the_wait_by_themselves(bound: str) -> None:
    done = threading.Event()
    intake = Intake(lambda raws: done.set(), lambda raw, error: None, 1 << 20)
    intake._rest_s = 60.0
    intake.offer(_raw(0))
    assert not done.wait(0.05)
    large = _raw(1, num_tokens=5000) if bound == "tokens" else _raw(1, num_bytes=300_000)
    assert intake.offer(large)
    assert done.wait(10)
    intake.close(10)


def test_the_thread_rests_for_long_after_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_MAX_REST_S", 1.0)
    intake = Intake(lambda raws: time.sleep(0.005), lambda raw, error: None, 1 << 20)
    intake.offer(_raw(0))
    assert intake.flush(10)
    assert 0.25 <= intake._rest_s <= 1.0
    intake.close(10)


def test_several_that_fail_together_are_given_again_one_by_one() -> None:
    seen: list[list[int]] = []
    failed: list[int] = []

    def process(raws: Sequence[RawForward]) -> None:
        seen.append([raw.forward_index for raw in raws])
        if any(raw.forward_index == 2 for raw in raws):
            raise ValueError("planted")

    intake = Intake(process, lambda raw, error: failed.append(raw.forward_index), 1 << 20)
    intake._rest_s = 60.0
    for index in range(4):
        intake.offer(_raw(index))
    assert intake.flush(10)
    intake.close(10)
    assert seen == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert failed == [2]
    assert intake.statistics().num_failed == 4
    assert intake.statistics().used_bytes == 0
