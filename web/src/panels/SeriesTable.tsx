// The numbers behind the training charts.
import { useTranslation } from "react-i18next";
import { formatInteger, formatValue } from "../format";
import { newest, newestSteps, type SeriesLine, valueAt, valueExtent } from "../model/series";

const MAX_STEPS = 200;

interface Column {
  key: string;
  label: string;
  line: SeriesLine;
}

/** Steps downwards, the newest first; a column for each series and source. */
export function StepTable({ columns }: { columns: readonly Column[] }) {
  const { t } = useTranslation();
  const lines = columns.map(({ line }) => line);
  const steps = newestSteps(lines, MAX_STEPS);
  return (
    <div className="table-scroll series-scroll">
      <table className="numbers" data-testid="series-table">
        <caption>{t("training.tableCaption", { n: formatInteger(steps.length) })}</caption>
        <thead>
          <tr>
            <th scope="col">{t("training.step")}</th>
            {columns.map(({ key, label }) => (
              <th scope="col" key={key}>
                {label}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {steps.map((step) => (
            <tr key={step}>
              <th scope="row">{formatInteger(step)}</th>
              {columns.map(({ key, line }) => {
                const value = valueAt(line, step);
                return <td key={key}>{value === null ? "" : formatValue(value)}</td>;
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export interface RangeRow {
  key: string | number;
  label: string;
  /** One for each column; without a line there was no such series. */
  lines: readonly (SeriesLine | undefined)[];
}

interface RangeTableProps {
  testId: string;
  caption: string;
  head: string;
  columns: readonly string[];
  rows: readonly RangeRow[];
}

/** Layers or experts downwards: the newest value of each series, and its range. */
export function RangeTable({ testId, caption, head, columns, rows }: RangeTableProps) {
  const { t } = useTranslation();
  return (
    <div className="table-scroll series-scroll">
      <table className="numbers" data-testid={testId}>
        <caption>{caption}</caption>
        <thead>
          <tr>
            <th scope="col">{head}</th>
            {columns.map((title) => (
              <th scope="col" key={title}>
                {title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(({ key, label, lines }) => (
            <tr key={key}>
              <th scope="row">{label}</th>
              {lines.map((line, i) => {
                const last = line && newest(line);
                const extent = line && valueExtent([line]);
                return (
                  <td key={columns[i]}>
                    {last ? formatValue(last.value) : line ? t("training.nothingRead") : "–"}{" "}
                    {extent && (
                      <span className="muted">
                        {formatValue(extent[0])} … {formatValue(extent[1])}
                      </span>
                    )}
                  </td>
                );
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
