"""Rendezvous hashing: everyone agrees, and only the share of the one that came or went moves."""

from collections import Counter

from moe_analyzer.ownership import rendezvous_owner

KEYS = [f"p{one}" for one in range(64)]


def test_rendezvous_owner_does_not_depend_on_the_order_of_members() -> None:
    assert [rendezvous_owner(key, ["a", "b", "c"]) for key in KEYS] == [
        rendezvous_owner(key, ["c", "a", "b"]) for key in KEYS
    ]
    assert rendezvous_owner("p0", []) is None


def test_rendezvous_owner_moves_only_the_share_of_the_member_that_leaves() -> None:
    before = {key: rendezvous_owner(key, ["a", "b", "c", "d"]) for key in KEYS}
    after = {key: rendezvous_owner(key, ["a", "b", "d"]) for key in KEYS}
    assert all(after[key] == before[key] for key in KEYS if before[key] != "c")
    assert min(Counter(before.values()).values()) >= 6  # 16 each on average
