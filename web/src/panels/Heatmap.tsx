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
import { layerName, layerNames } from "../layers";
import { type LayerShape, type LoadMatrix, loadRatio, rangeOf, rowOf, unseenRows } from "../model/load";
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

/** By row: whether its load is not known. */
export function useUnseen(): boolean[] {
  const snapshot = useApp((state) => state.picture?.snapshot);
  return useMemo(() => (snapshot ? unseenRows(snapshot) : []), [snapshot]);
}

function rangeWord([low, high]: [number, number]): string {
  return low === high ? String(low) : `${low}–${high}`;
}

/** "12 layers × 8–16 experts · top-1–2": layers may differ. */
function useShapeWord(layers: readonly LayerShape[]): string {
  const { t } = useTranslation();
  return t("heatmap.shape", {
    layers: layers.length,
    experts: rangeWord(rangeOf(layers, ({ numExperts }) => numExperts)),
    topK: rangeWord(rangeOf(layers, ({ topK }) => topK)),
  });
}

export function Heatmap() {
  const { t } = useTranslation();
  const load = useShownLoad();
  const picture = useApp((state) => state.picture);
  const { mode, isTable, row } = useApp();
  const unseen = useUnseen();
  const shape = useShapeWord(load?.layers ?? []);
  const numCells = load?.counts.length ?? 0;
  const range =
    mode === "whole"
      ? t("heatmap.wholeHint")
      : t("toolbar.recent", { seconds: recentSeconds(picture?.snapshot.recentWindowS) });
  const selected = load?.layers[row] ?? load?.layers[0];
  const isMixed = load?.layers.some(
    ({ numExperts, topK }) => numExperts / topK !== (selected?.numExperts ?? 1) / (selected?.topK ?? 1),
  );
  const isEmpty = load ? load.counts.every((count) => count === 0) : true;
  return (
    <section className="heatmap" aria-label={t("heatmap.title")}>
      <header className="panel-head">
        <h2>{t("heatmap.title")}</h2>
        {selected && (
          <span className="muted">
            {shape} · {range}
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
        {selected && (
          <Legend
            hot={hotEnd(selected.numExperts, selected.topK)}
            end={isMixed && load ? layerName(load.layers, row).short : t("heatmap.max")}
          />
        )}
      </header>
      {load && unseen.includes(true) && (
        <p className="notice warning-notice" data-testid="unseen-layers">
          {t("heatmap.unseenNotice", {
            count: unseen.filter(Boolean).length,
            layers: layerNames(load.layers)
              .filter((_, i) => unseen[i])
              .slice(0, 8)
              .map(({ short }) => short)
              .join(", "),
          })}{" "}
          <button type="button" className="link" onClick={() => useApp.setState({ sidebar: "capture" })}>
            {t("health.title")}
          </button>
        </p>
      )}
      {load && isEmpty && (
        <p className="notice" role="status">
          {mode === "recent"
            ? t("heatmap.noRecent", { seconds: recentSeconds(picture?.snapshot.recentWindowS) })
            : t("heatmap.noTokens")}
        </p>
      )}
      {load && isTable && (
        <LoadTable
          load={load}
          unseen={unseen}
          range={range}
          cellTestId={mode === "whole" ? "expert-cell" : "recent-expert-cell"}
        />
      )}
      {load && !isTable && <HeatmapCanvas />}
      {picture && !(isTable && mode === "whole") && numCells <= ALWAYS_TABLE_CELLS && (
        <div className="visually-hidden">
          <LoadTable load={picture.whole} unseen={unseen} range={t("heatmap.wholeHint")} />
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

function Legend({ hot, end }: { hot: number; end: string }) {
  const { t } = useTranslation();
  return <ScaleLegend hot={hot} end={end} label={t("heatmap.legend")} unusedWord={t("heatmap.unusedLegend")} />;
}

interface ScaleLegendProps {
  /** log2 of the largest ratio. */
  hot: number;
  /** What the hot end is. */
  end: string;
  label: string;
  unusedWord: string;
}

export function ScaleLegend({ hot, end, label: title, unusedWord }: ScaleLegendProps) {
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
    <div className="legend" role="img" aria-label={title} title={title}>
      <span className="swatch hatch" /> <span className="muted">{unusedWord}</span>
      <span className="ramp" style={{ marginInlineEnd: 14 + end.length * 6 }}>
        <canvas ref={canvas} width={256} height={1} />
        <span className="ticks">
          {scaleTicks(hot).map(({ at, label }) => (
            <span
              key={label}
              className={at === 0 ? "first" : at === 1 ? "last" : undefined}
              style={{ insetInlineStart: `${at * 100}%` }}
            >
              {at === 1 ? `${label} ${end}` : label}
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
  const { layers } = load;
  const labelLength = Math.max(...layerNames(layers).map(({ short }) => short.length));
  const hasAside = layers.some(({ numIdentity, numShared }) => numIdentity + numShared > 0);
  const g = useMemo<Geometry | null>(
    () =>
      size && size.width > 0
        ? geometry(numLayers, maxExperts, size.width, Math.max(size.height, 120), row, { labelLength, hasAside })
        : null,
    [size, numLayers, maxExperts, row, labelLength, hasAside],
  );
  const unseen = useUnseen();
  const aside = useAside(layers);
  const shape = useShapeWord(layers);

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
    const unseenWord = t("heatmap.unseen");
    paint(context, {
      load: shown,
      geometry: g,
      theme,
      tokens,
      selectedRow: row,
      cursor,
      isStale,
      unseen,
      unseenWord,
      aside,
    });
    paintHeads(
      context,
      g,
      tokens,
      {
        entropy: t("heatmap.entropy"),
        hottest: t("heatmap.hottest"),
        unused: t("heatmap.unused"),
        aside: t("heatmap.aside"),
      },
      "system-ui, sans-serif",
    );
  }, [app, g, theme, row, cursor, mode, isPaused, load, isStale, unseen, aside, t]);

  useEffect(() => {
    draw();
    return app.live.addPainter(draw);
  }, [app, draw]);

  const describe = (at: Hover): string => {
    const counts = rowOf(load, at.row);
    const { title } = layerName(load.layers, at.row);
    if (unseen[at.row]) return t("heatmap.cellUnseen", { layer: title });
    const count = counts[at.expert] ?? 0;
    const total = counts.reduce((sum, value) => sum + value, 0);
    return t(count === 0 ? "heatmap.cellUnused" : "heatmap.cell", {
      layer: title,
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
        aria-label={t("heatmap.label", { shape })}
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
        {g && cursor && <Tooltip geometry={g} load={load} at={cursor} isUnseen={unseen[cursor.row] ?? false} />}
      </div>
      {g && g.bin > 1 && <p className="muted small">{t("heatmap.shapeBinned", { bin: g.bin })}</p>}
      <div className="visually-hidden" aria-live="polite">
        {spoken}
      </div>
    </>
  );
}

/** By row: its zero and shared experts, which are no load. */
function useAside(layers: readonly LayerShape[]): string[] {
  const { t } = useTranslation();
  const snapshot = useApp((state) => state.picture?.snapshot);
  return useMemo(
    () =>
      layers.map(({ numIdentity, numShared, topK }, i) => {
        const layer = snapshot?.layers[i];
        const numSlots = Number(layer?.numTokens ?? 0n) * topK;
        const share = numSlots > 0 ? Number(layer?.numIdentitySlots ?? 0n) / numSlots : Number.NaN;
        return [
          numIdentity > 0 ? t("heatmap.asideZero", { count: numIdentity, share: formatPercent(share) }) : "",
          numShared > 0 ? t("heatmap.asideShared", { count: numShared }) : "",
        ]
          .filter(Boolean)
          .join(" ");
      }),
    [layers, snapshot, t],
  );
}

interface TooltipProps {
  geometry: Geometry;
  load: LoadMatrix;
  at: Hover;
  isUnseen: boolean;
}

function Tooltip({ geometry: g, load, at, isUnseen }: TooltipProps) {
  const { t } = useTranslation();
  const counts = rowOf(load, at.row);
  const layer = load.layers[at.row];
  if (!layer) return null;
  const count = counts[at.expert] ?? 0;
  const total = counts.reduce((sum, value) => sum + value, 0);
  const numTokens = load.numTokens[at.row] ?? 0;
  const { place } = layerName(load.layers, at.row);
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
      {place && <span className="muted">{place}</span>}
      <span>
        {isUnseen
          ? t("heatmap.tooltipUnseen")
          : count === 0
            ? t("heatmap.tooltipUnused")
            : t("heatmap.tooltipLoad", {
                ratio: formatRatio(loadRatio(count, total, layer.numExperts)),
                share: formatPercent(numTokens ? count / numTokens : Number.NaN, 1),
              })}
      </span>
      {!isUnseen && (
        <span className="muted">
          {t("heatmap.tooltipCount", { count: formatInteger(count), total: formatInteger(total) })}
        </span>
      )}
    </div>
  );
}
