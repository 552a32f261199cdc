// Why a finding, and what to do: where it began, what goes with it, what nobody could see, changes to paste.
import { useState } from "react";
import { useTranslation } from "react-i18next";
import { formatInteger, formatPercent, formatValue } from "../format";
import type {
  Explanation as ExplanationMessage,
  Finding,
  FindingCause,
  FindingOnset,
  FindingRemedy,
  LayerCrossing,
  RowsLink,
} from "../gen/moe_debugger/v1/session_pb";
import { catalogueText, i18n, metricName } from "../i18n";
import words from "../locales/en.explanation.json";
import { runQuery } from "../query";
import { useApp } from "../store";
import "./explanation.css";
import { EvidenceTable, showFinding } from "./Findings";

// The panel's words come with it.
i18n.addResourceBundle("en", "page", words, true, true);

export default function Explanation({ finding, explanation }: { finding: Finding; explanation: ExplanationMessage }) {
  const { t } = useTranslation();
  const { causes, missing, remedies, spread, startedAt, rows } = explanation;
  return (
    <section className="explanation" aria-label={t("explanation.label")} data-testid="explanation">
      <h4>{t("explanation.start")}</h4>
      <p data-testid="onset">{onsetText(startedAt, spread)}</p>
      {spread.length > 1 && <Spread spread={spread} />}
      <h4>
        {t("explanation.why")} <span className="association">{t("explanation.association")}</span>
      </h4>
      {causes.length > 0 && (
        <ol className="causes">
          {causes.map((cause) => (
            <Cause cause={cause} key={`${cause.code}/${cause.rule}/${cause.setting}`} />
          ))}
        </ol>
      )}
      <p className="muted small">{catalogueText(`explanation.${explanation.status}`, explanation.statusArgs)}</p>
      {missing.length > 0 && (
        <details className="missing" data-testid="missing">
          <summary>{t("explanation.missing", { count: missing.length })}</summary>
          <ul>
            {missing.map(({ code, args, name, change }) => (
              <li key={`${code}/${name}`}>
                {catalogueText(`missing.${code}`, { name, ...args })}
                {change && <Change text={change} what={name} />}
              </li>
            ))}
          </ul>
        </details>
      )}
      {remedies.length > 0 && (
        <>
          <h4>{t("diagnosis.todo")}</h4>
          <ol className="remedies">
            {remedies.map((remedy) => (
              <Remedy remedy={remedy} key={`${remedy.code}/${remedy.cause}/${remedy.change}`} />
            ))}
          </ol>
        </>
      )}
      {rows && <Rows rows={rows} finding={finding} />}
    </section>
  );
}

function onsetText(onset: FindingOnset | undefined, [first]: LayerCrossing[]): string {
  if (!onset && first) {
    const { layerIndex, step } = first;
    return catalogueText("explanation.from_the_first_step", { layer: layerIndex, step: formatInteger(step) });
  }
  if (!onset) return catalogueText("explanation.no_start", {});
  return catalogueText(Number.isNaN(onset.before) ? "explanation.crossed_at" : "explanation.started_at", {
    layer: onset.layerIndex,
    step: formatInteger(onset.step),
    first: formatInteger(onset.firstStep),
    last: formatInteger(onset.lastStep),
    metric: metricName(onset.metric).toLowerCase(),
    before: formatValue(onset.before),
    after: formatValue(onset.after),
  });
}

/** The layers in the order in which they crossed the limit, each with the steps after the first. */
function Spread({ spread }: { spread: LayerCrossing[] }) {
  const { t } = useTranslation();
  const first = spread[0]?.step ?? 0n;
  return (
    <ol className="spread" aria-label={t("explanation.spread")}>
      {spread.map(({ layerIndex, step }, i) => (
        <li key={layerIndex}>
          <button type="button" className="link num" onClick={() => selectLayer(layerIndex)}>
            L{layerIndex}
          </button>{" "}
          <span className="num muted">{i === 0 ? formatInteger(step) : `+${formatInteger(step - first)}`}</span>
        </li>
      ))}
    </ol>
  );
}

function selectLayer(layerIndex: number): void {
  const row = useApp.getState().picture?.whole.layers.findIndex((layer) => layer.layerIndex === layerIndex) ?? -1;
  if (row >= 0) useApp.setState({ row });
}

function Cause({ cause }: { cause: FindingCause }) {
  const { t } = useTranslation();
  const percent = formatPercent(cause.weight);
  return (
    <li data-testid="cause" data-code={cause.code}>
      <div className="cause">
        <span>{catalogueText(`cause.${cause.code}`, cause.args)}</span>
        <span className="cause-weight" title={t("explanation.weight", { percent })}>
          <span className="cause-bar" aria-hidden="true">
            <span style={{ inlineSize: percent.replace(" ", "") }} />
          </span>
          <span className="num">{cause.weight.toFixed(2)}</span>
        </span>
      </div>
      <details className="small">
        <summary className="muted">
          {t("explanation.rule", { rule: cause.rule, score: cause.score.toFixed(1) })}
        </summary>
        <EvidenceTable rows={cause.evidence} severity="info" code={cause.code} />
      </details>
    </li>
  );
}

function Remedy({ remedy }: { remedy: FindingRemedy }) {
  const text = catalogueText(`remedy.${remedy.code}`, remedy.args);
  return (
    <li data-testid="remedy" data-code={remedy.code}>
      <p>{text}</p>
      <p className="muted small">{effectText(remedy)}</p>
      {remedy.change && <Change text={remedy.change} what={text} />}
    </li>
  );
}

function effectText({ effect, effectValue, effectLower, effectUpper }: FindingRemedy): string {
  const scale = effect === "step_bound" ? 100 : 1;
  const numbers = { value: effectValue, lower: effectLower, upper: effectUpper };
  const given = Object.entries(numbers).filter(([, value]) => value !== undefined);
  return catalogueText(
    `effect.${effect}`,
    Object.fromEntries(given.map(([name, value]) => [name, Number((scale * Number(value)).toPrecision(3))])),
  );
}

/** Text to paste, with a button that copies it. */
function Change({ text, what }: { text: string; what: string }) {
  return (
    <div className="change">
      <pre>
        <code>{text}</code>
      </pre>
      <Copy text={text} label="explanation.copy" what={what} />
    </div>
  );
}

function Copy({ text, label, what }: { text: string; label: string; what: string }) {
  const { t } = useTranslation();
  const [said, setSaid] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setSaid(t("explanation.copied"));
    } catch {
      // No permission, or no secure context: the text can be selected by hand.
      setSaid(t("explanation.notCopied"));
    }
  };
  return (
    <span className="copy">
      <button
        type="button"
        className="button"
        data-testid="copy"
        aria-label={`${t(label)}: ${what}`}
        onClick={() => void copy()}
      >
        {t(label)}
      </button>
      <span role="status" className="muted small">
        {said}
      </span>
    </span>
  );
}

function Rows({ rows, finding }: { rows: RowsLink; finding: Finding }) {
  const { t } = useTranslation();
  return (
    <div className="rows-behind">
      <h4>{t("explanation.rows")}</h4>
      <pre>
        <code data-testid="rows-query">{rows.query}</code>
      </pre>
      <span className="copy">
        <button type="button" className="button primary" data-testid="show-rows" onClick={() => runQuery(rows.query)}>
          {t("explanation.show")}
        </button>
        <button type="button" className="button" onClick={() => showFinding(finding)}>
          {t("explanation.select")}
        </button>
        <Copy text={rows.query} label="explanation.copyQuery" what={rows.query} />
        {rows.python && <Copy text={rows.python} label="explanation.copyPython" what={rows.python} />}
      </span>
    </div>
  );
}
