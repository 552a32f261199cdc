"""Colours as on the page, ticks, and cells that say what they are."""

import math

import pytest

from moe_debugger.reporting.colours import NUM_STEPS, RAMPS, hot_end, ink_on, scale_position, scale_step
from moe_debugger.reporting.content import Bars, Heatmap, HeatmapRow, Line, Lines, Matrix
from moe_debugger.reporting.svg import draw, gauge, ticks


def test_the_scale_is_neutral_at_the_fair_share_and_ends_at_an_eighth_and_at_e_over_k() -> None:
    hot = hot_end(256, 8)
    assert hot == 5
    assert scale_position(1, hot) == 0.5
    assert scale_position(1 / 8, hot) == scale_position(1 / 100, hot) == scale_position(0, hot) == 0
    assert scale_position(32, hot) == scale_position(64, hot) == 1
    # Within a factor of two it is quiet.
    assert scale_position(2, hot) == 0.5 + 0.5 * 0.25
    assert scale_position(0.5, hot) == pytest.approx(0.5 - 0.5 / 3)
    assert scale_step(1, hot) == NUM_STEPS // 2
    assert hot_end(8, 8) == 1


def test_ink_reads_on_every_colour() -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ramp in RAMPS.values():
        assert len(ramp) == NUM_STEPS
        for colour in ramp:
            own = luminance(colour)
            ratio = (own + 0.05) / 0.05 if ink_on(colour) == "#000" else 1.05 / (own + 0.05)
            assert ratio >= 4.5, colour


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.0055, [0, 0.002, 0.004]),
        (120, 300, [150, 200, 250, 300]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_cell_says_its_layer_expert_and_load_and_dead_is_a_texture() -> None:
    row = HeatmapRow(layer_index=3, num_experts=4, top_k=1, values=[2.0, 0.0, 1.0, None])
    text = draw(Heatmap(rows=[row]), "<loads>")
    assert "layer 3, E0: 2 times the fair share" in text
    assert 'class="dead"><title>layer 3, E1: 0 times the fair share' in text
    assert 'class="blank"><title>layer 3, E3: not known' in text
    assert f'class="h{NUM_STEPS // 2}"' in text
    assert 'aria-label="&lt;loads&gt;"' in text


def test_many_cells_are_two_pictures_one_for_each_theme() -> None:
    rows = [HeatmapRow(layer_index=i, num_experts=256, top_k=8, values=[0.0] * 256) for i in range(58)]
    text = draw(Heatmap(rows=rows), "")
    assert text.count("<image ") == 2
    assert 'class="only-light"' in text
    assert 'class="only-dark"' in text
    assert len(text) < 60_000


def test_lines_break_where_nothing_is_known_and_names_do_not_lie_on_each_other() -> None:
    lines = [
        Line(name="a", x=[0, 1, 2, 3], y=[0.5, None, 0.5, 0.6], is_named=True),
        Line(name="b", x=[0, 1, 2, 3], y=[0.5, 0.5, 0.5, 0.6], is_named=True),
    ]
    text = draw(Lines(x_title="x", y_title="y", lines=lines), "")
    path = text.split('<path class="line c0" d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert path.count("L") == 1
    places = [float(part.split('y="')[1].split('"')[0]) for part in text.split("<text ") if 'class="name' in part]
    assert abs(places[0] - places[1]) >= 12


def test_a_matrix_and_bars_without_a_value_are_drawn() -> None:
    matrix = Matrix(
        row_title="r", column_title="c", row_names=["E0"], column_names=["E0", "E1"], values=[[None, 123.4]]
    )
    assert ">123<" in draw(matrix, "")
    bars = Bars(y_title="share", names=["0–15", "16–63"], values=[0.5, None], lower=[0.4, None], upper=[0.6, None])
    assert draw(bars, "").count('class="whisker"') == 1


def test_a_gauge_shows_its_number_or_that_there_is_none() -> None:
    assert ">74<" in gauge(74.4, "fair")
    assert "arc" not in gauge(None, "none")
    assert ">–<" in gauge(None, "none")
    length = 2 * math.pi * (96 / 2 - 6)
    assert f'stroke-dasharray="{length / 2:.2f} ' in gauge(50, "fair")
