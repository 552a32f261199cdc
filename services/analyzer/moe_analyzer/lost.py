"""What may have left the stream before it was counted: ranges of stream sequences, an upper bound. Pure.

A partition sees its own messages only, and the sequences between them belong to other partitions. So of a range that
the stream discarded before this partition came to it, nobody can say any more how many messages were of this partition,
or of which session. What is certain is that no more than these were lost. A session may lie in any partition, and every
message in one only, so over all partitions a sequence counts once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

__all__ = ["LostRange", "add_lost", "decode_lost", "encode_lost", "num_lost"]

# Of one partition and stream; beyond it neighbours become one, which keeps the bound above the truth.
_MAX_RANGES = 32


@dataclass(frozen=True, slots=True, order=True)
class LostRange:
    """Sequences that a partition had not consumed when they were gone.

    Attributes:
        stream: identity of the stream.
        first, last: the sequences, both inclusive.
        after_ns: when the last message that was consumed before the range was stored; 0 where there is none.
        noticed_ns: when the range was noticed.
    """

    stream: str
    first: int
    last: int
    after_ns: int
    noticed_ns: int

    def joined(self, other: "LostRange") -> "LostRange":
        """Return the range that covers both."""
        return replace(
            self,
            first=min(self.first, other.first),
            last=max(self.last, other.last),
            after_ns=min(self.after_ns, other.after_ns),
            noticed_ns=max(self.noticed_ns, other.noticed_ns),
        )


def add_lost(ranges: Iterable[LostRange], new: LostRange) -> tuple[LostRange, ...]:
    """Return the ranges with one more; bounded for each stream."""
    result = sorted({*ranges, new})
    mine = [one for one in result if one.stream == new.stream]
    if len(mine) > _MAX_RANGES:
        # The nearest neighbours, so that the fewest sequences are added that were not lost.
        at = min(range(len(mine) - 1), key=lambda index: mine[index + 1].first - mine[index].last)
        both = mine[at : at + 2]
        result = sorted([*(one for one in result if one not in both), both[0].joined(both[1])])
    return tuple(result)


def num_lost(ranges: Iterable[LostRange], *, opened_ns: int, closed_ns: int = 0) -> int:
    """Return how many sequences may have held messages of a session, at most.

    Args:
        ranges: of all partitions; where they overlap, a sequence counts once.
        opened_ns: a range that was noticed before the session began has none of its messages.
        closed_ns: nor has one that begins after its end; 0 where it is open.
    """
    mine = sorted(one for one in ranges if one.noticed_ns >= opened_ns and not 0 < closed_ns < one.after_ns)
    total = 0
    for _, group in groupby(mine, key=lambda one: one.stream):
        end = 0
        for one in group:
            total += max(0, one.last - max(end, one.first - 1))
            end = max(end, one.last)
    return total


def encode_lost(ranges: Iterable[LostRange]) -> str:
    """Return the ranges as a Redis value."""
    return json.dumps([[one.stream, one.first, one.last, one.after_ns, one.noticed_ns] for one in ranges])


def decode_lost(data: bytes | None) -> tuple[LostRange, ...]:
    """Return the ranges that `encode_lost` gave; none where nothing was stored."""
    return () if data is None else tuple(LostRange(*one) for one in json.loads(data))
