"""What a query may cost."""

from dataclasses import dataclass

__all__ = ["FLEET_LIMITS", "LOCAL_LIMITS", "Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The cost cap of one query.

    Attributes:
        max_rows: rows that may be read.
        max_bytes: bytes of the columns that these rows have, as they are in memory.
        max_seconds: wall time, looked at between batches.
        max_result_rows: rows of a result; a larger `limit` is refused.
        default_result_rows: rows of a result of a query without `limit`.
        max_groups: groups, or (step, layer) pairs, that are kept at a time.
    """

    max_rows: int = 200_000_000
    max_bytes: int = 32 * 1024**3
    max_seconds: float = 300.0
    max_result_rows: int = 100_000
    default_result_rows: int = 1000
    max_groups: int = 200_000


LOCAL_LIMITS = Limits()
"""Of a query in the caller's own process."""
FLEET_LIMITS = Limits(
    max_rows=4_000_000,
    max_bytes=256 * 1024**2,
    max_seconds=3.0,
    max_result_rows=10_000,
    default_result_rows=200,
    max_groups=20_000,
)
"""Of a query that a shared analyzer answers."""
