"""Recordings of several processes, read as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_rows import INFOS, begin
from routing_rows import forward, layer_infos
from zoo.build import ALL

from moe_debugger import (
    Decisions,
    InvalidInputError,
    JoinedRecording,
    MoEDebugger,
    ParallelCoordinates,
    RecordingError,
    join_recordings,
    open_recording,
)
from moe_debugger._counted import CountedRoutes
from moe_debugger.analysis.analyze import fold_decisions
from moe_debugger.recording.manifest import GroupManifest, Health, Topology, read_manifest, write_manifest
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.training.series import NO_INDEX, SeriesPoint
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns, RoutingColumns
from moe_debugger.wire.ids import new_id

SIZES: dict[str, Any] = {"num_experts": 8, "top_k": 2}


def record_rank(
    path: Path, rank: int, batches: list[RoutingColumns], *, domain: str = "global", losses: int = 0, **changes: Any
) -> Path:
    """Record one rank's forwards, each in a part of its own."""
    manifest = begin(step_domain=domain, source_id=new_id(), **changes).model_copy(
        update={"topology": Topology(global_rank=rank, world_size=2, recording_rank=rank)}
    )
    writer = RecordingWriter(make_folder(path), manifest, Limits(part_seconds=1e-9), lambda: INFOS, {})
    for batch in batches:
        writer.add([batch])
        writer.tick()
    writer.add_series([SeriesPoint(n, "loss", NO_INDEX, False, np.array([rank + n / 8])) for n in range(losses)])
    writer.finish(Ending(health=Health(is_healthy=True, num_produced=sum(each.num_decisions for each in batches))))
    return path


def rows_of(batches: list[RoutingColumns]) -> Decisions:
    return Decisions(batches, INFOS)


def test_equal_steps_of_the_global_domain_are_the_same_step(tmp_path: Path) -> None:
    by_rank = [[forward(index, seed=rank) for index in range(6)] for rank in range(2)]
    folders = [record_rank(tmp_path / f"r{rank}", rank, each) for rank, each in enumerate(by_rank)]
    joined = open_recording(folders[::-1])
    assert isinstance(joined, JoinedRecording)
    rows = joined.decisions()
    assert [each.manifest.topology.global_rank for each in joined.members] == [0, 1]
    assert joined.manifest.num_rows == len(rows) == 2 * 72
    assert (np.diff(rows.step.astype(int)) >= 0).all()
    for rank, batches in enumerate(by_rank):
        own = rows_of(batches)
        of_rank = rows.rank == rank
        assert (rows.source_id[of_rank] == joined.members[rank].manifest.source_id).all()
        for name in ("step", "layer_index", "expert_ids", "gate_weights", "request_id", "position", "margin"):
            np.testing.assert_array_equal(rows[name][of_rank], own[name], err_msg=name)
        # A forward is of one rank.
        np.testing.assert_array_equal(rows.forward_index[of_rank], own.forward_index * np.uint64(2) + np.uint64(rank))
    assert joined.is_whole
    assert joined.verify().num_rows == len(rows)
    assert joined.manifest.capture_health is not None
    assert joined.manifest.capture_health.num_produced == len(rows)


def test_steps_of_independent_replicas_are_never_aligned(tmp_path: Path) -> None:
    by_rank = [[forward(index, seed=rank) for index in range(6)] for rank in range(3)]
    folders = [record_rank(tmp_path / f"r{rank}", 0, each, domain="source") for rank, each in enumerate(by_rank)]
    joined = open_recording(folders)
    assert isinstance(joined, JoinedRecording)
    rows = joined.decisions()
    # forward() has two forwards a step: steps 0, 1, 2 of each.
    for place in range(3):
        own = rows_of(by_rank[place])
        of_source = rows.source_index == place
        np.testing.assert_array_equal(rows.step[of_source], own.step + np.uint64(3 * place))
        np.testing.assert_array_equal(rows.forward_index[of_source], own.forward_index + np.uint64(6 * place))
        np.testing.assert_array_equal(rows.expert_ids[of_source], own.expert_ids)
    assert (joined.manifest.first_step, joined.manifest.last_step) == (0, 8)
    # The caller may know better.
    aligned = join_recordings([open_recording(each) for each in folders], step_domain="global").decisions()
    assert np.unique(aligned.step).tolist() == [0, 1, 2]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_joined_rows_are_the_members_rows_one_by_one(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("joined")
    domains = data.draw(st.lists(st.sampled_from(["global", "source"]), min_size=1, max_size=4))
    by_member = [
        [
            forward(index, num_tokens=data.draw(st.integers(1, 4)), seed=place)
            for index in range(data.draw(st.integers(1, 5)))
        ]
        for place in range(len(domains))
    ]
    paths = [
        record_rank(folder / str(place), place, each, domain=domains[place]) for place, each in enumerate(by_member)
    ]
    joined = open_recording(paths)
    rows = joined.decisions()
    # The slow reference: members of the global domain step by step, then each other member by itself.
    expected = []
    together = [place for place, domain in enumerate(domains) if domain == "global"]
    first_step = 0
    for group in [together, *([place] for place, domain in enumerate(domains) if domain != "global")]:
        last = max((int(batch.step[0]) for place in group for batch in by_member[place]), default=-1)
        for step in range(last + 1):
            for place in group:
                for batch in by_member[place]:
                    if int(batch.step[0]) == step:
                        expected += [
                            (first_step + step, place, layer.layer_index, layer.expert_ids[row].tolist())
                            for layer in batch.layers
                            for row in range(batch.num_tokens)
                        ]
        first_step += last + 1
    actual = zip(
        rows.step.tolist(), rows.rank.tolist(), rows.layer_index.tolist(), rows.expert_ids.tolist(), strict=True
    )
    assert [tuple(each) for each in actual] == expected
    parts = list(joined.iter_decisions(9))
    np.testing.assert_array_equal(np.concatenate([part.rank for part in parts]), rows.rank)
    np.testing.assert_array_equal(np.concatenate([part.step for part in parts]), rows.step)


def test_the_joined_state_is_that_of_all_rows(tmp_path: Path) -> None:
    by_rank = [[forward(index, seed=rank, num_tokens=32) for index in range(6)] for rank in range(2)]
    joined = open_recording([record_rank(tmp_path / f"r{rank}", rank, each) for rank, each in enumerate(by_rank)])
    assert isinstance(joined, JoinedRecording)
    state, expected = joined.state(), fold_decisions(joined.decisions(), **SIZES)
    for index in (0, 1):
        load = np.zeros(8, np.int64)
        for batch in (one for each in by_rank for one in each):
            valid = batch.layers[index].expert_ids[~batch.is_padding]
            load += np.bincount(valid.reshape(-1), minlength=8)
        assert state.layers[index].counts.tolist() == expected.layers[index].counts.tolist() == load.tolist()
    assert joined.analyze().metrics[0].num_tokens == sum(
        int((~batch.is_padding).sum()) for each in by_rank for batch in each
    )


def test_the_probabilities_of_the_members_are_added_up(tmp_path: Path) -> None:
    by_rank = [[forward(index, seed=rank) for index in range(3)] for rank in range(2)]
    session = CountedRoutes(INFOS)
    for batch in (one for each in by_rank for one in each):
        for layer in batch.layers:
            layer.probability_sum = np.random.default_rng(batch.num_tokens).random(8) * batch.num_tokens
        session.fold(batch)
    folders = [record_rank(tmp_path / f"r{rank}", rank, each) for rank, each in enumerate(by_rank)]
    joined = open_recording(folders)
    for index, counted in session.state.layers.items():
        assert joined.state().layers[index].mean_probability.tolist() == counted.mean_probability.tolist()
    # Rows and sums of a part stand and fall together.
    part = folders[1] / "rows/part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    rest = CountedRoutes(INFOS)
    for batch in (*by_rank[0], by_rank[1][0], by_rank[1][2]):
        rest.fold(batch)
    skipping = open_recording(folders, damaged="skip")
    for index, counted in rest.state.layers.items():
        assert skipping.state().layers[index].mean_probability.tolist() == counted.mean_probability.tolist()
    assert "of 2 sources of tiny: 72 rows at 2 MoE layers, finished, 1 parts not whole>" in repr(skipping)


def test_members_without_any_copy_of_their_layers_are_named(tmp_path: Path) -> None:
    folders = [record_rank(tmp_path / f"r{rank}", rank, [forward(0, seed=rank)]) for rank in range(2)]
    for folder in folders:
        manifest = read_manifest(folder)
        write_manifest(folder, manifest.model_copy(update={"layers": []}))
    (folders[1] / "layers-00000000.parquet").unlink()
    joined = open_recording(folders, damaged="skip")
    assert len(joined.decisions()) == 24
    with pytest.raises(RecordingError, match=r"layers-00000000[.]parquet is missing"):
        joined.analyze()


def test_series_are_those_of_the_lowest_rank_that_has_any(tmp_path: Path) -> None:
    batches = [forward(index) for index in range(2)]
    folders = [record_rank(tmp_path / f"r{rank}", rank, batches, losses=3 * rank) for rank in range(3)]
    joined = open_recording(folders)
    assert isinstance(joined, JoinedRecording)
    assert joined.series().value.tolist() == [1, 1 + 1 / 8, 1 + 2 / 8]
    assert len(joined.series(joined.members[2].manifest.source_id)) == 6
    with pytest.raises(InvalidInputError, match="is not in this recording"):
        joined.series("nobody")


def test_replay_takes_members_in_the_order_of_time(tmp_path: Path) -> None:
    by_rank = [[forward(index, seed=rank) for index in range(3)] for rank in range(2)]
    for rank, batches in enumerate(by_rank):
        for index, batch in enumerate(batches):
            batch.captured_at_unix_ns = int((100 + index + rank / 2) * 1e9)
    joined = open_recording([record_rank(tmp_path / f"r{rank}", rank, each) for rank, each in enumerate(by_rank)])
    assert isinstance(joined, JoinedRecording)
    waited: list[float] = []
    played = list(joined.replay(speed=1000, sleep=waited.append))
    assert [each.offset_s for each in played] == [0, 0.5, 1, 1.5, 2, 2.5]
    sources = [each.manifest.source_id for each in joined.members]
    assert [each.source_id for each in played] == sources * 3


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    one = record_rank(tmp_path / "one", 0, [forward(0)])
    other = tmp_path / "other"
    writer = RecordingWriter(make_folder(other), begin(), Limits(), lambda: layer_infos((4, 1)), {})
    writer.add([forward(0, shapes=((4, 1),))])
    writer.finish(Ending())
    with pytest.raises(InvalidInputError, match=r"has 4 experts, top-1, .* has 8 experts, top-2: .*different models"):
        open_recording([one, other])
    with pytest.raises(InvalidInputError, match="is given twice"):
        open_recording([one, one])
    with pytest.raises(InvalidInputError, match="no recording to join"):
        open_recording([])


def make_group(folder: Path, members: dict[str, list[RoutingColumns]], **fields: Any) -> GroupManifest:
    """Write a recording of several sources as a fleet does."""
    group = GroupManifest(
        recording_id=new_id(),
        started_at_unix_ns=1,
        session_name="run",
        status="finished",
        members=[f"sources/{name}" for name in members],
        **fields,
    )
    (folder / "sources").mkdir(parents=True)
    for name, batches in members.items():
        record_rank(folder / "sources" / name, 0, batches, domain="source", group_id=group.recording_id)
    write_manifest(folder, group)
    return group


def test_a_folder_of_sources_is_one_recording(tmp_path: Path) -> None:
    names = [new_id(), new_id()]
    group = make_group(tmp_path / "rec", {name: [forward(place)] for place, name in enumerate(names)})
    recording = open_recording(tmp_path / "rec")
    assert isinstance(recording, JoinedRecording)
    assert recording.group == group
    assert recording.manifest.recording_id == group.recording_id
    assert len(recording.decisions()) == 24
    assert recording.is_whole
    for entry in recording.manifest.parts:
        assert (recording.path / entry.path).stat().st_size == entry.size_bytes


def test_damage_to_one_source_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    names = [new_id(), new_id(), new_id()]
    make_group(tmp_path / "rec", {name: [forward(place)] for place, name in enumerate(names)})
    (tmp_path / "rec/sources" / names[0] / "manifest.json").unlink()
    part = tmp_path / "rec/sources" / names[1] / "rows/part-00000000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(RecordingError, match=r"has no manifest\.json"):
        open_recording(tmp_path / "rec")
    recording = open_recording(tmp_path / "rec", damaged="skip")
    assert len(recording.decisions()) == 12
    assert len(recording.problems) == 2
    assert "is truncated" in recording.problems[1]
    assert names[1] in recording.problems[1]
    assert not recording.is_whole
    assert recording.verify().num_rows_lost == 12


def test_a_source_of_another_recording_is_foreign(tmp_path: Path) -> None:
    name = new_id()
    make_group(tmp_path / "rec", {name: [forward(0)]})
    make_group(tmp_path / "other", {name: [forward(1)]})
    target = tmp_path / "rec/sources" / name
    target.rename(tmp_path / "gone")
    (tmp_path / "other/sources" / name).rename(target)
    with pytest.raises(RecordingError, match="is foreign"):
        open_recording(tmp_path / "rec")
    assert len(open_recording(tmp_path / "rec", damaged="skip").decisions()) == 0


def test_rows_and_sums_of_one_session_are_counted_together(tmp_path: Path) -> None:
    rows = record_rank(tmp_path / "rows", 0, [forward(0, num_tokens=16)], domain="source")
    writer = RecordingWriter(
        make_folder(tmp_path / "sums"), begin(level="counts", step_domain="source"), Limits(), lambda: INFOS, {}
    )
    sums = [LayerCountColumns(layer, 8, 0, 4, 0, np.ones(8, np.uint64)) for layer in range(2)]
    writer.add([CountsColumns(3, 5, pb.PHASE_TRAIN, 7, sums)])
    writer.finish(Ending())
    joined = open_recording([rows, tmp_path / "sums"])
    assert joined.manifest.level == "routes"
    own = fold_decisions(open_recording(rows).decisions(), **SIZES)
    for layer in range(2):
        assert joined.state().layers[layer].counts.tolist() == (own.layers[layer].counts + np.uint64(1)).tolist()
    # Moved past the one step of the member before it.
    assert [(each.first_step, each.last_step) for each in joined.iter_counts()] == [(4, 6)]
    assert joined.analyze().metrics[0].num_tokens == own.layers[0].num_tokens + 4


def test_ranks_that_record_themselves_are_joined_by_training_step(tmp_path: Path) -> None:
    ids = torch.randint(3, 80, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = []
    for rank in range(2):
        place = ParallelCoordinates(global_rank=rank, world_size=2, data_parallel_rank=rank)
        model = ALL["mixtral"].make()
        with MoEDebugger(model, step_domain="global", coordinates=place) as debugger:
            session = debugger.session
            assert session is not None
            with session.record(tmp_path / f"rank-{rank}"), torch.no_grad():
                # The second rank does two forwards a step.
                for step in (10, 11, 12):
                    with debugger.step(step, loss=step + rank / 2):
                        for _ in range(1 + rank):
                            model(input_ids=ids)
            expected.append(session.decisions())
    joined = open_recording([tmp_path / "rank-1", tmp_path / "rank-0"])
    assert isinstance(joined, JoinedRecording)
    assert {each.manifest.step_domain for each in joined.members} == {"global"}
    rows = joined.decisions()
    assert np.unique(rows.step).tolist() == [10, 11, 12]
    for step in (10, 11, 12):
        sizes = [int(((rows.step == step) & (rows.rank == rank)).sum()) for rank in range(2)]
        assert sizes[1] == 2 * sizes[0] > 0
    for rank, own in enumerate(expected):
        np.testing.assert_array_equal(rows.expert_ids[rows.rank == rank], own.expert_ids)
    assert len(np.unique(rows.forward_index)) == 9
    assert joined.series().value.tolist() == [10, 11, 12]
    assert joined.is_whole


def test_ranks_that_routed_the_same_tokens_count_once(tmp_path: Path) -> None:
    ids = torch.randint(3, 80, (2, 7), generator=torch.Generator().manual_seed(0))
    for rank in range(4):
        place = ParallelCoordinates(
            global_rank=rank, world_size=4, data_parallel_rank=rank // 2, tensor_parallel_rank=rank % 2
        )
        model = ALL["mixtral"].make()
        with MoEDebugger(model, step_domain="global", coordinates=place) as debugger:
            session = debugger.session
            assert session is not None
            with session.record(tmp_path / str(rank)), torch.no_grad(), debugger.step(1):
                model(input_ids=ids)
    joined = open_recording([tmp_path / str(rank) for rank in range(4)])
    assert isinstance(joined, JoinedRecording)
    assert [each.manifest.topology.global_rank for each in joined.members] == [0, 2]
    assert [each.manifest.topology.global_rank for each in joined.replicas] == [1, 3]
    alone = open_recording(tmp_path / "0")
    assert len(joined.decisions()) == joined.manifest.num_rows == 2 * alone.manifest.num_rows
    # Where the rank that records is not given, one of its replicas stands for it.
    others = open_recording([tmp_path / "1", tmp_path / "2", tmp_path / "3"])
    assert isinstance(others, JoinedRecording)
    assert [each.manifest.topology.global_rank for each in others.members] == [1, 2]
    assert others.manifest.num_rows == joined.manifest.num_rows
