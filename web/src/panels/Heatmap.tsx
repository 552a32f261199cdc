import {
  type KeyboardEvent,
  type PointerEvent,
  useCallback,
  useEffect,
  useLayoutEffect,
  useMemo,
  useRef,
  useState,
} from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { formatInteger, formatPercent, formatRatio } from "../format";
import { type LoadMatrix, loadRatio, rowOf } from "../model/load";
import { hotEnd, LUTS, scaleTicks } from "../model/scale";
import { useApp } from "../store";
import { useTheme } from "../ui/theme";
import { cellAt, type Geometry, geometry, paint, paintHeads, readTokens } from "./heatmap-paint";
import { LoadTable } from "./LoadTable";

/** Small models keep the table in the document, for screen readers and tests. */
const ALWAYS_TABLE_CELLS = 1024;

interface Hover {
  row: number;
  expert: number;
}

export function useShownLoad(): LoadMatrix | null {
  return useApp((state) => (state.mode === "recent" ? state.picture?.recent : state.picture?.whole) ?? null);
}

export function Heatmap() {
  const { t } = useTranslation();
  const load = useShownLoad();
  const picture = useApp((state) => state.picture);
  const { mode, isTable } = useApp();
  const numCells = load?.counts.length ?? 0;
  const range =
    mode === "whole"
      ? t("heatmap.wholeHint")
      : t("toolbar.recent", { seconds: recentSeconds(picture?.snapshot.recentWindowS) });
  const first = load?.layers[0];
  const isEmpty = load ? load.counts.every((count) => count === 0) : true;
  return (
    <section className="heatmap" aria-label={t("heatmap.title")}>
      <header className="panel-head">
        <h2>{t("heatmap.title")}</h2>
        {first && load && (
          <span className="muted">
            {t("heatmap.shape", { layers: load.layers.length, experts: load.maxExperts, topK: first.topK })} · {range}
          </span>
        )}
        <span className="spacer" />
        <RangeToggle />
        <button
          type="button"
          className="button icon-text"
          aria-pressed={isTable}
          title={t("toolbar.tableHint")}
          onClick={() => useApp.setState({ isTable: !isTable })}
        >
          {t("toolbar.table")} <kbd>T</kbd>
        </button>
        {first && <Legend hot={hotEnd(first.numExperts, first.topK)} />}
      </header>
      {load && isEmpty && (
        <p className="notice" role="status">
          {mode === "recent"
            ? t("heatmap.noRecent", { seconds: recentSeconds(picture?.snapshot.recentWindowS) })
            : t("heatmap.noTokens")}
        </p>
      )}
      {load && isTable && (
        <LoadTable load={load} range={range} cellTestId={mode === "whole" ? "expert-cell" : "recent-expert-cell"} />
      )}
      {load && !isTable && <HeatmapCanvas />}
      {picture && !(isTable && mode === "whole") && numCells <= ALWAYS_TABLE_CELLS && (
        <div className="visually-hidden">
          <LoadTable load={picture.whole} range={t("heatmap.wholeHint")} />
        </div>
      )}
    </section>
  );
}

export function recentSeconds(seconds: number | undefined): string {
  return seconds ? String(Math.round(seconds)) : "–";
}

function RangeToggle() {
  const { t } = useTranslation();
  const mode = useApp((state) => state.mode);
  const seconds = useApp((state) => state.picture?.snapshot.recentWindowS);
  return (
    <fieldset className="segmented" aria-label={t("toolbar.range")}>
      <button type="button" aria-pressed={mode === "whole"} onClick={() => useApp.setState({ mode: "whole" })}>
        {t("toolbar.whole")}
      </button>
      <button type="button" aria-pressed={mode === "recent"} onClick={() => useApp.setState({ mode: "recent" })}>
        {seconds ? t("toolbar.recent", { seconds: recentSeconds(seconds) }) : t("toolbar.recentUnknown")}
      </button>
    </fieldset>
  );
}

export function Legend({ hot }: { hot: number }) {
  const { t } = useTranslation();
  const theme = useTheme();
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const context = canvas.current?.getContext("2d");
    if (!context) return;
    const image = context.createImageData(256, 1);
    new Uint32Array(image.data.buffer).set(LUTS[theme]);
    context.putImageData(image, 0, 0);
  }, [theme]);
  return (
    <div className="legend" role="img" aria-label={t("heatmap.legend")} title={t("heatmap.legend")}>
      <span className="swatch hatch" /> <span className="muted">{t("heatmap.unusedLegend")}</span>
      <span className="ramp">
        <canvas ref={canvas} width={256} height={1} />
        <span className="ticks">
          {scaleTicks(hot).map(({ at, label }) => (
            <span
              key={label}
              className={at === 0 ? "first" : at === 1 ? "last" : undefined}
              style={{ insetInlineStart: `${at * 100}%` }}
            >
              {at === 1 ? `${label} ${t("heatmap.max")}` : label}
            </span>
          ))}
        </span>
      </span>
    </div>
  );
}

function HeatmapCanvas() {
  const { t } = useTranslation();
  const { app } = useServices();
  const theme = useTheme();
  const { row, expert, mode, isPaused } = useApp();
  const load = useShownLoad() as LoadMatrix;
  const isStale = useApp((state) => state.connection.state !== "live");
  const wrapper = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const [size, setSize] = useState<{ width: number; height: number } | null>(null);
  const [hover, setHover] = useState<Hover | null>(null);
  const [isFocused, setFocused] = useState(false);
  const [spoken, setSpoken] = useState("");

  useLayoutEffect(() => {
    const element = wrapper.current;
    if (!element) return;
    const observer = new ResizeObserver(([entry]) => {
      if (entry) setSize({ width: Math.floor(entry.contentRect.width), height: Math.floor(entry.contentRect.height) });
    });
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  const numLayers = load.layers.length;
  const { maxExperts } = load;
  // Only the shape of the matrix matters here: its counts change ten times a second.
  const g = useMemo<Geometry | null>(
    () =>
      size && size.width > 0 ? geometry(numLayers, maxExperts, size.width, Math.max(size.height, 120), row) : null,
    [size, numLayers, maxExperts, row],
  );

  const cursor = hover ?? (isFocused && expert !== null ? { row, expert } : null);
  const draw = useCallback(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!element || !context || !g) return;
    const scale = window.devicePixelRatio || 1;
    if (element.width !== Math.round(g.width * scale) || element.height !== Math.round(g.height * scale)) {
      element.width = Math.round(g.width * scale);
      element.height = Math.round(g.height * scale);
    }
    // The newest picture, past React; a paused view keeps what the store froze.
    const live = isPaused ? useApp.getState().picture : app.live.picture;
    const shown = (mode === "recent" ? live?.recent : live?.whole) ?? load;
    if (shown.layers.length !== load.layers.length) return;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const tokens = readTokens(element);
    paint(context, { load: shown, geometry: g, theme, tokens, selectedRow: row, cursor, isStale });
    paintHeads(
      context,
      g,
      tokens,
      { entropy: t("heatmap.entropy"), hottest: t("heatmap.hottest"), unused: t("heatmap.unused") },
      "system-ui, sans-serif",
    );
  }, [app, g, theme, row, cursor, mode, isPaused, load, isStale, t]);

  useEffect(() => {
    draw();
    return app.live.addPainter(draw);
  }, [app, draw]);

  const describe = (at: Hover): string => {
    const counts = rowOf(load, at.row);
    const layer = load.layers[at.row];
    const count = counts[at.expert] ?? 0;
    const total = counts.reduce((sum, value) => sum + value, 0);
    return t(count === 0 ? "heatmap.cellUnused" : "heatmap.cell", {
      layer: layer?.layerIndex,
      expert: at.expert,
      ratio: formatRatio(loadRatio(count, total, counts.length)),
      count: formatInteger(count),
      total: formatInteger(total),
    });
  };

  const locate = (event: PointerEvent): { row: number; expert: number | null } | null => {
    const box = canvas.current?.getBoundingClientRect();
    return box && g ? cellAt(g, load, event.clientX - box.left, event.clientY - box.top) : null;
  };

  const onKeyDown = (event: KeyboardEvent) => {
    const numExperts = load.layers[row]?.numExperts ?? 1;
    const step = event.shiftKey ? 8 : 1;
    const at = { row, expert: expert ?? 0 };
    const clamp = (value: number, size: number) => Math.max(0, Math.min(size - 1, value));
    switch (event.key) {
      case "ArrowRight":
        at.expert = clamp(expert === null ? 0 : at.expert + step, numExperts);
        break;
      case "ArrowLeft":
        at.expert = clamp(at.expert - step, numExperts);
        break;
      case "ArrowDown":
        at.row = clamp(row + step, load.layers.length);
        break;
      case "ArrowUp":
        at.row = clamp(row - step, load.layers.length);
        break;
      case "Home":
        at.expert = 0;
        break;
      case "End":
        at.expert = numExperts - 1;
        break;
      case "Enter":
        useApp.setState({ sidebar: "layer" });
        return;
      case "Escape":
        setHover(null);
        useApp.setState({ expert: null });
        return;
      default:
        return;
    }
    event.preventDefault();
    at.expert = clamp(at.expert, load.layers[at.row]?.numExperts ?? 1);
    setHover(null);
    useApp.setState(at);
    setSpoken(describe(at));
  };

  return (
    <>
      <div
        className="heatmap-canvas"
        ref={wrapper}
        role="img"
        // biome-ignore lint/a11y/noNoninteractiveTabindex: a focusable picture; its cursor is spoken, its table is one key away
        tabIndex={0}
        aria-label={t("heatmap.label", { layers: load.layers.length, experts: load.maxExperts })}
        onKeyDown={onKeyDown}
        onFocus={() => setFocused(true)}
        onBlur={() => setFocused(false)}
        onPointerMove={(event) => {
          const at = locate(event);
          setHover(at && at.expert !== null ? { row: at.row, expert: at.expert } : null);
        }}
        onPointerLeave={() => setHover(null)}
        onPointerDown={(event) => {
          const at = locate(event);
          if (!at) return;
          useApp.setState({ row: at.row, expert: at.expert, sidebar: "layer" });
        }}
      >
        <canvas ref={canvas} style={g ? { width: g.width, height: g.height } : undefined} />
        {g && cursor && <Tooltip geometry={g} load={load} at={cursor} />}
      </div>
      {g && g.bin > 1 && <p className="muted small">{t("heatmap.shapeBinned", { bin: g.bin })}</p>}
      <div className="visually-hidden" aria-live="polite">
        {spoken}
      </div>
    </>
  );
}

function Tooltip({ geometry: g, load, at }: { geometry: Geometry; load: LoadMatrix; at: Hover }) {
  const { t } = useTranslation();
  const counts = rowOf(load, at.row);
  const layer = load.layers[at.row];
  if (!layer) return null;
  const count = counts[at.expert] ?? 0;
  const total = counts.reduce((sum, value) => sum + value, 0);
  const numTokens = load.numTokens[at.row] ?? 0;
  const x = g.left + (Math.floor(at.expert / g.bin) + 0.5) * g.columnWidth;
  const below = (g.rowEdges[at.row + 1] ?? 0) + 6;
  const isAbove = below + 70 > g.height;
  return (
    <div
      className="tooltip"
      style={{
        left: Math.max(4, Math.min(g.width - 254, x - 125)),
        ...(isAbove ? { bottom: g.height - (g.rowEdges[at.row] ?? 0) + 6, top: "auto" } : { top: below }),
      }}
    >
      <strong>{t("heatmap.tooltipTitle", { layer: layer.layerIndex, expert: at.expert })}</strong>
      <span>
        {count === 0
          ? t("heatmap.tooltipUnused")
          : t("heatmap.tooltipLoad", {
              ratio: formatRatio(loadRatio(count, total, layer.numExperts)),
              share: formatPercent(numTokens ? count / numTokens : Number.NaN, 1),
            })}
      </span>
      <span className="muted">
        {t("heatmap.tooltipCount", { count: formatInteger(count), total: formatInteger(total) })}
      </span>
    </div>
  );
}
