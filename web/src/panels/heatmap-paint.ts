// Geometry and painting of the load heatmap: one canvas with the cells and the row margins, so that they stay aligned.

import { formatCompact, formatFixed, formatRatio } from "../format";
import { layerNames } from "../layers";
import { type LoadMatrix, loadRatio, rowOf, rowStats } from "../model/load";
import { hotEnd, inkOn, LUTS, lutRgb, scaleIndex, type Theme } from "../model/scale";

export interface Geometry {
  width: number;
  height: number;
  left: number;
  plotWidth: number;
  /** Top edge of each row, and the bottom of the last. */
  rowEdges: number[];
  /** Experts per column: more than one where they would be narrower than two pixels. */
  bin: number;
  numColumns: number;
  columnWidth: number;
  entropyX: number;
  entropyWidth: number;
  hottestX: number;
  hottestWidth: number;
  unusedRight: number;
  /** What is no load: zero and shared experts. No column where the model has none, or no room. */
  asideX: number;
  asideWidth: number;
}

export interface GeometryOptions {
  /** Characters of the longest row label. */
  labelLength?: number;
  hasAside?: boolean;
}

const TOP = 18;
const BOTTOM = 18;
const MAX_ROW = 56;
const FISHEYE: Record<number, number> = { 0: 22, 1: 12, 2: 8 };

/** Row heights: equal where there is room, else the selected row and its neighbours are drawn larger. */
export function rowHeights(numLayers: number, available: number, selected: number): number[] {
  const even = available / numLayers;
  if (even >= 14) return Array.from({ length: numLayers }, () => Math.min(MAX_ROW, Math.floor(even)));
  const lens = Array.from({ length: numLayers }, (_, row) => FISHEYE[Math.abs(row - selected)]);
  const taken = lens.reduce<number>((sum, height) => sum + (height ?? 0), 0);
  const rest = Math.max(1, (available - taken) / Math.max(1, lens.filter((height) => height === undefined).length));
  return lens.map((height) => Math.max(height ?? 0, rest));
}

export function geometry(
  numLayers: number,
  maxExperts: number,
  width: number,
  available: number,
  selected: number,
  { labelLength = 3, hasAside = false }: GeometryOptions = {},
): Geometry {
  const isNarrow = width < 560;
  const left = Math.max(isNarrow ? 34 : 44, Math.ceil(labelLength * 6.7) + 16);
  const entropyWidth = isNarrow ? 44 : 96;
  const hottestWidth = isNarrow ? 58 : 104;
  const unusedWidth = isNarrow ? 0 : 52;
  const gap = isNarrow ? 8 : 14;
  const asideWidth = hasAside && !isNarrow ? 100 : 0;
  const plotWidth = Math.max(40, width - left - entropyWidth - hottestWidth - unusedWidth - asideWidth - gap * 2 - 4);
  const heights = rowHeights(numLayers, Math.max(40, available - TOP - BOTTOM), selected);
  const rowEdges = [TOP];
  for (const height of heights) rowEdges.push((rowEdges.at(-1) as number) + height);
  const bin = Math.max(1, Math.ceil((maxExperts * 2) / plotWidth));
  const numColumns = Math.ceil(maxExperts / bin);
  return {
    width,
    height: Math.ceil((rowEdges.at(-1) as number) + BOTTOM),
    left,
    plotWidth,
    rowEdges,
    bin,
    numColumns,
    columnWidth: plotWidth / Math.max(1, numColumns),
    asideX: left + plotWidth + gap,
    asideWidth,
    entropyX: left + plotWidth + asideWidth + gap,
    entropyWidth,
    hottestX: left + plotWidth + asideWidth + gap * 2 + entropyWidth,
    hottestWidth,
    unusedRight: width - 4,
  };
}

/** Right end of a row's cells: layers may differ in the number of their experts. */
export function rowRight(g: Geometry, numExperts: number): number {
  return g.left + Math.ceil(numExperts / g.bin) * g.columnWidth;
}

/** The cell below a point of the canvas. */
export function cellAt(
  g: Geometry,
  load: LoadMatrix,
  x: number,
  y: number,
): { row: number; expert: number | null } | null {
  const row = g.rowEdges.findIndex((edge, i) => y >= edge && y < (g.rowEdges[i + 1] ?? -1));
  if (row < 0) return null;
  const column = Math.floor((x - g.left) / g.columnWidth);
  const numExperts = load.layers[row]?.numExperts ?? 0;
  if (x < g.left || column >= g.numColumns) return { row, expert: null };
  const counts = rowOf(load, row);
  let expert = column * g.bin;
  for (let e = expert; e < Math.min(numExperts, (column + 1) * g.bin); e++) {
    if ((counts[e] as number) > (counts[expert] as number)) expert = e;
  }
  return expert < numExperts ? { row, expert } : { row, expert: null };
}

export interface Tokens {
  background: string;
  text: string;
  muted: string;
  faint: string;
  accent: string;
  onAccent: string;
  warm: string;
  warning: string;
  critical: string;
  onCritical: string;
  hatch: string;
  hatchGround: string;
  empty: string;
  mono: string;
}

/** The theme's colours, as the style sheet has them now. */
export function readTokens(element: HTMLElement): Tokens {
  const style = getComputedStyle(element);
  const token = (name: string) => style.getPropertyValue(name).trim();
  return {
    background: token("--surface"),
    text: token("--text"),
    muted: token("--muted"),
    faint: token("--line"),
    accent: token("--accent"),
    onAccent: token("--on-accent"),
    warm: token("--warm"),
    warning: token("--warning"),
    critical: token("--critical"),
    onCritical: token("--on-critical"),
    hatch: token("--hatch"),
    hatchGround: token("--hatch-ground"),
    empty: token("--empty-cell"),
    mono: token("--mono"),
  };
}

const patterns = new Map<string, CanvasPattern | null>();

function pattern(
  context: CanvasRenderingContext2D,
  tokens: Tokens,
  kind: string,
  size: number,
  draw: (ink: CanvasRenderingContext2D) => void,
): CanvasPattern | string {
  const key = `${kind}${tokens.hatch}${tokens.hatchGround}`;
  if (!patterns.has(key)) {
    const tile = document.createElement("canvas");
    tile.width = size;
    tile.height = size;
    const ink = tile.getContext("2d");
    if (ink) {
      ink.fillStyle = tokens.hatchGround;
      ink.fillRect(0, 0, size, size);
      ink.fillStyle = tokens.hatch;
      ink.strokeStyle = tokens.hatch;
      draw(ink);
    }
    patterns.set(key, context.createPattern(tile, "repeat"));
  }
  return patterns.get(key) ?? tokens.hatch;
}

/** Dots: no token chose this expert. */
export function hatchPattern(context: CanvasRenderingContext2D, tokens: Tokens): CanvasPattern | string {
  return pattern(context, tokens, "dots", 4, (ink) => {
    ink.fillRect(0, 0, 1.5, 1.5);
    ink.fillRect(2, 2, 1.5, 1.5);
  });
}

/** Stripes: what happened here was not seen. */
export function stripePattern(context: CanvasRenderingContext2D, tokens: Tokens): CanvasPattern | string {
  return pattern(context, tokens, "stripes", 10, (ink) => {
    ink.lineWidth = 1.2;
    for (const at of [-10, 0, 10]) {
      ink.beginPath();
      ink.moveTo(at, 10);
      ink.lineTo(at + 10, 0);
      ink.stroke();
    }
  });
}

const cells = { canvas: null as HTMLCanvasElement | null };

export interface PaintInput {
  load: LoadMatrix;
  geometry: Geometry;
  theme: Theme;
  tokens: Tokens;
  selectedRow: number;
  cursor: { row: number; expert: number } | null;
  isStale: boolean;
  /** Rows whose load is not known. */
  unseen: readonly boolean[];
  unseenWord: string;
  /** By row: zero and shared experts in words. */
  aside: readonly string[];
}

export function paint(context: CanvasRenderingContext2D, input: PaintInput): void {
  const { load, geometry: g, theme, tokens } = input;
  context.clearRect(0, 0, g.width, g.height);
  context.save();
  context.globalAlpha = input.isStale ? 0.45 : 1;
  paintCells(context, input);
  context.restore();
  paintAxes(context, input);
  load.layers.forEach((_, row) => {
    paintMargins(context, input, row);
  });
  const top = g.rowEdges[input.selectedRow];
  const bottom = g.rowEdges[input.selectedRow + 1];
  if (top !== undefined && bottom !== undefined) {
    context.strokeStyle = tokens.accent;
    context.lineWidth = 2;
    const right = rowRight(g, load.layers[input.selectedRow]?.numExperts ?? load.maxExperts);
    context.strokeRect(g.left - 1, top - 0.5, right - g.left + 2, bottom - top);
  }
  if (input.cursor) {
    const { row, expert } = input.cursor;
    const y = g.rowEdges[row] as number;
    const x = g.left + Math.floor(expert / g.bin) * g.columnWidth;
    const height = (g.rowEdges[row + 1] as number) - y;
    context.lineWidth = 2;
    context.strokeStyle = theme === "dark" ? "#ffffff" : "#000000";
    context.strokeRect(x + 0.5, y + 0.5, Math.max(3, g.columnWidth - 1), height - 1);
  }
}

function paintCells(context: CanvasRenderingContext2D, input: PaintInput): void {
  const { load, geometry: g, theme, tokens, unseen } = input;
  const lut = LUTS[theme];
  cells.canvas ??= document.createElement("canvas");
  const source = cells.canvas;
  source.width = Math.max(1, g.numColumns);
  source.height = Math.max(1, load.layers.length);
  const ink = source.getContext("2d");
  if (!ink) return;
  const image = ink.createImageData(source.width, source.height);
  const words = new Uint32Array(image.data.buffer);
  const hatched = new Path2D();
  const idle = new Path2D();
  const striped = new Path2D();
  load.layers.forEach((layer, row) => {
    const counts = rowOf(load, row);
    const total = counts.reduce((sum, count) => sum + count, 0);
    const hot = hotEnd(layer.numExperts, layer.topK);
    const y = g.rowEdges[row] as number;
    const height = (g.rowEdges[row + 1] as number) - y;
    if (unseen[row]) {
      striped.rect(g.left, y, rowRight(g, layer.numExperts) - g.left, height);
      return;
    }
    for (let column = 0; column < g.numColumns; column++) {
      const first = column * g.bin;
      const last = Math.min(layer.numExperts, first + g.bin);
      if (first >= last) continue;
      let most = 0;
      let numUnused = 0;
      for (let expert = first; expert < last; expert++) {
        const count = counts[expert] as number;
        if (count === 0) numUnused++;
        if (count > most) most = count;
      }
      const x = g.left + column * g.columnWidth;
      if (total === 0) {
        idle.rect(x, y, g.columnWidth, height);
      } else if (numUnused * 2 > last - first) {
        // In a bin: more than half of its experts are unused.
        hatched.rect(x, y, g.columnWidth, height);
      } else {
        words[row * source.width + column] = lut[scaleIndex(loadRatio(most, total, layer.numExperts), hot)] as number;
      }
    }
  });
  ink.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  load.layers.forEach((_, row) => {
    const y = g.rowEdges[row] as number;
    const height = (g.rowEdges[row + 1] as number) - y;
    context.drawImage(source, 0, row, source.width, 1, g.left, y, g.plotWidth, height);
  });
  context.fillStyle = tokens.empty;
  context.fill(idle);
  context.fillStyle = hatchPattern(context, tokens);
  context.fill(hatched);
  paintGaps(context, g, load.layers.length, tokens);
  context.fillStyle = stripePattern(context, tokens);
  context.fill(striped);
  paintNumbers(context, { load, g, theme, tokens });
  paintUnseen(context, input);
}

function paintUnseen(context: CanvasRenderingContext2D, { geometry: g, unseen, unseenWord, tokens }: PaintInput): void {
  context.font = `11px ${tokens.mono}`;
  context.textAlign = "left";
  context.textBaseline = "middle";
  unseen.forEach((isUnseen, row) => {
    const y = g.rowEdges[row] as number;
    const height = (g.rowEdges[row + 1] as number) - y;
    if (!isUnseen || height < 11) return;
    context.fillStyle = tokens.background;
    context.fillRect(g.left + 6, y + height / 2 - 8, context.measureText(unseenWord).width + 10, Math.min(16, height));
    context.fillStyle = tokens.text;
    context.fillText(unseenWord, g.left + 11, y + height / 2);
  });
}

function paintGaps(context: CanvasRenderingContext2D, g: Geometry, numLayers: number, tokens: Tokens): void {
  const bottom = g.rowEdges[numLayers] as number;
  context.fillStyle = tokens.background;
  if (g.columnWidth >= 7) {
    const line = g.columnWidth >= 28 ? 2 : 1;
    for (let column = 1; column < g.numColumns; column++) {
      context.fillRect(Math.round(g.left + column * g.columnWidth - line / 2), TOP, line, bottom - TOP);
    }
  } else {
    // Groups of 32 experts, so that the eye can count.
    const group = Math.max(1, Math.round(32 / g.bin));
    for (let column = group; column < g.numColumns; column += group) {
      context.fillRect(Math.round(g.left + column * g.columnWidth), TOP, 1, bottom - TOP);
    }
  }
  for (let row = 1; row < numLayers; row++) {
    const y = g.rowEdges[row] as number;
    const height = (g.rowEdges[row + 1] as number) - y;
    if (height >= 14) context.fillRect(g.left, y - 1, g.plotWidth, height >= 28 ? 2 : 1);
  }
}

function paintNumbers(
  context: CanvasRenderingContext2D,
  { load, g, theme, tokens }: { load: LoadMatrix; g: Geometry; theme: Theme; tokens: Tokens },
): void {
  if (g.columnWidth < 40 || g.bin > 1) return;
  context.textAlign = "center";
  context.textBaseline = "middle";
  load.layers.forEach((layer, row) => {
    const y = g.rowEdges[row] as number;
    const height = (g.rowEdges[row + 1] as number) - y;
    if (height < 18) return;
    const counts = rowOf(load, row);
    const total = counts.reduce((sum, count) => sum + count, 0);
    if (total === 0) return;
    const hot = hotEnd(layer.numExperts, layer.topK);
    counts.forEach((count, expert) => {
      const x = g.left + (expert + 0.5) * g.columnWidth;
      if (count === 0) return;
      const ratio = loadRatio(count, total, layer.numExperts);
      context.fillStyle = inkOn(lutRgb(theme, scaleIndex(ratio, hot)));
      const hasTwoLines = height >= 40 && g.columnWidth >= 44;
      context.font = `${hasTwoLines ? 13 : 11}px ${tokens.mono}`;
      context.fillText(formatRatio(ratio), x, hasTwoLines ? y + height / 2 - 7 : y + height / 2);
      if (hasTwoLines) {
        context.font = `10px ${tokens.mono}`;
        context.fillText(formatCompact(count), x, y + height / 2 + 9);
      }
    });
  });
}

function paintAxes(context: CanvasRenderingContext2D, { load, geometry: g, tokens, selectedRow }: PaintInput): void {
  context.font = `11px ${tokens.mono}`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  let lastLabel = Number.NEGATIVE_INFINITY;
  const names = layerNames(load.layers);
  load.layers.forEach((layer, row) => {
    if (row > 0 && layer.stack !== load.layers[row - 1]?.stack) {
      context.fillStyle = tokens.muted;
      context.fillRect(4, Math.round(g.rowEdges[row] as number) - 1, g.left + g.plotWidth - 4, 1);
    }
    const y = ((g.rowEdges[row] as number) + (g.rowEdges[row + 1] as number)) / 2;
    const label = names[row]?.short ?? "";
    if (row === selectedRow) {
      const height = 18;
      context.fillStyle = tokens.accent;
      context.beginPath();
      context.roundRect(1, y - height / 2, g.left - 8, height, 4);
      context.fill();
      context.fillStyle = tokens.onAccent;
      context.textAlign = "center";
      context.fillText(label, 1 + (g.left - 8) / 2, y + 0.5);
      context.textAlign = "right";
      return;
    }
    const selectedY = ((g.rowEdges[selectedRow] as number) + (g.rowEdges[selectedRow + 1] as number)) / 2;
    const isDue = load.layers.length <= 16 || row % 8 === 0 || row === load.layers.length - 1;
    if (!isDue || y - lastLabel < 13 || Math.abs(y - selectedY) < 16) return;
    lastLabel = y;
    context.fillStyle = tokens.muted;
    context.fillText(label, g.left - 8, y);
  });
  const axisY = (g.rowEdges.at(-1) as number) + 10;
  context.textAlign = "center";
  context.fillStyle = tokens.muted;
  const each =
    load.maxExperts * 26 <= g.plotWidth
      ? 1
      : Math.max(1, 2 ** Math.ceil(Math.log2((load.maxExperts * 44) / g.plotWidth)));
  for (let expert = 0; expert < load.maxExperts; expert += each) {
    const x = g.left + (Math.floor(expert / g.bin) + 0.5) * g.columnWidth;
    if (x > g.left + g.plotWidth - 6) break;
    context.fillText(`E${expert}`, Math.max(g.left + 10, x), axisY);
  }
}

function paintMargins(context: CanvasRenderingContext2D, input: PaintInput, row: number): void {
  const { load, geometry: g, tokens } = input;
  const stats = rowStats(rowOf(load, row));
  const layer = load.layers[row];
  if (!layer) return;
  const top = g.rowEdges[row] as number;
  const height = (g.rowEdges[row + 1] as number) - top;
  const y = top + height / 2;
  const isThin = height < 13;
  const barHeight = isThin ? Math.max(1, height - 1) : Math.min(16, height - 3);
  const barTop = y - barHeight / 2;
  context.textBaseline = "middle";
  context.font = `11px ${tokens.mono}`;
  context.textAlign = "left";
  if (g.asideWidth > 0 && !isThin) {
    context.fillStyle = tokens.muted;
    context.fillText(input.aside[row] ?? "", g.asideX, y);
  }
  if (!(stats.total > 0)) {
    if (!isThin) {
      context.fillStyle = tokens.muted;
      context.fillText("–", g.entropyX, y);
      context.fillText("–", g.hottestX, y);
    }
    return;
  }
  const lost = 1 - stats.entropy;
  const bar = (x: number, width: number, share: number, colour: string) => {
    context.fillStyle = tokens.faint;
    context.fillRect(x, top, 1, height);
    context.fillStyle = colour;
    context.fillRect(x, barTop, Math.max(1, share * Math.max(0, width)), barHeight);
  };
  const hot = hotEnd(layer.numExperts, layer.topK);
  const hotShare = Math.max(0, Math.min(1, Math.log2(Math.max(1, stats.hottestRatio)) / hot));
  const entropyColour = lost > 0.4 ? tokens.critical : lost > 0.15 ? tokens.warning : tokens.faint;
  const hotColour = hotShare > 0.5 ? tokens.warm : tokens.faint;
  const labelWidth = 34;
  bar(g.entropyX, g.entropyWidth - labelWidth, Math.min(1, lost), entropyColour);
  bar(g.hottestX, g.hottestWidth - labelWidth - 34, hotShare, hotColour);
  if (isThin) {
    if (stats.numUnused > 0 && g.unusedRight > g.hottestX + g.hottestWidth && height >= 7) {
      context.textAlign = "right";
      context.fillStyle = tokens.text;
      context.font = `10px ${tokens.mono}`;
      context.fillText(String(stats.numUnused), g.unusedRight, y);
    }
    return;
  }
  context.fillStyle = tokens.text;
  context.fillText(
    formatFixed(lost, lost < 0.1 ? 3 : 2),
    g.entropyX + Math.min(1, lost) * (g.entropyWidth - labelWidth) + 6,
    y,
  );
  const hotText =
    g.hottestWidth < 80 ? `E${stats.hottestExpert}` : `${formatRatio(stats.hottestRatio)} E${stats.hottestExpert}`;
  context.fillText(hotText, g.hottestX + hotShare * Math.max(0, g.hottestWidth - labelWidth - 34) + 6, y);
  if (g.unusedRight > g.hottestX + g.hottestWidth) {
    context.textAlign = "right";
    context.fillStyle = stats.numUnused > 0 ? tokens.text : tokens.muted;
    context.fillText(String(stats.numUnused), g.unusedRight, y);
  }
}

/** Heads of the margin columns. */
export function paintHeads(
  context: CanvasRenderingContext2D,
  g: Geometry,
  tokens: Tokens,
  words: { entropy: string; hottest: string; unused: string; aside: string },
  sans: string,
): void {
  context.font = `11px ${sans}`;
  context.textBaseline = "middle";
  context.textAlign = "left";
  context.fillStyle = tokens.muted;
  const isNarrow = g.entropyWidth < 60;
  context.fillText(isNarrow ? "1−H" : words.entropy, g.entropyX, 8);
  context.fillText(words.hottest, g.hottestX, 8);
  if (g.asideWidth > 0) context.fillText(words.aside, g.asideX, 8);
  if (g.unusedRight > g.hottestX + g.hottestWidth) {
    context.textAlign = "right";
    context.fillText(words.unused, g.unusedRight, 8);
  }
}
