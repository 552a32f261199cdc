// Results of queries as the page shows them: columns of the wire as cells, and where a row leads to.
import { type QueryColumn, QueryColumnKind, type QueryResult } from "../gen/moe_debugger/v1/query_pb";

export type Cell = number | string | boolean | null | (number | string)[];

export interface ResultTable {
  names: string[];
  units: string[];
  isNumber: boolean[];
  columns: Cell[][];
  numRows: number;
}

const IS_NUMBER = new Set([
  QueryColumnKind.INTEGER,
  QueryColumnKind.NUMBER,
  QueryColumnKind.INTEGERS,
  QueryColumnKind.NUMBERS,
]);

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function numbers(column: QueryColumn): number[] {
  const data = view(column.values);
  const isWhole = column.kind === QueryColumnKind.INTEGER || column.kind === QueryColumnKind.INTEGERS;
  return Array.from({ length: column.values.length >> 3 }, (_, at) =>
    isWhole ? Number(data.getBigInt64(8 * at, true)) : data.getFloat64(8 * at, true),
  );
}

function cells(column: QueryColumn, numRows: number): Cell[] {
  let values: Cell[];
  switch (column.kind) {
    case QueryColumnKind.TEXT:
      values = column.texts;
      break;
    case QueryColumnKind.BOOLEAN:
      values = [...column.values].map((value) => value !== 0);
      break;
    case QueryColumnKind.INTEGERS:
    case QueryColumnKind.NUMBERS: {
      const flat = numbers(column);
      const lengths = view(column.lengths);
      let at = 0;
      values = Array.from({ length: numRows }, (_, row) => {
        const start = at;
        at += lengths.getUint32(4 * row, true);
        return flat.slice(start, at);
      });
      break;
    }
    default:
      values = numbers(column);
  }
  return values.map((value, row) => (column.isMissing[row] ? null : value));
}

export function decodeResult(result: QueryResult): ResultTable {
  return {
    names: result.columns.map(({ name }) => name),
    units: result.columns.map(({ unit }) => unit),
    isNumber: result.columns.map(({ kind }) => IS_NUMBER.has(kind)),
    columns: result.columns.map((column) => cells(column, result.numRows)),
    numRows: result.numRows,
  };
}

/** What a row of a result is about, as far as its columns say. */
export function placeOf(
  table: ResultTable,
  row: number,
): { layer: number | null; expert: number | null; request: string | null; position: number | null } {
  const cell = (name: string): Cell => {
    const at = table.names.indexOf(name);
    return at < 0 ? null : ((table.columns[at] as Cell[])[row] ?? null);
  };
  const layer = cell("layer");
  const expert = cell("expert") ?? cell("hottest_expert");
  const request = cell("request");
  const position = cell("position");
  return {
    layer: typeof layer === "number" ? layer : null,
    expert: typeof expert === "number" ? expert : null,
    request: typeof request === "string" ? request : null,
    position: typeof position === "number" ? position : null,
  };
}
