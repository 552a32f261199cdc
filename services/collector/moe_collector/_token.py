"""The fleet token, as gRPC metadata carries it."""

import hmac
from collections.abc import Iterable

__all__ = ["AUTHORIZATION", "bearer", "is_authorized"]

AUTHORIZATION = "authorization"


def bearer(token: str) -> str:
    """Return the metadata value that presents `token`."""
    return f"Bearer {token}"


def is_authorized(metadata: Iterable[tuple[str, str | bytes]], token: str) -> bool:
    """Return whether `metadata` presents `token`, in a time that does not tell how much of it was right.

    An empty token authorizes nobody.
    """
    values = [value for key, value in metadata if key.lower() == AUTHORIZATION]
    if not token or len(values) != 1:
        return False
    presented = values[0].encode() if isinstance(values[0], str) else values[0]
    return hmac.compare_digest(presented, bearer(token).encode())
