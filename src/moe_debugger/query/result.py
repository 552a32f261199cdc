"""What a query answers: named, typed columns of plain values, and what was read for them."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_debugger._tables import html_table, text_table, to_data_frame
from moe_debugger.query.columns import Kind

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["QueryResult", "ResultColumn"]

_MAX_SHOWN = 1000
_PANDAS = {Kind.INTEGER: "Int64", Kind.NUMBER: "float64", Kind.BOOLEAN: "boolean"}


@dataclass(frozen=True, slots=True)
class ResultColumn:
    """One column of a result.

    Attributes:
        kind: of the values: int, float, str, bool, or lists of int or float; texts of choices are texts.
        unit: as in docs/query.md.
        values: None = missing.
    """

    name: str
    kind: Kind
    unit: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class QueryResult:
    """Rows that a query found.

    Attributes:
        query: its canonical text.
        subject: what a row is about.
        columns: in order.
        num_matched: rows or groups that matched; None where reading ended once there were enough.
        is_truncated: more rows matched than are here.
        num_rows_scanned: rows that were read.
        elapsed_s: wall time.
        notes: what the rows do not cover, in sentences: rows that were not kept, requests that were not sampled.
    """

    query: str
    subject: str
    columns: tuple[ResultColumn, ...]
    num_matched: int | None
    is_truncated: bool
    num_rows_scanned: int
    elapsed_s: float = field(default=0.0, compare=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns[0].values) if self.columns else 0

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(column.name for column in self.columns)

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """The rows as tuples of plain values."""
        return list(zip(*(column.values for column in self.columns), strict=True))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> tuple[Any, ...]:
        """Return the values of a column.

        Raises:
            KeyError: the result has no such column.
        """
        for column in self.columns:
            if column.name == name:
                return column.values
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; NaN and infinity are None."""
        return {
            "query": self.query,
            "subject": self.subject,
            "columns": [
                {
                    "name": column.name,
                    "kind": str(column.kind),
                    "unit": column.unit,
                    "values": [_json(value) for value in column.values],
                }
                for column in self.columns
            ],
            "num_rows": len(self),
            "num_matched": self.num_matched,
            "is_truncated": self.is_truncated,
            "num_rows_scanned": self.num_rows_scanned,
            "elapsed_s": self.elapsed_s,
            "notes": list(self.notes),
        }

    def to_pandas(self) -> "pd.DataFrame":
        """Return a DataFrame; integers that may be missing are pandas' Int64.

        Raises:
            DependencyMissingError: pandas is not installed.
        """
        frame = to_data_frame({column.name: list(column.values) for column in self.columns})
        for column in self.columns:
            if column.kind in _PANDAS:
                frame[column.name] = frame[column.name].astype(_PANDAS[column.kind])  # type: ignore[call-overload]
        return frame

    def to_csv(self) -> str:
        """Return CSV with a header; missing values are empty, lists stand with spaces between."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.names)
        for row in self.rows:
            writer.writerow(["" if value is None else _list(value) for value in row])
        return out.getvalue()

    @property
    def footer(self) -> str:
        """One line that says how many rows there are and what was read."""
        shown = f"{len(self):,} row{'' if len(self) == 1 else 's'}"
        if self.is_truncated:
            of = "more" if self.num_matched is None else f"{self.num_matched:,}"
            # The canonical text ends with the limit where there is one.
            hint = "" if " limit " in self.query else "; `limit` gives more"
            shown = f"the first {shown} of {of}{hint}"
        read = f"{self.num_rows_scanned:,} row{'' if self.num_rows_scanned == 1 else 's'} read"
        return f"{shown} ({read} in {self.elapsed_s:.2f} s)"

    def _cells(self) -> tuple[list[str], list[list[object]]]:
        units = {"x": "x fair", "s": "Unix s"}
        headers = [
            f"{column.name} ({units.get(column.unit, column.unit)})" if column.unit not in ("", "1") else column.name
            for column in self.columns
        ]
        rows = [[_cell(value) for value in row] for row in self.rows[:_MAX_SHOWN]]
        return headers, rows

    def __str__(self) -> str:
        lines = [text_table(*self._cells())] if len(self) else ["no rows"]
        if len(self) > _MAX_SHOWN:
            lines.append(f"… and {len(self) - _MAX_SHOWN:,} more rows in this result")
        return "\n".join([*lines, self.footer, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(f"{self.query}: {self.footer}", *self._cells())


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _list(value: Any) -> Any:
    return " ".join(str(each) for each in value) if isinstance(value, list) else value


def _cell(value: Any) -> object:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(f"{each:.3f}" if isinstance(each, float) else str(each) for each in value)
    if not isinstance(value, str):
        return value
    # A token may be a line break, which would break the table, or a space, which nobody would see.
    text = value if value.isprintable() else repr(value)[1:-1]
    return text if text == text.strip() else f'"{text}"'
