"""The store of rows: bounded memory, files behind it, and an account that adds up."""

import errno
import os
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from routing_rows import forward, layer_infos
from tiny_moe import build

from moe_debugger import Decisions, InvalidInputError, MoEDebugger, SessionClosedError
from moe_debugger._row_files import PrivateFolder, read_rows, write_rows
from moe_debugger._row_groups import available_bytes, regroup
from moe_debugger._row_packing import pack
from moe_debugger._rows import RowStore
from moe_debugger.publish.batching import columns_size_bytes
from moe_debugger.wire.codec import RoutingColumns

_INFOS = layer_infos((8, 2), (8, 2))
_NAMES = {info.layer_index: info.module_name for info in _INFOS}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """Makes stores whose files are below the test's folder."""
    stores: list[RowStore] = []

    def made(max_rows_bytes: int, **options: Any) -> RowStore:
        options = {"max_disk_bytes": 1 << 30, "rows_dir": tmp_path, "module_names": _NAMES, **options}
        stores.append(RowStore(max_rows_bytes, **options))
        return stores[-1]

    yield made
    for store in stores:
        store.close()


def _fill(store: RowStore, num_forwards: int, **options: Any) -> list[RoutingColumns]:
    batches = [forward(index, **options) for index in range(num_forwards)]
    for batch in batches:
        store.add(batch)
    return batches


def _assert_equal(actual: Decisions, expected: Decisions) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_twenty_times_the_bound_keeps_every_row_in_flat_memory(make: Any) -> None:
    bound = 2 * 1024 * 1024
    store = make(bound)
    produced, index, baseline = 0, 0, 0
    while produced < 20 * bound:
        batch = forward(index, num_tokens=1024)
        produced += columns_size_bytes(batch)
        store.add(batch)
        assert store.statistics().memory_bytes <= bound
        index += 1
        if not baseline and store.statistics().num_files == 2:
            # pyarrow is imported with the first file, and is no part of the rows.
            tracemalloc.start()
            baseline = index
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < baseline < index / 5
    # The trace sees the bound being filled anew, and besides it a file on its way out: an eighth, and its copy.
    assert peak_bytes < 1.5 * bound, "memory grows with the rows"
    statistics = store.statistics()
    assert (statistics.num_kept, statistics.num_not_kept) == (index * 1024 * 2, 0)
    assert statistics.num_on_disk > 15 / 20 * statistics.num_kept
    kept = Decisions(store.source(), _INFOS)
    assert np.array_equal(kept.forward_index, np.repeat(np.arange(index), 2048))
    assert store.problems == {}


@pytest.mark.parametrize("options", [{}, {"has_tokens": True, "has_logits": True}, {"has_statistics": False}])
def test_rows_from_files_equal_those_that_were_added(make: Any, options: dict[str, Any]) -> None:
    store = make(40_000)
    batches = _fill(store, 120, **options)
    assert store.statistics().num_files > 3
    _assert_equal(Decisions(store.source(), _INFOS), Decisions(batches, _INFOS))
    _assert_equal(Decisions(store.source(max_rows=100), _INFOS), _last(batches, 100))
    _assert_equal(Decisions(store.source(first_forward_index=50), _INFOS), Decisions(batches[50:], _INFOS))
    assert len(Decisions(store.source(max_rows=0), _INFOS)) == 0


def _last(batches: list[RoutingColumns], num_rows: int) -> Decisions:
    block = pack(batches)
    return Decisions([block.slice(len(block) - num_rows, len(block))], _INFOS)


def test_forwards_of_other_shapes_share_a_file(make: Any) -> None:
    store = make(40_000)
    batches = [
        forward(index, shapes=((8, 2), (300, 5)) if index % 3 else ((8, 1),), has_tokens=index % 2 == 0)
        for index in range(150)
    ]
    for index, batch in enumerate(batches):
        if index % 4 == 0:
            batch.layers[0].intended_expert_ids = (batch.layers[0].expert_ids + 1) % 8
        store.add(batch)
    assert store.statistics().num_files > 2
    infos = layer_infos((8, 2), (300, 5))
    _assert_equal(Decisions(store.source(), infos), Decisions(batches, infos))


def test_without_files_the_oldest_rows_go_and_are_counted(make: Any) -> None:
    store = make(30_000, max_disk_bytes=0)
    _fill(store, 200)
    statistics = store.statistics()
    assert statistics.num_kept + statistics.num_not_kept == 200 * 12
    assert 0 < statistics.num_kept < 200 * 12
    assert (statistics.num_files, statistics.folder) == (0, None)
    assert statistics.memory_bytes <= 30_000
    kept = Decisions(store.source(), _INFOS)
    assert np.array_equal(kept.forward_index, np.repeat(np.arange(200), 12)[-statistics.num_kept :])
    assert store.problems == {}, "a bound that was asked for is no problem"


def test_past_the_disk_budget_the_oldest_files_go_and_are_counted(make: Any, tmp_path: Path) -> None:
    store = make(30_000, max_disk_bytes=60_000)
    _fill(store, 600)
    statistics = store.statistics()
    assert statistics.disk_bytes <= 60_000
    assert statistics.disk_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    assert statistics.num_files == len(list(tmp_path.rglob("*.arrow"))) > 1
    assert statistics.num_kept + statistics.num_not_kept == 600 * 12
    assert statistics.num_not_kept > 0
    kept = Decisions(store.source(), _INFOS)
    assert np.array_equal(kept.forward_index, np.repeat(np.arange(600), 12)[-statistics.num_kept :])


def test_no_bytes_at_all_keep_no_rows(make: Any) -> None:
    store = make(0)
    _fill(store, 5)
    assert (store.statistics().num_kept, store.statistics().num_not_kept) == (0, 60)
    assert len(Decisions(store.source(), _INFOS)) == 0


def test_a_forward_larger_than_the_bound_is_kept_on_disk(make: Any) -> None:
    store = make(50_000)
    batches = [forward(0, num_tokens=3), forward(1, num_tokens=2000), forward(2, num_tokens=3)]
    for batch in batches:
        store.add(batch)
        assert store.statistics().memory_bytes <= 50_000
    _assert_equal(Decisions(store.source(), _INFOS), Decisions(batches, _INFOS))


def test_files_are_the_documented_columns_for_any_reader_of_arrow(make: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    store = make(30_000, rank=2)
    batches = _fill(store, 100, has_tokens=True)
    tables = []
    for path in sorted(tmp_path.rglob("*.arrow")):
        with pa.ipc.open_file(path) as reader:
            tables.append(reader.read_all())
    assert len(tables) > 1
    expected = Decisions(batches, _INFOS, rank=2).to_arrow()
    assert tables[0].column_names == expected.column_names
    for name in set(expected.column_names) - {"request_index"}:  # which counts in the file's own requests
        values = [value for table in tables for value in table.column(name).to_pylist()]
        assert values == expected.column(name).slice(0, len(values)).to_pylist(), name


def test_only_the_user_can_read_the_files_and_they_go_with_the_store(tmp_path: Path) -> None:
    before = os.umask(0)  # a careless one must not open them
    try:
        store = RowStore(20_000, max_disk_bytes=1 << 20, rows_dir=tmp_path)
        assert list(tmp_path.iterdir()) == []
        _fill(store, 100)
    finally:
        os.umask(before)
    folder = store.statistics().folder
    assert folder is not None
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []
    store.add(forward(0))
    assert store.statistics().num_kept == 0
    assert list(tmp_path.iterdir()) == []


_EXIT = """
import os, sys
from routing_rows import forward
from moe_debugger._rows import RowStore
store = RowStore(20_000, max_disk_bytes=1 << 20, rows_dir=sys.argv[1])
for index in range(100):
    store.add(forward(index))
folder = store.statistics().folder
if os.fork() == 0:
    sys.exit(0)  # a forked child that ends as programs end
os.wait()
assert len(list(folder.iterdir())) > 1, "the child removed its parent's files"
print(folder)
"""


def test_files_go_at_the_interpreters_exit_and_not_at_a_forked_childs(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _EXIT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert list(tmp_path.iterdir()) == []


_FULL_DISK = """
import resource, sys
from routing_rows import forward
from moe_debugger._rows import RowStore
# A file that may grow no further, as on a full disk: the kernel itself refuses the write.
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
store = RowStore(20_000, max_disk_bytes=1 << 20, rows_dir=sys.argv[1])
for index in range(100):
    store.add(forward(index))
full = store.statistics()
assert full.num_kept + full.num_not_kept == 1200, full
assert full.num_not_kept > 0 and full.num_files == 0 and full.memory_bytes <= 20_000, full
assert not list(full.folder.iterdir()), "a part of a file was left"
(text, times), = store.problems.items()
assert "File too large" in text and "rows_dir" in text and times > 1, text
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for index in range(100, 200):
    store.add(forward(index))
again = store.statistics()
assert again.num_not_kept == full.num_not_kept and again.num_files > 0, again
assert again.num_kept + again.num_not_kept == 2400
print("ok")
"""


def test_a_full_disk_costs_rows_and_nothing_else_and_is_said(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("ok")


def test_without_pyarrow_the_oldest_rows_go_with_the_reason(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    store = make(30_000)
    _fill(store, 200)
    statistics = store.statistics()
    assert statistics.num_kept + statistics.num_not_kept == 200 * 12
    assert statistics.num_files == 0
    assert any("pip install 'moe-debugger[pandas]'" in text for text in store.problems)


def test_a_file_that_someone_removed_is_a_loss_that_is_counted(make: Any, tmp_path: Path) -> None:
    store = make(30_000)
    _fill(store, 200)
    before = store.statistics()
    sorted(tmp_path.rglob("*.arrow"))[0].unlink()
    kept = Decisions(store.source(), _INFOS)
    after = store.statistics()
    assert len(kept) == after.num_kept < before.num_kept
    assert after.num_kept + after.num_not_kept == 200 * 12
    assert any("rows are lost" in text for text in store.problems)


def test_reading_goes_on_while_rows_are_added_spilled_and_dropped(make: Any) -> None:
    store = make(30_000, max_disk_bytes=40_000)
    failures: list[BaseException] = []
    is_done = threading.Event()

    def add() -> None:
        try:
            _fill(store, 1500)
        except BaseException as error:  # the test's own thread must report it
            failures.append(error)
        is_done.set()

    thread = threading.Thread(target=add)
    thread.start()
    num_reads = 0
    while not is_done.is_set() or not num_reads:
        last: int | None = None
        for block in store.blocks():
            forwards = block.token_column("forward_index").astype(np.int64)
            assert (np.diff(forwards) >= 0).all()
            assert last is None or forwards[0] >= last, "a row came twice"
            last = int(forwards[-1])
        num_reads += 1
    thread.join()
    assert failures == []
    statistics = store.statistics()
    assert statistics.num_kept + statistics.num_not_kept == 1500 * 12
    assert store.problems == {}, "a file that made room is no loss to report"


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(60_000, 8), (3000, 2048)])
def test_the_written_file_is_read_back_in_parts_of_bounded_size(
    tmp_path: Path, num_tokens: int, num_experts: int
) -> None:
    options: dict[str, Any] = {"shapes": ((num_experts, 2),) * 2, "has_logits": num_experts > 8}
    blocks = [pack([forward(index, num_tokens=num_tokens, **options)]) for index in range(2)]
    write_rows(tmp_path / "rows.arrow", blocks, _NAMES, 0)
    parts = list(read_rows(tmp_path / "rows.arrow"))
    assert max(len(part) for part in parts) <= 65_536
    assert max(part.size_bytes for part in parts) <= 9 * 1024 * 1024
    _assert_equal(Decisions(parts, _INFOS), Decisions(blocks, _INFOS))


@pytest.mark.parametrize("max_rows", [1, 5, 24, 25, 100, 10_000])
@pytest.mark.parametrize("cut", [1, 7, 13, 1000])
def test_groups_hold_whole_forwards_however_the_blocks_are_cut(max_rows: int, cut: int) -> None:
    sizes = [1, 2, 9, 1, 30, 30, 1, 1, 1, 4]
    block = pack([forward(index, num_tokens=tokens) for index, tokens in enumerate(sizes)])
    grouped = list(regroup(block.slices(cut), max_rows))
    groups = [Decisions(group, _INFOS) for group in grouped]
    _assert_equal(Decisions([part for group in grouped for part in group], _INFOS), Decisions([block], _INFOS))
    seen: list[int] = []
    for group in groups:
        forwards = [index for index, _ in groupby(group.forward_index.tolist())]
        assert len(group) <= max_rows or len(forwards) == 1
        seen += forwards
    assert seen == list(range(len(sizes))), "a forward was split"
    for group, following in pairwise(groups):
        assert len(group) + 2 * sizes[int(following.forward_index[0])] > max_rows, "one more forward had fitted"


def test_a_store_that_closes_while_it_writes_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(20_000, max_disk_bytes=1 << 20, rows_dir=tmp_path)

    def slow(path: Path, *rest: Any) -> None:
        store.close()
        path.parent.mkdir(exist_ok=True)
        write_rows(path, *rest)

    monkeypatch.setattr("moe_debugger._rows.write_rows", slow)
    _fill(store, 100)
    assert list(tmp_path.iterdir()) == []
    assert store.statistics().num_kept == 0


def test_a_forward_that_cannot_be_packed_costs_its_rows_alone(make: Any) -> None:
    store = make(100_000)
    broken = forward(3)
    broken.layers[1].margin = np.zeros(3, np.float32)
    batches = [forward(index) for index in range(60)]
    for batch in [*batches[:3], broken, *batches[4:]]:
        store.add(batch)
    statistics = store.statistics()
    assert (statistics.num_kept, statistics.num_not_kept) == (59 * 12, 12)
    _assert_equal(Decisions(store.source(), _INFOS), Decisions([*batches[:3], *batches[4:]], _INFOS))
    assert list(store.problems) == [
        "rows of a forward could not be kept (ValueError: margin has 9 rows, the ids have 12)"
    ]


def test_the_private_folder_is_made_when_it_is_needed_and_once(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    assert folder.path is None
    assert folder.ensure() == folder.ensure() == folder.path
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_known_on_this_machine_and_is_no_more_than_it_has() -> None:
    free = available_bytes()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("mixtral")


def _ids(seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(seed))


def test_a_session_keeps_twenty_times_its_bound_and_counts_exactly(model: Any, tmp_path: Path) -> None:
    bound = 8_000
    with torch.no_grad(), MoEDebugger(model, max_rows_bytes=bound, rows_dir=tmp_path) as debugger:
        session = debugger.session
        assert session is not None
        num_forwards = 0
        # 2 x 6 tokens at 3 layers: 2 ids of 2 bytes, 2 weights and 4 statistics of 4 bytes.
        while num_forwards * 36 * 28 < 20 * bound:
            model(_ids(num_forwards))
            num_forwards += 1
        rows, stats = session.decisions(), debugger.get_routing_stats()
        parts = list(session.iter_decisions(batch_rows=100))
        statistics, performance = session.row_statistics(), debugger.get_performance_metrics()
        newest, later = session.decisions(max_rows=50), session.decisions_since(num_forwards - 2)
    assert len(rows) == statistics.num_kept == performance.num_rows_kept == num_forwards * 36
    assert statistics.num_on_disk > 0.8 * statistics.num_kept
    assert (statistics.num_not_kept, performance.num_rows_not_kept, performance.problems) == (0, 0, {})
    for layer in stats.layers:
        ids = rows.expert_ids[rows.layer_index == layer.info.layer_index]
        assert layer.expert_counts.tolist() == np.bincount(ids.reshape(-1), minlength=8).tolist()
    assert max(len(part) for part in parts) <= 100
    for name in rows:
        if name != "request_index":
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows[name], err_msg=name)
    assert np.array_equal(newest.expert_ids, rows.expert_ids[-50:])
    assert np.array_equal(later.forward_index, np.repeat([num_forwards - 2, num_forwards - 1], 36))
    assert list(tmp_path.iterdir()) == [], "the files went with the session"


def test_rows_that_do_not_fit_the_machine_are_refused_with_the_way_to_read_them(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        model(_ids())
        session = debugger.session
        assert session is not None
        monkeypatch.setattr("moe_debugger._session.available_bytes", lambda: 1000)
        with pytest.raises(InvalidInputError, match=r"36 rows.*iter_decisions\(\).*max_rows"):
            session.decisions()
        assert len(session.decisions(max_rows=3)) == 3
        assert sum(len(part) for part in session.iter_decisions()) == 36
        for call in (lambda: session.decisions(max_rows=-1), lambda: session.iter_decisions(0)):
            with pytest.raises(InvalidInputError, match="expected"):
                call()


def test_rows_that_no_file_takes_are_a_problem_of_the_performance_and_no_fault_of_the_capture(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moe_debugger._rows.write_rows", refuse)
    with torch.no_grad(), MoEDebugger(model, max_rows_bytes=4_000, rows_dir=tmp_path) as debugger:
        for seed in range(20):
            model(_ids(seed))
        performance, analysis = debugger.get_performance_metrics(), debugger.analyze()
        assert {layer.num_tokens for layer in debugger.get_routing_stats().layers} == {20 * 12}
    assert performance.num_rows_kept + performance.num_rows_not_kept == 20 * 36
    assert performance.num_rows_not_kept > 0
    assert any("No space left on device" in text for text in performance.problems)
    assert "capture_unhealthy" not in {finding.code for finding in analysis.findings}


def test_iterating_over_a_session_that_closes_meanwhile_says_so(model: Any) -> None:
    with torch.no_grad(), MoEDebugger(model) as debugger:
        for _ in range(3):
            model(_ids())
        session = debugger.session
        assert session is not None
        parts = session.iter_decisions(batch_rows=1)
        next(parts)
        session.close()
        with pytest.raises(SessionClosedError):
            next(parts)
