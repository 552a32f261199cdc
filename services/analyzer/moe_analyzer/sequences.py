"""Which messages of a source were seen: a watermark and the ranges above it.

Example: after 1, 2, 5, 4 the ranges are [1, 2] and [4, 5]; 3 is missing.
"""

from bisect import bisect_right

__all__ = ["SequenceSet"]

# Each range is one gap. A source that loses more messages than this in separate places has its lowest gaps given up:
# they stay counted as missing, and a message that comes for them later is taken as a duplicate.
_MAX_RANGES = 1024


class SequenceSet:
    """A set of sequences from 1 as sorted, disjoint ranges; bounded."""

    __slots__ = ("_num_given_up", "_ranges")

    def __init__(self, ranges: list[list[int]] | None = None, num_given_up: int = 0) -> None:
        self._ranges = [list(one) for one in ranges or []]
        self._num_given_up = num_given_up

    def __contains__(self, sequence: int) -> bool:
        at = self._find(sequence)
        return at >= 0 and sequence <= self._ranges[at][1]

    def _find(self, sequence: int) -> int:
        """Index of the last range that begins at or before `sequence`, or -1."""
        return bisect_right(self._ranges, sequence, key=lambda one: one[0]) - 1

    def add(self, sequence: int) -> bool:
        """Add `sequence`; return False where it was there."""
        at = self._find(sequence)
        if at >= 0 and sequence <= self._ranges[at][1]:
            return False
        if at >= 0 and self._ranges[at][1] == sequence - 1:
            self._ranges[at][1] = sequence
        else:
            at += 1
            self._ranges.insert(at, [sequence, sequence])
        if at + 1 < len(self._ranges) and self._ranges[at + 1][0] == sequence + 1:
            self._ranges[at][1] = self._ranges.pop(at + 1)[1]
        if len(self._ranges) > _MAX_RANGES:
            low, high = self._ranges[0], self._ranges[1]
            self._num_given_up += high[0] - low[1] - 1
            self._ranges[:2] = [[low[0], high[1]]]
        return True

    @property
    def last(self) -> int:
        """The highest sequence, 0 where there is none."""
        return self._ranges[-1][1] if self._ranges else 0

    @property
    def num_missing(self) -> int:
        """Sequences below `last` that were not seen."""
        return self.last - sum(high - low + 1 for low, high in self._ranges) + self._num_given_up

    def to_json(self) -> dict[str, object]:
        """Return the set as JSON values."""
        return {"ranges": self._ranges, "given_up": self._num_given_up}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> "SequenceSet":
        """Return the set that `to_json` gave."""
        ranges, given_up = value["ranges"], value["given_up"]
        assert isinstance(ranges, list)
        assert isinstance(given_up, int)
        return cls(ranges, given_up)
