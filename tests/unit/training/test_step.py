"""Steps of a plain loop, and the series that are recorded with them."""

from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch

from moe_debugger import MoEDebugger, SessionClosedError
from moe_debugger.errors import InvalidInputError
from moe_debugger.training import SeriesPoint, SeriesRecorder, SeriesStore, SeriesTable
from moe_debugger.training.readout import Readout

TRAIN, EVAL = 3, 4


def forward(model: Any, num_tokens: int = 4) -> None:
    model(input_ids=torch.randint(3, tiny_moe.VOCABULARY, (1, num_tokens)), use_cache=False)


@pytest.mark.parametrize("level", ["routes", "full"])
def test_forwards_belong_to_the_step_of_their_block(level: Any) -> None:
    model = tiny_moe.build("mixtral").train()
    with MoEDebugger(model, level=level, step_domain="global") as debugger:
        for step in (100, 101):
            with debugger.step(step):
                forward(model)
                forward(model)
        # An evaluation between two steps is of the last one, and told apart by its phase.
        model.eval()
        forward(model)
        model.train()
        debugger.step(102)
        forward(model)
        session = debugger.session
        assert session is not None
        decisions = session.decisions()
        rows = zip(decisions.step.tolist(), decisions.forward_index.tolist(), decisions.phase.tolist(), strict=True)
        assert sorted(set(rows)) == [
            (100, 0, TRAIN), (100, 1, TRAIN), (101, 2, TRAIN), (101, 3, TRAIN), (101, 4, EVAL), (102, 5, TRAIN),
        ]  # fmt: skip


def test_values_are_kept_by_step_and_name_and_given_again_replace() -> None:
    model = tiny_moe.build("mixtral")
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        loss = torch.tensor(3.0, requires_grad=True)
        with debugger.step(5, lr=0.5, balance_coef=0.01) as step:
            step.record(loss=loss, balance_loss=np.float32(1.5))
            with torch.no_grad():
                loss.zero_()
        debugger.step(5, loss=torch.tensor([2.5], dtype=torch.bfloat16), grad_norm=7)
        debugger.step(6, loss=2, tokens_seen=1e6)
        series = session.series()
        assert dict(zip(zip(series.step.tolist(), series.name.tolist(), strict=True), series.value, strict=True)) == {
            (5, "lr"): 0.5,
            (5, "balance_coef"): 0.01,
            (5, "balance_loss"): 1.5,
            (5, "loss"): 2.5,
            (5, "grad_norm"): 7.0,
            (6, "loss"): 2.0,
            (6, "tokens_seen"): 1e6,
        }
        assert set(series.layer_index.tolist()) == set(series.expert_id.tolist()) == {-1}
        frame = series.to_pandas()
        assert list(frame.columns) == ["step", "name", "layer_index", "expert_id", "value"]
        assert frame[frame.name == "loss"].value.tolist() == [2.5, 2.0]
        assert series.select("loss").value.tolist() == [2.5, 2.0]
        assert "7 values of 6 series" in str(series)
        assert "<table>" in series._repr_html_()
    with pytest.raises(SessionClosedError):
        session.series()


def test_a_tensor_is_read_as_it_was_when_it_was_given() -> None:
    recorder = SeriesRecorder(pytest.fail)
    loss = torch.tensor(3.0)
    recorder.record(1, {"loss": loss})
    loss.zero_()
    assert recorder.table().value.tolist() == [3.0]


class Event:
    """A CUDA event that has not come yet."""

    def __init__(self) -> None:
        self.is_done = False
        self.num_waits = 0

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.num_waits += 1
        self.is_done = True


def test_the_training_thread_never_waits_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    original = Readout.__init__

    def on_a_device(self: Readout, vectors: Any) -> None:
        original(self, vectors)
        events.append(Event())
        self._events.append(events[-1])

    monkeypatch.setattr(Readout, "__init__", on_a_device)
    sent: list[SeriesPoint] = []
    recorder = SeriesRecorder(pytest.fail, sent.extend)
    for step in range(4):
        recorder.record(step, {"loss": torch.tensor(float(step)), "lr": 0.5})
    assert [point.name for point in sent] == ["lr"] * 4
    assert sum(event.num_waits for event in events) == 0
    # What has arrived goes on, in order: nothing overtakes.
    events[0].is_done = events[2].is_done = True
    recorder.poll()
    assert [point.step for point in sent if point.name == "loss"] == [0]
    assert [event.num_waits for event in events] == [1, 0, 0, 0]  # asked of a finished event only
    losses = recorder.table().select("loss")
    assert (losses.step.tolist(), losses.value.tolist()) == ([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0])


def test_memory_is_bounded_and_what_went_is_counted() -> None:
    store = SeriesStore(100_000)
    for step in range(1000):
        for layer in range(2):
            store.add(SeriesPoint(step, "norm", layer, True, np.full(8, float(step))))
    assert store.used_bytes <= 100_000
    points = store.points()
    assert len(points) + store.num_not_kept == 2000
    assert [point.step for point in points] == sorted(point.step for point in points)
    assert points[-1].step == 999
    table = SeriesTable(points, num_not_kept=store.num_not_kept)
    assert len(table) == 8 * len(points)
    assert table.select("norm", layer_index=1, expert_id=7).value.tolist() == sorted({p.step for p in points})


@pytest.mark.parametrize(
    ("step", "series", "text"),
    [
        (-1, {}, "step -1"),
        (2**63, {}, "expected an integer from 0"),
        (1.5, {}, "step 1.5: expected an integer"),
        ("3", {}, "step '3': expected an integer"),
        (1, {"loss": "high"}, "'loss' has no number"),
        (1, {"loss": torch.zeros(2)}, "'loss' has no number"),
        (1, {"x" * 65: 1.0}, "1 to 64"),
    ],
)
def test_wrong_values_are_named(step: Any, series: dict[str, Any], text: str) -> None:
    with MoEDebugger(tiny_moe.build("mixtral")) as debugger, pytest.raises(InvalidInputError, match=text):
        debugger.step(step, **series)


def test_whatever_is_an_integer_names_a_step() -> None:
    model = tiny_moe.build("mixtral").train()
    with MoEDebugger(model) as debugger:
        session = debugger.session
        assert session is not None
        for step in (np.int64(30), torch.tensor(31)):
            debugger.step(step)  # type: ignore[arg-type]
            forward(model)
        assert sorted(set(session.decisions().step.tolist())) == [30, 31]


def test_the_first_step_starts_a_session_and_no_later_one_does() -> None:
    model = tiny_moe.build("mixtral").train()
    debugger = MoEDebugger(model)
    debugger.step(4)
    assert debugger.session is None, "a step alone says what a session will see, which may be opened after it"
    with debugger.step(5):
        forward(model)
    session = debugger.session
    assert session is not None
    assert set(session.decisions().step.tolist()) == {5}
    session.close()
    with debugger.step(6, loss=1.0):
        forward(model)
    assert debugger.session is None
    debugger.close()
    debugger.step(7, loss=1.0)

    by_value = MoEDebugger(model)
    by_value.step(8, loss=2.5)
    assert by_value.session is not None
    assert by_value.session.series().value.tolist() == [2.5]
    by_value.close()


def test_an_empty_table_has_all_columns() -> None:
    table = SeriesTable([])
    assert len(table) == 0
    assert [table[name].dtype.kind for name in table] == ["i", "U", "i", "i", "f"]
    assert table.to_pandas().empty


def test_a_stopped_session_can_be_read_until_it_is_closed() -> None:
    model = tiny_moe.build("mixtral")
    debugger = MoEDebugger(model)
    session = debugger.start_session()
    forward(model)
    session.stop()
    forward(model)
    session.stop()
    assert len(session.decisions()) == 4 * 3
    debugger.close()
    with pytest.raises(SessionClosedError):
        session.decisions()
