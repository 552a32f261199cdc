"""Domain and vocabulary specialisation against loops over tokens."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_debugger.analysis import RowSet, domain_specialisation, specialisation, vocabulary_specialisation
from moe_debugger.analysis.intervals import student_quantile
from moe_debugger.errors import InvalidInputError


def rows_of(ids: Any, **columns: Any) -> RowSet:
    ids = np.asarray(ids, np.int32)
    given_columns = {"layer_index": np.zeros(len(ids), np.int64), "expert_ids": ids, **columns}
    return RowSet.of(given_columns, num_experts=3, top_k=ids.shape[1], num_identity_experts=1)


def test_specialisation_equals_the_hand_worked_example() -> None:
    rows = rows_of([[0], [0], [0], [1], [1], [1]], workload=["code"] * 4 + ["prose"] * 2, token_id=[7, 5, 5, 5, 6, 6])
    domains = domain_specialisation(rows)[0]
    assert domains.labels == ("code", "prose")
    assert domains.rate.tolist() == [[0.75, 0.25, 0], [0, 1, 0]]
    assert domains.num_tokens.tolist() == [4, 2]
    assert domains.chance == 0.25
    vocabulary = vocabulary_specialisation(rows, prior_tokens=10)[0]
    assert vocabulary.token_id.tolist() == [5, 5, 6, 7]
    assert vocabulary.expert_id.tolist() == [0, 1, 1, 0]
    assert vocabulary.rate.tolist() == pytest.approx([2 / 3, 1 / 3, 1, 1])
    assert vocabulary.num_tokens.tolist() == [3, 3, 2, 1]
    assert vocabulary.shrunk_rate[-1] == pytest.approx((1 + 10 * 0.5) / 11)
    # One token more counts for less than two thirds of three.
    assert [token for token, _, _ in vocabulary.top_tokens(0)] == [7, 5]
    [(token, shrunk, num)] = vocabulary.top_tokens(1, 1)
    assert (token, num) == (6, 2)
    assert shrunk == pytest.approx((2 + 5) / 12)


TOKEN = st.tuples(
    st.lists(st.integers(-1, 3), min_size=2, max_size=2),
    st.sampled_from(["x", "y", None]),
    st.integers(-1, 3),
    st.sampled_from(["a", "b", "c", "d", "e", "f"]),
    st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(TOKEN, max_size=40), prior=st.floats(0.5, 20))
def test_specialisation_equals_loops(tokens: list[Any], prior: float) -> None:
    tokens = [([0, 1], "x", 0, "a", False), *tokens]
    ids, labels, token_ids, documents, padding = zip(*tokens, strict=True)
    rows = rows_of(
        ids,
        workload=np.array(labels, object),
        token_id=token_ids,
        request_id=documents,
        is_padding=np.array(padding),
    )
    valid = [token for token in tokens if not token[4]]
    domains = domain_specialisation(rows)[0]
    assert domains.num_unlabelled == sum(token[1] is None for token in valid)
    for d, label in enumerate(domains.labels):
        of_label = [token for token in valid if token[1] == label]
        assert domains.num_tokens[d] == len(of_label)
        names = {token[3] for token in of_label}
        assert domains.num_documents[d] == len(names)
        sizes = [sum(token[3] == name for token in of_label) for name in names]
        for e in range(3):
            rate = sum(e in token[0] for token in of_label) / len(of_label)
            assert domains.rate[d, e] == pytest.approx(rate)
            if sum(sizes) ** 2 / sum(size**2 for size in sizes) < 4:
                assert np.isnan(domains.half_width[d, e])
                continue
            residuals = [sum((e in t[0]) - rate for t in of_label if t[3] == name) for name in names]
            error = (len(names) / (len(names) - 1) * sum(r * r for r in residuals)) ** 0.5 / len(of_label)
            quantile = student_quantile(sum(sizes) ** 2 / sum(size**2 for size in sizes) - 1)
            assert domains.half_width[d, e] == pytest.approx(quantile * error)
    vocabulary = vocabulary_specialisation(rows, prior_tokens=prior)[0]
    known = [token for token in valid if token[2] >= 0]
    assert vocabulary.num_unknown == len(valid) - len(known)
    expected = {}
    for x in range(4):
        of_token = [token for token in known if token[2] == x]
        for e in range(3):
            together = sum(e in token[0] for token in of_token)
            overall = sum(e in token[0] for token in known) / len(known)
            if together:
                n = len(of_token)
                expected[x, e] = (together, n, together / n, (together + prior * overall) / (n + prior))
    v = vocabulary
    columns = zip(v.token_id, v.expert_id, v.num_together, v.num_tokens, v.rate, v.shrunk_rate, strict=True)
    got = {(int(x), int(e)): tuple(values) for x, e, *values in columns}
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        assert got[key] == pytest.approx(values)


def test_pairs_that_occur_are_counted_alike_with_and_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((200, 3)), axis=1)[:, :2]
    rows = rows_of(ids, token_id=rng.integers(0, 50, 200))
    by_table = vocabulary_specialisation(rows)[0]
    monkeypatch.setattr(specialisation, "_MAX_TABLE_RATIO", 0)
    sorted_out = vocabulary_specialisation(rows)[0]
    assert by_table.num_together.sum() == 400
    for name in ("token_id", "expert_id", "num_together", "num_tokens"):
        assert getattr(sorted_out, name).tolist() == getattr(by_table, name).tolist()


def test_domain_rates_sum_to_k_and_intervals_cover_documents_that_differ() -> None:
    rng = np.random.default_rng(0)
    num_documents, length = 40, 50
    covered = 0
    for _ in range(200):
        # Each document sends a share of its tokens to expert 0: .4 on average.
        share = rng.beta(2, 3, num_documents)
        is_first = rng.random((num_documents, length)) < share[:, None]
        ids = np.where(is_first.ravel(), 0, rng.integers(1, 3, num_documents * length))[:, None]
        rows = rows_of(ids, workload=["w"] * len(ids), request_id=np.repeat(np.arange(num_documents), length))
        result = domain_specialisation(rows)[0]
        assert result.rate.sum() == pytest.approx(1)
        covered += abs(result.rate[0, 0] - 0.4) <= result.half_width[0, 0]
    assert covered >= 178  # 95 % nominal, 190 expected


def test_specialisation_refuses_rows_that_have_no_labels_or_tokens() -> None:
    rows = rows_of([[0]], token_id=[-1])
    with pytest.raises(InvalidInputError, match="column `workload`"):
        domain_specialisation(rows)
    with pytest.raises(InvalidInputError, match="no token ids"):
        vocabulary_specialisation(rows)
    with pytest.raises(InvalidInputError, match="prior_tokens is 0"):
        vocabulary_specialisation(rows_of([[0]], token_id=[1]), prior_tokens=0)
