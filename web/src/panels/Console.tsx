import { Fragment, useMemo, useState } from "react";
import { useTranslation } from "react-i18next";
import { countBySeverity, filterable, findingKey, SEVERITY_NAME, sortFindings } from "../findings";
import { formatClock, formatClockMs, formatInteger, formatValue } from "../format";
import { ComponentState } from "../gen/moe_debugger/v1/gateway_pb";
import { type Finding, Severity } from "../gen/moe_debugger/v1/session_pb";
import { findingText, metricName } from "../i18n";
import { layerName } from "../layers";
import { matchesFilter } from "../model/filter";
import { type ComponentEvent, useApp } from "../store";
import { SearchIcon, SeverityGlyph } from "../ui/icons";

type Chip = "all" | "critical" | "warning" | "info" | "component";

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

/** Findings, worst first, and what happened to the fleet's components. */
export function Console() {
  const { t } = useTranslation();
  const findings = useFindings();
  const events = useApp((state) => state.componentEvents);
  const sources = useApp((state) => state.picture?.snapshot.sources);
  const sessionId = useApp((state) => state.sessionId);
  const numTokens = useApp((state) => state.picture?.whole.numTokens[0] ?? 0);
  const [chip, setChip] = useState<Chip>("all");
  const [query, setQuery] = useState("");
  const counts = countBySeverity(findings);
  const shown = findings.filter(
    (finding) =>
      (chip === "all" || chip === (SEVERITY_NAME[finding.severity] ?? "info")) &&
      matchesFilter(filterable(finding), query),
  );
  const shownEvents =
    chip === "all" || chip === "component"
      ? events.filter(({ name, detail }) =>
          matchesFilter({ text: `${name} ${detail}`, fields: { component: name } }, query),
        )
      : [];
  const problems =
    chip === "all" || chip === "component"
      ? (sources ?? []).flatMap((source) =>
          source.isLive
            ? source.problems.map((problem) => ({ host: source.hostName, problem, id: source.sourceId }))
            : [],
        )
      : [];
  const hasAny = findings.length + events.length + problems.length > 0;
  const chips: [Exclude<Chip, "all">, number][] = [
    ["critical", counts.critical],
    ["warning", counts.warning],
    ["info", counts.info],
    ["component", events.length + problems.length],
  ];
  return (
    <div className="console">
      <div className="console-bar">
        <h2>{t("console.title")}</h2>
        <fieldset className="chips" aria-label={t("console.filter")}>
          <button type="button" className="chip" aria-pressed={chip === "all"} onClick={() => setChip("all")}>
            {t("console.all")}
          </button>
          {chips.map(([id, n]) => (
            <button type="button" className="chip" key={id} aria-pressed={chip === id} onClick={() => setChip(id)}>
              {id !== "component" && (
                <SeverityGlyph
                  severity={id === "critical" ? Severity.CRITICAL : id === "warning" ? Severity.WARNING : Severity.INFO}
                />
              )}
              <span className={n > 0 ? id : undefined}>{t(`console.${id}`, { count: n })}</span>
            </button>
          ))}
        </fieldset>
        <label className="filter">
          <SearchIcon />
          <span className="visually-hidden">{t("console.filter")}</span>
          <input
            type="search"
            id="console-filter"
            value={query}
            placeholder={t("console.filterHint")}
            onChange={(event) => setQuery(event.target.value)}
          />
        </label>
      </div>
      <div className="console-rows" role="log" aria-live="off" aria-label={t("console.title")}>
        {problems.map(({ host, problem, id }) => (
          <div className="console-row component-row warning" key={`${id}${problem}`}>
            <SeverityGlyph severity={Severity.WARNING} />
            <span className="cell-sentence">{t("console.sourceProblem", { host, problem })}</span>
          </div>
        ))}
        {shown.map((finding) => (
          <FindingRow finding={finding} key={findingKey(finding)} />
        ))}
        {shownEvents.map((event) => (
          <ComponentRow event={event} key={event.id} />
        ))}
        {shown.length + shownEvents.length + problems.length === 0 && (
          <p className="empty-line muted">
            {!sessionId
              ? t("console.emptyNoSession")
              : hasAny && (query || chip !== "all")
                ? t("console.emptyFilter")
                : numTokens > 0
                  ? t("console.empty", { tokens: formatInteger(numTokens) })
                  : t("console.emptyWaiting")}
          </p>
        )}
      </div>
    </div>
  );
}

function FindingRow({ finding }: { finding: Finding }) {
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
        className={`console-row finding-row ${severity}${isSelected ? " selected" : ""}`}
        data-testid="finding"
        data-code={finding.code}
        data-severity={severity}
        data-layer={finding.layerIndex}
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
        <span className="cell-step num">{finding.sinceStep === undefined ? "" : formatInteger(finding.sinceStep)}</span>
        <span className="cell-code num">{finding.ruleId || finding.code}</span>
        <span className="cell-sentence">
          <b>{title}</b> {summary}
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
          <EvidenceTable finding={finding} />
          <Remedy finding={finding} />
        </div>
      )}
    </Fragment>
  );
}

export function EvidenceTable({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  if (finding.evidence.length === 0) return null;
  const hasBaseline = finding.evidence.some(({ baseline }) => baseline !== undefined);
  const severity = SEVERITY_NAME[finding.severity] ?? "info";
  return (
    <table className="evidence">
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
        {finding.evidence.map((row) => (
          <tr key={row.metric}>
            <th scope="row">{metricName(row.metric)}</th>
            <td className={`num ${row.rule ? severity : ""}`}>
              <bdi dir="ltr">
                {formatValue(row.value)}
                {row.unit && row.unit !== "1" ? ` ${row.unit}` : ""}
              </bdi>
            </td>
            {hasBaseline && <td className="num">{row.baseline === undefined ? "–" : formatValue(row.baseline)}</td>}
            <td className="num">
              <bdi dir="ltr">{row.rule}</bdi>
            </td>
            <td className="num">{row.sampleSize > 0n ? formatInteger(row.sampleSize) : "–"}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

export function Remedy({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const remedy = findingText(finding, "remedy");
  if (!remedy) return null;
  return (
    <div className="remedy">
      <h4>{t("diagnosis.todo")}</h4>
      {remedy.split("\n").map((line) => (
        <p key={line}>{line}</p>
      ))}
    </div>
  );
}

function ComponentRow({ event }: { event: ComponentEvent }) {
  const { t } = useTranslation();
  const name = t(`component.name.${event.name}`, { defaultValue: event.name });
  const severity =
    event.state === ComponentState.DOWN
      ? Severity.CRITICAL
      : event.state === ComponentState.READY
        ? Severity.INFO
        : Severity.WARNING;
  const kind = SEVERITY_NAME[severity] ?? "info";
  return (
    <div className={`console-row component-row ${kind}`} data-testid="component-event" data-component={event.name}>
      <span />
      <span className="cell-severity">
        <SeverityGlyph severity={severity} />
        <span className={`word ${kind}`}>{t(`severity.${severity}`)}</span>
      </span>
      <span className="cell-time num">{formatClockMs(event.at)}</span>
      <span className="cell-step" />
      <span className="cell-code num">{event.name}</span>
      <span className="cell-sentence">
        <b>{t("component.is", { name, state: t(`component.state.${event.state}`) })}</b> {event.detail}
      </span>
    </div>
  );
}
