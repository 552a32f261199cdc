"""What is, and what is not, a presented token."""

import pytest

from moe_collector._token import bearer, is_authorized

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("metadata", [[("authorization", bearer(TOKEN))], [("Authorization", bearer(TOKEN).encode())]])
def test_the_token_is_taken(metadata: list[tuple[str, str | bytes]]) -> None:
    assert is_authorized(metadata, TOKEN)


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", TOKEN)],
        [("authorization", bearer(TOKEN) + "x")],
        [("authorization", bearer(TOKEN)[:-1])],
        [("authorization", "Bearer é")],
        [("authorization", bearer(TOKEN)), ("authorization", bearer(TOKEN))],
        [("x-authorization", bearer(TOKEN))],
    ],
)
def test_anything_else_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    assert not is_authorized(metadata, TOKEN)


def test_an_empty_token_authorizes_nobody() -> None:
    assert not is_authorized([("authorization", "Bearer ")], "")
