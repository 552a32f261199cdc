// Findings in the page: their order, identity, state and rows for the Console.
import { type Finding, FindingState, Severity } from "./gen/moe_debugger/v1/session_pb";
import { findingText } from "./i18n";
import type { Filterable } from "./model/filter";

export function findingKey(finding: Finding): string {
  return `${finding.ruleId}/${finding.code}/${finding.layerIndex ?? ""}/${finding.expertId ?? ""}`;
}

export const isOpen = (finding: Finding): boolean => finding.state !== FindingState.CLOSED;
// The analyzer leaves out a silence that is over, by its own clock.
export const isSilenced = (finding: Finding): boolean => finding.silencedUntilUnixNs > 0n;
export const isAcknowledged = (finding: Finding): boolean => finding.acknowledgedAtUnixNs > 0n;
/** What badges count: it is there now, and nobody asked to be left alone with it. */
export const needsAttention = (finding: Finding): boolean => isOpen(finding) && !isSilenced(finding);

export type FindingStateName = "open" | "acknowledged" | "silenced" | "closed";

/** One word for the state of a finding: the one that matters most. */
export function stateName(finding: Finding): FindingStateName {
  if (!isOpen(finding)) return "closed";
  if (isSilenced(finding)) return "silenced";
  return isAcknowledged(finding) ? "acknowledged" : "open";
}

const RANK: Record<FindingStateName, number> = { open: 0, acknowledged: 0, silenced: 1, closed: 2 };

/** What needs attention first, then what is silenced, then what is over; of these the worst first, then the newest. */
export function sortFindings(findings: readonly Finding[]): Finding[] {
  return [...findings].sort(
    (a, b) =>
      RANK[stateName(a)] - RANK[stateName(b)] ||
      b.severity - a.severity ||
      Number(b.lastSeenAtUnixNs - a.lastSeenAtUnixNs) ||
      (a.layerIndex ?? 0) - (b.layerIndex ?? 0) ||
      (a.expertId ?? 0) - (b.expertId ?? 0),
  );
}

export interface FindingCounts {
  critical: number;
  warning: number;
  info: number;
  silenced: number;
  closed: number;
}

/** How many findings need attention, by severity, and how many others there are. */
export function countFindings(findings: readonly Finding[]): FindingCounts {
  const counts = { critical: 0, warning: 0, info: 0, silenced: 0, closed: 0 };
  for (const finding of findings) {
    if (needsAttention(finding)) counts[SEVERITY_NAME[finding.severity] ?? "info"] += 1;
    else counts[isOpen(finding) ? "silenced" : "closed"] += 1;
  }
  return counts;
}

export const SEVERITY_NAME: Record<number, "critical" | "warning" | "info"> = {
  [Severity.CRITICAL]: "critical",
  [Severity.WARNING]: "warning",
};

export function filterable(finding: Finding): Filterable {
  return {
    text: `${findingText(finding, "title")} ${findingText(finding, "summary")} ${finding.ruleId} ${finding.code}`,
    fields: {
      layer: finding.layerIndex,
      expert: finding.expertId,
      severity: SEVERITY_NAME[finding.severity] ?? "info",
      state: stateName(finding),
      rule: finding.ruleId,
      code: finding.code,
      step: finding.sinceStep === undefined ? undefined : Number(finding.sinceStep),
      count: finding.numOccurrences,
    },
  };
}
