// Training series: numbers by global step, of the whole model, of a layer, or of each expert of a layer.
import type { Series } from "../gen/moe_debugger/v1/session_pb";
import { decodeF64, decodeU64 } from "./columns";

export interface SeriesLine {
  sourceId: string;
  globalRank: number;
  name: string;
  /** Null for a series of the whole model. */
  layerIndex: number | null;
  /** Values of one point: 1, or the layer's experts. */
  numValues: number;
  steps: Float64Array;
  /** [n, numValues]; NaN where there was nothing to read. */
  values: Float64Array;
}

export function decodeSeries(messages: readonly Series[]): SeriesLine[] {
  return messages.map((message) => {
    const steps = decodeU64(message.step, "step");
    const values = decodeF64(message.value, "value");
    const numValues = Math.max(1, message.numValues);
    if (values.length !== steps.length * numValues) {
      throw new RangeError(
        `series ${message.name}: ${values.length} values for ${steps.length} steps of ${numValues} values each`,
      );
    }
    return {
      sourceId: message.sourceId,
      globalRank: message.globalRank,
      name: message.name,
      layerIndex: message.layerIndex ?? null,
      numValues,
      steps,
      values,
    };
  });
}

// The order in which people look for them; others follow by name.
const ORDER = ["loss", "eval_loss", "lr", "balance_loss", "balance_coef", "grad_norm"];
const LAYER_ORDER = ["router_gradient_norm", "router_weight_norm", "selection_bias_min", "selection_bias_max"];

function inOrder(order: readonly string[]): (a: string, b: string) => number {
  const place = (name: string) => (order.includes(name) ? order.indexOf(name) : order.length);
  return (a, b) => place(a) - place(b) || (a < b ? -1 : 1);
}

function byName(lines: readonly SeriesLine[], order: readonly string[]): Map<string, SeriesLine[]> {
  const groups = new Map<string, SeriesLine[]>();
  for (const line of lines) groups.set(line.name, [...(groups.get(line.name) ?? []), line]);
  const compare = inOrder(order);
  return new Map([...groups].sort(([a], [b]) => compare(a, b)));
}

/** Series of the whole model by name: one line for each source, never summed or averaged. */
export function modelSeries(lines: readonly SeriesLine[]): Map<string, SeriesLine[]> {
  return byName(
    lines.filter(({ layerIndex, numValues }) => layerIndex === null && numValues === 1),
    ORDER,
  );
}

/** Series of layers by name: one line for each layer, all of one source. */
export function layerSeries(lines: readonly SeriesLine[], sourceId: string): Map<string, SeriesLine[]> {
  const own = lines.filter((line) => line.layerIndex !== null && line.numValues === 1 && line.sourceId === sourceId);
  return byName(
    own.sort((a, b) => (a.layerIndex ?? 0) - (b.layerIndex ?? 0)),
    LAYER_ORDER,
  );
}

export interface SeriesSource {
  sourceId: string;
  globalRank: number;
}

/** The sources that have series, by rank. */
export function seriesSources(lines: readonly SeriesLine[]): SeriesSource[] {
  const sources = new Map(lines.map(({ sourceId, globalRank }) => [sourceId, { sourceId, globalRank }]));
  return [...sources.values()].sort((a, b) => a.globalRank - b.globalRank || (a.sourceId < b.sourceId ? -1 : 1));
}

export type Extent = [number, number];

/**
 * First and last step to draw; null where there is no point. Lines that were cut to their newest `maxPoints` begin it, so
 * that a sparse line with a longer past (an evaluation's loss) does not squeeze the others.
 */
export function stepDomain(lines: readonly SeriesLine[], maxPoints = Number.POSITIVE_INFINITY): Extent | null {
  let first = Number.POSITIVE_INFINITY;
  let last = Number.NEGATIVE_INFINITY;
  let cutAt = Number.NEGATIVE_INFINITY;
  for (const { steps } of lines) {
    if (steps.length === 0) continue;
    first = Math.min(first, steps[0] as number);
    last = Math.max(last, steps[steps.length - 1] as number);
    if (steps.length >= maxPoints) cutAt = Math.max(cutAt, steps[0] as number);
  }
  return first <= last ? [Math.max(first, cutAt), last] : null;
}

/** Smallest and largest finite value; with `isLog` of those above 0. */
export function valueExtent(lines: readonly SeriesLine[], isLog = false): Extent | null {
  let low = Number.POSITIVE_INFINITY;
  let high = Number.NEGATIVE_INFINITY;
  for (const { values } of lines) {
    for (const value of values) {
      if (!Number.isFinite(value) || (isLog && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

/** Points without a number: nothing to read (NaN), or out of bounds (infinite). */
export function countUnreadable(lines: readonly SeriesLine[]): { nan: number; infinite: number } {
  let nan = 0;
  let infinite = 0;
  for (const { values } of lines) {
    for (const value of values) {
      if (Number.isNaN(value)) nan++;
      else if (!Number.isFinite(value)) infinite++;
    }
  }
  return { nan, infinite };
}

/** Index of the last point at or before the step; -1 where there is none. */
export function indexAt(steps: Float64Array, step: number): number {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((steps[middle] as number) <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The step of the point that is nearest; null without points. */
export function nearestStep(steps: Float64Array, step: number): number | null {
  if (steps.length === 0) return null;
  const before = indexAt(steps, step);
  const a = steps[Math.max(0, before)] as number;
  const b = steps[Math.min(steps.length - 1, before + 1)] as number;
  return Math.abs(step - a) <= Math.abs(b - step) ? a : b;
}

/** The newest point with a number. */
export function newest(line: SeriesLine): { step: number; value: number } | null {
  for (let i = line.steps.length - 1; i >= 0; i--) {
    const value = line.values[i] as number;
    if (Number.isFinite(value)) return { step: line.steps[i] as number, value };
  }
  return null;
}

/**
 * A path through the points, broken where a value is missing. Where several points share a pixel column its smallest and
 * its largest are both drawn, so that no spike is lost.
 */
export function seriesPath(line: SeriesLine, x: (step: number) => number, y: (value: number) => number): string {
  let path = "";
  let isOpen = false;
  let column = Number.NaN;
  let bucket: { low: number; high: number; first: number; last: number; x: number } | null = null;
  const emit = (at: number, value: number) => {
    path += `${isOpen ? "L" : "M"}${at.toFixed(1)} ${y(value).toFixed(1)}`;
    isOpen = true;
  };
  const flush = () => {
    if (!bucket) return;
    emit(bucket.x, bucket.first);
    if (bucket.low !== bucket.high) {
      emit(bucket.x, bucket.low);
      emit(bucket.x, bucket.high);
      emit(bucket.x, bucket.last);
    }
    bucket = null;
  };
  line.steps.forEach((step, i) => {
    const value = line.values[i] as number;
    if (!Number.isFinite(value) || !Number.isFinite(y(value))) {
      flush();
      // A lone point shows as a dot: line caps are round.
      isOpen = false;
      column = Number.NaN;
      return;
    }
    const at = x(step);
    if (Math.round(at) !== column) flush();
    column = Math.round(at);
    if (bucket) {
      bucket.low = Math.min(bucket.low, value);
      bucket.high = Math.max(bucket.high, value);
      bucket.last = value;
    } else {
      bucket = { low: value, high: value, first: value, last: value, x: at };
    }
  });
  flush();
  // A path of one point needs a length to be drawn.
  return path.replace(/(M([\d.-]+) ([\d.-]+))(?=M|$)/g, "$1h0.01");
}

/** Round numbers over a range, at most `count` of them; whole numbers where `isInteger`. */
export function niceTicks([low, high]: Extent, count: number, isInteger = false): number[] {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) ?? power * 10;
  if (isInteger) step = Math.max(1, Math.ceil(step));
  const ticks: number[] = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++)
    ticks.push(Number((n * step).toPrecision(12)));
  return ticks;
}

/** Middle of the values above 0; NaN without any. */
export function medianOf(lines: readonly SeriesLine[]): number {
  const values: number[] = [];
  for (const line of lines)
    for (const value of line.values) if (Number.isFinite(value) && value > 0) values.push(value);
  if (values.length === 0) return Number.NaN;
  values.sort((a, b) => a - b);
  return values[values.length >> 1] as number;
}

export interface HeatGrid {
  numRows: number;
  numColumns: number;
  /** [numRows, numColumns]: the largest value of each column; NaN where points had nothing to read. */
  cells: Float64Array;
  /** [numRows, numColumns]: whether any point is there. */
  hasPoint: Uint8Array;
}

/**
 * Rows x columns over the steps of the domain: as many columns as there are steps with a point, at most `maxColumns`. A
 * column of several steps shows its largest value.
 */
export function heatGrid(rows: readonly SeriesLine[], [first, last]: Extent, maxColumns: number): HeatGrid {
  const width = last - first + 1;
  const distinct = new Set<number>();
  for (const { steps } of rows) for (const step of steps) if (step >= first && step <= last) distinct.add(step);
  const numColumns = Math.max(1, Math.min(maxColumns, distinct.size));
  const cells = new Float64Array(rows.length * numColumns).fill(Number.NaN);
  const hasPoint = new Uint8Array(rows.length * numColumns);
  rows.forEach((line, row) => {
    line.steps.forEach((step, i) => {
      if (step < first || step > last) return;
      const at = row * numColumns + Math.min(numColumns - 1, Math.floor(((step - first) / width) * numColumns));
      const value = line.values[i] as number;
      hasPoint[at] = 1;
      if (!Number.isNaN(value) && !((cells[at] as number) >= value)) cells[at] = value;
    });
  });
  return { numRows: rows.length, numColumns, cells, hasPoint };
}

/** A line with a value for each expert as one line for each. */
export function expertLines(line: SeriesLine): SeriesLine[] {
  return Array.from({ length: line.numValues }, (_, expert) => ({
    ...line,
    numValues: 1,
    values: Float64Array.from(line.steps, (_, i) => line.values[i * line.numValues + expert] as number),
  }));
}

/** All steps of the lines, the newest first, at most `limit`. */
export function newestSteps(lines: readonly SeriesLine[], limit: number): number[] {
  const steps = new Set<number>();
  for (const line of lines) for (const step of line.steps) steps.add(step);
  return [...steps].sort((a, b) => b - a).slice(0, limit);
}

/** The value at exactly that step; null where the line has no point there. */
export function valueAt(line: SeriesLine, step: number): number | null {
  const at = indexAt(line.steps, step);
  return at >= 0 && line.steps[at] === step ? (line.values[at] as number) : null;
}
