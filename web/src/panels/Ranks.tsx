// Where each source stands in a sharded model, and how the load spreads over the expert-parallel ranks.
import { useTranslation } from "react-i18next";
import { formatCompact, formatInteger, formatRatio } from "../format";
import { CheckStatus } from "../gen/moe_debugger/v1/routing_pb";
import type { SessionSnapshot, Source } from "../gen/moe_debugger/v1/session_pb";
import { layerName } from "../layers";
import { loadRatio } from "../model/load";
import { rankLoad } from "../model/ranks";
import { useApp } from "../store";

/** Load of the experts that each expert-parallel rank computes, whole session. */
export function RankBars({ counts, testId = "rank-load" }: { counts: readonly number[]; testId?: string }) {
  const { t } = useTranslation();
  const total = counts.reduce((sum, count) => sum + count, 0);
  const peak = Math.max(1, ...counts);
  return (
    <ol className="expert-bars rank-bars" data-testid={testId}>
      {counts.map((count, rank) => (
        // biome-ignore lint/suspicious/noArrayIndexKey: the index is the rank
        <li key={rank}>
          <div className="rank-bar">
            <span className="num">{t("layer.rank", { rank })}</span>
            <span className="bar-track">
              <span className="bar-fill" style={{ inlineSize: `${(count / peak) * 100}%` }} />
              <span className="bar-mean" style={{ insetInlineStart: `${(total / counts.length / peak) * 100}%` }} />
            </span>
            <span className="num">{formatRatio(loadRatio(count, total, counts.length))}</span>
            <span className="num muted">{formatInteger(count)}</span>
          </div>
        </li>
      ))}
    </ol>
  );
}

/** All layers' load by expert-parallel rank, and the layer where it is most uneven. */
export function RankLoadPicture({ snapshot }: { snapshot: SessionSnapshot }) {
  const { t } = useTranslation();
  const layers = useApp((state) => state.picture?.whole.layers);
  const load = rankLoad(snapshot.layers);
  if (!load) return null;
  const { worst } = load;
  return (
    <>
      <h4>
        {t("ranks.load")}{" "}
        <span className="num" data-testid="ranks-ratio">
          {t("ranks.maxOverMean", { ratio: formatRatio(load.maxOverMean) })}
        </span>
      </h4>
      <RankBars counts={load.totals} testId="ranks-load" />
      {worst && layers && (
        <p className="small">
          <button
            type="button"
            className="link"
            data-testid="worst-rank"
            onClick={() => useApp.setState({ row: worst.row, sidebar: "layer", panel: "experts" })}
          >
            {t("ranks.worst", {
              layer: layerName(layers, worst.row).short,
              rank: worst.rank,
              ratio: formatRatio(worst.maxOverMean),
            })}
          </button>
        </p>
      )}
    </>
  );
}

/** Nothing for processes on their own. */
export function SourcesTable({ sources }: { sources: readonly Source[] }) {
  const { t } = useTranslation();
  const placed = sources
    .filter(({ coordinates }) => (coordinates?.worldSize ?? 1) > 1)
    .sort((a, b) => (a.coordinates?.globalRank ?? 0) - (b.coordinates?.globalRank ?? 0));
  if (placed.length === 0) return null;
  const size = placed[0]?.coordinates?.worldSize ?? placed.length;
  return (
    <>
      <div className="table-scroll ranks-scroll">
        <table className="numbers ranks" data-testid="ranks-table">
          <caption className="visually-hidden">{t("ranks.title")}</caption>
          <thead>
            <tr>
              <th scope="col">{t("ranks.rank")}</th>
              {(["dp", "tp", "ep", "pp"] as const).map((axis) => (
                <th scope="col" key={axis} title={t(`ranks.axis.${axis}`)}>
                  {axis}
                </th>
              ))}
              <th scope="col">{t("ranks.sends")}</th>
              <th scope="col">{t("ranks.health")}</th>
            </tr>
          </thead>
          <tbody>
            {placed.map((source) => (
              <RankRow source={source} key={source.sourceId} />
            ))}
          </tbody>
        </table>
      </div>
      {placed.length < size && (
        <p className="warning small" data-testid="ranks-missing">
          {t("ranks.missing", { n: placed.length, size })}
        </p>
      )}
    </>
  );
}

function RankRow({ source }: { source: Source }) {
  const { t } = useTranslation();
  const { coordinates, checks } = source;
  if (!coordinates) return null;
  const numFailed = checks.filter(({ status }) => status === CheckStatus.FAILED).length;
  const state = source.isLive ? "capture.live" : source.saidGoodbye ? "capture.goodbye" : "capture.gone";
  return (
    <tr data-testid="rank" data-rank={coordinates.globalRank}>
      <th scope="row" title={`${source.hostName}:${source.processId}`}>
        <span className={`dot-state ${source.isLive ? "ready" : "off"}`} /> {coordinates.globalRank}
        <span className="visually-hidden"> {t(state)}</span>
      </th>
      <td>{coordinates.dataParallelRank}</td>
      <td>{coordinates.tensorParallelRank}</td>
      <td>{coordinates.expertParallelRank}</td>
      <td>{coordinates.pipelineParallelRank}</td>
      <td data-testid="rank-sends">
        {coordinates.replicaOfRank === undefined
          ? t("ranks.decisions", { n: formatCompact(Number(source.numCounted)) })
          : t("ranks.replica", { rank: coordinates.replicaOfRank })}
      </td>
      <td className={numFailed > 0 ? "critical" : undefined}>
        {numFailed > 0 ? t("ranks.failed", { n: numFailed }) : t(checks.length > 0 ? "ranks.ok" : "ranks.unchecked")}
      </td>
    </tr>
  );
}
