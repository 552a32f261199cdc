// Findings in the page: their order, identity and rows for the Console.
import { type Finding, Severity } from "./gen/moe_debugger/v1/session_pb";
import { findingText } from "./i18n";
import type { Filterable } from "./model/filter";

export function findingKey(finding: Finding): string {
  return `${finding.ruleId}/${finding.code}/${finding.layerIndex ?? ""}/${finding.expertId ?? ""}`;
}

/** The worst first, then the newest. */
export function sortFindings(findings: readonly Finding[]): Finding[] {
  return [...findings].sort(
    (a, b) =>
      b.severity - a.severity ||
      Number(b.lastSeenAtUnixNs - a.lastSeenAtUnixNs) ||
      (a.layerIndex ?? 0) - (b.layerIndex ?? 0) ||
      (a.expertId ?? 0) - (b.expertId ?? 0),
  );
}

export function countBySeverity(findings: readonly Finding[]): Record<"critical" | "warning" | "info", number> {
  return {
    critical: findings.filter(({ severity }) => severity === Severity.CRITICAL).length,
    warning: findings.filter(({ severity }) => severity === Severity.WARNING).length,
    info: findings.filter(({ severity }) => severity === Severity.INFO).length,
  };
}

export const SEVERITY_NAME: Record<number, "critical" | "warning" | "info"> = {
  [Severity.CRITICAL]: "critical",
  [Severity.WARNING]: "warning",
};

export function filterable(finding: Finding): Filterable {
  const severity = SEVERITY_NAME[finding.severity] ?? "info";
  return {
    text: `${findingText(finding, "title")} ${findingText(finding, "summary")} ${finding.ruleId} ${finding.code}`,
    fields: {
      layer: finding.layerIndex,
      expert: finding.expertId,
      severity: severity === "critical" ? "critical" : severity,
      rule: finding.ruleId,
      code: finding.code,
      step: finding.sinceStep === undefined ? undefined : Number(finding.sinceStep),
      count: finding.numOccurrences,
    },
  };
}
