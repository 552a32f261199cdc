import { lazy, Suspense, useEffect } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { findingKey, needsAttention, SEVERITY_NAME, stateName } from "../findings";
import { formatInteger } from "../format";
import { findingText } from "../i18n";
import { layerName } from "../layers";
import { useApp } from "../store";
import { ErrorBoundary } from "../ui/ErrorBoundary";
import { SeverityGlyph } from "../ui/icons";
import { Tabs } from "../ui/Tabs";
import { FindingActions } from "./FindingActions";
import { Advice, EvidenceTable, FindingLife, StateTag, showFinding, useFindings } from "./Findings";
import { Sparkline } from "./History";

// Details are loaded with the first look at them.
const LazyCapture = lazy(() => import("./Capture"));
const LazyLayer = lazy(() => import("./LayerDetails"));
const LazyAssurance = lazy(() => import("./Assurance"));

export function Details({ of }: { of: "layer" | "capture" }) {
  const { t } = useTranslation();
  return (
    <Suspense fallback={<p className="muted">{t("loading.panel")}</p>}>
      {of === "layer" ? <LazyLayer /> : <LazyCapture />}
    </Suspense>
  );
}

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
          {sidebar === "layer" && <Details of="layer" />}
          {sidebar === "capture" && <Details of="capture" />}
        </ErrorBoundary>
      </div>
    </aside>
  );
}

/** The finding that is selected, or the worst; and how sure findings are. */
export function Diagnosis() {
  return (
    <>
      <SelectedFinding />
      <Suspense fallback={null}>
        <LazyAssurance />
      </Suspense>
    </>
  );
}

function SelectedFinding() {
  const { t } = useTranslation();
  const findings = useFindings();
  const selected = useApp((state) => state.findingKey);
  const layers = useApp((state) => state.picture?.whole.layers);
  const numTokens = useApp((state) => Math.max(0, ...(state.picture?.whole.numTokens ?? [])));
  const chosen = findings.findIndex((finding) => findingKey(finding) === selected);
  const at = Math.max(0, chosen);
  const [first] = findings;
  const worst = first && needsAttention(first) ? first : undefined;
  const finding = chosen >= 0 ? findings[chosen] : worst;
  // Once it is on screen it stays: what comes or is set aside must not change what is being read.
  const pinned = finding && findingKey(finding);
  useEffect(() => {
    if (pinned !== undefined) useApp.setState({ findingKey: pinned });
  }, [pinned]);
  if (!finding) {
    return (
      <div className="diagnosis">
        <h3>{t("diagnosis.none")}</h3>
        <p>
          {numTokens > 0
            ? t(first ? "life.noneOpen" : "diagnosis.noneText", {
                tokens: formatInteger(numTokens),
                layers: layers?.length ?? 0,
              })
            : t("diagnosis.noneWaiting")}
        </p>
        <p className="muted">{t("diagnosis.noneNote")}</p>
        {first && (
          <p>
            <button type="button" className="button" onClick={() => showFinding(first)}>
              {t("life.others", { count: findings.length })}
            </button>
          </p>
        )}
      </div>
    );
  }
  const severity = SEVERITY_NAME[finding.severity] ?? "info";
  const row = layers?.findIndex(({ layerIndex }) => layerIndex === finding.layerIndex) ?? -1;
  const place = row >= 0 && layers ? layerName(layers, row).place : "";
  const step = (delta: number) => {
    const next = findings[(at + delta + findings.length) % findings.length];
    if (next) showFinding(next);
  };
  return (
    <div
      className={`diagnosis ${severity} is-${stateName(finding)}`}
      data-testid="diagnosis"
      data-rule={finding.ruleId}
    >
      <header className="diagnosis-head">
        <SeverityGlyph severity={finding.severity} size={18} />
        <h3>
          <span className="visually-hidden">{t(`severity.${finding.severity}`)}: </span>
          {findingText(finding, "title")}
        </h3>
        <StateTag finding={finding} />
      </header>
      <div className="rule-line muted small">
        <span className="num">{finding.ruleId}</span>
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
      </div>
      <FindingLife finding={finding} />
      <FindingActions finding={finding} />
      {worst && worst.severity > (needsAttention(finding) ? finding.severity : 0) && (
        <p className="worse small" data-testid="worse">
          {t("diagnosis.worse", { title: findingText(worst, "title") })}{" "}
          <button type="button" className="link" onClick={() => showFinding(worst)}>
            {t("diagnosis.showWorse")}
          </button>
        </p>
      )}
      {place && <p className="muted small">{place}</p>}
      <p className="diagnosis-summary">{findingText(finding, "summary")}</p>
      {row >= 0 && <Sparkline row={row} label={t("layer.spark")} />}
      <h4>{t("diagnosis.evidence")}</h4>
      <EvidenceTable rows={finding.evidence} severity={severity} code={finding.code} isFinding />
      <Advice finding={finding} />
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

/** Loads the list of requests when a session is chosen, and again as its requests change. */
export function useRequestList(): void {
  const { generator } = useServices();
  const sessionId = useApp((state) => state.sessionId);
  const isLive = useApp((state) => state.connection.state === "live");
  const numTokens = useApp((state) => Math.floor(Math.max(0, ...(state.picture?.whole.numTokens ?? [])) / 32));
  // biome-ignore lint/correctness/useExhaustiveDependencies: new tokens mean that the list has changed
  useEffect(() => {
    if (!isLive) return;
    const timer = setTimeout(() => void generator.loadList(), 500);
    return () => clearTimeout(timer);
  }, [generator, sessionId, isLive, numTokens]);
}
