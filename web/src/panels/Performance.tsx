// Performance: where the time of the MoE layers goes, what was estimated, and how far from the machine's roof it is.
import type { TFunction } from "i18next";
import { type ReactNode, useMemo } from "react";
import { useTranslation } from "react-i18next";
import { formatBytes, formatFixed, formatInteger, formatPercent, formatRatio, formatValue } from "../format";
import { Severity } from "../gen/moe_debugger/v1/session_pb";
import { findingText, i18n } from "../i18n";
import { layerNames } from "../layers";
import words from "../locales/en.performance.json";
import {
  along,
  type Bottleneck,
  decades,
  type Estimate,
  type LayerTimes,
  PARTS,
  type Performance,
  performanceOf,
} from "../model/performance";
import { seriesSources } from "../model/series";
import { usePerformance, usePerformancePolling } from "../performance";
import { useApp } from "../store";
import { SeverityGlyph } from "../ui/icons";
import "./performance.css";

// The panel's words come with it.
i18n.addResourceBundle("en", "page", words, true, true);

const RATIOS = new Set(["slow_layer", "slow_expert"]);
const INFOS = new Set(["memory_bound", "compute_bound", "below_roof"]);
const PLOT = { width: 460, height: 260, left: 46, right: 12, top: 10, bottom: 36 };
const MAX_EXPERT_BARS = 64;
const MAX_BOTTLENECKS = 40;

export default function PerformancePanel() {
  const { t } = useTranslation();
  usePerformancePolling();
  const lines = usePerformance((state) => state.lines);
  const error = usePerformance((state) => state.error);
  const sourceId = usePerformance((state) => state.sourceId);
  const sources = useMemo(() => seriesSources(lines ?? []), [lines]);
  const chosen = sources.find((source) => source.sourceId === sourceId) ?? sources[0];
  const profile = useMemo(() => performanceOf(lines ?? [], chosen?.sourceId ?? ""), [lines, chosen?.sourceId]);
  return (
    <section className="performance" aria-label={t("panel.performance")} data-testid="performance">
      <header className="panel-head">
        <h2>{t("panel.performance")}</h2>
        {profile && (
          <span className="muted" data-testid="perf-summary">
            {t("performance.summary", {
              ms: formatValue(profile.forwardMs),
              n: formatInteger(profile.numForwards),
              share: formatPercent(profile.overheadShare, 1),
            })}
          </span>
        )}
        <span className="spacer" />
        {sources.length > 1 && (
          <label className="muted">
            {t("performance.source")}{" "}
            <select
              className="select wide"
              value={chosen?.sourceId}
              onChange={(event) => usePerformance.setState({ sourceId: event.target.value })}
            >
              {sources.map((source) => (
                <option key={source.sourceId} value={source.sourceId}>
                  {t("ranks.nth", { rank: source.globalRank })}
                </option>
              ))}
            </select>
          </label>
        )}
        {profile && <TableButton />}
      </header>
      {error && <Failed message={error} />}
      {profile ? (
        <Profile profile={profile} />
      ) : (
        !error && (lines ? <Empty /> : <p role="status">{t("performance.loading")}</p>)
      )}
    </section>
  );
}

function TableButton() {
  const { t } = useTranslation();
  const isTable = useApp((state) => state.isTable);
  return (
    <button
      type="button"
      className="button icon-text"
      aria-pressed={isTable}
      title={t("toolbar.tableHint")}
      onClick={() => useApp.setState({ isTable: !isTable })}
    >
      {t("toolbar.table")} <kbd>T</kbd>
    </button>
  );
}

function useLabel(): (layerIndex: number) => string {
  const layers = useApp((state) => state.picture?.whole.layers);
  const names = useMemo(() => (layers ? layerNames(layers) : []), [layers]);
  return (layerIndex) => {
    const row = layers?.findIndex((layer) => layer.layerIndex === layerIndex) ?? -1;
    return names[row]?.short ?? `L${layerIndex}`;
  };
}

function Profile({ profile }: { profile: Performance }) {
  const { t } = useTranslation();
  const isTable = useApp((state) => state.isTable);
  return (
    <>
      {profile.numDropped > 0 && (
        <p className="muted small">
          {t("performance.dropped", { count: profile.numDropped, n: formatInteger(profile.numDropped) })}
        </p>
      )}
      {isTable ? (
        <LayerTable layers={profile.layers} />
      ) : (
        <div className="perf-grid">
          <Card title={t("performance.layers")} hint={t("performance.layersHint", { n: callsOf(profile.layers, t) })}>
            <LayerBars profile={profile} />
          </Card>
          <Card title={t("performance.bottlenecks")}>
            <Bottlenecks found={profile.bottlenecks} />
          </Card>
          <Card title={t("performance.roofline")} hint={t("performance.rooflineHint")}>
            <Roofline profile={profile} />
          </Card>
          <Experts profile={profile} />
        </div>
      )}
    </>
  );
}

/** How many calls a median is over: one number where all layers have the same. */
function callsOf(layers: readonly LayerTimes[], t: TFunction): string {
  const known = layers.map(({ numCalls }) => numCalls).filter(Number.isFinite);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  if (known.length === 0) return "–";
  return low === high
    ? formatInteger(low)
    : t("performance.range", { low: formatInteger(low), high: formatInteger(high) });
}

function Card({
  title,
  hint,
  mark,
  children,
}: {
  title: string;
  hint?: string;
  mark?: ReactNode;
  children: ReactNode;
}) {
  return (
    <section className="perf-card" aria-label={title}>
      <header className="panel-head">
        <h2>{title}</h2>
        {hint && <span className="muted small">{hint}</span>}
        <span className="spacer" />
        {mark}
      </header>
      {children}
    </section>
  );
}

function LayerBars({ profile: { layers, bottlenecks } }: { profile: Performance }) {
  const { t } = useTranslation();
  const labelOf = useLabel();
  const longest = Math.max(...layers.map(({ ms }) => ms));
  const shown = PARTS.filter((part) => layers.some(({ parts }) => (parts[part] ?? 0) > 0));
  const slow = new Set(bottlenecks.filter(({ kind }) => kind === "slow_layer").map(({ layerIndex }) => layerIndex));
  const hasDispatch = layers.every(({ parts }) => parts.dispatch !== undefined);
  const hasWait = layers.some(({ parts }) => parts.wait !== undefined);
  return (
    <>
      <ul className="perf-legend">
        {shown.map((part) => (
          <li key={part}>
            <i className={`perf-${part}`} /> {t(`performance.part.${part}`)}
          </li>
        ))}
      </ul>
      <dl className="perf-rows" data-testid="perf-layers">
        {layers.map((layer) => {
          const total = shown.reduce((sum, part) => sum + (layer.parts[part] ?? 0), 0);
          const label = labelOf(layer.layerIndex);
          const parts = shown
            .filter((part) => layer.parts[part] !== undefined)
            .map((part) => `${t(`performance.part.${part}`)} ${formatValue(layer.parts[part] as number)} ms`)
            .join(", ");
          return (
            <div key={layer.layerIndex} style={{ display: "contents" }}>
              <dt className={`num${slow.has(layer.layerIndex) ? " perf-slow" : ""}`}>{label}</dt>
              <dd>
                <div
                  className="perf-bar"
                  role="img"
                  aria-label={t("performance.barLabel", { layer: label, ms: formatValue(layer.ms), parts })}
                  title={parts}
                  data-layer={layer.layerIndex}
                  style={{ inlineSize: `${(100 * layer.ms) / longest}%` }}
                >
                  {shown.map((part) => (
                    <span
                      key={part}
                      className={`perf-${part}`}
                      style={{ inlineSize: `${(100 * (layer.parts[part] ?? 0)) / Math.max(total, 1e-12)}%` }}
                    />
                  ))}
                </div>
              </dd>
              <dd className="num">
                {formatValue(layer.ms)} <span className="muted">{formatPercent(layer.share)}</span>
              </dd>
            </div>
          );
        })}
      </dl>
      {!hasDispatch && <p className="muted small">{t("performance.notSeparable")}</p>}
      {!hasWait && <p className="muted small">{t("performance.noWait")}</p>}
    </>
  );
}

function Bottlenecks({ found }: { found: readonly Bottleneck[] }) {
  const { t } = useTranslation();
  const labelOf = useLabel();
  if (found.length === 0) return <p className="muted">{t("performance.noBottlenecks")}</p>;
  const shown = found.slice(0, MAX_BOTTLENECKS);
  return (
    <ul className="perf-list" data-testid="perf-bottlenecks">
      {shown.map(({ kind, layerIndex, expertId, value, low, numCalls }, at) => {
        // Of the roof what is missing was sent; what is reached is shown.
        const isBelow = kind === "below_roof";
        const format = (number: number) =>
          RATIOS.has(kind) ? formatRatio(number) : formatPercent(isBelow ? 1 - number : number, 1);
        return (
          <li key={`${kind}/${layerIndex}/${expertId}`} data-kind={kind}>
            <SeverityGlyph severity={INFOS.has(kind) ? Severity.INFO : Severity.WARNING} size={12} />
            <div>
              {t(`performance.bottleneck.${kind}`, {
                layer: layerIndex === null ? "" : labelOf(layerIndex),
                expert: expertId ?? "",
                value: format(value),
              })}{" "}
              {Number.isFinite(low) && (
                <span className="muted">
                  {t(isBelow ? "performance.atMost" : "performance.atLeast", {
                    bound: format(low),
                    n: formatInteger(numCalls),
                  })}
                </span>
              )}
              {/* Those of a kind stand together, and what to do about them is the same. */}
              {shown[at + 1]?.kind !== kind && (
                <p className="muted small">{findingText({ code: `profile_${kind}`, args: {} }, "remedy")}</p>
              )}
            </div>
          </li>
        );
      })}
      {found.length > shown.length && (
        <li className="muted">{t("performance.moreBottlenecks", { n: formatInteger(found.length - shown.length) })}</li>
      )}
    </ul>
  );
}

function Numbers({ profile }: { profile: Performance }) {
  const { t } = useTranslation();
  const shown: [string, string][] = [
    [t("performance.stepExperts"), formatValue(profile.stepExperts)],
    [t("performance.stepBytes"), formatBytes(profile.stepBytes)],
    [t("performance.intensity"), formatFixed(profile.intensity)],
    [t("performance.achieved"), `${formatFixed(profile.gflops)} GFLOP/s · ${formatFixed(profile.gbps)} GB/s`],
  ];
  return (
    <dl className="perf-numbers" data-testid="perf-numbers">
      {shown.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd className="num">{value}</dd>
        </div>
      ))}
    </dl>
  );
}

function Roofline({ profile }: { profile: Performance }) {
  const { t } = useTranslation();
  const labelOf = useLabel();
  const layers = profile.layers.filter(({ intensity, gflops }) => intensity > 0 && gflops > 0);
  const ridge = profile.peakGflops / profile.peakGbps;
  const hasRoof = Number.isFinite(ridge);
  const x = decades([...layers.map(({ intensity }) => intensity), ...(hasRoof ? [ridge] : [])]);
  const y = decades([...layers.map(({ gflops }) => gflops), ...(hasRoof ? [profile.peakGflops] : [])]);
  if (!x || !y || !(profile.intensity > 0)) return <p className="muted">{t("performance.noRoofline")}</p>;
  const { width, height, left, right, top, bottom } = PLOT;
  const toX = (value: number) => left + along(x, value) * (width - left - right);
  const toY = (value: number) => height - bottom - along(y, value) * (height - top - bottom);
  // The roof rises with the bandwidth, and is flat from the ridge on; it begins where it enters the plot.
  const start = Math.max(10 ** x.low, 10 ** y.low / profile.peakGbps);
  const roof = `M${toX(start)} ${toY(start * profile.peakGbps)}L${toX(ridge)} ${toY(profile.peakGflops)}H${width - right}`;
  const spoken = (name: string, own: Pick<LayerTimes, "intensity" | "gflops" | "gbps">) =>
    t("performance.point", {
      name,
      intensity: formatFixed(own.intensity),
      gflops: formatFixed(own.gflops),
      gbps: formatFixed(own.gbps),
    });
  const roofText = hasRoof
    ? t("performance.roof", { gflops: formatFixed(profile.peakGflops, 1), gbps: formatFixed(profile.peakGbps, 1) })
    : t("performance.noRoof");
  const points = layers.map((layer) => spoken(labelOf(layer.layerIndex), layer)).join("; ");
  return (
    <>
      <Numbers profile={profile} />
      <svg
        className="perf-plot"
        viewBox={`0 0 ${width} ${height}`}
        role="img"
        aria-label={t("performance.rooflineLabel", { points, roof: roofText })}
        data-testid="perf-roofline"
        data-points={layers.length}
      >
        <Grid x={x} y={y} toX={toX} toY={toY} />
        {hasRoof && <path className="roof" d={roof} />}
        {layers.map((layer) => (
          <circle key={layer.layerIndex} cx={toX(layer.intensity)} cy={toY(layer.gflops)} r={5}>
            <title>{spoken(labelOf(layer.layerIndex), layer)}</title>
          </circle>
        ))}
        <circle className="whole" cx={toX(profile.intensity)} cy={toY(profile.gflops)} r={8}>
          <title>{spoken(t("performance.wholeStep"), profile)}</title>
        </circle>
        <text x={(left + width - right) / 2} y={height - 5} textAnchor="middle">
          {t("performance.intensity")}
        </text>
        <text x={-(height - bottom) / 2} y={11} transform="rotate(-90)" textAnchor="middle">
          {t("performance.gflops")}
        </text>
      </svg>
      <p className="muted small">{roofText}</p>
    </>
  );
}

interface GridProps {
  x: { low: number; high: number };
  y: { low: number; high: number };
  toX: (value: number) => number;
  toY: (value: number) => number;
}

function Grid({ x, y, toX, toY }: GridProps) {
  const { width, height, left, right, top, bottom } = PLOT;
  const powers = ({ low, high }: GridProps["x"]) => Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
  return (
    <>
      {powers(x).map((value) => (
        <g key={value}>
          <line className="grid" x1={toX(value)} x2={toX(value)} y1={top} y2={height - bottom} />
          <text x={toX(value)} y={height - bottom + 14} textAnchor="middle">
            {formatValue(value)}
          </text>
        </g>
      ))}
      {powers(y).map((value) => (
        <g key={value}>
          <line className="grid" x1={left} x2={width - right} y1={toY(value)} y2={toY(value)} />
          <text x={left - 5} y={toY(value) + 4} textAnchor="end">
            {formatValue(value)}
          </text>
        </g>
      ))}
    </>
  );
}

function Experts({ profile: { layers, bottlenecks } }: { profile: Performance }) {
  const { t } = useTranslation();
  const labelOf = useLabel();
  const selected = useApp((state) => state.picture?.whole.layers[state.row]?.layerIndex);
  const layer = layers.find(({ layerIndex }) => layerIndex === selected) ?? layers[0];
  if (!layer) return null;
  const known = [...(layer.experts ?? [])]
    .map((ms, expert) => ({ ms, expert }))
    .filter(({ ms }) => Number.isFinite(ms))
    .sort((a, b) => b.ms - a.ms)
    .slice(0, MAX_EXPERT_BARS);
  const longest = known[0]?.ms ?? 1;
  const slow = new Set(
    bottlenecks.filter((each) => each.layerIndex === layer.layerIndex).map(({ expertId }) => expertId),
  );
  const mark = known.length > 0 && (
    <span className="perf-estimated" data-testid="perf-mark">
      {t(layer.isEstimated ? "performance.estimated" : "performance.measured")}
    </span>
  );
  return (
    <Card
      title={t("performance.experts", { layer: labelOf(layer.layerIndex) })}
      hint={t("performance.expertsHint")}
      mark={mark}
    >
      {known.length === 0 && <p className="muted">{t("performance.noExperts")}</p>}
      <dl className="perf-rows" data-testid="perf-experts">
        {known.map(({ ms, expert }) => (
          <div key={expert} style={{ display: "contents" }}>
            <dt className={`num${slow.has(expert) ? " perf-slow" : ""}`}>E{expert}</dt>
            <dd>
              <div
                className={`perf-bar perf-experts${layer.isEstimated ? " is-estimated" : ""}`}
                role="img"
                aria-label={t("performance.expertLabel", { expert, ms: formatValue(ms) })}
                style={{ inlineSize: `${(100 * ms) / longest}%` }}
              >
                <span style={{ inlineSize: "100%" }} />
              </div>
            </dd>
            <dd className="num">{formatValue(ms)}</dd>
          </div>
        ))}
      </dl>
      {known.length > 0 && layer.isEstimated && <EstimateNote estimate={layer.estimate} />}
    </Card>
  );
}

function EstimateNote({ estimate }: { estimate: Estimate }) {
  const { t } = useTranslation();
  const { error, numFitted, numHeldOut, worst, worstRows, unknownRows, merged } = estimate;
  return (
    <p className="muted small" data-testid="perf-estimate">
      {t("performance.estimatedWhy")}{" "}
      {Number.isFinite(error) &&
        t("performance.estimateError", {
          error: formatPercent(error),
          heldOut: formatInteger(numHeldOut),
          calls: formatInteger(numFitted + numHeldOut),
          rows: formatInteger(worstRows),
          worst: formatPercent(worst),
        })}{" "}
      {unknownRows > 0 && t("performance.unknownRows", { rows: formatInteger(unknownRows) })}{" "}
      {merged !== "nothing" && t(`performance.merged.${merged}`)}
    </p>
  );
}

function LayerTable({ layers }: { layers: readonly LayerTimes[] }) {
  const { t } = useTranslation();
  const labelOf = useLabel();
  return (
    <div className="table-scroll">
      <table className="numbers" data-testid="perf-table">
        <thead>
          <tr>
            <th scope="col">{t("performance.layer")}</th>
            <th scope="col">{t("performance.calls")}</th>
            <th scope="col">{t("performance.ms")}</th>
            <th scope="col">{t("performance.p95")}</th>
            <th scope="col">{t("performance.share")}</th>
            {PARTS.map((part) => (
              <th scope="col" key={part}>
                {t(`performance.part.${part}`)}
              </th>
            ))}
            <th scope="col">{t("performance.distinct")}</th>
            <th scope="col">{t("performance.intensity")}</th>
            <th scope="col">{t("performance.gflops")}</th>
            <th scope="col">{t("performance.gbps")}</th>
          </tr>
        </thead>
        <tbody>
          {layers.map((layer) => (
            <tr key={layer.layerIndex}>
              <th scope="row">{labelOf(layer.layerIndex)}</th>
              <td>{Number.isFinite(layer.numCalls) ? formatInteger(layer.numCalls) : "–"}</td>
              <td>{formatValue(layer.ms)}</td>
              <td>{formatValue(layer.p95Ms)}</td>
              <td>{formatPercent(layer.share, 1)}</td>
              {PARTS.map((part) => (
                <td key={part}>{formatValue(layer.parts[part] ?? Number.NaN)}</td>
              ))}
              <td>{formatValue(layer.distinctExperts)}</td>
              <td>{formatFixed(layer.intensity)}</td>
              <td>{formatFixed(layer.gflops)}</td>
              <td>{formatFixed(layer.gbps)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

const TURN_ON = `MOE_COLLECTOR_PROFILING=true moe-debugger up
MoEDebugger(model, fleet=url, profiling=True)`;

function Empty() {
  const { t } = useTranslation();
  return (
    <div className="empty-state" data-testid="perf-empty">
      <h2>{t("performance.emptyTitle")}</h2>
      <p>{t("performance.emptyText")}</p>
      <div className="command" dir="ltr">
        <pre>{TURN_ON}</pre>
      </div>
    </div>
  );
}

function Failed({ message }: { message: string }) {
  const { t } = useTranslation();
  return (
    <div className="panel-error" role="alert" data-testid="perf-error">
      <p>{t("performance.failed", { message })}</p>
      <button
        type="button"
        className="button"
        onClick={() => usePerformance.setState((state) => ({ numRetries: state.numRetries + 1 }))}
      >
        {t("performance.retry")}
      </button>
    </div>
  );
}
