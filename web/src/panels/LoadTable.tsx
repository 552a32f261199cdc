import { type UIEvent, useState } from "react";
import { useTranslation } from "react-i18next";
import { formatFixed, formatInteger } from "../format";
import { layerName } from "../layers";
import { type LoadMatrix, rowOf, rowStats } from "../model/load";

// Above this many cells only the rows in view are in the document.
const WINDOWED_CELLS = 4096;
const ROW_HEIGHT = 24;
const ROWS_IN_VIEW = 24;

/** The numbers behind the heatmap: exact assignments, one row per layer. */
export function LoadTable({
  load,
  unseen = [],
  range,
  cellTestId = "expert-cell",
}: {
  load: LoadMatrix;
  /** Rows whose load is not known. */
  unseen?: readonly boolean[];
  range: string;
  cellTestId?: string;
}) {
  const { t } = useTranslation();
  const [scroll, setScroll] = useState(0);
  const isWindowed = load.counts.length > WINDOWED_CELLS;
  const first = isWindowed ? Math.max(0, Math.floor(scroll / ROW_HEIGHT) - 4) : 0;
  const last = isWindowed ? Math.min(load.layers.length, first + ROWS_IN_VIEW + 8) : load.layers.length;
  const experts = Array.from({ length: load.maxExperts }, (_, expert) => expert);
  return (
    <div
      className="table-scroll"
      onScroll={(event: UIEvent<HTMLDivElement>) => isWindowed && setScroll(event.currentTarget.scrollTop)}
    >
      <table
        className="numbers"
        data-testid={cellTestId === "expert-cell" ? "expert-table" : "recent-expert-table"}
        aria-rowcount={load.layers.length + 1}
      >
        <caption className="visually-hidden">{t("table.caption", { range })}</caption>
        <thead>
          <tr>
            <th scope="col">{t("table.layer")}</th>
            <th scope="col">{t("table.tokens")}</th>
            <th scope="col">{t("table.entropy")}</th>
            {experts.map((expert) => (
              <th scope="col" key={expert}>
                {t("table.expert", { expert })}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {first > 0 && <tr style={{ height: first * ROW_HEIGHT }} />}
          {load.layers.slice(first, last).map((layer, i) => {
            const row = first + i;
            const counts = rowOf(load, row);
            return (
              <tr key={layer.layerIndex} aria-rowindex={row + 2}>
                <th
                  scope="row"
                  data-testid="layer-tokens"
                  data-layer={layer.layerIndex}
                  data-count={load.numTokens[row]}
                >
                  {layerName(load.layers, row).short}
                </th>
                <td>{unseen[row] ? "–" : formatInteger(load.numTokens[row] ?? 0)}</td>
                <td>{formatFixed(rowStats(counts).entropy, 3)}</td>
                {unseen[row] && (
                  <td className="unseen" colSpan={counts.length} data-testid="unseen-row" data-layer={layer.layerIndex}>
                    {t("heatmap.unseen")}
                  </td>
                )}
                {Array.from(unseen[row] ? [] : counts, (count, expert) => (
                  <td
                    // biome-ignore lint/suspicious/noArrayIndexKey: the index is the expert's id
                    key={expert}
                    data-testid={cellTestId}
                    data-layer={layer.layerIndex}
                    data-expert={expert}
                    data-count={count}
                    className={count === 0 ? "zero" : undefined}
                  >
                    {formatInteger(count)}
                  </td>
                ))}
                {counts.length < load.maxExperts && <td className="absent" colSpan={load.maxExperts - counts.length} />}
              </tr>
            );
          })}
          {last < load.layers.length && <tr style={{ height: (load.layers.length - last) * ROW_HEIGHT }} />}
        </tbody>
      </table>
    </div>
  );
}
