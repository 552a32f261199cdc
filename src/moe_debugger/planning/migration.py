"""What it takes to get from one placement to another, and how to make it less.

Ranks are interchangeable for balance, so a new placement is first renumbered to hold what the current one already
holds (`align_placement`), and layers in which it gains nothing keep what they have (`keep_layers_without_gain`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning.loads import Floats
from moe_debugger.planning.placement import Ints, Placement
from moe_debugger.planning.rank_metrics import rank_loads

__all__ = ["Migration", "align_placement", "keep_layers_without_gain", "migration"]


@dataclass(frozen=True, slots=True)
class Migration:
    """What has to be sent to change the placement. A rank that holds an expert already copies it locally, for free.

    Attributes:
        num_experts_moved: experts received by ranks that did not hold them, over all layers.
        num_crossing_nodes: of these, those that no rank of the receiving node held.
        num_layers_changed: layers in which any rank receives.
        max_received: most experts that one rank receives, over all layers.
        bytes_moved: of all ranks; None where the size of an expert is not known.
        max_bytes_received: of the rank that receives most; None likewise.
        extra_bytes_per_rank: weights that each rank holds beyond those of the current placement, all layers; None
            likewise.
    """

    num_experts_moved: int
    num_crossing_nodes: int
    num_layers_changed: int
    max_received: int
    bytes_moved: int | None
    max_bytes_received: int | None
    extra_bytes_per_rank: int | None


def migration(current: Placement, target: Placement, *, expert_bytes: int | None = None) -> Migration:
    """Return what changing from `current` to `target` moves.

    Args:
        expert_bytes: size of the weights of one expert of one layer.

    Raises:
        InvalidInputError: the placements are of different layers, experts, ranks or nodes, or a size is negative.
    """
    _check_alike(current, target)
    if expert_bytes is not None and expert_bytes < 0:
        raise InvalidInputError(f"expert_bytes {expert_bytes}: expected 0 or more")
    had, has = current.copies_on_ranks() > 0, target.copies_on_ranks() > 0
    received = has & ~had
    shape = (target.num_layers, target.num_experts, target.num_nodes, -1)
    node_had = had.reshape(shape).any(axis=3, keepdims=True)
    crossing = received.reshape(shape) & ~node_had
    moved, most = int(received.sum()), int(received.sum(axis=(0, 1)).max())
    extra = (target.slots_per_rank - current.slots_per_rank) * target.num_layers
    return Migration(
        num_experts_moved=moved,
        num_crossing_nodes=int(crossing.sum()),
        num_layers_changed=int(received.any(axis=(1, 2)).sum()),
        max_received=most,
        bytes_moved=None if expert_bytes is None else moved * expert_bytes,
        max_bytes_received=None if expert_bytes is None else most * expert_bytes,
        extra_bytes_per_rank=None if expert_bytes is None else extra * expert_bytes,
    )


def align_placement(target: Placement, current: Placement) -> Placement:
    """Renumber the nodes, and the ranks of each node, of `target` so that fewer experts move; loads stay as even.

    Pairs are taken greedily, those with most experts in common first; a layer where that is no better than leaving the
    numbers alone keeps them. Experts that stay on their rank stay in their slot where both have as many slots.

    Raises:
        InvalidInputError: the placements are of different layers, experts, ranks or nodes.
    """
    _check_alike(current, target)
    had, has = current.copies_on_ranks() > 0, target.copies_on_ranks() > 0
    table = np.empty_like(target.physical_to_logical)
    new = target.physical_to_logical.reshape(target.num_layers, target.num_ranks, -1)
    old = current.physical_to_logical.reshape(current.num_layers, current.num_ranks, -1)
    for layer in range(target.num_layers):
        # Products of floats are many times faster than those of integers, and exact for counts.
        common = (has[layer].T.astype(np.float32) @ had[layer].astype(np.float32)).astype(np.int64)
        rows = [
            _keep_slots(new[layer, source], old[layer, rank]) for rank, source in enumerate(_sources(common, target))
        ]
        table[layer] = np.concatenate(rows)
    return Placement(target.strategy, target.num_experts, target.num_ranks, table, target.num_nodes)


def keep_layers_without_gain(target: Placement, current: Placement, loads: Any) -> Placement:
    """Return `target` with the current placement in the layers where, over `loads`, ranks would wait no less.

    So it is never worse than `current` on the window that it was fitted to. Where `target` has more slots, the spare
    ones of a kept layer repeat experts of their own rank, which changes no load; a layer where that is not possible
    (an expert with copies on several ranks) takes the target's.

    Args:
        loads: [num_steps, num_layers, num_experts], the fitting window.

    Raises:
        InvalidInputError: placements or loads do not fit each other.
    """
    _check_alike(current, target)
    before = rank_loads(loads, current).max(axis=2).sum(axis=0)
    after = rank_loads(loads, target).max(axis=2).sum(axis=0)
    table = target.physical_to_logical.copy()
    for layer in np.flatnonzero(after >= before * (1 - 1e-12)).tolist():
        row = _widened(current, layer, target.slots_per_rank)
        if row is not None:
            table[layer] = row
    return Placement(target.strategy, target.num_experts, target.num_ranks, table, target.num_nodes)


def _check_alike(current: Placement, target: Placement) -> None:
    for name in ("num_layers", "num_experts", "num_ranks", "num_nodes"):
        if getattr(current, name) != getattr(target, name):
            raise InvalidInputError(
                f"{name} is {getattr(current, name)} in the current placement and {getattr(target, name)} in the other"
            )


def _sources(common: Ints, target: Placement) -> Ints:
    """Return for each rank, which rank of the target it becomes. `common` is [target's rank, current rank]."""
    nodes, size = target.num_nodes, target.num_ranks // target.num_nodes
    blocks = common.reshape(nodes, size, nodes, size).transpose(0, 2, 1, 3)
    within = np.array([[_match(block) for block in row] for row in blocks])
    best = np.array(
        [[block[within[i, j], np.arange(size)].sum() for j, block in enumerate(row)] for i, row in enumerate(blocks)]
    )
    node_of = _match(best)
    return np.concatenate([node_of[node] * size + within[node_of[node], node] for node in range(nodes)])


def _match(common: Ints) -> Ints:
    """Return for each column a row of its own, so that the sum of the chosen cells is high."""
    num = len(common)
    result, is_free = np.full(num, -1), np.ones(num, np.bool_)
    cells = np.flatnonzero(common)
    for cell in cells[np.argsort(-common.ravel()[cells], kind="stable")].tolist():
        row, column = divmod(cell, num)
        if is_free[row] and result[column] < 0:
            result[column], is_free[row] = row, False
    result[result < 0] = np.flatnonzero(is_free)
    columns = np.arange(num)
    return result if common[result, columns].sum() > np.trace(common) else columns


def _keep_slots(new: Ints, old: Ints) -> Ints:
    """Return the experts of `new` in an order that leaves those of `old` in their slots."""
    if len(new) != len(old):
        return new
    rest = new.tolist()
    kept: list[int | None] = []
    for expert in old.tolist():
        if expert in rest:
            rest.remove(expert)
            kept.append(expert)
        else:
            kept.append(None)
    others = iter(rest)
    return np.array([next(others) if expert is None else expert for expert in kept], np.int64)


def _widened(current: Placement, layer: int, slots_per_rank: int) -> Ints | None:
    row = current.physical_to_logical[layer].reshape(current.num_ranks, -1)
    spare = slots_per_rank - current.slots_per_rank
    if spare == 0:
        same: Ints = row.ravel()
        return same
    is_alone = (current.copies_on_ranks()[layer] > 0).sum(axis=1) == 1
    if spare < 0 or not all(is_alone[experts].any() for experts in row):
        return None
    parts = [np.concatenate([experts, np.resize(experts[is_alone[experts]], spare)]) for experts in row]
    widened: Ints = np.concatenate(parts)
    return widened


def fitted_gain(current: Placement, target: Placement, loads: Any) -> float:
    """Return the share by which `target` shortens the sum of per-step maxima over `loads`; NaN without load."""
    before: Floats = rank_loads(loads, current).max(axis=2)
    after: Floats = rank_loads(loads, target).max(axis=2)
    return 1 - float(after.sum()) / float(before.sum()) if before.sum() else float("nan")
