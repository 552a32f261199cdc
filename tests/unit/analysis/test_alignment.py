"""Matched rows against a dictionary of keys, and what is refused."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import RoutingState, RowSet, align
from moe_debugger.errors import InvalidInputError

SIZES: Any = {"num_experts": 4, "top_k": 2}
Row = tuple[int, str, int, int, list[int], bool]  # layer, document, position, token, experts, padding


def columns_of(rows: list[Row]) -> dict[str, Any]:
    layer, document, position, token, experts, padding = zip(*rows, strict=True)
    return {
        "layer_index": np.array(layer),
        "request_id": np.array([name or None for name in document], object),
        "position": np.array(position, np.uint32),
        "token_id": np.array(token),
        "expert_ids": np.array(experts, np.int32),
        "is_padding": np.array(padding),
    }


ROW = st.tuples(
    st.integers(0, 1),
    st.sampled_from(["", "a", "b", "c"]),
    st.integers(0, 3),
    st.sampled_from([7, 7, 7, 8, -1]),
    st.lists(st.integers(-1, 3), min_size=2, max_size=2),
    st.booleans(),
)
# Both layers are always there.
ROWS = st.lists(ROW, max_size=30).map(
    lambda rows: [(0, "a", 0, 7, [0, 1], False), (1, "a", 0, 7, [0, 1], False), *rows]
)


@settings(max_examples=80, deadline=None)
@given(first=ROWS, second=ROWS)
def test_align_equals_a_dictionary_of_keys(first: list[Row], second: list[Row]) -> None:
    alignment = align(RowSet.of(columns_of(first), **SIZES), RowSet.of(columns_of(second), **SIZES))
    keys = [Counter((r[0], r[1], r[2]) for r in rows if r[1] and not r[5]) for rows in (first, second)]
    places = [{(r[0], r[1], r[2]): i for i, r in enumerate(rows) if r[1] and not r[5]} for rows in (first, second)]
    pairs = {key for key in keys[0] if keys[0][key] == 1 and keys[1][key] == 1}
    begins_to_differ: dict[str, int] = {}
    for _, document, position in pairs:
        tokens = {
            (first[places[0][key]][3], second[places[1][key]][3]) for key in pairs if key[1:] == (document, position)
        }
        if any(a != b and a >= 0 and b >= 0 for a, b in tokens):
            begins_to_differ[document] = min(position, begins_to_differ.get(document, position))
    for layer_index, layer in alignment.layers.items():
        expected = {
            (document, position): (places[0][index, document, position], places[1][index, document, position])
            for index, document, position in pairs
            if index == layer_index and position < begins_to_differ.get(document, 99)
        }
        got = {
            (alignment.documents[d], int(p)): (int(alignment.a.row[i]), int(alignment.b.row[j]))
            for d, p, i, j in zip(layer.document, layer.position, layer.rows_a, layer.rows_b, strict=True)
        }
        assert got == expected
        sets = [
            [{e for e in rows[i[side]][4] if e >= 0} for i in got.values()] for side, rows in ((0, first), (1, second))
        ]
        assert layer.num_chosen_a.tolist() == [len(x) for x in sets[0]]
        assert layer.num_chosen_b.tolist() == [len(x) for x in sets[1]]
        assert layer.num_shared.tolist() == [len(x & y) for x, y in zip(*sets, strict=True)]
        for own, other, rows, unmatched in (
            (keys[0], keys[1], first, layer.unmatched_a),
            (keys[1], keys[0], second, layer.unmatched_b),
        ):
            of_layer = [r for r in rows if r[0] == layer_index and not r[5]]
            named = [(r[0], r[1], r[2]) for r in of_layer if r[1]]
            assert unmatched.num_no_document == len(of_layer) - len(named)
            assert unmatched.num_alone == sum(own[key] == 1 and not other[key] for key in named)
            assert unmatched.num_ambiguous == sum(own[key] > 1 or other[key] > 1 for key in named)
            assert unmatched.num_other_text == sum(key[0] == layer_index for key in pairs) - len(expected)
            # Every row has exactly one fate.
            fates = (unmatched.num_no_document, unmatched.num_alone, unmatched.num_ambiguous, unmatched.num_other_text)
            assert layer.num_tokens + sum(fates) == len(of_layer)


def test_align_takes_text_as_other_from_its_first_other_token() -> None:
    first = [(0, "r", position, token, [0, 1], False) for position, token in enumerate((5, 6, 7))]
    second = [(0, "r", position, token, [1, 0], False) for position, token in enumerate((5, 9, 7))]
    alignment = align(RowSet.of(columns_of(first), **SIZES), RowSet.of(columns_of(second), **SIZES))
    assert alignment.layers[0].position.tolist() == [0]
    assert alignment.layers[0].unmatched_a.num_other_text == 2
    assert alignment.account() == (
        "2 rows of the first recording: the text differs there or before",
        "2 rows of the second recording: the text differs there or before",
    )


@pytest.mark.parametrize("unknown", [0, 1])
def test_align_takes_a_token_that_is_not_known_for_no_other_text(unknown: int) -> None:
    texts = [[5, 6, 7], [5, 6, 7]]
    texts[unknown][1] = -1
    sets = [
        RowSet.of(
            columns_of([(0, "r", position, token, [0, 1], False) for position, token in enumerate(text)]), **SIZES
        )
        for text in texts
    ]
    alignment = align(*sets)
    assert alignment.layers[0].position.tolist() == [0, 1, 2]
    assert not alignment.is_text_checked


def test_align_says_what_only_one_has_and_what_was_not_checked() -> None:
    rows = columns_of([(0, "a", 0, -1, [0, 1], False), (0, "b", 0, -1, [0, 1], False)])
    other = columns_of([(0, "a", 0, 3, [0, 1], False)])
    alignment = align(RowSet.of(rows, **SIZES), RowSet.of(other, **SIZES))
    assert alignment.documents_only_a == ("b",)
    assert not alignment.is_text_checked
    assert alignment.account() == (
        "1 documents are in the first recording only, such as 'b'",
        "1 rows of the first recording: the other recording has no such document and position",
        "token ids were not captured in both: that the text is the same was not checked",
    )
    nothing = columns_of([(0, "c", 0, 3, [0, 1], False)])
    with pytest.raises(InvalidInputError, match="no row has a counterpart"):
        align(RowSet.of(rows, **SIZES), RowSet.of(nothing, **SIZES)).require_rows()


def test_align_matches_documents_by_a_column_of_choice() -> None:
    rows = columns_of([(0, "minted 1", 0, 5, [0, 1], False)]) | {"text": ["wiki/3"]}
    other = columns_of([(0, "minted 2", 0, 5, [0, 1], False)]) | {"text": ["wiki/3"]}
    sets = [RowSet.of(columns, **SIZES, document_column="text") for columns in (rows, other)]
    assert align(*sets).num_rows == 1


def test_align_refuses_other_models_and_layers() -> None:
    columns = columns_of([(layer, "a", 0, 5, [0, 1], False) for layer in range(2)])
    rows = RowSet.of(columns, **SIZES)
    sizes: Any
    for sizes in ({"num_experts": 8, "top_k": 2}, {"num_experts": 4, "top_k": [2, 3], "num_identity_experts": 1}):
        wide = columns | {"expert_ids": np.array([[0, 1, -1], [0, 1, -1]])}
        with pytest.raises(InvalidInputError, match="different models"):
            align(rows, RowSet.of(wide, **sizes))
    one_layer = RowSet.of(columns_of([(0, "a", 0, 5, [0, 1], False)]), **SIZES)
    with pytest.raises(InvalidInputError, match=r"the first has no rows of layers \[\], the second none of \[1\]"):
        align(rows, one_layer)
    assert align(rows, one_layer, layers=[0]).num_rows == 1
    no_positions = RowSet.of({name: columns[name] for name in ("layer_index", "expert_ids", "request_id")}, **SIZES)
    with pytest.raises(InvalidInputError, match="`position` is missing"):
        align(rows, no_positions)


def test_row_set_refuses_what_are_no_rows() -> None:
    with pytest.raises(InvalidInputError, match="needs rows"):
        RowSet.of(RoutingState({}), **SIZES)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="needs rows"):
        align(RoutingState({}), RoutingState({}))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="expected 0 to 3, or -1"):
        RowSet.of({"layer_index": [0], "expert_ids": [[0, 4]]}, **SIZES)
    with pytest.raises(InvalidInputError, match="expected top_k = 2"):
        RowSet.of({"layer_index": [0], "expert_ids": [[0, 1, 2]]}, **SIZES)
    with pytest.raises(InvalidInputError, match="other lengths"):
        RowSet.of({"layer_index": [0], "expert_ids": [[0, 1]], "position": [0, 1]}, **SIZES)
    with pytest.raises(InvalidInputError, match="no column"):
        RowSet.of({"layer_index": [0]}, **SIZES)


def test_row_set_keeps_training_steps_apart_as_units_but_not_as_documents() -> None:
    rows = RowSet.of(
        {
            "layer_index": [0] * 4,
            "expert_ids": [[0, 1], [0, 2], [3, 1], [0, 1]],
            "request_id": ["row 0", "row 0", "row 1", "r"],
            "phase": [3, 3, 3, 2],
            "step": [4, 5, 4, 9],
        },
        **SIZES,
    )
    assert rows.documents == ("r", "row 0", "row 1")
    assert rows.units == ("r", "row 0 @ step 4", "row 0 @ step 5", "row 1 @ step 4")
    assert rows.unit.tolist() == [1, 2, 3, 0]
    assert rows.unit_loads(0).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_a_layer_that_is_all_padding_has_no_rows_to_compare() -> None:
    rows = {
        "layer_index": np.array([0, 0, 1]),
        "expert_ids": np.array([[0, 1], [2, 3], [1, 2]], np.int32),
        "is_padding": np.array([False, True, True]),
        "request_id": ["a", "a", "a"],
        "position": np.array([0, 1, 0]),
    }
    found = RowSet.of(rows, **SIZES)
    assert found.num_padding == {0: 1, 1: 1}
    assert list(found.shapes) == [0]
    assert list(found.padded_shapes) == [1]
    with pytest.raises(InvalidInputError, match=r"no rows of layers \[1\]"):
        align(found, found, layers=[1])
