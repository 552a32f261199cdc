"""Heuristics that place experts by their loads: greedy, EPLB-like, hierarchical.

Written from the description that DeepSeek published with its Expert Parallelism Load Balancer (README of
deepseek-ai/EPLB): heavy experts get more copies, then copies are packed onto ranks so that loads are even; in the
hierarchical form groups of experts are first packed onto nodes, and copies stay within their node. Unlike the published
one, a second copy of an expert goes onto another rank wherever there is room, because on the same rank it changes
nothing.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np

from moe_debugger.errors import InvalidInputError
from moe_debugger.planning.loads import Floats
from moe_debugger.planning.placement import Ints, Placement, check_ranks

__all__ = ["copies_by_load", "eplb_placement", "greedy_placement", "hierarchical_placement", "pack_evenly"]


def pack_evenly(weights: Sequence[float] | Floats, num_packs: int, labels: Sequence[int] | None = None) -> list[Ints]:
    """Deal items into packs of the same size, heaviest first, each to the lightest pack that has room.

    This is longest-processing-time scheduling under a limit on the number of items. O(n log n) where
    the items of a label are alike.

    Args:
        weights: [n], 0 or more; n is a multiple of `num_packs`.
        labels: [n]; an item goes to a pack without its label where one has room.

    Returns:
        The indices of the items of each pack, in the order in which they were dealt.

    Raises:
        InvalidInputError: n is not a multiple of `num_packs`.
    """
    values = np.asarray(weights, np.float64)
    if num_packs < 1 or len(values) % num_packs:
        raise InvalidInputError(f"{len(values)} items in {num_packs} packs: expected the same number in each")
    size = len(values) // num_packs
    names = list(range(len(values))) if labels is None else list(labels)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    held: list[set[int]] = [set() for _ in range(num_packs)]
    # Among equally light packs the emptiest: experts without load would otherwise fill one rank.
    with_room = [(0.0, 0, pack) for pack in range(num_packs if size else 0)]
    # Heap of those with room that hold the label of the last item.
    aside: list[tuple[float, int, int]] = []
    last = None
    for item in np.argsort(-values, kind="stable").tolist():
        label = names[item]
        if label != last:
            for pack in aside:
                heappush(with_room, pack)
            last, aside = label, []
        while with_room and label in held[with_room[0][2]]:
            heappush(aside, heappop(with_room))
        total, number, best = heappop(with_room or aside)
        packs[best].append(item)
        held[best].add(label)
        if number + 1 < size:
            heappush(aside, (total + float(values[item]), number + 1, best))
    return [np.array(pack, np.int64) for pack in packs]


def copies_by_load(weights: Sequence[float] | Floats, num_slots: int, max_copies: int) -> Ints:
    """Return [E] how many copies each expert gets: each further slot goes to the highest load per copy.

    The highest load per copy is then as low as `num_slots` slots allow. Of equal loads per copy the expert with fewer
    copies is first.

    Raises:
        InvalidInputError: the slots are fewer than the experts, or more than `max_copies` of each.
    """
    values = np.asarray(weights, np.float64)
    if not len(values) <= num_slots <= len(values) * max_copies:
        raise InvalidInputError(
            f"{num_slots} slots for {len(values)} experts of at most {max_copies} copies: expected {len(values)} to "
            f"{len(values) * max_copies}"
        )
    copies = np.ones(len(values), np.int64)
    may_grow = [(-value, 1, expert) for expert, value in enumerate(values.tolist())] if max_copies > 1 else []
    heapify(may_grow)
    for _ in range(num_slots - len(values)):
        _, number, expert = may_grow[0]
        copies[expert] = number + 1
        if number + 1 < max_copies:
            heapreplace(may_grow, (-float(values[expert]) / (number + 1), number + 1, expert))
        else:
            heappop(may_grow)
    return copies


def greedy_placement(weights: Any, num_ranks: int, *, num_nodes: int = 1) -> Placement:
    """Place each expert once, the same number on each rank, heaviest first onto the lightest rank.

    Args:
        weights: [num_layers, num_experts], 0 or more, such as loads summed over a window.

    Raises:
        InvalidInputError: the experts are no multiple of the ranks, or a weight is not valid.
    """
    values = _check_weights(weights)
    check_ranks(values.shape[1], values.shape[1], num_ranks, num_nodes)
    table = [np.concatenate(pack_evenly(row, num_ranks)) for row in values]
    return Placement("greedy", values.shape[1], num_ranks, np.stack(table), num_nodes)


def eplb_placement(weights: Any, num_ranks: int, *, num_slots: int, num_nodes: int = 1) -> Placement:
    """Copy the heaviest experts into the spare slots, then pack the copies onto the ranks evenly.

    Args:
        weights: [num_layers, num_experts], 0 or more.
        num_slots: R * S, of one layer.

    Raises:
        InvalidInputError: the slots do not fit experts and ranks, or a weight is not valid.
    """
    values = _check_weights(weights)
    check_ranks(num_slots, values.shape[1], num_ranks, num_nodes)
    table = [_place(row, np.arange(len(row)), num_slots, num_ranks) for row in values]
    return Placement("eplb", values.shape[1], num_ranks, np.stack(table), num_nodes)


def hierarchical_placement(
    weights: Any, num_ranks: int, *, num_slots: int, num_nodes: int, num_groups: int
) -> Placement:
    """Pack groups of experts onto nodes, then copy and pack within each node.

    With group-limited routing a token's experts are then on few nodes, which spares traffic between nodes. Loads alone
    do not show that traffic, so nothing here measures it.

    Args:
        weights: [num_layers, num_experts], 0 or more; group g is the experts g * E / groups and following.

    Raises:
        InvalidInputError: experts, groups, nodes, ranks and slots do not divide, or a weight is not valid.
    """
    values = _check_weights(weights)
    num_experts = values.shape[1]
    check_ranks(num_slots, num_experts, num_ranks, num_nodes)
    if num_groups < 1 or num_experts % num_groups or num_groups % num_nodes:
        raise InvalidInputError(
            f"{num_experts} experts in {num_groups} groups on {num_nodes} nodes: expected equal groups, and the same "
            "number of them on each node; use eplb_placement"
        )
    groups = np.arange(num_experts).reshape(num_groups, -1)
    table = []
    for row in values:
        nodes = pack_evenly(row[groups].sum(axis=1), num_nodes)
        experts = [groups[node].ravel() for node in nodes]
        parts = [_place(row[own], own, num_slots // num_nodes, num_ranks // num_nodes) for own in experts]
        table.append(np.concatenate(parts))
    return Placement("hierarchical", num_experts, num_ranks, np.stack(table), num_nodes)


def _place(weights: Floats, experts: Ints, num_slots: int, num_ranks: int) -> Ints:
    # More copies than ranks would put two on one rank, so that is allowed only where slots have to be filled.
    copies = copies_by_load(weights, num_slots, max(num_ranks, -(-num_slots // len(experts))))
    items = np.repeat(np.arange(len(experts)), copies)
    packs = pack_evenly((weights / copies)[items], num_ranks, items.tolist())
    return experts[items[np.concatenate(packs)]]


def _check_weights(weights: Any) -> Floats:
    values = np.asarray(weights, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise InvalidInputError(
            f"weights: shape {values.shape}, expected [num_layers, num_experts] of finite numbers, 0 or more"
        )
    return values
