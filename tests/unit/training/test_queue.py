"""Points on their way to the fleet: whole, in order, bounded."""

from moe_debugger.publish.series import SeriesQueue
from moe_debugger.v1 import routing_pb2 as pb


def points(step: int, num_layers: int, num_experts: int) -> list[pb.SeriesPoint]:
    return [
        pb.SeriesPoint(step=step, name="norm", layer_index=layer, values=[0.5] * num_experts, is_per_expert=True)
        for layer in range(num_layers)
    ]


def test_statuses_carry_all_points_in_order() -> None:
    queue = SeriesQueue()
    for step in range(10):
        queue.put(points(step, 16, 256))
    taken: list[pb.SeriesPoint] = []
    while not queue.is_empty:
        part = queue.take()
        assert 0 < sum(point.ByteSize() for point in part) <= 256 * 1024
        taken += part
    assert [(point.step, point.layer_index) for point in taken] == [(s, n) for s in range(10) for n in range(16)]
    assert queue.num_dropped == 0
    assert queue.take() == []


def test_beyond_its_bound_the_oldest_are_dropped_and_counted() -> None:
    queue = SeriesQueue()
    for step in range(100):
        queue.put(points(step, 64, 256))
    taken: list[pb.SeriesPoint] = []
    while not queue.is_empty:
        taken += queue.take()
    assert sum(point.ByteSize() for point in taken) <= 4 << 20
    assert len(taken) + queue.num_dropped == 6400
    assert taken[-1].step == 99


def test_a_point_larger_than_a_status_still_goes() -> None:
    queue = SeriesQueue()
    queue.put([pb.SeriesPoint(step=1, name="norm", layer_index=0, values=[0.0] * 60_000, is_per_expert=True)])
    assert len(queue.take()) == 1
    assert queue.is_empty
