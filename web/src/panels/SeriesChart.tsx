// One small multiple: a series over the global step, one line for each source.
import { type KeyboardEvent, type PointerEvent, useId, useMemo } from "react";
import { useTranslation } from "react-i18next";
import { formatInteger, formatValue } from "../format";
import {
  countUnreadable,
  type Extent,
  indexAt,
  nearestStep,
  newest,
  niceTicks,
  type SeriesLine,
  seriesPath,
  valueExtent,
} from "../model/series";
import { useTraining } from "../training";
import { useWidth } from "../ui/use-width";

const HEIGHT = 132;
export const LEFT = 52;
export const RIGHT = 10;
const TOP = 8;
const BOTTOM = 20;
const MAX_COLOURS = 6;

/** Where a step lies: the same for all charts of the panel. */
export function stepScale([first, last]: Extent, left: number, right: number): (step: number) => number {
  return (step) => (last > first ? left + ((step - first) / (last - first)) * (right - left) : (left + right) / 2);
}

/** Moves the cursor that all charts share: arrows by a point, with Shift by ten, Home and End to the ends. */
export function moveCursor(event: KeyboardEvent, steps: Float64Array): boolean {
  if (steps.length === 0) return false;
  const { cursor } = useTraining.getState();
  const at = cursor === null ? steps.length - 1 : Math.max(0, indexAt(steps, cursor));
  const by = event.shiftKey ? 10 : 1;
  const to: Record<string, number> = {
    ArrowLeft: cursor === null ? at : at - by,
    ArrowRight: at + by,
    Home: 0,
    End: steps.length - 1,
  };
  if (event.key === "Escape") useTraining.setState({ cursor: null });
  else if (event.key in to) {
    const next = Math.max(0, Math.min(steps.length - 1, to[event.key] as number));
    useTraining.setState({ cursor: steps[next] as number });
  } else return false;
  event.preventDefault();
  return true;
}

interface SeriesChartProps {
  name: string;
  title: string;
  /** Lines of one name, or of a pair such as smallest and largest. */
  lines: readonly SeriesLine[];
  labels: readonly string[];
  domain: Extent;
  isLog: boolean;
}

export function SeriesChart({ name, title, lines, labels, domain, isLog }: SeriesChartProps) {
  const { t } = useTranslation();
  const cursor = useTraining((state) => state.cursor);
  const [box, width] = useWidth();
  const clipId = useId();
  const { bad, isLogHere, extent } = useMemo(() => {
    // A log scale needs values above 0; a series with others stays linear.
    const canLog = isLog && lines.every(({ values }) => values.every((value) => !(value <= 0)));
    return { bad: countUnreadable(lines), isLogHere: canLog, extent: valueExtent(lines, canLog) };
  }, [lines, isLog]);
  const shown = cursor === null ? null : readAt(lines, cursor);
  const last = newestOf(lines);
  const read = shown ?? last;
  // The cursor moves often: the paths are made anew only when they change.
  const { x, y, paths } = useMemo(() => {
    const toX = stepScale(domain, LEFT, Math.max(LEFT + 1, width - RIGHT));
    const toY = extent ? valueScale(extent, isLogHere) : () => Number.NaN;
    return { x: toX, y: toY, paths: lines.map((line) => seriesPath(line, toX, toY)) };
  }, [lines, domain, extent, isLogHere, width]);
  const [longest] = [...lines].sort((a, b) => b.steps.length - a.steps.length);
  const summary =
    extent && last
      ? t("training.chartLabel", {
          name: title,
          first: formatInteger(domain[0]),
          last: formatInteger(domain[1]),
          newest: formatValue(last.value),
          low: formatValue(extent[0]),
          high: formatValue(extent[1]),
        })
      : t("training.chartEmpty", { name: title });
  const onPointer = (event: PointerEvent) => {
    const left = event.currentTarget.getBoundingClientRect().left;
    const share = (event.clientX - left - LEFT) / Math.max(1, width - RIGHT - LEFT);
    const step = domain[0] + Math.max(0, Math.min(1, share)) * (domain[1] - domain[0]);
    useTraining.setState({ cursor: longest ? nearestStep(longest.steps, step) : null });
  };
  return (
    <figure className="series-chart" data-testid="series-chart" data-series={name} data-lines={lines.length}>
      <figcaption>
        <span className="series-name">{title}</span>
        <span className="spacer" />
        {read && (
          <span className="num muted" data-testid="series-step">
            {t("training.atStep", { step: formatInteger(read.step) })}
          </span>
        )}
        <b className="num" data-testid="series-value">
          {read ? formatValue(read.value) : "–"}
        </b>
      </figcaption>
      <div
        ref={box}
        className="series-plot"
        role="img"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: a focusable picture; its cursor is spoken, its table is one key away
        tabIndex={0}
        aria-label={summary}
        onKeyDown={(event) => longest && moveCursor(event, longest.steps)}
        onPointerMove={onPointer}
        onPointerDown={onPointer}
        onPointerLeave={() => useTraining.setState({ cursor: null })}
      >
        {width > 0 && (
          <svg width={width} height={HEIGHT} aria-hidden="true">
            <clipPath id={clipId}>
              <rect x={LEFT - 2} y={0} width={Math.max(0, width - LEFT - RIGHT + 4)} height={HEIGHT - BOTTOM + 2} />
            </clipPath>
            {extent &&
              valueTicks(extent, isLogHere).map((value) => (
                <g key={value}>
                  <line className="grid" x1={LEFT} x2={width - RIGHT} y1={y(value)} y2={y(value)} />
                  <text className="tick" x={LEFT - 6} y={y(value) + 3.5} textAnchor="end">
                    {tickLabel(value, extent)}
                  </text>
                </g>
              ))}
            <StepAxis domain={domain} x={x} y={HEIGHT - BOTTOM} width={width} />
            <g clipPath={`url(#${clipId})`}>
              {lines.map((line, i) => (
                <path
                  key={`${line.sourceId}/${line.name}`}
                  className={`line series-line series-${i % MAX_COLOURS}`}
                  d={paths[i]}
                />
              ))}
              {cursor !== null && (
                <line className="cursor" x1={x(cursor)} x2={x(cursor)} y1={TOP} y2={HEIGHT - BOTTOM} />
              )}
              {cursor !== null &&
                lines.map((line, i) => {
                  const at = indexAt(line.steps, cursor);
                  const value = line.values[at] ?? Number.NaN;
                  const step = line.steps[at];
                  if (step === undefined || !Number.isFinite(y(value))) return null;
                  return (
                    <circle
                      key={`${line.sourceId}/${line.name}`}
                      className={`series-dot series-${i % MAX_COLOURS}`}
                      cx={x(step)}
                      cy={y(value)}
                      r={3}
                    />
                  );
                })}
            </g>
          </svg>
        )}
      </div>
      {lines.length > 1 && (
        <ul className="series-legend">
          {lines.slice(0, MAX_COLOURS).map((line, i) => (
            <li key={`${line.sourceId}/${line.name}`}>
              <i className={`key-line series-${i}`} /> {labels[i]}
            </li>
          ))}
          {lines.length > MAX_COLOURS && (
            <li className="muted">{t("training.moreLines", { n: lines.length - MAX_COLOURS })}</li>
          )}
        </ul>
      )}
      {bad.nan + bad.infinite > 0 && (
        <p className={`small ${bad.infinite > 0 ? "warning" : "muted"}`} data-testid="series-gaps">
          {bad.nan > 0 && t("training.unreadable", { count: bad.nan })}{" "}
          {bad.infinite > 0 && t("training.infinite", { count: bad.infinite })}
        </p>
      )}
      {isLog && !isLogHere && <p className="small muted">{t("training.notLog")}</p>}
    </figure>
  );
}

interface StepAxisProps {
  domain: Extent;
  x: (step: number) => number;
  y: number;
  width: number;
  left?: number;
}

/** Marks of the global step. */
export function StepAxis({ domain, x, y, width, left = LEFT }: StepAxisProps) {
  return (
    <>
      <line className="grid" x1={left} x2={width - RIGHT} y1={y} y2={y} />
      {niceTicks(domain, Math.max(2, Math.floor(width / 90)), true).map((step) => (
        <text
          className="tick"
          key={step}
          x={x(step)}
          y={y + 14}
          textAnchor={x(step) > width - RIGHT - 16 ? "end" : "middle"}
        >
          {formatInteger(step)}
        </text>
      ))}
    </>
  );
}

function valueScale([low, high]: Extent, isLog: boolean): (value: number) => number {
  const map = isLog ? Math.log : (value: number) => value;
  const pad = high > low ? 0 : Math.abs(map(high)) * 0.1 || 1;
  const [from, to] = [map(low) - pad, map(high) + pad];
  return (value) => TOP + (1 - (map(value) - from) / (to - from)) * (HEIGHT - TOP - BOTTOM - 2);
}

function valueTicks([low, high]: Extent, isLog: boolean): number[] {
  if (!isLog) return niceTicks([low, high], 4);
  const powers = niceTicks([Math.log10(low), Math.log10(high)], 3).map((power) => Number((10 ** power).toPrecision(2)));
  return powers.filter((value) => value >= low && value <= high);
}

/** As short as it may be, and still different from its neighbours. */
function tickLabel(value: number, [low, high]: Extent): string {
  const isNarrow = high > low && high - low < Math.abs(high) / 100;
  return isNarrow ? String(Number(value.toPrecision(6))) : formatValue(value);
}

function newestOf(lines: readonly SeriesLine[]): { step: number; value: number } | null {
  let found: { step: number; value: number } | null = null;
  for (const line of lines) {
    const last = newest(line);
    if (last && (!found || last.step > found.step)) found = last;
  }
  return found;
}

/** The first line's value at the last point up to the step. */
function readAt(lines: readonly SeriesLine[], step: number): { step: number; value: number } | null {
  for (const line of lines) {
    const at = indexAt(line.steps, step);
    if (at >= 0) return { step: line.steps[at] as number, value: line.values[at] as number };
  }
  return null;
}
