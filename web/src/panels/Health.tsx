// What the sources' own checks say of the capture: a shape, a word and a colour for each, and the first fault as text.
import { useTranslation } from "react-i18next";
import { formatInteger } from "../format";
import { CheckStatus, type HealthCheck } from "../gen/moe_debugger/v1/routing_pb";

const CLASS: Record<number, string> = { [CheckStatus.OK]: "ok", [CheckStatus.FAILED]: "failed" };
const GLYPH: Record<string, string> = { ok: "✓", failed: "✕", unknown: "?" };

export const statusClass = (check: HealthCheck): string => CLASS[check.status] ?? "unknown";

export function HealthList({ checks }: { checks: HealthCheck[] }) {
  const { t } = useTranslation();
  if (checks.length === 0) return <p className="muted small">{t("health.none")}</p>;
  const numFailed = checks.filter(({ status }) => status === CheckStatus.FAILED).length;
  const numUnknown = checks.filter((check) => statusClass(check) === "unknown").length;
  return (
    <div className="health">
      <p className={numFailed > 0 ? "small critical" : "small muted"} data-testid="health-summary">
        {numFailed > 0
          ? t("health.failed", { count: numFailed })
          : numUnknown > 0
            ? t("health.unknown", { count: numUnknown })
            : t("health.fine")}
      </p>
      <ul>
        {checks.map((check) => {
          const state = statusClass(check);
          return (
            <li
              key={check.name}
              className={state}
              data-testid="health-check"
              data-check={check.name}
              data-state={state}
            >
              <span className="health-glyph" aria-hidden="true">
                {GLYPH[state]}
              </span>
              <span className="health-name" title={t(`health.about.${check.name}`, { defaultValue: "" })}>
                {t(`health.name.${check.name}`, { defaultValue: check.name })}
              </span>
              <span className="num muted">
                <span className="visually-hidden">{t(`health.state.${state}`)}: </span>
                {state === "failed"
                  ? t("health.violations", {
                      violations: formatInteger(check.numViolations),
                      checked: formatInteger(check.numChecked),
                      unit: check.unit,
                    })
                  : state === "ok"
                    ? t("health.checked", { checked: formatInteger(check.numChecked), unit: check.unit })
                    : t("health.state.unknown")}
              </span>
              {check.example && <span className="health-example small">{check.example}</span>}
            </li>
          );
        })}
      </ul>
    </div>
  );
}
