"""Results of queries as messages and back."""

from itertools import pairwise
from typing import Any

import numpy as np

from moe_debugger.errors import WireFormatError
from moe_debugger.query.columns import Kind
from moe_debugger.query.result import QueryResult, ResultColumn
from moe_debugger.v1 import query_pb2 as pb

__all__ = ["result_from_proto", "result_to_proto"]

_KINDS: dict[Kind, "pb.QueryColumnKind.ValueType"] = {
    Kind.INTEGER: pb.QUERY_COLUMN_KIND_INTEGER,
    Kind.NUMBER: pb.QUERY_COLUMN_KIND_NUMBER,
    Kind.TEXT: pb.QUERY_COLUMN_KIND_TEXT,
    Kind.CHOICE: pb.QUERY_COLUMN_KIND_TEXT,
    Kind.BOOLEAN: pb.QUERY_COLUMN_KIND_BOOLEAN,
    Kind.INTEGERS: pb.QUERY_COLUMN_KIND_INTEGERS,
    Kind.NUMBERS: pb.QUERY_COLUMN_KIND_NUMBERS,
}
_NAMES: dict[int, Kind] = {number: kind for kind, number in _KINDS.items() if kind is not Kind.CHOICE}
_TYPES = {
    Kind.INTEGER: "<i8",
    Kind.NUMBER: "<f8",
    Kind.BOOLEAN: "u1",
    Kind.INTEGERS: "<i8",
    Kind.NUMBERS: "<f8",
}
_LISTS = (Kind.INTEGERS, Kind.NUMBERS)
_TEXTS = (Kind.TEXT, Kind.CHOICE)


def result_to_proto(result: QueryResult) -> pb.QueryResult:
    """Return a result as a message."""
    return pb.QueryResult(
        query=result.query,
        subject=result.subject,
        columns=[_column(column) for column in result.columns],
        num_rows=len(result),
        num_matched=result.num_matched,
        is_truncated=result.is_truncated,
        num_rows_scanned=result.num_rows_scanned,
        elapsed_s=result.elapsed_s,
        notes=result.notes,
    )


def _column(column: ResultColumn) -> pb.QueryColumn:
    message = pb.QueryColumn(name=column.name, kind=_KINDS[column.kind], unit=column.unit)
    values = column.values
    if any(value is None for value in values):
        message.is_missing = bytes(value is None for value in values)
    if column.kind in _TEXTS:
        # A lone surrogate has no UTF-8 form.
        message.texts.extend(str(value or "").encode("utf-8", "replace").decode() for value in values)
    elif column.kind in _LISTS:
        lists = [value or [] for value in values]
        message.lengths = np.array([len(each) for each in lists], "<u4").tobytes()
        message.values = np.array([item for each in lists for item in each], _TYPES[column.kind]).tobytes()
    else:
        message.values = np.array([value or 0 for value in values], _TYPES[column.kind]).tobytes()
    return message


def result_from_proto(message: pb.QueryResult) -> QueryResult:
    """Return the result in a message; choices are texts.

    Raises:
        WireFormatError: a column has not as many values as there are rows, or is of an unknown kind.
    """
    return QueryResult(
        query=message.query,
        subject=message.subject,
        columns=tuple(_result_column(column, message.num_rows) for column in message.columns),
        num_matched=message.num_matched if message.HasField("num_matched") else None,
        is_truncated=message.is_truncated,
        num_rows_scanned=message.num_rows_scanned,
        elapsed_s=message.elapsed_s,
        notes=tuple(message.notes),
    )


def _result_column(message: pb.QueryColumn, num_rows: int) -> ResultColumn:
    kind = _NAMES.get(message.kind)
    if kind is None:
        raise WireFormatError(f"column {message.name!r} is of the unknown kind {message.kind}; is the fleet newer?")
    values: list[Any]
    try:
        if kind is Kind.TEXT:
            values = list(message.texts)
        else:
            values = np.frombuffer(message.values, _TYPES[kind]).tolist()
            if kind in _LISTS:
                ends = np.cumsum(np.frombuffer(message.lengths, "<u4"), dtype=np.int64).tolist()
                if (ends[-1] if ends else 0) != len(values):
                    raise ValueError("its lists do not add up")
                values = [values[start:end] for start, end in pairwise([0, *ends])]
            elif kind is Kind.BOOLEAN:
                values = [bool(value) for value in values]
        if len(values) != num_rows or len(message.is_missing) not in (0, num_rows):
            raise ValueError(f"{len(values)} values for {num_rows} rows")
    except ValueError as error:
        raise WireFormatError(f"column {message.name!r} cannot be read: {error}") from error
    if message.is_missing:
        values = [None if absent else value for value, absent in zip(values, message.is_missing, strict=True)]
    return ResultColumn(message.name, kind, message.unit, tuple(values))
