// Layers (or experts) x steps as a picture: colour is a value over the median of all that is shown, on the load's scale.
import { type KeyboardEvent, type PointerEvent, useEffect, useMemo, useRef } from "react";
import { useTranslation } from "react-i18next";
import { formatInteger, formatRatio, formatValue } from "../format";
import { LUTS, scaleIndex } from "../model/scale";
import { type Extent, heatGrid, indexAt, medianOf, nearestStep, type SeriesLine } from "../model/series";
import { useTraining } from "../training";
import { useTheme } from "../ui/theme";
import { useWidth } from "../ui/use-width";
import { hatchPattern, readTokens } from "./heatmap-paint";
import { LEFT, moveCursor, RIGHT, StepAxis, stepScale } from "./SeriesChart";

// log2 of the scale's hot end: 8 times the median.
const HOT = 3;
const AXIS = 20;
// Room for half of the first row's label.
const TOP = 6;
const MAX_COLUMNS = 400;

interface SeriesHeatProps {
  name: string;
  title: string;
  rows: readonly SeriesLine[];
  labels: readonly string[];
  domain: Extent;
  selected: number;
  onSelect: (row: number) => void;
}

export function SeriesHeat({ name, title, rows, labels, domain, selected, onSelect }: SeriesHeatProps) {
  const { t } = useTranslation();
  const theme = useTheme();
  const cursor = useTraining((state) => state.cursor);
  const [box, width] = useWidth();
  const canvas = useRef<HTMLCanvasElement>(null);
  const rowHeight = Math.max(3, Math.min(16, Math.floor(180 / Math.max(1, rows.length))));
  const height = rowHeight * rows.length;
  const left = Math.max(LEFT, Math.max(...labels.map((label) => label.length)) * 6.2 + 12);
  const plotWidth = Math.max(1, width - left - RIGHT);
  const median = useMemo(() => medianOf(rows), [rows]);
  const line = rows[selected];
  const steps = line?.steps ?? rows[0]?.steps ?? new Float64Array();

  useEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!element || !context || width === 0) return;
    const scale = window.devicePixelRatio || 1;
    element.width = Math.round(plotWidth * scale);
    element.height = Math.round(height * scale);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const grid = heatGrid(rows, domain, Math.min(MAX_COLUMNS, plotWidth));
    const tokens = readTokens(element);
    const lut = LUTS[theme];
    const cell = plotWidth / grid.numColumns;
    const hatch = hatchPattern(context, tokens);
    grid.cells.forEach((value, at) => {
      if (!grid.hasPoint[at]) return;
      // Whole pixels: a column on half a pixel would mix with its neighbours.
      const x = Math.round((at % grid.numColumns) * cell);
      const nextX = Math.round(((at % grid.numColumns) + 1) * cell);
      const y = Math.floor(at / grid.numColumns) * rowHeight;
      if (Number.isNaN(value)) {
        context.fillStyle = hatch;
      } else {
        const word = lut[scaleIndex(value / median, HOT)] as number;
        context.fillStyle = `rgb(${word & 255} ${(word >> 8) & 255} ${(word >> 16) & 255})`;
      }
      context.fillRect(x, y, nextX - x, rowHeight - (rowHeight >= 6 ? 1 : 0));
    });
  }, [rows, domain, theme, plotWidth, height, rowHeight, width, median]);

  const at = line ? (cursor === null ? line.steps.length - 1 : indexAt(line.steps, cursor)) : -1;
  const value = line?.values[at] ?? Number.NaN;
  const select = (row: number) => onSelect(Math.max(0, Math.min(rows.length - 1, row)));
  const onPointer = (event: PointerEvent, isPress: boolean) => {
    const bounds = event.currentTarget.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - bounds.left - left) / plotWidth));
    const step = domain[0] + share * (domain[1] - domain[0]);
    useTraining.setState({ cursor: nearestStep(steps, step) });
    const row = Math.floor((event.clientY - bounds.top - TOP) / rowHeight);
    if (isPress && row >= 0 && row < rows.length) select(row);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      select(selected + (event.key === "ArrowDown" ? 1 : -1));
    } else moveCursor(event, steps);
  };
  const x = stepScale(domain, left, left + plotWidth);
  const each = Math.max(1, Math.ceil(13 / rowHeight));
  return (
    <figure className="series-chart is-heat" data-testid="series-heat" data-series={name} data-rows={rows.length}>
      <figcaption>
        <span className="series-name">{title}</span>
        <span className="spacer" />
        <span className="num muted">
          {labels[selected]}{" "}
          {at >= 0 && line && t("training.atStep", { step: formatInteger(line.steps[at] as number) })}
        </span>
        <b className="num" data-testid="series-value">
          {formatValue(value)}
        </b>
        {Number.isFinite(value / median) && <span className="num muted">{formatRatio(value / median)}</span>}
      </figcaption>
      <div
        ref={box}
        className="series-plot"
        role="img"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: a focusable picture; its cursor is spoken, its table is one key away
        tabIndex={0}
        aria-label={t("training.heatLabel", {
          name: title,
          rows: rows.length,
          first: formatInteger(domain[0]),
          last: formatInteger(domain[1]),
          median: formatValue(median),
        })}
        onKeyDown={onKeyDown}
        onPointerMove={(event) => onPointer(event, false)}
        onPointerDown={(event) => onPointer(event, true)}
        onPointerLeave={() => useTraining.setState({ cursor: null })}
      >
        {width > 0 && (
          <>
            <canvas
              ref={canvas}
              className="series-cells"
              style={{ width: plotWidth, height, insetInlineStart: left, insetBlockStart: TOP }}
            />
            <svg width={width} height={height + TOP + AXIS} aria-hidden="true">
              {labels.map((label, row) =>
                row % each === 0 || row === selected ? (
                  <text
                    key={label}
                    className={row === selected ? "tick strong" : "tick"}
                    x={left - 6}
                    y={TOP + (row + 0.5) * rowHeight + 3.5}
                    textAnchor="end"
                  >
                    {row !== selected && Math.abs(row - selected) * rowHeight < 12 ? "" : label}
                  </text>
                ) : null,
              )}
              <rect
                className="series-selected"
                x={left - 1}
                y={TOP + selected * rowHeight - 0.5}
                width={plotWidth + 2}
                height={rowHeight}
              />
              {cursor !== null && <line className="cursor" x1={x(cursor)} x2={x(cursor)} y1={TOP} y2={TOP + height} />}
              <StepAxis domain={domain} x={x} y={TOP + height + 4} width={width} left={left} />
            </svg>
          </>
        )}
      </div>
    </figure>
  );
}
