"""Reading rows in parts that fit the memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_debugger._row_blocks import RowBlock

__all__ = ["available_bytes", "regroup"]

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def regroup(blocks: Iterator[RowBlock], max_rows: int) -> Iterator[list[RowBlock]]:
    """Yield the rows of `blocks` in groups of whole forwards: at most `max_rows` rows, but at least one forward."""
    group: list[RowBlock] = []
    num_rows = 0
    last_forward: int | None = None
    for block in blocks:
        forward_index = block.token_column("forward_index")
        starts = np.flatnonzero(forward_index[1:] != forward_index[:-1]) + 1
        if int(forward_index[0]) != last_forward:
            starts = np.r_[0, starts]
        last_forward = int(forward_index[-1])
        taken = 0
        while True:
            # The last start of a forward up to which the group is not too large; else the next one there is.
            fitting = np.searchsorted(starts, taken + max_rows - num_rows, side="right")
            is_whole = len(block) - taken + num_rows <= max_rows
            after = starts[:fitting][starts[:fitting] + num_rows > taken]
            cut = int(after[-1]) if len(after) else int(starts[fitting]) if fitting < len(starts) else None
            if is_whole or cut is None:
                break
            if cut > taken:
                group.append(block.slice(taken, cut))
            yield group
            group, num_rows, taken = [], 0, cut
        if taken < len(block):
            group.append(block.slice(taken, len(block)))
            num_rows += len(block) - taken
    if group:
        yield group


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
