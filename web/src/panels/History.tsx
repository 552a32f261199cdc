import { useLayoutEffect, useRef, useState } from "react";
import { useTranslation } from "react-i18next";
import { formatCompact, formatFixed } from "../format";
import { linePath, NUM_POINTS, type Resolution, useHistoryEnd, useHistoryStore } from "../history";
import { useApp } from "../store";

const HEIGHT = 74;
const TOP = 16;

/** Strip over the whole session: the smallest load entropy of any layer, the selected layer's, and tokens per second. */
export function HistoryStrip() {
  const { t } = useTranslation();
  const { points, resolution, error } = useHistoryStore();
  const end = useHistoryEnd();
  const row = useApp((state) => state.row);
  const layerIndex = useApp((state) => state.picture?.whole.layers[state.row]?.layerIndex ?? state.row);
  const box = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const element = box.current;
    if (!element) return;
    const observer = new ResizeObserver(([entry]) => entry && setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  const span = NUM_POINTS[resolution] * resolution * 1000;
  const start = end - span;
  const shown = points?.filter((point) => point.atMs + point.durationS * 1000 >= start) ?? [];
  const x = (ms: number) => ((ms - start) / span) * width;
  const yEntropy = (value: number) => TOP + 4 + (1 - Math.max(0, Math.min(1, value))) * (HEIGHT - TOP - 8);
  const mostTokens = Math.max(1, ...shown.map((point) => point.numTokens / point.durationS));
  const yTokens = (rate: number) => HEIGHT - (rate / mostTokens) * (HEIGHT - TOP - 22);
  const last = shown.at(-1);
  const spanWord = t(`history.span${resolution}`);
  // Whole hours of five, quarters of the others.
  const ticks = resolution === 60 ? [1, 0.8, 0.6, 0.4, 0.2] : [1, 0.75, 0.5, 0.25];
  return (
    <section className="history" aria-label={t("history.title")}>
      <div className="history-key">
        <span>
          <i className="key-line min" /> {t("history.minEntropy")}{" "}
          <b className="num">{formatFixed(last?.minEntropy ?? Number.NaN)}</b>
        </span>
        <span>
          <i className="key-line layer" /> {t("history.layerEntropy", { layer: layerIndex })}{" "}
          <b className="num">{formatFixed(last?.loadEntropy[row] ?? Number.NaN)}</b>
        </span>
        <span>
          <i className="key-line tokens" /> {t("history.tokens")}{" "}
          <b className="num">{last ? formatCompact(last.numTokens / last.durationS) : "–"}</b>
        </span>
      </div>
      <div className="history-plot" ref={box}>
        {width > 0 && (
          <svg width={width} height={HEIGHT} role="img" aria-label={t("history.label", { span: spanWord })}>
            {ticks.map((share) => (
              <g key={share}>
                <line className="grid" x1={width * (1 - share)} x2={width * (1 - share)} y1={TOP} y2={HEIGHT} />
                <text className="tick" x={width * (1 - share) + 3} y={10}>
                  −{formatSpan((span * share) / 1000)}
                </text>
              </g>
            ))}
            <text className="tick" x={width - 4} y={10} textAnchor="end">
              {t("history.now")}
            </text>
            <line className="grid" x1={0} x2={width} y1={yEntropy(1)} y2={yEntropy(1)} />
            <line className="grid" x1={0} x2={width} y1={HEIGHT - 0.5} y2={HEIGHT - 0.5} />
            {shown.map((point) => (
              <rect
                key={point.atMs}
                className="bar"
                x={x(point.atMs)}
                width={Math.max(1, (point.durationS * 1000 * width) / span - 0.4)}
                y={yTokens(point.numTokens / point.durationS)}
                height={Math.max(0, HEIGHT - yTokens(point.numTokens / point.durationS))}
              />
            ))}
            <path
              className="line layer"
              d={linePath(shown, (point) => point.loadEntropy[row] ?? Number.NaN, x, yEntropy)}
            />
            <path className="line min" d={linePath(shown, (point) => point.minEntropy, x, yEntropy)} />
          </svg>
        )}
        {shown.length === 0 && (
          <p className="history-empty muted">{error ? t("history.error", { message: error }) : t("history.empty")}</p>
        )}
      </div>
      <fieldset className="segmented vertical" aria-label={t("history.span")}>
        {([1, 10, 60] as Resolution[]).map((value) => (
          <button
            type="button"
            key={value}
            aria-pressed={value === resolution}
            title={t("history.points", { n: NUM_POINTS[value], resolution: value })}
            onClick={() => useHistoryStore.setState({ resolution: value })}
          >
            {t(`history.span${value}`)}
          </button>
        ))}
      </fieldset>
    </section>
  );
}

function formatSpan(seconds: number): string {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** Load entropy of one layer over the history's span. */
export function Sparkline({ row, label }: { row: number; label: string }) {
  const points = useHistoryStore((state) => state.points);
  const resolution = useHistoryStore((state) => state.resolution);
  const end = useHistoryEnd();
  const width = 340;
  const height = 56;
  const span = NUM_POINTS[resolution] * resolution * 1000;
  const x = (ms: number) => ((ms - end + span) / span) * (width - 34);
  const y = (value: number) => 4 + (1 - Math.max(0, Math.min(1, value))) * (height - 8);
  const entropyOf = (point: { loadEntropy: Float32Array }) => point.loadEntropy[row] ?? Number.NaN;
  const shown = points?.filter((point) => point.atMs >= end - span) ?? [];
  const last = shown.findLast((point) => !Number.isNaN(entropyOf(point)));
  return (
    <svg className="spark" viewBox={`0 0 ${width} ${height}`} role="img" aria-label={label}>
      <line className="grid" x1={0} x2={width - 34} y1={y(1)} y2={y(1)} />
      <line className="grid" x1={0} x2={width - 34} y1={y(0.5)} y2={y(0.5)} />
      <line className="grid" x1={0} x2={width - 34} y1={y(0)} y2={y(0)} />
      <path className="line min" d={linePath(shown, entropyOf, x, y)} />
      {last && (
        <>
          <circle className="dot" cx={x(last.atMs + (last.durationS * 1000) / 2)} cy={y(entropyOf(last))} r={3} />
          <text className="tick strong" x={width - 30} y={y(entropyOf(last)) + 4}>
            {formatFixed(entropyOf(last))}
          </text>
        </>
      )}
      <text className="tick" x={2} y={height - 7}>
        {label}
      </text>
    </svg>
  );
}
