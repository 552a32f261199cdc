// Training: what was recorded by global step, as small multiples that share one axis and one cursor.
import { type ReactNode, useMemo } from "react";
import { useTranslation } from "react-i18next";
import { formatInteger } from "../format";
import { i18n } from "../i18n";
import { layerNames } from "../layers";
import words from "../locales/en.training.json";
import {
  type Extent,
  expertLines,
  indexAt,
  layerSeries,
  modelSeries,
  type SeriesLine,
  seriesSources,
  stepDomain,
} from "../model/series";
import { useApp } from "../store";
import { EXPERT_SERIES, useTraining } from "../training";
import { ScaleLegend } from "./Heatmap";
import { SeriesChart } from "./SeriesChart";
import { SeriesHeat } from "./SeriesHeat";
import { RangeTable, StepTable } from "./SeriesTable";
import "./training.css";

// The panel's words come with it.
i18n.addResourceBundle("en", "page", words, true, true);

const BIAS = ["selection_bias_min", "selection_bias_max"];
// The heat scale's hot end: 8 times the median.
const HOT = 3;

export default function TrainingPanel() {
  const { t } = useTranslation();
  const lines = useTraining((state) => state.lines);
  const error = useTraining((state) => state.error);
  if (!lines || lines.length === 0) {
    return (
      <section className="training" aria-label={t("panel.training")}>
        {error ? <Failed message={error} /> : lines ? <NoSeries /> : <LoadingSeries />}
      </section>
    );
  }
  return <TrainingCharts lines={lines} />;
}

function layerIndices(perLayer: ReadonlyMap<string, readonly SeriesLine[]>): number[] {
  return [...new Set([...perLayer.values()].flat().map(({ layerIndex }) => layerIndex ?? 0))].sort((a, b) => a - b);
}

function useSeriesTitle(): (name: string) => string {
  const { t } = useTranslation();
  return (name) => t(`series.${name}`, { defaultValue: name });
}

function TrainingCharts({ lines }: { lines: readonly SeriesLine[] }) {
  const { t } = useTranslation();
  const titleOf = useSeriesTitle();
  const error = useTraining((state) => state.error);
  const maxPoints = useTraining((state) => state.maxPoints);
  const numNotKept = useTraining((state) => state.numNotKept);
  const sourceId = useTraining((state) => state.sourceId);
  const isLog = useTraining((state) => state.isLog);
  const isTable = useApp((state) => state.isTable);
  const layers = useApp((state) => state.picture?.whole.layers);
  const model = useMemo(() => modelSeries(lines), [lines]);
  const sources = useMemo(() => seriesSources(lines.filter(({ layerIndex }) => layerIndex !== null)), [lines]);
  const chosen = sources.find((source) => source.sourceId === sourceId) ?? sources[0];
  const perLayer = useMemo(() => layerSeries(lines, chosen?.sourceId ?? ""), [lines, chosen?.sourceId]);
  const domain = useMemo(() => stepDomain(lines, maxPoints) ?? ([0, 0] as Extent), [lines, maxPoints]);
  const names = layers ? layerNames(layers) : [];
  const labelOf = (layerIndex: number) => {
    const row = layers?.findIndex((layer) => layer.layerIndex === layerIndex) ?? -1;
    return names[row]?.short ?? `L${layerIndex}`;
  };
  const rankOf = (line: SeriesLine) => t("ranks.nth", { rank: line.globalRank });
  const isCut = lines.some(({ steps }) => steps.length >= maxPoints);
  return (
    <section className="training" aria-label={t("panel.training")} data-testid="training">
      <header className="panel-head">
        <h2>{t("panel.training")}</h2>
        <span className="muted">
          {t("training.span", { first: formatInteger(domain[0]), last: formatInteger(domain[1]) })}
          {isCut && ` · ${t("training.newest", { n: formatInteger(maxPoints) })}`}
        </span>
        <span className="spacer" />
        <button
          type="button"
          className="button"
          aria-pressed={isLog}
          onClick={() => useTraining.setState({ isLog: !isLog })}
        >
          {t("training.log")}
        </button>
        <button
          type="button"
          className="button icon-text"
          aria-pressed={isTable}
          title={t("toolbar.tableHint")}
          onClick={() => useApp.setState({ isTable: !isTable })}
        >
          {t("toolbar.table")} <kbd>T</kbd>
        </button>
      </header>
      {error && <Failed message={t("training.stale", { message: error })} />}
      {numNotKept > 0 && (
        <p className="muted small" data-testid="series-not-kept">
          {t("training.notKept", { count: numNotKept, n: formatInteger(numNotKept) })}
        </p>
      )}
      {isTable ? (
        <>
          <StepTable
            columns={[...model].flatMap(([name, own]) =>
              own.map((line) => ({
                key: `${line.sourceId}/${name}`,
                label: own.length > 1 ? `${titleOf(name)} · ${rankOf(line)}` : titleOf(name),
                line,
              })),
            )}
          />
          {perLayer.size > 0 && (
            <>
              <RangeTable
                testId="layer-series-table"
                caption={t("training.layerTableCaption")}
                head={t("table.layer")}
                columns={[...perLayer.keys()].map(titleOf)}
                rows={layerIndices(perLayer).map((layerIndex) => ({
                  key: layerIndex,
                  label: labelOf(layerIndex),
                  lines: [...perLayer.values()].map((own) => own.find((line) => line.layerIndex === layerIndex)),
                }))}
              />
              <ExpertSection perLayer={perLayer} labelOf={labelOf} />
            </>
          )}
        </>
      ) : (
        <>
          <div className="series-grid">
            {[...model].map(([name, own]) => (
              <SeriesChart
                key={name}
                name={name}
                title={titleOf(name)}
                lines={own}
                labels={own.map(rankOf)}
                domain={domain}
                isLog={isLog}
              />
            ))}
          </div>
          {perLayer.size > 0 && (
            <LayerCharts
              perLayer={perLayer}
              domain={domain}
              labelOf={labelOf}
              picker={
                sources.length > 1 && (
                  <label className="inline-field">
                    {t("training.source")}
                    <select
                      className="select wide"
                      value={chosen?.sourceId}
                      onChange={(event) => useTraining.setState({ sourceId: event.target.value })}
                    >
                      {sources.map((source) => (
                        <option key={source.sourceId} value={source.sourceId}>
                          {t("ranks.nth", { rank: source.globalRank })}
                        </option>
                      ))}
                    </select>
                  </label>
                )
              }
            />
          )}
        </>
      )}
      <div className="visually-hidden" aria-live="polite" data-testid="training-spoken">
        <Spoken model={model} titleOf={titleOf} />
      </div>
    </section>
  );
}

interface SpokenProps {
  model: ReadonlyMap<string, readonly SeriesLine[]>;
  titleOf: (name: string) => string;
}

/** What the cursor stands on, in words. */
function Spoken({ model, titleOf }: SpokenProps) {
  const { t } = useTranslation();
  const step = useTraining((state) => state.cursor);
  if (step === null) return null;
  const values = [...model].flatMap(([name, [line]]) => {
    const at = line ? indexAt(line.steps, step) : -1;
    const value = line?.values[at];
    return value === undefined ? [] : [`${titleOf(name)} ${Number(value.toPrecision(4))}`];
  });
  return (
    <>
      {t("training.atStep", { step: formatInteger(step) })}: {values.join(", ")}
    </>
  );
}

interface LayerChartsProps {
  perLayer: ReadonlyMap<string, readonly SeriesLine[]>;
  domain: Extent;
  labelOf: (layerIndex: number) => string;
  picker: ReactNode;
}

function LayerCharts({ perLayer, domain, labelOf, picker }: LayerChartsProps) {
  const { t } = useTranslation();
  const titleOf = useSeriesTitle();
  const layers = useApp((state) => state.picture?.whole.layers);
  const row = useApp((state) => state.row);
  const selectedIndex = layers?.[row]?.layerIndex ?? row;
  const selectLayer = (layerIndex: number) => {
    const to = layers?.findIndex((layer) => layer.layerIndex === layerIndex) ?? -1;
    if (to >= 0) useApp.setState({ row: to });
  };
  const bias = useMemo(
    () => BIAS.flatMap((name) => perLayer.get(name)?.find(({ layerIndex }) => layerIndex === selectedIndex) ?? []),
    [perLayer, selectedIndex],
  );
  return (
    <>
      <header className="panel-head">
        <h2>{t("training.layers")}</h2>
        <span className="muted">{t("training.layersHint")}</span>
        <span className="spacer" />
        {picker}
        <ScaleLegend hot={HOT} end="" label={t("training.heatLegend")} unusedWord={t("training.nothingRead")} />
      </header>
      <div className="series-grid is-wide">
        {[...perLayer]
          .filter(([name]) => !BIAS.includes(name))
          .map(([name, rows]) => {
            const indices = rows.map(({ layerIndex }) => layerIndex ?? 0);
            return (
              <SeriesHeat
                key={name}
                name={name}
                title={titleOf(name)}
                rows={rows}
                labels={indices.map(labelOf)}
                domain={domain}
                selected={Math.max(0, indices.indexOf(selectedIndex))}
                onSelect={(at) => selectLayer(indices[at] ?? 0)}
              />
            );
          })}
        {bias.length > 0 && (
          <SeriesChart
            name="selection_bias"
            title={t("training.bias", { layer: labelOf(selectedIndex) })}
            lines={bias}
            labels={bias.map(({ name }) => titleOf(name))}
            domain={domain}
            isLog={false}
          />
        )}
      </div>
      <ExpertSection perLayer={perLayer} labelOf={labelOf} />
    </>
  );
}

/** Gradient norms by expert: many numbers, so only asked for while they are open. */
function ExpertSection({ perLayer, labelOf }: Pick<LayerChartsProps, "perLayer" | "labelOf">) {
  const { t } = useTranslation();
  const isTable = useApp((state) => state.isTable);
  const layerIndex = useApp((state) => state.picture?.whole.layers[state.row]?.layerIndex ?? state.row);
  const label = labelOf(layerIndex);
  const found = useTraining((state) => state.expertLines);
  const expertError = useTraining((state) => state.expertError);
  const isShowingExperts = useTraining((state) => state.isShowingExperts);
  const sourceId = useTraining((state) => state.sourceId);
  const expert = useApp((state) => state.expert);
  const line =
    found?.find((one) => one.layerIndex === layerIndex && (!sourceId || one.sourceId === sourceId)) ??
    found?.find((one) => one.layerIndex === layerIndex);
  const rows = useMemo(() => (line ? expertLines(line) : []), [line]);
  const domain = stepDomain(rows);
  if (!perLayer.has("router_gradient_norm")) return null;
  return (
    <details
      className="series-experts"
      open={isShowingExperts}
      onToggle={(event) => useTraining.setState({ isShowingExperts: event.currentTarget.open })}
    >
      <summary>{t("training.experts", { layer: label })}</summary>
      {isShowingExperts &&
        (domain && isTable ? (
          <RangeTable
            testId="expert-series-table"
            caption={t("training.expertTableCaption", { layer: label })}
            head={t("training.expert")}
            columns={[t("series.expert_gradient_norm")]}
            rows={rows.map((own, id) => ({ key: id, label: `E${id}`, lines: [own] }))}
          />
        ) : domain ? (
          <SeriesHeat
            name={EXPERT_SERIES}
            title={t("series.expert_gradient_norm")}
            rows={rows}
            labels={rows.map((_, id) => `E${id}`)}
            domain={domain}
            selected={Math.min(expert ?? 0, rows.length - 1)}
            onSelect={(at) => useApp.setState({ expert: at })}
          />
        ) : (
          <p className={expertError ? "warning" : "muted"} role={expertError ? "alert" : "status"}>
            {expertError ?? t(found ? "training.noExperts" : "training.loading")}
          </p>
        ))}
    </details>
  );
}

function LoadingSeries() {
  const { t } = useTranslation();
  return (
    <div className="loading" role="status" data-testid="training-loading">
      <p className="muted">{t("training.loading")}</p>
      <div className="skeleton" aria-hidden="true">
        {Array.from({ length: 8 }, (_, i) => (
          // biome-ignore lint/suspicious/noArrayIndexKey: a fixed pattern
          <span key={i} />
        ))}
      </div>
    </div>
  );
}

const RECORD = `with debugger.step(n) as step:
    loss.backward()
    step.record(loss=loss, lr=learning_rate)`;

function NoSeries() {
  const { t } = useTranslation();
  return (
    <div className="empty-state" data-testid="training-empty">
      <h2>{t("training.emptyTitle")}</h2>
      <p>{t("training.emptyText")}</p>
      <div className="command" dir="ltr">
        <pre>{RECORD}</pre>
      </div>
    </div>
  );
}

function Failed({ message }: { message: string }) {
  const { t } = useTranslation();
  return (
    <div className="panel-error" role="alert" data-testid="training-error">
      <p>{t("training.failed", { message })}</p>
      <button
        type="button"
        className="button"
        onClick={() => useTraining.setState((state) => ({ numRetries: state.numRetries + 1 }))}
      >
        {t("training.retry")}
      </button>
    </div>
  );
}
