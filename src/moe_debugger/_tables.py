"""Tables of the library's results: plain text, HTML and pandas, from the same rows."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from moe_debugger._plain_text import plain_text
from moe_debugger.errors import DependencyMissingError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ColumnTable", "bar", "html_table", "text_table", "to_data_frame"]

_BLOCKS = " ▏▎▍▌▋▊▉█"


class ColumnTable(Mapping[str, npt.NDArray[Any]]):
    """A table whose columns are arrays of equal length: attributes, and items of the same names."""

    # Names of the columns, in order; set by each table.
    _columns: ClassVar[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self[self._columns[0]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._columns:
            raise KeyError(name)
        column: npt.NDArray[Any] = getattr(self, name)
        return column

    __hash__ = None  # type: ignore[assignment]  # holds arrays


def bar(share: float, width: int) -> str:
    """Return a bar of `width` characters, filled to `share` in 0..1."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[rest] if rest else "")).ljust(width)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows under headers; columns of numbers are aligned to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max([len(header), *(len(row[i]) for row in cells)]) for i, header in enumerate(headers)]
    is_number = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(headers))]
    lines = ["  ".join(_align(header, widths[i], is_number[i]) for i, header in enumerate(headers)).rstrip()]
    lines.append("  ".join("─" * width for width in widths))
    lines += ["  ".join(_align(cell, widths[i], is_number[i]) for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join(lines)


def html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table; everything in it is escaped."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_text(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def to_data_frame(columns: Mapping[str, Any]) -> "pd.DataFrame":
    """Return a pandas DataFrame of `columns`.

    Raises:
        DependencyMissingError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise DependencyMissingError(
            "to_pandas() needs pandas, which is not installed; run: pip install 'moe-debugger[pandas]'"
        ) from error
    return pd.DataFrame(dict(columns))


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else plain_text(str(value))


def _align(text: str, width: int, is_number: bool) -> str:
    return text.rjust(width) if is_number else text.ljust(width)
