import { lazy, Suspense, useState } from "react";
import { useTranslation } from "react-i18next";
import { countFindings, filterable, findingKey, needsAttention, SEVERITY_NAME, stateName } from "../findings";
import { formatClockMs, formatInteger } from "../format";
import { ComponentState } from "../gen/moe_debugger/v1/gateway_pb";
import { type Finding, Severity } from "../gen/moe_debugger/v1/session_pb";
import { matchesFilter } from "../model/filter";
import { type ComponentEvent, useApp } from "../store";
import { SearchIcon, SeverityGlyph } from "../ui/icons";
import { FindingRow, useFindings } from "./Findings";

// Its tables and completions are no part of the first look.
const QueryConsole = lazy(() => import("./QueryConsole"));

type Chip = "all" | "critical" | "warning" | "info" | "silenced" | "superseded" | "closed" | "component";

const SEVERITY_OF: Partial<Record<Chip, Severity>> = {
  critical: Severity.CRITICAL,
  warning: Severity.WARNING,
  info: Severity.INFO,
};

const SET_ASIDE = new Set<Chip>(["silenced", "superseded", "closed"]);

function isUnderChip(finding: Finding, chip: Chip): boolean {
  if (chip === "all" || chip === stateName(finding)) return true;
  return needsAttention(finding) && chip === (SEVERITY_NAME[finding.severity] ?? "info");
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
  const counts = countFindings(findings);
  const shown = findings.filter((finding) => isUnderChip(finding, chip) && matchesFilter(filterable(finding), query));
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
    ["silenced", counts.silenced],
    ["superseded", counts.superseded],
    ["closed", counts.closed],
    ["component", events.length + problems.length],
  ];
  // Chips of what is set aside are there where there is some.
  const shownChips = chips.filter(([id, n]) => n > 0 || id === chip || !SET_ASIDE.has(id));
  return (
    <div className="console">
      <div className="console-bar">
        <h2>{t("console.title")}</h2>
        <fieldset className="chips" aria-label={t("console.filter")}>
          <button type="button" className="chip" aria-pressed={chip === "all"} onClick={() => setChip("all")}>
            {t("console.all")}
          </button>
          {shownChips.map(([id, n]) => (
            <button type="button" className="chip" key={id} aria-pressed={chip === id} onClick={() => setChip(id)}>
              {SEVERITY_OF[id] !== undefined && <SeverityGlyph severity={SEVERITY_OF[id]} />}
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
      <Suspense fallback={<div className="console-bar" />}>
        <QueryConsole />
      </Suspense>
      <div className="console-rows" role="log" aria-live="off" aria-label={t("console.title")}>
        {problems.map(({ host, problem, id }) => (
          <div className="console-row component-row problem-row warning" key={`${id}${problem}`}>
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
