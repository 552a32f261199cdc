"""Rows of two recordings matched by document, position and layer, with an account of what did not match.

Every row of a compared layer is exactly one of these, in each recording:

    matched         the other recording has the same document, position and layer once, and the same text up to there.
    other text      matched, but the token ids differ here or at an earlier position of the document: from there on the
                    same position is not the same token in the same context.
    ambiguous       document, position and layer occur more than once, here or in the other recording.
    alone           the other recording has no such row.
    no document     the row names no document.

Positions are taken as those of one stack: name the layers of the encoder or of the decoder where a model has both.

Example: request "r" at positions 0, 1, 2 with tokens 5, 6, 7 against 5, 9, 7: position 0 matches, 1 and 2 are other
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.row_set import RowSet, comparable_layers
from moe_debugger.analysis.state import LayerShape
from moe_debugger.errors import InvalidInputError

__all__ = ["AlignedLayer", "Alignment", "Unmatched", "align"]

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Rows of one layer of one recording that were not matched, by reason."""

    num_other_text: int
    num_ambiguous: int
    num_alone: int
    num_no_document: int


@dataclass(frozen=True, slots=True, eq=False)
class AlignedLayer:
    """The m matched rows of one layer, by document and position.

    Attributes:
        shape: E, k and Z.
        rows_a, rows_b: [m] int64, rows of each `RowSet`.
        document: [m] int64 into `Alignment.documents`; position: [m] int64.
        num_chosen_a, num_chosen_b: [m] int64, |A| and |B|: different experts of the token, identity experts among them.
        num_shared: [m] int64, |A and B|. The order of slots does not count.
        unmatched_a, unmatched_b: the rest.
    """

    shape: LayerShape
    rows_a: _Ints
    rows_b: _Ints
    document: _Ints
    position: _Ints
    num_chosen_a: _Ints
    num_chosen_b: _Ints
    num_shared: _Ints
    unmatched_a: Unmatched
    unmatched_b: Unmatched

    @property
    def num_tokens(self) -> int:
        """Matched tokens."""
        return len(self.rows_a)


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The matched rows of two recordings.

    Attributes:
        a, b: the recordings.
        layers: by layer index.
        documents: names of the documents of either.
        documents_only_a, documents_only_b: names of documents that only one has.
        is_text_checked: whether both have the token id of every row, so that it is known that the tokens are the same.
    """

    a: RowSet
    b: RowSet
    layers: dict[int, AlignedLayer]
    documents: tuple[str, ...]
    documents_only_a: tuple[str, ...]
    documents_only_b: tuple[str, ...]
    is_text_checked: bool

    @property
    def num_rows(self) -> int:
        """Matched rows of all layers."""
        return sum(layer.num_tokens for layer in self.layers.values())

    def account(self) -> tuple[str, ...]:
        """Return what did not match and what is not known, one sentence each; nothing where all matched."""
        said = []
        for name, only in (("first", self.documents_only_a), ("second", self.documents_only_b)):
            if only:
                said.append(f"{len(only)} documents are in the {name} recording only, such as {only[0]!r}")
        for name, of_layers in (
            ("first", [layer.unmatched_a for layer in self.layers.values()]),
            ("second", [layer.unmatched_b for layer in self.layers.values()]),
        ):
            for attribute, text in _REASONS.items():
                if num := sum(getattr(unmatched, attribute) for unmatched in of_layers):
                    said.append(f"{num} rows of the {name} recording: {text}")
        if not self.is_text_checked:
            said.append("token ids were not captured in both: that the text is the same was not checked")
        return tuple(said)

    def require_rows(self) -> None:
        """Raise InvalidInputError where nothing matched: there is nothing to compare token by token."""
        if not self.num_rows:
            raise InvalidInputError(
                "no row has a counterpart in the other recording: "
                + "; ".join(self.account() or ("all rows are padding",))
            )


_REASONS = {
    "num_other_text": "the text differs there or before",
    "num_ambiguous": "their document and position occur more than once (choose one step or one forward)",
    "num_alone": "the other recording has no such document and position",
    "num_no_document": "they name no document",
}


def align(a: RowSet, b: RowSet, *, layers: Sequence[int] | None = None) -> Alignment:
    """Match the rows of two recordings; O(n log n).

    Args:
        a: rows of one recording.
        b: rows of the other, of the same model (another checkpoint, engine or precision).
        layers: the layers to match; None = all.

    Raises:
        InvalidInputError: the recordings are not comparable (see `comparable_layers`), or have no positions.
    """
    wanted = comparable_layers(a, b, layers)
    if a.position is None or b.position is None:
        raise InvalidInputError("rows cannot be matched: the column `position` is missing")
    documents = tuple(sorted({*a.documents, *b.documents}))
    codes = {name: index for index, name in enumerate(documents)}
    code_a, code_b = _recode(a, codes), _recode(b, codes)
    span = int(max(a.position.max(initial=0), b.position.max(initial=0))) + 1
    key_a, key_b = code_a * span + a.position, code_b * span + b.position
    pairs = {
        i: _match(key_a[a.bounds[i]], code_a[a.bounds[i]] >= 0, key_b[b.bounds[i]], code_b[b.bounds[i]] >= 0)
        for i in wanted
    }
    rows = {i: (pair.in_a + a.bounds[i].start, pair.in_b + b.bounds[i].start) for i, pair in pairs.items()}
    # By document: where its text begins to differ.
    first_other = np.full(len(documents), np.iinfo(np.int64).max)
    if a.token_id is not None and b.token_id is not None:
        for rows_a, rows_b in rows.values():
            token_a, token_b = a.token_id[rows_a], b.token_id[rows_b]
            is_other = (token_a != token_b) & (token_a >= 0) & (token_b >= 0)
            np.minimum.at(first_other, code_a[rows_a[is_other]], a.position[rows_a[is_other]])
    layers_of = {}
    for i, (rows_a, rows_b) in rows.items():
        is_same = a.position[rows_a] < first_other[code_a[rows_a]]
        num_other = int(np.count_nonzero(~is_same))
        rows_a, rows_b = rows_a[is_same], rows_b[is_same]
        sets_a, sets_b = _as_sets(a.expert_ids[rows_a]), _as_sets(b.expert_ids[rows_b])
        layers_of[i] = AlignedLayer(
            shape=a.shapes[i],
            rows_a=rows_a,
            rows_b=rows_b,
            document=code_a[rows_a],
            position=a.position[rows_a],
            num_chosen_a=(sets_a >= 0).sum(axis=1),
            num_chosen_b=(sets_b >= 0).sum(axis=1),
            num_shared=_num_shared(sets_a, sets_b),
            unmatched_a=Unmatched(num_other, *pairs[i].unmatched_a),
            unmatched_b=Unmatched(num_other, *pairs[i].unmatched_b),
        )
    return Alignment(
        a=a,
        b=b,
        layers=layers_of,
        documents=documents,
        documents_only_a=tuple(sorted(set(a.documents) - set(b.documents))),
        documents_only_b=tuple(sorted(set(b.documents) - set(a.documents))),
        is_text_checked=_is_known(a.token_id) and _is_known(b.token_id),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Matched places in both, by key, and how many are ambiguous, alone and of no document in each."""

    in_a: _Ints
    in_b: _Ints
    unmatched_a: tuple[int, int, int]
    unmatched_b: tuple[int, int, int]


def _is_known(token_id: _Ints | None) -> bool:
    return token_id is not None and bool((token_id >= 0).all())


def _recode(rows: RowSet, codes: dict[str, int]) -> _Ints:
    # The last entry is that of rows without a document, whose index is -1.
    code: _Ints = np.array([codes[name] for name in rows.documents] + [-1], np.int64)[rows.document]
    return code


def _match(key_a: _Ints, is_named_a: npt.NDArray[np.bool_], key_b: _Ints, is_named_b: npt.NDArray[np.bool_]) -> _Pairs:
    named_a, named_b = np.flatnonzero(is_named_a), np.flatnonzero(is_named_b)
    unique_a, first_a, times_a = np.unique(key_a[named_a], return_index=True, return_counts=True)
    unique_b, first_b, times_b = np.unique(key_b[named_b], return_index=True, return_counts=True)
    _, at_a, at_b = np.intersect1d(unique_a, unique_b, assume_unique=True, return_indices=True)
    is_matched = (times_a[at_a] == 1) & (times_b[at_b] == 1)

    def unmatched(is_named: npt.NDArray[np.bool_], times: _Ints, at: _Ints) -> tuple[int, int, int]:
        is_common = np.zeros(len(times), np.bool_)
        is_common[at] = True
        alone = int(np.count_nonzero((times == 1) & ~is_common))
        named = int(np.count_nonzero(is_named))
        return named - alone - int(np.count_nonzero(is_matched)), alone, len(is_named) - named

    return _Pairs(
        in_a=named_a[first_a[at_a[is_matched]]],
        in_b=named_b[first_b[at_b[is_matched]]],
        unmatched_a=unmatched(is_named_a, times_a, at_a),
        unmatched_b=unmatched(is_named_b, times_b, at_b),
    )


def _as_sets(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return each row's ids sorted, with -1 for a repeated one."""
    sets = np.sort(ids, axis=1)
    sets[:, 1:][sets[:, 1:] == sets[:, :-1]] = -1
    return sets


def _num_shared(sets_a: npt.NDArray[np.int32], sets_b: npt.NDArray[np.int32]) -> _Ints:
    """Return how many ids each row has in both sets: neighbours in the sorted union of two sets are equal once each."""
    both = np.sort(np.concatenate([sets_a, sets_b], axis=1), axis=1)
    shared: _Ints = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(axis=1)
    return shared
