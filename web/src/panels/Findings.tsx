import { Fragment, lazy, Suspense, useMemo, useState } from "react";
import { useTranslation } from "react-i18next";
import { findingKey, isClosed, isOpen, isSuperseded, SEVERITY_NAME, sortFindings, stateName } from "../findings";
import { formatClock, formatInteger, formatPercent, formatValue } from "../format";
import type { EvidenceRow, Finding } from "../gen/moe_debugger/v1/session_pb";
import { findingText, metricName, sampleUnit } from "../i18n";
import { layerName } from "../layers";
import { useApp } from "../store";
import { SeverityGlyph } from "../ui/icons";
import { FindingActions } from "./FindingActions";

// Loaded with the first finding that has one.
const LazyExplanation = lazy(() => import("./Explanation"));

/** Selects the place that a finding names, and shows its diagnosis. */
export function showFinding(finding: Finding): void {
  const layers = useApp.getState().picture?.whole.layers ?? [];
  const row = layers.findIndex(({ layerIndex }) => layerIndex === finding.layerIndex);
  useApp.setState({
    findingKey: findingKey(finding),
    sidebar: "diagnosis",
    ...(row >= 0 ? { row } : {}),
    ...(finding.expertId !== undefined ? { expert: finding.expertId } : {}),
  });
}

export function useFindings(): Finding[] {
  const findings = useApp((state) => state.picture?.snapshot.findings);
  return useMemo(() => sortFindings(findings ?? []), [findings]);
}

export function FindingRow({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const key = findingKey(finding);
  const isSelected = useApp((state) => state.findingKey === key);
  const [isOpen, setOpen] = useState(false);
  // Of a model with several stacks: which one the layer is of.
  const where = useApp((state) => {
    const layers = state.picture?.whole.layers ?? [];
    const row = layers.findIndex(({ layerIndex }) => layerIndex === finding.layerIndex);
    return row >= 0 ? layerName(layers, row).place : "";
  });
  const severity = SEVERITY_NAME[finding.severity] ?? "info";
  const state = stateName(finding);
  const title = findingText(finding, "title");
  const summary = findingText(finding, "summary");
  const place =
    finding.layerIndex === undefined
      ? ""
      : finding.expertId === undefined
        ? t("console.layer", { layer: finding.layerIndex })
        : t("console.layerExpert", { layer: finding.layerIndex, expert: finding.expertId });
  return (
    <Fragment>
      <div
        className={`console-row finding-row ${severity} is-${state}${isSelected ? " selected" : ""}`}
        data-testid="finding"
        data-code={finding.code}
        data-severity={severity}
        data-layer={finding.layerIndex}
        data-state={state}
      >
        <button
          type="button"
          className="expander"
          aria-expanded={isOpen}
          aria-label={`${t("console.expand")}: ${title}`}
          onClick={() => {
            setOpen(!isOpen);
            if (!isOpen) showFinding(finding);
          }}
        />
        <span className="cell-severity">
          <SeverityGlyph severity={finding.severity} />
          <span className={`word ${severity}`}>{t(`severity.${finding.severity}`)}</span>
        </span>
        <span className="cell-time num">{formatClock(finding.lastSeenAtUnixNs)}</span>
        <Step step={finding.sinceStep} />
        <span className="cell-code num" title={finding.ruleId || finding.code}>
          {finding.ruleId || finding.code}
        </span>
        <span className="cell-sentence">
          <StateTag finding={finding} /> <b>{title}</b> {summary}
        </span>
        {place ? (
          <button type="button" className="link num" title={where || undefined} onClick={() => showFinding(finding)}>
            {place}
          </button>
        ) : (
          <span />
        )}
        <span className="count num" title={t("diagnosis.times", { n: finding.numOccurrences })}>
          {finding.numOccurrences}
        </span>
      </div>
      {isOpen && (
        <div className="finding-details">
          <p className="finding-sentence">{summary}</p>
          <EvidenceTable rows={finding.evidence} severity={severity} code={finding.code} isFinding />
          <div>
            <FindingLife finding={finding} />
            <FindingActions finding={finding} />
            <Advice finding={finding} />
          </div>
        </div>
      )}
    </Fragment>
  );
}

function Step({ step }: { step: bigint | undefined }) {
  const { t } = useTranslation();
  if (step === undefined) return <span className="cell-step" />;
  const number = formatInteger(step);
  return (
    <span className="cell-step num" title={t("console.step", { step: number })}>
      {number}
    </span>
  );
}

interface EvidenceProps {
  rows: EvidenceRow[];
  severity: string;
  /** Of the finding or cause. */
  code: string;
  /** Says that there is no baseline, where there is none. */
  isFinding?: boolean;
}

export function EvidenceTable({ rows, severity, code, isFinding = false }: EvidenceProps) {
  const { t } = useTranslation();
  if (rows.length === 0) return null;
  const hasBaseline = rows.some(({ baseline }) => baseline !== undefined);
  return (
    <table className="evidence" data-testid="evidence">
      {isFinding && !hasBaseline && <caption className="muted small">{t("diagnosis.noBaseline")}</caption>}
      <thead>
        <tr>
          <th scope="col">{t("diagnosis.metric")}</th>
          <th scope="col">{t("diagnosis.value")}</th>
          {hasBaseline && <th scope="col">{t("diagnosis.baseline")}</th>}
          <th scope="col">{t("diagnosis.rule")}</th>
          <th scope="col">{t("diagnosis.n")}</th>
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <tr key={row.metric}>
            <th scope="row">{metricName(row.metric)}</th>
            <td className={`num ${row.rule ? severity : ""}`}>
              <bdi dir="ltr">{valueText(row)}</bdi>
            </td>
            {hasBaseline && <td className="num">{row.baseline === undefined ? "–" : formatValue(row.baseline)}</td>}
            <td className="num">
              <bdi dir="ltr">{row.rule}</bdi>
            </td>
            <td className="num">
              {row.sampleSize > 0n ? withUnit(formatInteger(row.sampleSize), sampleUnit(row, code)) : "–"}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

const withUnit = (value: string, unit: string) => (unit ? `${value} ${unit}` : value);

function valueText({ metric, unit, value, rule, baseline }: EvidenceRow): string {
  // "Requests: 62 requests" says it twice, and nothing has no unit.
  if (Number.isNaN(value) || unit === "1" || metricName(metric).toLowerCase() === unit) return formatValue(value);
  // A part of something, unless it stands beside a limit or an earlier value that is no percentage.
  if (unit.startsWith("of ") && !rule && baseline === undefined) return withUnit(formatPercent(value), unit);
  return withUnit(formatValue(value), unit);
}

/** Where it began, why, and what to do; of a finding that was not explained, what the catalogue advises. */
export function Advice({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const remedy = findingText(finding, "remedy");
  return (
    <>
      {finding.explanation && (
        <Suspense fallback={<p className="muted">{t("loading.panel")}</p>}>
          <LazyExplanation finding={finding} explanation={finding.explanation} />
        </Suspense>
      )}
      {remedy && !finding.explanation?.remedies.length && (
        <div className="remedy">
          <h4>{t("diagnosis.todo")}</h4>
          {remedy.split("\n").map((line) => (
            <p key={line}>{line}</p>
          ))}
        </div>
      )}
    </>
  );
}

/** What became of a finding, where it is not simply there. */
export function StateTag({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const state = stateName(finding);
  if (state === "open") return null;
  return (
    <span className={`state-tag ${state}`} title={finding.supersededBy || undefined}>
      {t(`life.state.${state}`)}
    </span>
  );
}

/** Since when, until when, how often, and who said what. */
export function FindingLife({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const since =
    finding.sinceStep === undefined
      ? t("life.since", { clock: formatClock(finding.openedAtUnixNs) })
      : t("life.sinceStep", {
          clock: formatClock(finding.openedAtUnixNs),
          step: formatInteger(finding.sinceStep),
        });
  const lines = [
    since,
    isClosed(finding)
      ? t("life.closed", { clock: formatClock(finding.closedAtUnixNs) })
      : t("diagnosis.seen", { clock: formatClock(finding.lastSeenAtUnixNs) }),
    isSuperseded(finding) && t("life.supersededBy", { rule: finding.supersededBy }),
    t("life.occurrences", { count: finding.numOccurrences, n: formatInteger(finding.numOccurrences) }),
    finding.numReopened > 0 && t("life.reopened", { count: finding.numReopened }),
    isOpen(finding) &&
      finding.numQuietSeconds > 0 &&
      t("life.quiet", { n: finding.numQuietSeconds, of: finding.numQuietSecondsToClose }),
    finding.acknowledgedAtUnixNs > 0n &&
      t("life.acknowledgedBy", { who: finding.acknowledgedBy, clock: formatClock(finding.acknowledgedAtUnixNs) }),
    finding.silencedUntilUnixNs > 0n &&
      t("life.silencedBy", { who: finding.silencedBy, clock: formatClock(finding.silencedUntilUnixNs) }),
  ].filter((line) => typeof line === "string");
  return (
    <p className="finding-life muted small" data-testid="finding-life">
      {lines.map((line, i) => (
        <Fragment key={line}>
          {i > 0 && " · "}
          <span>{line}</span>
        </Fragment>
      ))}
    </p>
  );
}
