"""Ids, subjects and keys: nothing from outside becomes part of a subject or a key unchecked."""

import re
import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_debugger.errors import InvalidInputError, WireFormatError
from moe_debugger.wire.ids import ID_PATTERN, check_id, check_tenant, new_id
from moe_debugger.wire.subjects import (
    event_subject,
    live_subject,
    open_session_subject,
    parse_stored_subject,
    partition_transform,
    redis_prefix,
)

SESSION, SOURCE = "01jdabcdefghjkmnpqrstvwxyz", "01jdabcdefghjkmnpqrstvwxy0"
HOSTILE = st.text(string.printable + "é\u202e*>.", max_size=40)


def test_new_ids_match_the_pattern_and_sort_by_time() -> None:
    ids = [new_id() for _ in range(100)]
    assert all(ID_PATTERN.match(value) for value in ids)
    assert len(set(ids)) == 100
    assert [value[:10] for value in ids] == sorted(value[:10] for value in ids)


@given(HOSTILE)
def test_subjects_take_only_ids(text: str) -> None:
    builders: list[Callable[[], str]] = [
        lambda: event_subject("default", text, SOURCE),
        lambda: event_subject("default", SESSION, text),
        lambda: live_subject("default", text),
        lambda: redis_prefix(3, "default", text),
    ]
    for build in builders:
        if ID_PATTERN.match(text):
            assert re.fullmatch(r"[a-z0-9.:{}-]+", build())
        else:
            with pytest.raises(InvalidInputError):
                build()


@given(HOSTILE)
def test_a_tenant_is_a_plain_name_or_refused(text: str) -> None:
    if re.fullmatch(r"[a-z][a-z0-9-]{0,31}", text):
        assert open_session_subject(text) == f"moe.v1.ctl.{text}.open_session"
    else:
        with pytest.raises(InvalidInputError, match="tenant"):
            check_tenant(text)


def test_a_trailing_newline_is_not_an_id() -> None:
    with pytest.raises(InvalidInputError, match="session_id"):
        check_id(SESSION + "\n", "session_id")


def test_a_stored_subject_reads_back() -> None:
    stored = parse_stored_subject(f"moe.v1.ev.11.default.{SESSION}.{SOURCE}")
    assert (stored.partition, stored.tenant, stored.session_id, stored.source_id) == (11, "default", SESSION, SOURCE)


@pytest.mark.parametrize("subject", ["", "moe.v1.ev", f"moe.v1.ev.x.default.{SESSION}.{SOURCE}", "moe.v1.ev.1.a.b.c"])
def test_a_foreign_subject_is_refused(subject: str) -> None:
    with pytest.raises(WireFormatError):
        parse_stored_subject(subject)


def test_keys_of_a_partition_share_a_slot() -> None:
    assert redis_prefix(5, "default", SESSION) == f"moe:1:{{p5}}:default:{SESSION}:"
    assert redis_prefix(5) == "moe:1:{p5}:"


def test_the_transform_hashes_tenant_session_and_source() -> None:
    source, destination = partition_transform(16)
    assert source == "moe.v1.ev.*.*.*"
    assert destination == "moe.v1.ev.{{partition(16,1,2,3)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}"
