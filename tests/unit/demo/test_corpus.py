"""The demo's texts: the same bytes each time, four kinds, nothing held out is trained on."""

import json
import random
import re

from moe_debugger.demo.corpus import KINDS, Corpus, build_corpus


def test_corpus_is_the_same_bytes_each_time(held_out: Corpus) -> None:
    assert build_corpus("held_out").texts == held_out.texts


def test_corpus_has_other_generated_texts_for_another_seed_and_the_same_collected_ones(held_out: Corpus) -> None:
    other = build_corpus("held_out", seed=1)
    assert {kind for kind in KINDS if other.texts[kind] != held_out.texts[kind]} == {"numbers", "structured"}


def test_splits_share_no_code_and_no_prose(held_out: Corpus) -> None:
    train = build_corpus("train")
    prose = set(held_out.texts["prose"].split(b"\n\n"))
    # Some sentences of the standard library's docstrings are copies of each other.
    assert len(prose & set(train.texts["prose"].split(b"\n\n"))) < len(prose) / 10
    definitions = {line for line in held_out.texts["code"].split(b"\n") if len(line) > 60}
    assert len(definitions & set(train.texts["code"].split(b"\n"))) < len(definitions) / 20


def test_sums_are_right(held_out: Corpus) -> None:
    sums = re.findall(rb"^(\d+) \+ (\d+) = (\d+)$", held_out.texts["numbers"], flags=re.MULTILINE)
    assert len(sums) > 100
    assert all(int(left) + int(right) == int(total) for left, right, total in sums)


def test_structured_lines_parse_as_json(held_out: Corpus) -> None:
    lines = [
        line for line in held_out.texts["structured"].split(b"\n") if line.startswith(b"{") and line.endswith(b"}")
    ]
    assert len(lines) > 50
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_window_comes_from_its_kind_and_has_the_length(held_out: Corpus) -> None:
    window = held_out.window("prose", 64, random.Random(3))
    assert len(window) == 64
    assert window in held_out.texts["prose"]
