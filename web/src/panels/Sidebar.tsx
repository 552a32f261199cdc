import { useEffect } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { findingKey, SEVERITY_NAME } from "../findings";
import {
  formatBytes,
  formatClock,
  formatFixed,
  formatInteger,
  formatPercent,
  formatRatio,
  formatValue,
} from "../format";
import { ComponentState } from "../gen/moe_debugger/v1/gateway_pb";
import { type DropCounter, DropReason, type ParallelCoordinates } from "../gen/moe_debugger/v1/routing_pb";
import type { Account } from "../gen/moe_debugger/v1/session_pb";
import { findingText } from "../i18n";
import { loadRatio, rowOf, rowStats } from "../model/load";
import { useApp } from "../store";
import { ErrorBoundary } from "../ui/ErrorBoundary";
import { SeverityGlyph } from "../ui/icons";
import { Tabs } from "../ui/Tabs";
import { EvidenceTable, Remedy, showFinding, useFindings } from "./Console";
import { HealthList } from "./Health";
import { recentSeconds, useShownLoad } from "./Heatmap";
import { Sparkline } from "./History";

export function Sidebar() {
  const { t } = useTranslation();
  const sidebar = useApp((state) => state.sidebar);
  const layerIndex = useApp((state) => state.picture?.whole.layers[state.row]?.layerIndex);
  return (
    <aside className="sidebar" aria-label={t("sidebar.label")}>
      <Tabs
        label={t("sidebar.label")}
        idPrefix="sidebar"
        items={[
          { id: "diagnosis", label: t("sidebar.diagnosis") },
          {
            id: "layer",
            label: layerIndex === undefined ? t("sidebar.layer") : t("layer.title", { layer: layerIndex }),
          },
          { id: "capture", label: t("sidebar.capture") },
        ]}
        selected={sidebar}
        onSelect={(id) => useApp.setState({ sidebar: id })}
      />
      <div className="sidebar-body" role="tabpanel" id="sidebar-panel" aria-labelledby={`sidebar-tab-${sidebar}`}>
        <ErrorBoundary name={sidebar} key={sidebar}>
          {sidebar === "diagnosis" && <Diagnosis />}
          {sidebar === "layer" && <LayerDetails />}
          {sidebar === "capture" && <Capture />}
        </ErrorBoundary>
      </div>
    </aside>
  );
}

export function Diagnosis() {
  const { t } = useTranslation();
  const findings = useFindings();
  const selected = useApp((state) => state.findingKey);
  const layers = useApp((state) => state.picture?.whole.layers);
  const numTokens = useApp((state) => state.picture?.whole.numTokens[0] ?? 0);
  const at = Math.max(
    0,
    findings.findIndex((finding) => findingKey(finding) === selected),
  );
  const finding = findings[at];
  if (!finding) {
    return (
      <div className="diagnosis">
        <h3>{t("diagnosis.none")}</h3>
        <p>
          {numTokens > 0
            ? t("diagnosis.noneText", { tokens: formatInteger(numTokens), layers: layers?.length ?? 0 })
            : t("diagnosis.noneWaiting")}
        </p>
        <p className="muted">{t("diagnosis.noneNote")}</p>
      </div>
    );
  }
  const severity = SEVERITY_NAME[finding.severity] ?? "info";
  const row = layers?.findIndex(({ layerIndex }) => layerIndex === finding.layerIndex) ?? -1;
  const step = (delta: number) => {
    const next = findings[(at + delta + findings.length) % findings.length];
    if (next) showFinding(next);
  };
  return (
    <div className={`diagnosis ${severity}`}>
      <header className="diagnosis-head">
        <SeverityGlyph severity={finding.severity} size={18} />
        <h3>
          <span className="visually-hidden">{t(`severity.${finding.severity}`)}: </span>
          {findingText(finding, "title")}
        </h3>
        <span className="num muted">{finding.ruleId}</span>
      </header>
      <p className="muted small">
        {[
          finding.sinceStep === undefined ? "" : t("diagnosis.since", { step: formatInteger(finding.sinceStep) }),
          t("diagnosis.seen", { clock: formatClock(finding.lastSeenAtUnixNs) }),
          t("diagnosis.times", { n: finding.numOccurrences }),
        ]
          .filter(Boolean)
          .join(" · ")}
        {findings.length > 1 && (
          <span className="pager">
            {t("diagnosis.position", { i: at + 1, n: findings.length })}
            <button type="button" aria-label={t("diagnosis.previous")} onClick={() => step(-1)}>
              ‹
            </button>
            <button type="button" aria-label={t("diagnosis.next")} onClick={() => step(1)}>
              ›
            </button>
          </span>
        )}
      </p>
      <p className="diagnosis-summary">{findingText(finding, "summary")}</p>
      {row >= 0 && <Sparkline row={row} label={t("layer.spark")} />}
      <h4>{t("diagnosis.evidence")}</h4>
      <EvidenceTable finding={finding} />
      <Remedy finding={finding} />
      {row >= 0 && (
        <p>
          <button type="button" className="button primary" onClick={() => useApp.setState({ row, sidebar: "layer" })}>
            {t("diagnosis.show", { layer: finding.layerIndex })}
          </button>
        </p>
      )}
    </div>
  );
}

export function LayerDetails() {
  const { t } = useTranslation();
  const load = useShownLoad();
  const { row, expert, mode, picture } = useApp();
  const layer = load?.layers[row];
  const snapshot = picture?.snapshot.layers[row];
  if (!load || !layer || !snapshot) return <p className="muted">{t("diagnosis.noneWaiting")}</p>;
  const counts = rowOf(load, row);
  const stats = rowStats(counts);
  const order = Array.from(counts, (count, id) => ({ id, count })).sort((a, b) => b.count - a.count || a.id - b.id);
  const range =
    mode === "whole"
      ? t("heatmap.wholeHint")
      : t("toolbar.recent", { seconds: recentSeconds(picture?.snapshot.recentWindowS) });
  const description = snapshot.description;
  const numSlots = Number(snapshot.numTokens) * layer.topK;
  const shareOfSlots = (slots: bigint) =>
    numSlots > 0 ? t("layer.ofSlots", { share: formatPercent(Number(slots) / numSlots, 1) }) : "";
  const optional = (value: number, digits: number) =>
    Number.isNaN(value) ? t("layer.notCaptured") : formatFixed(value, digits);
  const facts: [string, string, string?][] = [
    [t("layer.entropy"), formatFixed(stats.entropy, 3)],
    [t("layer.effective"), formatFixed(stats.effectiveExperts, 1), t("layer.ofExperts", { n: layer.numExperts })],
    [
      t("layer.hottest"),
      Number.isNaN(stats.hottestRatio) ? "–" : `E${stats.hottestExpert}`,
      formatRatio(stats.hottestRatio),
    ],
    [t("layer.unused"), String(stats.total > 0 ? stats.numUnused : "–"), t("layer.ofExperts", { n: layer.numExperts })],
    [
      t("layer.routerEntropy"),
      optional(snapshot.meanRouterEntropy, 3),
      Number.isNaN(snapshot.meanRouterEntropy) ? "" : t("layer.nats"),
    ],
    [t("layer.confidence"), optional(snapshot.meanTop1Probability, 3)],
    [t("layer.tokens"), formatInteger(load.numTokens[row] ?? 0)],
    [t("layer.assignments"), formatInteger(stats.total)],
    [t("layer.padding"), formatInteger(snapshot.numPaddingTokens)],
    [t("layer.dropped"), formatInteger(snapshot.numDroppedSlots), shareOfSlots(snapshot.numDroppedSlots)],
  ];
  const optionalSlots: [string, bigint, boolean][] = [
    [t("layer.skipped"), snapshot.numSkippedSlots, snapshot.numSkippedSlots > 0n],
    [t("layer.unusedSlots"), snapshot.numUnusedSlots, snapshot.numUnusedSlots > 0n],
    [t("layer.identity"), snapshot.numIdentitySlots, (description?.numIdentityExperts ?? 0) > 0],
  ];
  for (const [name, slots, isShown] of optionalSlots) {
    if (isShown) facts.push([name, formatInteger(slots), shareOfSlots(slots)]);
  }
  if (description && description.numIdentityExperts > 0) {
    facts.push([t("layer.identityExperts"), String(description.numIdentityExperts), t("layer.identityNote")]);
  }
  if (description && description.numSharedExperts > 0) {
    facts.push([t("layer.shared"), String(description.numSharedExperts), t("layer.sharedNote")]);
  }
  return (
    <div className="layer-details">
      <h3>{t("layer.title", { layer: layer.layerIndex })}</h3>
      {layer.moduleName && (
        <p className="muted small">
          <bdi dir="ltr" className="mono">
            {t("layer.module", { name: layer.moduleName, index: layer.modelLayerIndex })}
          </bdi>
        </p>
      )}
      <Sparkline row={row} label={t("layer.spark")} />
      <dl className="facts" data-testid="layer-facts" data-layer={layer.layerIndex}>
        {facts.map(([name, value, note]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>
              <b className="num">{value}</b> <span className="muted">{note}</span>
            </dd>
          </div>
        ))}
      </dl>
      <p className="muted small">{t("layer.range", { range })}</p>
      {snapshot.expertParallelCounts.length > 0 && (
        <>
          <h4>{t("layer.ranks")}</h4>
          <RankBars counts={snapshot.expertParallelCounts.map(Number)} />
        </>
      )}
      <h4>{t("layer.experts")}</h4>
      <ol className="expert-bars">
        {order.slice(0, 32).map(({ id, count }) => (
          <li key={id}>
            <button
              type="button"
              aria-pressed={id === expert}
              onClick={() => useApp.setState({ expert: id })}
              className={count === 0 ? "unused" : undefined}
            >
              <span className="num">E{id}</span>
              <span className="bar-track">
                <span
                  className="bar-fill"
                  style={{ inlineSize: `${stats.total ? (count / (order[0]?.count || 1)) * 100 : 0}%` }}
                />
              </span>
              <span className="num">{formatRatio(loadRatio(count, stats.total, layer.numExperts))}</span>
              <span className="num muted">{formatInteger(count)}</span>
            </button>
          </li>
        ))}
      </ol>
    </div>
  );
}

/** Load of the experts that each expert-parallel rank computes, whole session. */
function RankBars({ counts }: { counts: readonly number[] }) {
  const { t } = useTranslation();
  const total = counts.reduce((sum, count) => sum + count, 0);
  const peak = Math.max(1, ...counts);
  return (
    <ol className="expert-bars" data-testid="rank-load">
      {counts.map((count, rank) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: the index is the rank
        <li key={rank}>
          <div className="rank-bar">
            <span className="num">{t("layer.rank", { rank })}</span>
            <span className="bar-track">
              <span className="bar-fill" style={{ inlineSize: `${(count / peak) * 100}%` }} />
            </span>
            <span className="num">{formatRatio(loadRatio(count, total, counts.length))}</span>
            <span className="num muted">{formatInteger(count)}</span>
          </div>
        </li>
      ))}
    </ol>
  );
}

const sampledOut = (dropped: readonly DropCounter[]) =>
  dropped
    .filter(({ reason }) => reason === DropReason.SAMPLED_OUT)
    .reduce((sum, { numDecisions }) => sum + numDecisions, 0n);

export interface AccountNumbers {
  produced: bigint;
  counted: bigint;
  dropped: bigint;
  sampledOut: bigint;
  inFlight: bigint;
  missing: bigint;
  /** What produced = counted + dropped + in flight leaves over; never below 0, since counts may be newer than a status. */
  unexplained: bigint;
}

export function accountNumbers(account: Account | undefined): AccountNumbers {
  const dropped = (account?.dropped ?? []).reduce((sum, { numDecisions }) => sum + numDecisions, 0n);
  const sampled = sampledOut(account?.dropped ?? []);
  const produced = account?.numProduced ?? 0n;
  const counted = account?.numCounted ?? 0n;
  const inFlight = account?.numInFlight ?? 0n;
  const rest = produced - counted - dropped - inFlight;
  return {
    produced,
    counted,
    dropped: dropped - sampled,
    sampledOut: sampled,
    inFlight,
    missing: account?.numMissingMessages ?? 0n,
    unexplained: rest > 0n ? rest : 0n,
  };
}

export function Capture() {
  const { t } = useTranslation();
  const account = useApp((state) => state.picture?.snapshot.account);
  const sources = useApp((state) => state.picture?.snapshot.sources) ?? [];
  const components = useApp((state) => state.components);
  const numbers = accountNumbers(account);
  const rows: [string, bigint, boolean?][] = [
    [t("capture.produced"), numbers.produced],
    [t("capture.counted"), numbers.counted],
    [t("capture.dropped"), numbers.dropped, true],
    [t("capture.sampledOut"), numbers.sampledOut],
    [t("capture.inFlight"), numbers.inFlight],
    [t("capture.difference"), numbers.unexplained, true],
    [t("capture.missing"), account?.numMissingMessages ?? 0n, true],
    [t("capture.lost"), account?.numLostStreamMessages ?? 0n, true],
    [t("capture.late"), account?.numLate ?? 0n],
    [t("capture.deadLettered"), account?.numDeadLettered ?? 0n, true],
  ];
  return (
    <div className="capture">
      <h3>{t("capture.account")}</h3>
      <dl className="facts">
        {rows.map(([name, value, isBad]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd className={isBad && value > 0n ? "num warning" : "num"}>{formatInteger(value)}</dd>
          </div>
        ))}
        {(account?.dropped ?? []).map(({ reason, numDecisions }) => (
          <div key={reason} className="sub">
            <dt>{t(`dropReason.${reason}`)}</dt>
            <dd className="num">{formatInteger(numDecisions)}</dd>
          </div>
        ))}
      </dl>
      <p className="muted small">{t("capture.accountNote")}</p>
      <h4>{t("capture.sources")}</h4>
      {sources.length === 0 && <p className="muted">{t("capture.noSources")}</p>}
      {sources.map((source) => (
        <div className="source" key={source.sourceId}>
          <p>
            <span className={`dot-state ${source.isLive ? "ready" : "off"}`} /> <b>{source.kind || source.hostName}</b>{" "}
            <span className="muted">
              {source.hostName}:{source.processId} ·{" "}
              {source.isLive ? t("capture.live") : source.saidGoodbye ? t("capture.goodbye") : t("capture.gone")}
            </span>
          </p>
          <p className="muted small num">
            {t("capture.level")} {t(`level.${source.level}`)} ·{" "}
            {t("status.sampling", { rate: formatSampling(source.samplingRate) })} ·{" "}
            {t("capture.sequence", { n: formatInteger(source.lastSequence) })} ·{" "}
            {t("capture.overhead", { share: formatPercent(source.hookTimeShare, 1) })}
          </p>
          <Rank coordinates={source.coordinates} />
          {source.tailUnknownBytes > 0n && (
            <p className="warning small">
              {t("capture.tailUnknown", { bytes: formatBytes(Number(source.tailUnknownBytes)) })}
            </p>
          )}
          <h4>{t("health.title")}</h4>
          <HealthList checks={source.checks} />
          {source.problems.map((problem) => (
            <p className="warning small" key={problem}>
              {problem}
            </p>
          ))}
          {Object.keys(source.series).length > 0 && (
            <dl className="facts">
              {Object.entries(source.series)
                .sort(([a], [b]) => (a < b ? -1 : 1))
                .map(([name, value]) => (
                  <div key={name} className="sub">
                    <dt className="mono">{name}</dt>
                    <dd className="num">{formatValue(value)}</dd>
                  </div>
                ))}
            </dl>
          )}
        </div>
      ))}
      <h4>{t("capture.components")}</h4>
      {components.map(({ name, state, detail }) => (
        <p key={name}>
          <span className={`dot-state ${componentClass(state)}`} />{" "}
          {t(`component.name.${name}`, { defaultValue: name })}{" "}
          <span className="muted">
            {t(`component.state.${state}`)} {detail}
          </span>
        </p>
      ))}
    </div>
  );
}

/** Where a source stands in a sharded model; nothing for a process on its own. */
function Rank({ coordinates }: { coordinates: ParallelCoordinates | undefined }) {
  const { t } = useTranslation();
  if (!coordinates || coordinates.worldSize <= 1) return null;
  return (
    <p className="muted small num" data-testid="rank">
      {t("capture.rank", {
        rank: coordinates.globalRank,
        size: coordinates.worldSize,
        dp: coordinates.dataParallelRank,
        tp: coordinates.tensorParallelRank,
        ep: coordinates.expertParallelRank,
        pp: coordinates.pipelineParallelRank,
      })}
      {coordinates.replicaOfRank !== undefined && (
        <>
          {" · "}
          {t("capture.replica", { rank: coordinates.replicaOfRank })}
        </>
      )}
    </p>
  );
}

export function componentClass(state: ComponentState): string {
  return state === ComponentState.READY ? "ready" : state === ComponentState.DOWN ? "down" : "starting";
}

export function formatSampling(rate: number): string {
  return rate >= 1 || rate <= 0 ? "1 : 1" : `1 : ${Number((1 / rate).toFixed(1))}`;
}

/** Loads the list of requests when a session is chosen, and again as its requests change. */
export function useRequestList(): void {
  const { generator } = useServices();
  const sessionId = useApp((state) => state.sessionId);
  const isLive = useApp((state) => state.connection.state === "live");
  const numTokens = useApp((state) => Math.floor((state.picture?.whole.numTokens[0] ?? 0) / 32));
  // biome-ignore lint/correctness/useExhaustiveDependencies: new tokens mean that the list has changed
  useEffect(() => {
    if (!isLive) return;
    const timer = setTimeout(() => void generator.loadList(), 500);
    return () => clearTimeout(timer);
  }, [generator, sessionId, isLive, numTokens]);
}
