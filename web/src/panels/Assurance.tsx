// How often findings are wrong, and what the early warning watches: said also where there is no finding.
import { useTranslation } from "react-i18next";
import { formatCompact, formatValue } from "../format";
import { EarlyWarningStatus, type LayerEarlyWarning } from "../gen/moe_debugger/v1/session_pb";
import { i18n } from "../i18n";
import words from "../locales/en.assurance.json";
import { useApp } from "../store";

// The panel's words come with it.
i18n.addResourceBundle("en", "page", words, true, true);

const NAME: Record<number, "learning" | "watching" | "warned"> = {
  [EarlyWarningStatus.LEARNING]: "learning",
  [EarlyWarningStatus.WATCHING]: "watching",
  [EarlyWarningStatus.WARNED]: "warned",
};

export default function Assurance() {
  const { t } = useTranslation();
  const snapshot = useApp((state) => state.picture?.snapshot);
  if (snapshot?.falseAlarmsPer1000Windows === undefined) return null;
  return (
    <section className="assurance muted small" aria-label={t("assurance.label")} data-testid="assurance">
      {snapshot.earlyWarning.length > 0 && (
        <EarlyWarning layers={snapshot.earlyWarning} runLength={snapshot.earlyWarningRunLength} />
      )}
      <details>
        <summary data-testid="false-alarms">
          {t("assurance.rate", { n: formatValue(snapshot.falseAlarmsPer1000Windows) })}
        </summary>
        <p>{snapshot.falseAlarmNote}</p>
      </details>
    </section>
  );
}

function EarlyWarning({ layers, runLength }: { layers: LayerEarlyWarning[]; runLength: number | undefined }) {
  const { t } = useTranslation();
  const of = (name: string) => layers.filter(({ status }) => NAME[status] === name);
  const [learning, watching, warned] = [of("learning"), of("watching"), of("warned")];
  const points = Math.max(0, ...learning.map(({ numPoints }) => numPoints));
  const parts = [
    warned.length > 0 && t("assurance.warned", { count: warned.length }),
    learning.length > 0 && t("assurance.learning", { count: learning.length, points }),
    watching.length > 0 && t("assurance.watching", { count: watching.length }),
  ].filter((part) => typeof part === "string");
  return (
    <details>
      <summary data-testid="early-warning" className={warned.length > 0 ? "warning" : undefined}>
        {t("assurance.early", { parts: parts.join(", ") })}
      </summary>
      {runLength !== undefined && <p>{t("assurance.runLength", { steps: formatCompact(runLength) })}</p>}
      <ul className="early-layers">
        {layers.map((layer) => (
          <li
            key={layer.layerIndex}
            data-testid="early-layer"
            data-layer={layer.layerIndex}
            data-status={NAME[layer.status]}
          >
            <span className="num">L{layer.layerIndex}</span> {t(`assurance.status.${layer.status}`)}
            {layer.baseline !== undefined && layer.effectiveExperts !== undefined && (
              <span className="num">
                {" "}
                {t("assurance.level", {
                  now: formatValue(layer.effectiveExperts),
                  baseline: formatValue(layer.baseline),
                })}
              </span>
            )}
          </li>
        ))}
      </ul>
    </details>
  );
}
