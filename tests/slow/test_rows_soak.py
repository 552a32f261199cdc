"""The store of rows at the sizes of a long run: resident memory, and the time that reading takes."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from routing_rows import forward

from moe_debugger import Decisions
from moe_debugger._rows import RowStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# In a process of its own, because a process's peak is never lower than what ran in it before.
_SOAK = """
import sys
from pathlib import Path
import numpy as np
from routing_rows import forward
from moe_debugger._rows import RowStore
from moe_debugger.publish.batching import columns_size_bytes

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024

bound, num_tokens = int(sys.argv[1]), int(sys.argv[2])
shapes = ((64, 8),) * 16
models = [forward(index, num_tokens=num_tokens, shapes=shapes) for index in range(8)]
store = RowStore(bound, max_disk_bytes=32 << 30, rows_dir=sys.argv[3])
produced = index = early = late = 0
while produced < 20 * bound:
    batch = forward(index, num_tokens=num_tokens, shapes=shapes) if num_tokens < 64 else models[index % 8]
    batch.forward_index = np.full(num_tokens, index, np.uint64)
    produced += columns_size_bytes(batch)
    store.add(batch)
    index += 1
    if produced < 3 * bound:
        early = max(early, resident())
    else:
        late = max(late, resident())
statistics = store.statistics()
assert statistics.memory_bytes <= bound
assert statistics.num_not_kept == 0 and statistics.num_kept == index * num_tokens * 16, statistics
seen = 0
for block in store.blocks():
    forwards = block.token_column("forward_index").astype(np.int64)
    expected = (seen + np.arange(len(block))) // (num_tokens * 16)
    assert np.array_equal(forwards, expected), "rows are missing or out of order"
    seen += len(block)
    late = max(late, resident())
assert seen == statistics.num_kept
print(early, late, store.problems)
store.close()
"""


@pytest.mark.parametrize(("bound", "num_tokens"), [(64 << 20, 2048), (8 << 20, 8)])
def test_resident_memory_is_flat_over_twenty_times_the_bound(tmp_path: Path, bound: int, num_tokens: int) -> None:
    command = [sys.executable, "-c", _SOAK, str(bound), str(num_tokens), str(tmp_path)]
    # The child finds the tests' helpers as pytest does.
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000)
    assert result.returncode == 0, result.stderr
    early, late, problems = result.stdout.split(maxsplit=2)
    print(f"bound {bound >> 20} MiB: {int(early) >> 20} MiB after 3 times the bound, {int(late) >> 20} MiB after 20")
    assert problems.strip() == "{}"
    # From 3 to 20 times the bound and a read of all of it: nothing grows but what a batch on its way takes.
    assert int(late) < int(early) + 48 * 1024 * 1024
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_forwards", "num_tokens"), [(153, 2048), (39_063, 8)])
def test_five_million_rows_become_columns_in_seconds(num_forwards: int, num_tokens: int) -> None:
    store = RowStore(1 << 30)
    for index in range(num_forwards):
        batch = forward(index % 50, num_tokens=num_tokens, shapes=((64, 8),) * 16)
        batch.forward_index = np.full(num_tokens, index, np.uint64)
        store.add(batch)
    started = time.process_time()
    rows = Decisions(store.source(), ())
    seconds = time.process_time() - started
    print(f"{len(rows):,} rows of {num_forwards:,} forwards in {seconds:.2f} s of CPU")
    assert len(rows) == store.statistics().num_kept >= 4_999_000
    assert np.array_equal(rows.forward_index, np.repeat(np.arange(num_forwards), num_tokens * 16))
    assert seconds < 10
