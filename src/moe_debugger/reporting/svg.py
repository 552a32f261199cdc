"""Draws a report's pictures as SVG. Colours are classes of the page's style, so that they follow the theme.

Every text that goes in is escaped by `Markup.format`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from moe_debugger.reporting import png
from moe_debugger.reporting.colours import NUM_STEPS, RAMPS, hot_end, scale_step
from moe_debugger.reporting.content import Bars, Heatmap, Line, Lines, Matrix, show

__all__ = ["draw", "gauge", "ticks"]

# Beyond so many, cells are pixels of a picture instead of rectangles.
_MAX_RECTANGLES = 1024
_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 76, 12, 40
_NUM_COLOURS = 6
_MATRIX_HOT = 3.0
_BLANK, _HATCH, _GROUND = NUM_STEPS, NUM_STEPS + 1, NUM_STEPS + 2
_HATCHES = {"dark": ((77, 85, 99, 255), (13, 15, 18, 255)), "light": ((141, 151, 166, 255), (255, 255, 255, 255))}


def draw(data: Heatmap | Lines | Matrix | Bars, label: str) -> Markup:
    """Return a picture; `label` is what a screen reader says of it."""
    if isinstance(data, Heatmap):
        return _heatmap(data, label)
    if isinstance(data, Lines):
        return _lines(data, label)
    if isinstance(data, Matrix):
        return _matrix(data, label)
    return _bars(data, label)


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Return about `num` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def gauge(score: float | None, tone: str, size: int = 96) -> Markup:
    """Return a ring filled to `score`, with the number in it; "–" where there is none."""
    radius, centre = size / 2 - 6, size / 2
    length = 2 * math.pi * radius
    arc = Markup("")
    if score is not None and score > 0:
        arc = Markup(
            '<circle class="arc {0}" cx="{1}" cy="{1}" r="{2}" stroke-dasharray="{3:.2f} {4:.2f}" '
            'transform="rotate(-90 {1} {1})"/>'
        ).format(tone, centre, radius, length * score / 100, length)
    return Markup(
        '<svg class="gauge" viewBox="0 0 {0} {0}" width="{0}" height="{0}" aria-hidden="true"><circle class="track" '
        'cx="{1}" cy="{1}" r="{2}"/>{3}<text class="score {5}" x="{1}" y="{1}" dy=".35em">{4}</text></svg>'
    ).format(size, centre, radius, arc, "–" if score is None else f"{score:.0f}", tone)


def _svg(width: float, height: float, label: str, body: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {0:g} {1:g}" role="img" aria-label="{2}">{3}</svg>').format(
        width, height, label, Markup("").join(body)
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, kind, anchor, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> Markup:
    tip = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}">{}</rect>').format(
        x, y, width, height, kind, tip
    )


def _heatmap(data: Heatmap, label: str) -> Markup:
    width = max(len(row.values) for row in data.rows)
    row_height = 26.0 if len(data.rows) <= 8 else 14.0 if len(data.rows) <= 24 else 7.0
    plot_width, top = _WIDTH - 52 - 8, 30
    cell, plot_height = plot_width / width, row_height * len(data.rows)
    hot = data.hot or max(hot_end(row.num_experts, row.top_k) for row in data.rows)
    body = [_legend(hot)]
    if sum(len(row.values) for row in data.rows) <= _MAX_RECTANGLES:
        for at, row in enumerate(data.rows):
            for expert, value in enumerate(row.values):
                kind = "blank" if value is None else "dead" if value == 0 else f"h{scale_step(value, hot)}"
                name = f"layer {row.layer_index}, E{expert}: "
                tip = name + ("not known" if value is None else f"{show(value)} {data.value_name}")
                body.append(_rect(52 + expert * cell, top + at * row_height, cell - 1, row_height - 1, kind, tip))
    else:
        image = Markup(
            '<image class="only-{}" x="52" y="{}" width="{:.1f}" height="{:.1f}" preserveAspectRatio="none" href="{}"/>'
        )
        body += [
            image.format(theme, top, plot_width, plot_height, _raster(data, hot, theme)) for theme in ("light", "dark")
        ]
    every = max(1, math.ceil(12 / row_height), math.ceil(len(data.rows) / 20))
    for at, row in enumerate(data.rows):
        if at % every == 0:
            body.append(_text(46, top + at * row_height + row_height / 2 + 4, f"L{row.layer_index}", "tick", "end"))
    every = max(1, math.ceil(width / 16))
    body += [
        _text(52 + (expert + 0.5) * cell, top + plot_height + 14, f"E{expert}", "tick", "middle")
        for expert in range(0, width, every)
    ]
    return _svg(_WIDTH, top + plot_height + 22, label, body)


def _raster(data: Heatmap, hot: float, theme: str) -> str:
    width = max(len(row.values) for row in data.rows)
    wide, high = max(3, 768 // width), 6
    steps = np.full((len(data.rows), width), _BLANK, np.uint8)
    for at, row in enumerate(data.rows):
        steps[at, : len(row.values)] = [
            _BLANK if value is None else _HATCH if value == 0 else scale_step(value, hot) for value in row.values
        ]
    pixels = np.repeat(np.repeat(steps, high, axis=0), wide, axis=1)
    y, x = np.indices(pixels.shape)
    # Dead is a texture, not a colour.
    pixels[(pixels == _HATCH) & ((x + y) % 4 != 0)] = _GROUND
    hatch, ground = _HATCHES[theme]
    palette = [(*colour, 255) for colour in RAMPS[theme]] + [(0, 0, 0, 0), hatch, ground]
    return png.data_uri(pixels, palette)


def _legend(hot: float) -> Markup:
    width, x0 = 6.0, _WIDTH - 8 - 33 * 6.0
    parts = [_rect(x0 + step * width, 4, width + 0.3, 8, f"h{step}") for step in range(NUM_STEPS)]
    for place, name in ((0.0, "⅛×"), (0.5, "1×"), (1.0, f"{2**hot:.3g}×")):
        anchor = "start" if place == 0 else "end" if place == 1 else "middle"
        parts.append(_text(x0 + place * 33 * width, 23, name, "tick", anchor))
    parts += [_rect(x0 - 70, 4, 14, 8, "dead"), _text(x0 - 52, 12, "none", "tick")]
    return Markup("").join(parts)


def _scales(x_range: tuple[float, float], y_max: float, height: float) -> tuple[float, float, float, float]:
    """Return plot width and height, and the pixels of one unit of x and y."""
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    return plot_width, plot_height, plot_width / max(x_range[1] - x_range[0], 1e-12), plot_height / y_max


def _lines(data: Lines, label: str) -> Markup:
    height = 280.0
    every_x = [x for line in data.lines for x in line.x]
    low, high = min(every_x), max(every_x)
    _, plot_height, per_x, per_y = _scales((low, high), data.y_max, height)
    bottom = _TOP + plot_height

    def at_x(x: float) -> float:
        return _LEFT + (x - low) * per_x

    def at_y(y: float) -> float:
        return bottom - min(max(y, 0.0), data.y_max) * per_y

    body = []
    for y in ticks(0, data.y_max):
        body += [
            _line(_LEFT, at_y(y), _WIDTH - _RIGHT, at_y(y), "grid"),
            _text(_LEFT - 6, at_y(y) + 4, show(y), "tick", "end"),
        ]
    for x in ticks(low, high):
        body.append(_text(at_x(x), bottom + 15, show(x if x != int(x) else int(x)), "tick", "middle"))
    body += [
        _text((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, data.x_title, "axis", "middle"),
        Markup('<text class="axis" text-anchor="middle" transform="translate(12 {:.1f}) rotate(-90)">{}</text>').format(
            _TOP + plot_height / 2, data.y_title
        ),
    ]
    for y, name in data.guides:
        body += [_line(_LEFT, at_y(y), _WIDTH - _RIGHT, at_y(y), "guide"), _text(_LEFT + 4, at_y(y) - 4, name, "tick")]
    ordered = sorted(data.lines, key=lambda line: line.is_named)
    number, labels = 0, []
    for line in ordered:
        kind = "context"
        if line.is_named:
            kind = f"c{number % _NUM_COLOURS}"
            number += 1
            labels.append((at_y(next((y for y in reversed(line.y) if y is not None), 0.0)), line.name, kind))
        body.append(_path(line, at_x, at_y, kind))
    place = -math.inf
    for y, name, kind in sorted(labels):
        # Names do not lie on each other.
        place = max(y + 4, place + 13)
        body.append(_text(_WIDTH - _RIGHT + 6, place, name, f"name {kind}"))
    return _svg(_WIDTH, height, label, body)


def _path(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float], kind: str) -> Markup:
    parts, is_open = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            is_open = False
            continue
        parts.append(f"{'L' if is_open else 'M'}{at_x(x):.1f} {at_y(y):.1f}")
        is_open = True
    return Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(kind, "".join(parts), line.name)


def _matrix(data: Matrix, label: str) -> Markup:
    rows, columns = len(data.row_names), len(data.column_names)
    cell = min(44.0, (_WIDTH - 90) / max(columns, 1))
    high = min(cell, 26.0)
    left, top = 66.0, 44.0
    body = [
        _text(left, 12, f"{data.column_title} →", "axis"),
        Markup('<text class="axis" text-anchor="end" transform="translate(12 {:.1f}) rotate(-90)">{}</text>').format(
            top, f"← {data.row_title}"
        ),
    ]
    for at, name in enumerate(data.column_names):
        body.append(_text(left + (at + 0.5) * cell, top - 6, name, "tick", "middle"))
    for i, name in enumerate(data.row_names):
        y = top + i * high
        body.append(_text(left - 6, y + high / 2 + 4, name, "tick", "end"))
        for j, value in enumerate(data.values[i]):
            x = left + j * cell
            if value is None:
                body.append(_rect(x, y, cell - 1, high - 1, "blank"))
                continue
            step = scale_step(value / data.neutral, _MATRIX_HOT)
            tip = f"{name} and {data.column_names[j]}: lift {show(value)} (unrelated {show(data.neutral)})"
            kind = "dead" if value == 0 else f"h{step}"
            body.append(_rect(x, y, cell - 1, high - 1, kind, tip))
            if cell >= 34 and high >= 18:
                ink = "tick" if value == 0 else f"i{step}"
                body.append(
                    _text(
                        x + cell / 2 - 0.5,
                        y + high / 2 + 4,
                        f"{value:.0f}" if value >= 10 else f"{value:.2g}",
                        f"cell {ink}",
                        "middle",
                    )
                )
    # The title of the rows needs its room.
    return _svg(_WIDTH, top + max(rows * high, 130) + 6, label, body)


def _bars(data: Bars, label: str) -> Markup:
    height = 240.0
    highs = [v for v in (*data.values, *data.upper) if v is not None]
    y_max = max(max(highs, default=0.0) * 1.1, 1e-6)
    plot_width, plot_height, _, per_y = _scales((0, 1), y_max, height)
    bottom, room = _TOP + plot_height, plot_width / max(len(data.names), 1)
    body = []
    for y in ticks(0, y_max):
        at = bottom - y * per_y
        body += [_line(_LEFT, at, _WIDTH - _RIGHT, at, "grid"), _text(_LEFT - 6, at + 4, show(y), "tick", "end")]
    for number, (name, value) in enumerate(zip(data.names, data.values, strict=True)):
        x = _LEFT + (number + 0.5) * room
        body.append(_text(x, bottom + 15, name, "tick", "middle"))
        if value is None:
            continue
        wide = min(48.0, room * 0.6)
        body.append(_rect(x - wide / 2, bottom - value * per_y, wide, value * per_y, "bar", f"{name}: {show(value)}"))
        lower = data.lower[number] if data.lower else None
        upper = data.upper[number] if data.upper else None
        if lower is not None and upper is not None:
            body.append(_line(x, bottom - max(lower, 0.0) * per_y, x, bottom - upper * per_y, "whisker"))
    body.append(_text(_LEFT, height - 6, data.y_title, "axis"))
    return _svg(_WIDTH, height, label, body)
