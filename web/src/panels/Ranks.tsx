// Where each source stands in a sharded model, and how the load spreads over the expert-parallel ranks.
import { useTranslation } from "react-i18next";
import { formatCompact, formatInteger, formatPercent, formatRatio } from "../format";
import { CheckStatus } from "../gen/moe_debugger/v1/routing_pb";
import type { SessionSnapshot, Source } from "../gen/moe_debugger/v1/session_pb";
import { i18n } from "../i18n";
import { layerName } from "../layers";
import words from "../locales/en.ranks.json";
import { loadRatio } from "../model/load";
import { maxOverMean, type RankSteps, rankLoad } from "../model/ranks";
import { useApp } from "../store";

// The panel's words come with it.
i18n.addResourceBundle("en", "page", words, true, true);

// More ranks than this are columns of one small picture, with the numbers folded below it.
const MAX_ROWS = 16;

interface RankBarsProps {
  counts: readonly number[];
  testId?: string;
}

/** Load of the experts that each expert-parallel rank computes, whole session. */
export function RankBars({ counts, testId = "rank-load" }: RankBarsProps) {
  const { t } = useTranslation();
  if (counts.length <= MAX_ROWS) return <RankRows counts={counts} testId={testId} />;
  return (
    <>
      <RankColumns counts={counts} />
      <details className="rank-numbers">
        <summary>{t("ranks.numbers", { n: counts.length })}</summary>
        <RankRows counts={counts} testId={testId} />
      </details>
    </>
  );
}

const COLUMNS_HEIGHT = 56;

function RankColumns({ counts }: { counts: readonly number[] }) {
  const { t } = useTranslation();
  const peak = Math.max(1, ...counts);
  const mean = counts.reduce((sum, count) => sum + count, 0) / counts.length;
  const y = (count: number) => COLUMNS_HEIGHT - (count / peak) * (COLUMNS_HEIGHT - 2);
  const label = t("ranks.columnsLabel", {
    n: counts.length,
    rank: counts.indexOf(Math.max(...counts)),
    ratio: formatRatio(maxOverMean(counts)),
  });
  return (
    <svg
      className="rank-columns"
      data-testid="rank-columns"
      viewBox={`0 0 ${counts.length * 4} ${COLUMNS_HEIGHT}`}
      preserveAspectRatio="none"
      role="img"
      aria-label={label}
    >
      {counts.map((count, rank) => (
        <rect
          // biome-ignore lint/suspicious/noArrayIndexKey: the index is the rank
          key={rank}
          className="rank-column"
          x={rank * 4 + 0.4}
          width={3.2}
          y={y(count)}
          height={COLUMNS_HEIGHT - y(count)}
        >
          <title>{`${t("layer.rank", { rank })} ${formatRatio(loadRatio(count, mean * counts.length, counts.length))}`}</title>
        </rect>
      ))}
      <line className="cursor" x1={0} x2={counts.length * 4} y1={y(mean)} y2={y(mean)} />
    </svg>
  );
}

function RankRows({ counts, testId }: Required<RankBarsProps>) {
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

/** How uneven ranks are in single steps of a layer: what sums over steps hide. */
export function RankStepsLine({ steps, layer }: { steps: RankSteps; layer: string }) {
  const { t } = useTranslation();
  return (
    <p className="small" data-testid="rank-steps">
      {t("ranks.steps", {
        layer,
        ratio: formatRatio(steps.imbalance),
        waste: formatPercent(steps.waste),
        n: formatInteger(steps.numSteps),
      })}
    </p>
  );
}

/** The layers that load the expert-parallel ranks least evenly, over the session and in single steps; then the sum. */
export function RankLoadPicture({ snapshot }: { snapshot: SessionSnapshot }) {
  const { t } = useTranslation();
  const layers = useApp((state) => state.picture?.whole.layers);
  const load = rankLoad(snapshot.layers);
  if (!load?.worst || !layers) return null;
  const { worst, worstSteps } = load;
  const nameOf = (row: number) => layerName(layers, row).short;
  return (
    <>
      <h4>{t("ranks.load")}</h4>
      <p className="small">
        {t("ranks.mostUneven")}{" "}
        <button
          type="button"
          className="link"
          data-testid="worst-rank"
          title={t("ranks.worstHint")}
          onClick={() => useApp.setState({ row: worst.row, sidebar: "layer", panel: "experts" })}
        >
          {t("ranks.worst", { layer: nameOf(worst.row), rank: worst.rank, ratio: formatRatio(worst.maxOverMean) })}
        </button>
      </p>
      <RankBars counts={worst.counts} testId="ranks-load" />
      {worstSteps && <RankStepsLine steps={worstSteps} layer={nameOf(worstSteps.row)} />}
      <details className="rank-numbers" data-testid="ranks-sum">
        <summary>{t("ranks.sum", { ratio: formatRatio(maxOverMean(load.totals)) })}</summary>
        <p className="muted small">{t("ranks.sumHint")}</p>
        <RankBars counts={load.totals} testId="ranks-sum-load" />
      </details>
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
