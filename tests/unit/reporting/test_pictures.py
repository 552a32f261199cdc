"""The numbers of pictures against plain loops over the rows."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from reported import Ids, forwards, infos, material, sampled

from moe_debugger.reporting.content import Bars, Heatmap, Lines, Matrix, Picture
from moe_debugger.reporting.material import Material
from moe_debugger.reporting.pictures import pictures
from moe_debugger.reporting.step_series import LayerSteps

SHAPE = (6, 2)


def _choices(num: int = 12, tokens: int = 40) -> list[list[Ids]]:
    made = []
    for r in range(num):
        first = sampled(r, tokens, SHAPE, preference=np.array([1.0, 0, 0, 0, 0, -9]))
        # The second layer follows the first: experts one further.
        made.append([first, (first + 1) % 6])
    return made


@pytest.fixture(scope="module")
def choices() -> list[list[Ids]]:
    return _choices()


@pytest.fixture(scope="module")
def drawn(choices: list[list[Ids]]) -> dict[str, Picture]:
    found = material(forwards(choices, [6, 6]), infos(SHAPE, SHAPE))
    assert found.state is not None
    steps = {i: LayerSteps.of(layer.load_series) for i, layer in found.state.layers.items() if layer.load_series}
    return {
        each.key: each for each in pictures(_with(found, steps=steps), {token: f"text {token}" for token in range(50)})
    }


def _with(found: Material, **changes: Any) -> Material:
    return Material(**{**{name: getattr(found, name) for name in found.__dataclass_fields__}, **changes})


def test_load_is_the_count_over_the_fair_share(drawn: dict[str, Picture], choices: list[list[Ids]]) -> None:
    data = drawn["load"].data
    assert isinstance(data, Heatmap)
    for index in range(2):
        counts = Counter(int(e) for layers in choices for row in layers[index] for e in row)
        expected = [round(6 * counts[e] / counts.total(), 4) for e in range(6)]
        assert data.rows[index].values == pytest.approx(expected, abs=1e-4)
    table = drawn["load"].table
    assert table is not None
    assert [row[1:] for row in table.rows] == [pytest.approx(row.values, abs=1e-3) for row in data.rows]


def test_effective_experts_over_steps(drawn: dict[str, Picture], choices: list[list[Ids]]) -> None:
    data = drawn["over_steps"].data
    assert isinstance(data, Lines)
    # 16 tokens for each of 6 experts: three requests of 40 tokens make one point.
    groups = [choices[at : at + 3] for at in range(0, 12, 3)]
    for index, line in enumerate(data.lines):
        expected = []
        for group in groups:
            counts = Counter(int(e) for layers in group for row in layers[index] for e in row)
            shares = [count / counts.total() for count in counts.values()]
            expected.append(math.exp(-sum(p * math.log(p) for p in shares)) / 6)
        assert line.x == [0, 3, 6, 9]
        assert line.y == pytest.approx(expected, abs=1e-4)


def test_lorenz_curves_are_shares_of_the_least_loaded(drawn: dict[str, Picture], choices: list[list[Ids]]) -> None:
    data = drawn["lorenz"].data
    assert isinstance(data, Lines)
    counts = Counter(int(e) for layers in choices for row in layers[0] for e in row)
    shares = sorted(counts[e] / counts.total() for e in range(6))
    assert data.lines[0].y == pytest.approx([0, *itertools.accumulate(shares)], abs=1e-4)
    assert data.lines[-1].name == "even"


def test_coactivation_and_transitions_are_counted_one_by_one(
    drawn: dict[str, Picture], choices: list[list[Ids]]
) -> None:
    tokens = [[set(map(int, row)) for layers in choices for row in layers[index]] for index in range(2)]
    total = len(tokens[0])
    data = drawn["coactivation"].data
    assert isinstance(data, Matrix)
    index = int(data.row_title.rsplit(" ", 1)[1])
    single = Counter(e for experts in tokens[index] for e in experts)
    for i, j in itertools.product(range(6), range(6)):
        value = data.values[i][j]
        if i == j or not single[i] or not single[j]:
            assert value is None
            continue
        both = sum({i, j} <= experts for experts in tokens[index])
        assert value == pytest.approx(both * total / (single[i] * single[j]), abs=1e-3)
    steps = drawn["transitions"].data
    assert isinstance(steps, Matrix)
    first, second = (Counter(e for experts in each for e in experts) for each in tokens)
    for i, j in itertools.product(range(6), range(6)):
        both = sum(i in a and j in b for a, b in zip(*tokens, strict=True))
        if first[i] and second[j]:
            assert steps.values[i][j] == pytest.approx(both * total / (first[i] * second[j]), abs=1e-3)
    table = drawn["transitions"].table
    assert table is not None
    assert table.rows[0][0] == "0 → 1"
    follows = [(row[1], row[2]) for row in table.rows[:5]]
    assert all((int(str(b)[1:]) - int(str(a)[1:])) % 6 == 1 for a, b in follows)


def test_tokens_stand_with_their_text_and_how_often_they_occur(drawn: dict[str, Picture]) -> None:
    table = drawn["tokens"].table
    assert table is not None
    cells = [str(cell) for row in table.rows for cell in row if cell is not None]
    known = [int(cell.split("'text ")[1].split("'")[0]) for cell in cells if "'text " in cell]
    assert known
    assert max(known) < 50
    # Ids without a text stand alone.
    assert any(cell.split(" ")[0].isdigit() and int(cell.split(" ")[0]) >= 50 for cell in cells if "(n " in cell)


def test_drops_stand_by_position_and_are_not_applicable_without_any(
    drawn: dict[str, Picture], choices: list[list[Ids]]
) -> None:
    assert drawn["drops"].data is None
    assert "dropless" in str(drawn["drops"].why_not)
    batches = forwards(choices, [6, 6])
    for batch in batches:
        for layer in batch.layers:
            status = np.ones((40, 2), np.uint8)
            status[20:, 1] = 2
            layer.expert_ids[20:, 1] = -1
            layer.slot_status = status
    data = {each.key: each for each in pictures(material(batches, infos(SHAPE, SHAPE)))}["drops"].data
    assert isinstance(data, Bars)
    # Positions 0–15 drop nothing; of 16–39, 20 of 24 tokens drop one of two slots.
    assert data.names[:2] == ["0–15", "16–63"]
    assert data.values[:2] == pytest.approx([0, 20 / 48])


def test_a_large_model_has_a_short_table_and_all_in_json() -> None:
    layers = infos(*[(256, 8)] * 3)
    choices = [[sampled(r + 5 * i, 30, (256, 8)) for i in range(3)] for r in range(2)]
    drawn = {each.key: each for each in pictures(material(forwards(choices, [256] * 3), layers))}
    table, data = drawn["load"].table, drawn["load"].data
    assert table is not None
    assert isinstance(data, Heatmap)
    assert len(table.rows) == 3
    assert table.note is not None
    assert [len(row.values) for row in data.rows] == [256] * 3
    matrix = drawn["coactivation"].data
    assert matrix is None or (isinstance(matrix, Matrix) and len(matrix.row_names) <= 16)
