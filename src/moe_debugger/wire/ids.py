"""Identifiers: lowercase ULIDs (26 characters of Crockford's base 32), checked by one regex at every entrance.

Tenants are names, not ULIDs, with an alphabet that is as safe in a subject, a key and a file name.
"""

import os
import re
import time

from moe_debugger.errors import InvalidInputError

__all__ = ["DEFAULT_TENANT", "ID_PATTERN", "TENANT_PATTERN", "check_id", "check_tenant", "new_id"]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
ID_PATTERN = re.compile(r"\A[0-7][0-9a-hjkmnp-tv-z]{25}\Z")
TENANT_PATTERN = re.compile(r"\A[a-z][a-z0-9-]{0,31}\Z")
DEFAULT_TENANT = "default"


def new_id() -> str:
    """Return a new ULID: 48 bits of milliseconds, then 80 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5))


def check_id(value: str, what: str) -> str:
    """Return `value` if it is an id.

    Raises:
        InvalidInputError: it is not; the text names `what` and the value.
    """
    if not ID_PATTERN.match(value):
        raise InvalidInputError(
            f"{what} {value[:64]!r} is not an id; expected a lowercase 26-character ULID, as new_id() makes"
        )
    return value


def check_tenant(value: str) -> str:
    """Return `value` if it is a tenant's name.

    Raises:
        InvalidInputError: it is not.
    """
    if not TENANT_PATTERN.match(value):
        raise InvalidInputError(f"tenant {value[:64]!r} is not valid; expected [a-z][a-z0-9-]*, at most 32 characters")
    return value
