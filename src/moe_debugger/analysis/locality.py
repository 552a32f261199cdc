"""Locality: do neighbouring tokens of a text use the same experts?

Glossary, for one layer:
    window      n tokens at consecutive positions of one text, each with a routed expert. Windows overlap.
    share       windows whose n tokens all have an expert in common. For n = 2: consistency with the previous token.
    segment     m tokens at consecutive positions of one text. Segments overlap (all positions count).
    f           how many tokens of a segment use an expert, 0..m.
    SRP         segment routing best performance: the best F1 score with which a router that keeps each expert on or
                off for a whole segment can mimic the real one (arXiv 2505.16056, eq. 6).
    hit rate    share of the routed slots of a segment that its C most used experts serve: the best that a cache can do
                which keeps the same C experts for a whole segment (that paper's SCH as in its version 1; version 3
                simulates a cache that looks ahead instead, which is not given here).

Neighbours agree by chance and by skewed loads alone. So every number stands beside the chance level of even,
independent choices, or beside that of the same tokens in a shuffled order, which keeps the loads and loses the order.

Example: E = 4, K = 2, sets {0, 1}, {1, 2}, {2, 3} at positions 0, 1, 2: share 2 of 2 for n = 2 (chance 5/6), 0 of 1 for
n = 3. One segment of m = 3: f = 1, 2, 2, 1; "on" for f >= 1 has F1 = 2 * 6 / (12 + 6) = 0.667, for f >= 2
2 * 4 / (6 + 6) = 0.667: SRP 0.667. Its two most used experts serve 4 of 6 slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.intervals import Interval
from moe_debugger.analysis.sketch import mix
from moe_debugger.analysis.token_rows import (
    DecisionRows,
    Floats,
    Ints,
    LayerRows,
    block_sums,
    chance_of_common_expert,
    plain,
    ratio_interval,
    unique_rows,
)
from moe_debugger.errors import InvalidInputError

__all__ = ["Locality", "NgramLocality", "SegmentLocality", "routing_locality"]

_NAN = float("nan")
_NO_INTERVAL = Interval(_NAN, _NAN)
# Cells of the table of segments in memory at a time.
_MAX_CELLS = 1 << 21
_MAX_N = 8
_MAX_LENGTH = 1024

_Experts = npt.NDArray[np.int32]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class NgramLocality:
    """How often n neighbours share an expert; NaN where there is no window.

    Attributes:
        n: tokens of a window.
        num_windows: the sample size.
        share: windows whose tokens all have an expert in common, 0..1; `interval`: 95 %, from blocks of requests.
        chance: of even, independent choices of as many experts as these tokens have; for n = 2
            1 - C(E - K, K)/C(E, K).
        shuffled_share: the same of the same tokens in shuffled order, over `num_shuffled` windows.
    """

    n: int
    num_windows: int
    share: float
    interval: Interval
    chance: float
    shuffled_share: float
    num_shuffled: int


@dataclass(frozen=True, slots=True)
class SegmentLocality:
    """How well one group of experts serves a whole segment; NaN where no text is as long as a segment.

    Attributes:
        length: m, tokens.
        num_segments: the sample size; segments overlap.
        srp: segment routing best performance, F1 in 0..1; `srp_interval`: 95 % at the best threshold, from blocks.
        threshold: the best router keeps an expert on for segments in which it is used by this many tokens or more.
        size_ratio: experts that router keeps on over experts really used, the paper's rho hat.
        cache_size: C, experts.
        hit_rate: slots served by each segment's C most used experts over all slots; `hit_rate_interval` likewise.
        shuffled_srp, shuffled_hit_rate: the same of the same tokens in shuffled order.
    """

    length: int
    num_segments: int
    srp: float
    srp_interval: Interval
    threshold: int
    size_ratio: float
    cache_size: int
    hit_rate: float
    hit_rate_interval: Interval
    shuffled_srp: float
    shuffled_hit_rate: float


@dataclass(frozen=True, slots=True)
class Locality:
    """Locality of one layer; `not_applicable` says why where there is none.

    Attributes:
        num_tokens: valid tokens whose place in a text is clear; `num_ambiguous` others share theirs and are left out.
        ngrams: n = 2, 3, ...; empty where not applicable.
        mean_overlap: experts that a token has in common with the previous one, mean over the windows of n = 2; by
            chance `chance_overlap`, which is K^2/E.
        segments: None where not asked for or not applicable.
    """

    layer_index: int
    num_experts: int
    top_k: int
    num_tokens: int
    num_ambiguous: int
    not_applicable: str
    ngrams: tuple[NgramLocality, ...]
    mean_overlap: float
    chance_overlap: float
    segments: SegmentLocality | None

    @property
    def previous_token(self) -> NgramLocality | None:
        """Consistency with the previous token: the windows of two."""
        return self.ngrams[0] if self.ngrams else None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return plain(self)


def routing_locality(
    decisions: Mapping[str, Any],
    *,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    num_identity_experts: int | Sequence[int] = 0,
    max_n: int = 4,
    segment_length: int | None = 16,
    cache_ratio: float = 2.0,
) -> dict[int, Locality]:
    """Return the locality of each layer, by layer index. Time O(T log T + T K^2 max_n), for segments O(T (K log + m)).

    Args:
        decisions: columns as for `analyze`. Required besides: `request_id`, `position`. Used where present: `phase`,
            `forward_index`, `step`, `rank`, `is_padding`, `slot_status`.
        num_experts: E, or one per layer index.
        top_k: k, or one per layer index.
        num_identity_experts: Z, or one per layer index.
        max_n: largest window, 2..8 tokens.
        segment_length: m, 2..1,024 tokens; None = no segments.
        cache_ratio: C / K.

    Raises:
        InvalidInputError: a column is missing or of another length, ids or an argument are out of range.
    """
    if not 2 <= max_n <= _MAX_N:
        raise InvalidInputError(f"max_n is {max_n}, expected 2 to {_MAX_N} tokens")
    if segment_length is not None and not 2 <= segment_length <= _MAX_LENGTH:
        raise InvalidInputError(f"segment_length is {segment_length}, expected 2 to {_MAX_LENGTH} tokens, or None")
    if not cache_ratio > 0:
        raise InvalidInputError(f"cache_ratio is {cache_ratio}, expected more than 0 (2 = room for 2 K experts)")
    rows = DecisionRows(decisions, num_experts=num_experts, top_k=top_k, num_identity_experts=num_identity_experts)
    codes = rows.text_codes()
    return {i: _locality(rows.layer(i), codes, max_n, segment_length, cache_ratio) for i in rows.shapes}


def _locality(layer: LayerRows, codes: Ints, max_n: int, segment_length: int | None, cache_ratio: float) -> Locality:
    shape = layer.shape
    order, num_ambiguous = unique_rows(codes[layer.row])
    text = _Text(
        codes[layer.row][order],
        np.ascontiguousarray(layer.experts[order].T),
        layer.num_routed[order],
        layer.block[order],
        layer.num_blocks,
    )
    # The sorted order does not depend on how the rows stood, so neither does its shuffle.
    shuffled = text.shuffled()
    reason = ""
    if shape.num_experts == 1:
        reason = "the layer has one routed expert"
    elif not (text.follows & (text.num_routed[1:] > 0) & (text.num_routed[:-1] > 0)).any():
        reason = "no two valid tokens stand at consecutive positions of a text"
    ngrams: tuple[NgramLocality, ...] = ()
    overlap = chance = _NAN
    if not reason:
        ngrams, overlap = _ngrams(text, shuffled, shape.num_experts, max_n)
        is_pair = text.follows & (text.num_routed[1:] > 0) & (text.num_routed[:-1] > 0)
        sizes = text.num_routed
        chance = float((sizes[1:] * sizes[:-1])[is_pair].mean()) / shape.num_experts
    segments = None
    if segment_length is not None and not reason:
        cache_size = max(1, min(shape.num_experts, round(cache_ratio * shape.top_k)))
        segments = _segments(text, shuffled, shape.num_experts, segment_length, cache_size)
    return Locality(
        layer_index=shape.layer_index,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_tokens=len(order),
        num_ambiguous=num_ambiguous,
        not_applicable=reason,
        ngrams=ngrams,
        mean_overlap=overlap,
        chance_overlap=chance,
        segments=segments,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """Tokens in the order of their texts; `code` is consecutive where positions are."""

    code: Ints
    experts: _Experts  # [k, n]: slots first, so that numpy's inner loops run over tokens
    num_routed: Ints
    block: Ints
    num_blocks: int

    @property
    def follows(self) -> _Mask:
        """[n - 1]: the next token stands at the next position of the same text."""
        is_next: _Mask = np.diff(self.code) == 1
        return is_next

    def shuffled(self) -> "_Text":
        """Return the same tokens as one text in a fixed, shuffled order."""
        n = len(self.code)
        order = np.argsort(mix(np.arange(n, dtype=np.uint64)))
        return _Text(np.arange(n), self.experts[:, order], self.num_routed[order], self.block[order], self.num_blocks)


def _common(text: _Text, num_experts: int, max_n: int) -> Iterator[tuple[Ints, _Mask, float]]:
    """Yield for n = 2, 3, ...: first tokens of all windows, which have experts in common, and how many on average."""
    n = len(text.code)
    is_window = text.num_routed > 0
    is_used = is_window.copy()
    is_common = text.experts < num_experts
    follows = text.follows
    for size in range(2, max_n + 1):
        last = n - size + 1
        if last < 1:
            yield np.zeros(0, np.int64), np.zeros(0, np.bool_), _NAN
            is_window, is_common = is_window[:0], is_common[:, :0]
            continue
        is_window = is_window[:last] & is_used[size - 1 :] & follows[size - 2 :]
        is_common = is_common[:, :last]
        is_met = np.zeros_like(is_common)
        for later in text.experts[:, size - 1 :]:
            is_met |= text.experts[:, :last] == later
        is_common = is_common & is_met
        starts = np.flatnonzero(is_window)
        in_common = is_common.sum(axis=0)[starts]
        yield starts, in_common > 0, float(in_common.mean()) if len(starts) else _NAN


def _ngrams(text: _Text, shuffled: _Text, num_experts: int, max_n: int) -> tuple[tuple[NgramLocality, ...], float]:
    found, overlap = [], _NAN
    both = zip(_common(text, num_experts, max_n), _common(shuffled, num_experts, max_n), strict=True)
    for n, ((starts, has_common, mean), (_, has_shuffled, _)) in enumerate(both, start=2):
        overlap = mean if n == 2 else overlap
        block = text.block[starts]
        found.append(
            NgramLocality(
                n=n,
                num_windows=len(starts),
                share=float(has_common.mean()) if len(starts) else _NAN,
                interval=ratio_interval(
                    block_sums(block[has_common], text.num_blocks), block_sums(block, text.num_blocks)
                ),
                chance=_chance(text.num_routed, starts, num_experts, n),
                shuffled_share=float(has_shuffled.mean()) if len(has_shuffled) else _NAN,
                num_shuffled=len(has_shuffled),
            )
        )
    return tuple(found), overlap


def _chance(num_routed: Ints, starts: Ints, num_experts: int, n: int) -> float:
    if not len(starts):
        return _NAN
    if (num_routed == num_routed[0]).all():
        return chance_of_common_expert(num_experts, [int(num_routed[0])] * n)
    sizes = np.sort(np.stack([num_routed[starts + step] for step in range(n)], axis=1), axis=1)
    kinds, times = np.unique(sizes, axis=0, return_counts=True)
    chances = [chance_of_common_expert(num_experts, kind) for kind in kinds.tolist()]
    return float(np.dot(chances, times) / len(starts))


def _segments(text: _Text, shuffled: _Text, num_experts: int, length: int, cache_size: int) -> SegmentLocality:
    table, hits = _segment_sums(text, num_experts, length, cache_size)
    srp, threshold, predicted, actual = _best_f1(table.sum(axis=0))
    shuffled_table, shuffled_hits = _segment_sums(shuffled, num_experts, length, cache_size)
    shuffled_srp, _, _, shuffled_actual = _best_f1(shuffled_table.sum(axis=0))
    srp_interval = hit_interval = _NO_INTERVAL
    if actual:
        f = np.arange(length + 1)
        is_on = f >= threshold
        # Blocks of requests; the last row is of tokens whose request is unknown.
        of_block, known_hits = table[:-1].astype(np.float64), hits[:-1].astype(np.float64)
        slots = of_block @ f
        srp_interval = ratio_interval(2 * (of_block @ (f * is_on)), length * (of_block @ is_on) + slots)
        hit_interval = ratio_interval(known_hits, slots)
    return SegmentLocality(
        length=length,
        num_segments=int(table.sum()) // num_experts,
        srp=srp,
        srp_interval=srp_interval,
        threshold=threshold,
        size_ratio=predicted / actual if actual else _NAN,
        cache_size=cache_size,
        hit_rate=int(hits.sum()) / actual if actual else _NAN,
        hit_rate_interval=hit_interval,
        shuffled_srp=shuffled_srp,
        shuffled_hit_rate=int(shuffled_hits.sum()) / shuffled_actual if shuffled_actual else _NAN,
    )


def _segment_sums(text: _Text, num_experts: int, length: int, cache_size: int) -> tuple[Ints, Ints]:
    """Return how many (segment, expert) have each f, [blocks + 1, m + 1], and the hits of each block, [blocks + 1].

    The last block is that of tokens whose request is unknown.
    """
    table = np.zeros((text.num_blocks + 1, length + 1), np.int64)
    hits = np.zeros(text.num_blocks + 1, np.int64)
    block = np.where(text.block < 0, text.num_blocks, text.block)
    num = len(text.code)
    is_start = np.r_[True, ~text.follows][:num]
    bounds = np.r_[np.flatnonzero(is_start), num]
    # One past the last segment of each token's text.
    after_of = bounds[np.cumsum(is_start)] - length + 1
    step = max(length, _MAX_CELLS // (length + 1 + len(text.experts)))
    for first in range(0, num - length + 1, step):
        end = min(first + step, num - length + 1)
        rows = slice(first, end + length - 1)
        token = np.arange(first, end + length - 1)
        # A token is in the segments that start up to m - 1 tokens before it; those that cross texts are left out below.
        start = np.maximum(token - length + 1, first)
        after = np.minimum(token + 1, end)
        usage = _usage(text.experts[:, rows], num_experts, start - first, after - first, end - first, length)
        is_segment = np.arange(first, end) < after_of[first:end]
        usage, own = usage[is_segment], block[first:end][is_segment]
        # Of the C most used experts, min(C, experts with f >= v) have the v-th use of theirs in the segment.
        at_least = np.cumsum(usage[:, :0:-1], axis=1)
        served = np.minimum(at_least, cache_size).sum(axis=1)
        hits += np.bincount(own, served, minlength=len(hits)).astype(np.int64)
        for f in range(1, length + 1):
            table[:, f] += np.bincount(own, usage[:, f], minlength=len(table)).astype(np.int64)
        table[:, 0] += np.bincount(own, minlength=len(table)) * num_experts
    table[:, 0] -= table[:, 1:].sum(axis=1)
    return table, hits


def _usage(experts: _Experts, num_experts: int, start: Ints, after: Ints, num_segments: int, length: int) -> Ints:
    """Return how many experts each segment uses f times, [segments, m + 1]; column 0 means nothing.

    For one expert f is a step function of the segment: it rises where a segment reaches a token that uses the expert,
    and falls where one leaves it. So the work grows with the slots that tokens use, not with the number of experts.

    Args:
        experts: [k, tokens], E where there is none.
        num_experts: E.
        start, after: [tokens], the first segment that holds the token, and the one after the last.
        num_segments: segments are 0..num_segments - 1.
        length: m.
    """
    slots = experts.T.reshape(-1)
    # In 16 bits numpy sorts by radix; ids are at most 65,535.
    order = np.argsort(slots.astype(np.uint16), kind="stable")
    token = order // len(experts)
    order = order[(slots[order] < num_experts) & (start < after)[token]]
    token = order // len(experts)
    base = slots[order].astype(np.int64) * (num_segments + 1)
    # Both halves rise, so that sorting is one merge.
    places = np.concatenate([base + start[token], base + after[token]])
    merged = np.argsort(places, kind="stable")
    places = places[merged]
    f = np.cumsum(np.where(merged < len(base), 1, -1))
    is_step = np.r_[places[1:] != places[:-1], False][: len(places)] & (f > 0)
    steps = np.flatnonzero(is_step)
    width, f = length + 1, f[steps]
    size = (num_segments + 1) * width
    rises = np.bincount(places[steps] % (num_segments + 1) * width + f, minlength=size)
    falls = np.bincount(places[steps + 1] % (num_segments + 1) * width + f, minlength=size)
    usage: Ints = np.cumsum((rises - falls).reshape(-1, width), axis=0)[:num_segments]
    return usage


def _best_f1(times: Ints) -> tuple[float, int, int, int]:
    """Return the best F1 over thresholds on f, the threshold, and the slots predicted and really used.

    Args:
        times: [m + 1], how many (segment, expert) have f = 0..m.
    """
    length = len(times) - 1
    f = np.arange(length + 1)
    actual = int((f * times).sum())
    if not actual:
        return _NAN, 0, 0, 0
    true_positive: Floats = np.cumsum((f * times)[::-1])[::-1].astype(np.float64)
    predicted = length * np.cumsum(times[::-1])[::-1]
    scores = 2 * true_positive / (predicted + actual)
    # Of equally good thresholds the highest, which keeps the fewest experts on.
    best = length - int(np.argmax(scores[::-1]))
    return float(scores[best]), best, int(predicted[best]), actual
