"""Reading rows in parts that fit the memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from moe_debugger._row_blocks import RowBlock

__all__ = ["available_bytes", "regroup"]

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def regroup(blocks: Iterable[RowBlock], max_rows: int) -> Iterator[list[RowBlock]]:
    """Yield the rows of `blocks` in groups of whole forwards: at most `max_rows` rows, but at least one forward."""
    whole = _Parts()
    # The newest forward, of which the next block may hold more.
    newest = _Parts()
    last_forward: int | None = None
    for block in blocks:
        forward_index = block.token_column("forward_index")
        starts = np.flatnonzero(forward_index[1:] != forward_index[:-1]) + 1
        if int(forward_index[0]) != last_forward:
            starts = np.r_[0, starts]
        last_forward = int(forward_index[-1])
        if not len(starts):
            newest.add(block)
            continue
        first, last = int(starts[0]), int(starts[-1])
        if first:
            newest.add(block.slice(0, first))
        if whole.num_rows and whole.num_rows + newest.num_rows > max_rows:
            yield whole.take()
        whole.extend(newest)
        done = first
        while done < last:
            # As many forwards as fit; where not even one does, it has a group of its own.
            place = int(np.searchsorted(starts, done + max_rows - whole.num_rows, side="right"))
            cut = int(starts[place - 1]) if place else done
            if cut <= done:
                if whole.num_rows:
                    yield whole.take()
                    continue
                cut = int(starts[np.searchsorted(starts, done, side="right")])
            whole.add(block.slice(done, cut))
            done = cut
        newest.add(block.slice(last, len(block)))
    if whole.num_rows and whole.num_rows + newest.num_rows > max_rows:
        yield whole.take()
    whole.extend(newest)
    if whole.num_rows:
        yield whole.take()


class _Parts:
    """Blocks that are collected, and their rows."""

    def __init__(self) -> None:
        self.blocks: list[RowBlock] = []
        self.num_rows = 0

    def add(self, block: RowBlock) -> None:
        self.blocks.append(block)
        self.num_rows += len(block)

    def extend(self, other: "_Parts") -> None:
        """Add the blocks of `other`, which is empty afterwards."""
        self.num_rows += other.num_rows
        self.blocks += other.take()

    def take(self) -> list[RowBlock]:
        blocks, self.blocks, self.num_rows = self.blocks, [], 0
        return blocks


def available_bytes() -> int | None:
    """Return the memory that this process can still take without swapping; None where the system does not say."""
    limits: list[int] = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        limits += [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    except OSError:
        return None
    # A container has less than its machine.
    for limit_name, used_name in _CGROUP_FILES:
        try:
            limits.append(int(Path(limit_name).read_text()) - int(Path(used_name).read_text()))
        except (OSError, ValueError):
            continue  # no such group, or no limit ("max")
    return max(0, min(limits)) if limits else None
