// Findings in the page: their order, identity, state and rows for the Console.
import { type Finding, FindingState, Severity } from "./gen/moe_debugger/v1/session_pb";
import { findingText } from "./i18n";
import type { Filterable } from "./model/filter";

export function findingKey(finding: Finding): string {
  return `${finding.ruleId}/${finding.code}/${finding.layerIndex ?? ""}/${finding.expertId ?? ""}`;
}

/** A worse finding at its place covers it: it is not judged, and not over. */
export const isSuperseded = (finding: Finding): boolean => finding.state === FindingState.SUPERSEDED;
export const isClosed = (finding: Finding): boolean => finding.state === FindingState.CLOSED;
export const isOpen = (finding: Finding): boolean => !isClosed(finding) && !isSuperseded(finding);
// The analyzer leaves out a silence that is over, by its own clock.
export const isSilenced = (finding: Finding): boolean => finding.silencedUntilUnixNs > 0n;
export const isAcknowledged = (finding: Finding): boolean => finding.acknowledgedAtUnixNs > 0n;
/** What badges count: it is there now, and nobody asked to be left alone with it. */
export const needsAttention = (finding: Finding): boolean => isOpen(finding) && !isSilenced(finding);

export type FindingStateName = "open" | "acknowledged" | "silenced" | "superseded" | "closed";

/** One word for the state of a finding: the one that matters most. */
export function stateName(finding: Finding): FindingStateName {
  if (isClosed(finding)) return "closed";
  if (isSuperseded(finding)) return "superseded";
  if (isSilenced(finding)) return "silenced";
  return isAcknowledged(finding) ? "acknowledged" : "open";
}

/** Every word of the state that is true of a finding, for the filter. */
function stateWords(finding: Finding): FindingStateName[] {
  const words: FindingStateName[] = [isClosed(finding) ? "closed" : isSuperseded(finding) ? "superseded" : "open"];
  if (isAcknowledged(finding)) words.push("acknowledged");
  if (isSilenced(finding)) words.push("silenced");
  return words;
}

const RANK: Record<FindingStateName, number> = { open: 0, acknowledged: 0, silenced: 1, superseded: 2, closed: 3 };

/** What needs attention first, then what is set aside, then what is over; of these the worst first, then the newest. */
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
  superseded: number;
  closed: number;
}

/** How many findings need attention, by severity, and how many others there are. */
export function countFindings(findings: readonly Finding[]): FindingCounts {
  const counts = { critical: 0, warning: 0, info: 0, silenced: 0, superseded: 0, closed: 0 };
  for (const finding of findings) {
    const state = stateName(finding);
    if (state === "open" || state === "acknowledged") counts[SEVERITY_NAME[finding.severity] ?? "info"] += 1;
    else counts[state] += 1;
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
      state: stateWords(finding),
      rule: finding.ruleId,
      code: finding.code,
      step: finding.sinceStep === undefined ? undefined : Number(finding.sinceStep),
      count: finding.numOccurrences,
    },
  };
}
