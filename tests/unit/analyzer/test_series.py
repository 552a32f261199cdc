"""The history of training series: exact, bounded by kind, the same after every flush and reload."""

import numpy as np
import pytest

from moe_analyzer.series import INDEX_FIELD, SeriesHistory, StoredPoint, chunk_fields, read_chunk, series_messages
from moe_debugger.errors import WireFormatError
from moe_debugger.v1 import routing_pb2 as pb


def loss(step: int, value: float) -> pb.SeriesPoint:
    return pb.SeriesPoint(step=step, name="loss", values=[value])


def experts(step: int, layer: int, values: list[float]) -> pb.SeriesPoint:
    return pb.SeriesPoint(step=step, name="norm", layer_index=layer, values=values, is_per_expert=True)


class Stored:
    """A dict in place of the hash of Redis; each flush is by a new owner, who knows what is stored only."""

    def __init__(self, budget_bytes: int) -> None:
        self.fields: dict[str, bytes] = {}
        self._budget_bytes = budget_bytes

    def add(self, source_id: str, points: list[pb.SeriesPoint]) -> None:
        history = SeriesHistory(self._budget_bytes)
        history.load(self.fields)
        history.add(source_id, points)
        for name, value in history.take_writes().items():
            if value is None:
                del self.fields[name]
            else:
                self.fields[name] = value
        assert history.take_writes() == {}

    def read(self, *, with_experts: bool = True) -> tuple[list[StoredPoint], int]:
        fields, num_not_kept = chunk_fields(self.fields[INDEX_FIELD], with_experts=with_experts)
        return [point for name in fields for point in read_chunk(self.fields[name])], num_not_kept


def test_points_are_kept_in_order_over_flushes_and_owners() -> None:
    stored = Stored(8 << 20)
    for step in range(3000):
        stored.add("b" if step % 3 else "a", [loss(step, step / 7)])
    points, num_not_kept = stored.read()
    assert [(source, point.step, point.values[0]) for source, point in points] == [
        ("b" if step % 3 else "a", step, step / 7) for step in range(3000)
    ]
    assert num_not_kept == 0


def test_only_the_newest_chunk_is_written_again() -> None:
    history = SeriesHistory(8 << 20)
    history.add("a", [experts(step, 0, [0.0] * 256) for step in range(100)])
    first = history.take_writes()
    history.add("a", [experts(100, 0, [0.0] * 256)])
    second = history.take_writes()
    assert len(first) > 3
    assert set(second) == {INDEX_FIELD, max(set(first) - {INDEX_FIELD}, key=lambda name: int(name.rpartition(":")[2]))}


def test_the_budget_drops_the_oldest_and_experts_never_push_out_the_loss() -> None:
    stored = Stored(1 << 20)
    num_points = 0
    for step in range(600):
        stored.add("a", [loss(step, 1.0), *(experts(step, layer, [0.5] * 64) for layer in range(4))])
        num_points += 5
    points, num_not_kept = stored.read()
    assert sum(len(value) for value in stored.fields.values()) < 1.2 * (1 << 20)
    assert len(points) + num_not_kept == num_points
    assert num_not_kept > 0
    assert [point.step for _, point in points if point.name == "loss"] == list(range(600))
    kept = [point.step for _, point in points if point.name == "norm"]
    assert kept == sorted(kept)
    assert kept[-1] == 599
    assert stored.read(with_experts=False)[0] == [(one, point) for one, point in points if point.name == "loss"]


def test_series_are_by_source_and_the_later_point_of_a_step_wins() -> None:
    points = [
        ("s1", loss(2, 2.0)),
        ("s1", loss(1, 1.0)),
        ("s0", loss(1, 9.0)),
        ("s1", loss(2, 2.5)),
        ("s1", experts(1, 0, [1.0, float("nan")])),
        ("s1", pb.SeriesPoint(step=1, name="router_gradient_norm", layer_index=3, values=[4.0])),
    ]
    series = series_messages(points, {"s0": 1, "s1": 0}, [], 100)
    assert [(one.source_id, one.global_rank, one.name) for one in series] == [
        ("s1", 0, "loss"),
        ("s1", 0, "router_gradient_norm"),
        ("s0", 1, "loss"),
    ]
    assert np.frombuffer(series[0].step, "<u8").tolist() == [1, 2]
    assert np.frombuffer(series[0].value, "<f8").tolist() == [1.0, 2.5]
    assert not series[0].HasField("layer_index")
    assert series[1].layer_index == 3
    (norm,) = series_messages(points, {}, ["norm"], 100)
    assert (norm.num_values, norm.is_per_expert, norm.layer_index) == (2, True, 0)
    assert np.frombuffer(norm.value, "<f8").reshape(-1, 2)[0, 0] == 1.0
    (newest,) = series_messages([("s", loss(step, step)) for step in range(50)], {}, ["loss"], 7)
    assert np.frombuffer(newest.step, "<u8").tolist() == list(range(43, 50))


@pytest.mark.parametrize(
    ("point", "text"),
    [
        (pb.SeriesPoint(step=1, name="", values=[1.0]), "expected a name"),
        (pb.SeriesPoint(step=1, name="loss"), "0 values"),
        (pb.SeriesPoint(step=1, name="loss", values=[1.0, 2.0]), "2 values"),
        (pb.SeriesPoint(step=2**63, name="loss", values=[1.0]), "2\\^63"),
        (pb.SeriesPoint(step=1, name="norm", values=[1.0], is_per_expert=True), "no layer"),
    ],
)
def test_a_point_of_another_form_is_refused_whole(point: pb.SeriesPoint, text: str) -> None:
    history = SeriesHistory(1 << 20)
    with pytest.raises(WireFormatError, match=text):
        history.add("a", [loss(1, 1.0), point])
    assert history.take_writes() == {}
