// One layer in numbers: its load, what is no load, and its experts.
import { useTranslation } from "react-i18next";
import { formatFixed, formatInteger, formatPercent, formatRatio } from "../format";
import type { LayerSnapshot } from "../gen/moe_debugger/v1/session_pb";
import { layerName } from "../layers";
import { type LayerShape, loadRatio, type RowStats, rowOf, rowStats } from "../model/load";
import { maxOverMean, rankSteps } from "../model/ranks";
import { useApp, useIsCountsOnly } from "../store";
import { recentSeconds, useShownLoad, useUnseen } from "./Heatmap";
import { Sparkline } from "./History";
import { RankBars, RankStepsLine } from "./Ranks";

const MAX_BARS = 32;

type Fact = [name: string, value: string, note?: string];

export default function LayerDetails() {
  const { t } = useTranslation();
  const load = useShownLoad();
  const { row, mode, picture } = useApp();
  const isUnseen = useUnseen()[row] ?? false;
  const layer = load?.layers[row];
  const snapshot = picture?.snapshot.layers[row];
  if (!load || !layer || !snapshot) return <p className="muted">{t("diagnosis.noneWaiting")}</p>;
  const counts = rowOf(load, row);
  const stats = rowStats(counts);
  const range =
    mode === "whole"
      ? t("heatmap.wholeHint")
      : t("toolbar.recent", { seconds: recentSeconds(picture?.snapshot.recentWindowS) });
  const name = layerName(load.layers, row);
  const rankCounts = snapshot.expertParallelCounts.map(Number);
  const steps = rankSteps(snapshot);
  return (
    <div className="layer-details">
      <h3 data-testid="layer-title">{name.title}</h3>
      {layer.moduleName && (
        <p className="muted small">
          <bdi dir="ltr" className="mono">
            {t("layer.module", { name: layer.moduleName, index: layer.modelLayerIndex })}
          </bdi>
        </p>
      )}
      {isUnseen && (
        <p className="notice warning-notice" data-testid="layer-unseen">
          {t("layer.unseen")}
        </p>
      )}
      <Sparkline row={row} label={t("layer.spark")} />
      <Facts layer={layer} snapshot={snapshot} stats={stats} numTokens={load.numTokens[row] ?? 0} isUnseen={isUnseen} />
      <p className="muted small">{t("layer.range", { range })}</p>
      {rankCounts.length > 0 && (
        <>
          <h4>
            {t("layer.ranks")}{" "}
            <span className="num" data-testid="rank-ratio">
              {t("ranks.maxOverMean", { ratio: formatRatio(maxOverMean(rankCounts)) })}
            </span>
          </h4>
          <RankBars counts={rankCounts} />
          {steps && <RankStepsLine steps={steps} layer={t("ranks.thisLayer")} />}
        </>
      )}
      <Aside layer={layer} snapshot={snapshot} />
      {!isUnseen && (
        <>
          <h4>{t("layer.experts")}</h4>
          <ExpertBars counts={counts} total={stats.total} />
        </>
      )}
    </div>
  );
}

interface FactsProps {
  layer: LayerShape;
  snapshot: LayerSnapshot;
  stats: RowStats;
  numTokens: number;
  isUnseen: boolean;
}

function Facts({ layer, snapshot, stats, numTokens, isUnseen }: FactsProps) {
  const { t } = useTranslation();
  const isCountsOnly = useIsCountsOnly();
  const reason = isCountsOnly ? t("layer.notAtCounts") : (snapshot.description?.unavailableReason ?? "");
  const numSlots = Number(snapshot.numTokens) * layer.topK;
  const share = (slots: bigint) =>
    numSlots > 0 ? t("layer.ofSlots", { share: formatPercent(Number(slots) / numSlots, 1) }) : "";
  const ofRouter = (name: string, value: number, unit: string): Fact =>
    Number.isNaN(value) ? [name, t("layer.notCaptured"), reason] : [name, formatFixed(value, 3), unit];
  const seen = (text: string) => (isUnseen ? "–" : text);
  const facts: Fact[] = [
    [t("layer.entropy"), formatFixed(stats.entropy, 3)],
    [t("layer.effective"), formatFixed(stats.effectiveExperts, 1), t("layer.ofExperts", { n: layer.numExperts })],
    [
      t("layer.hottest"),
      Number.isNaN(stats.hottestRatio) ? "–" : `E${stats.hottestExpert}`,
      formatRatio(stats.hottestRatio),
    ],
    [t("layer.unused"), String(stats.total > 0 ? stats.numUnused : "–"), t("layer.ofExperts", { n: layer.numExperts })],
    ofRouter(t("layer.routerEntropy"), snapshot.meanRouterEntropy, t("layer.nats")),
    ofRouter(t("layer.confidence"), snapshot.meanTop1Probability, ""),
    [t("layer.tokens"), seen(formatInteger(numTokens)), t("layer.topK", { topK: layer.topK })],
    [t("layer.assignments"), seen(formatInteger(stats.total))],
    [t("layer.padding"), seen(formatInteger(snapshot.numPaddingTokens))],
    [t("layer.dropped"), seen(formatInteger(snapshot.numDroppedSlots)), share(snapshot.numDroppedSlots)],
  ];
  const optionalSlots: [string, bigint, boolean][] = [
    [t("layer.skipped"), snapshot.numSkippedSlots, snapshot.numSkippedSlots > 0n],
    [t("layer.unusedSlots"), snapshot.numUnusedSlots, snapshot.numUnusedSlots > 0n],
    [t("layer.identity"), snapshot.numIdentitySlots, layer.numIdentity > 0],
  ];
  for (const [name, slots, isShown] of optionalSlots) {
    if (isShown) facts.push([name, formatInteger(slots), share(slots)]);
  }
  return (
    <dl className="facts" data-testid="layer-facts" data-layer={layer.layerIndex}>
      {facts.map(([name, value, note]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>
            <b className="num">{value}</b> <span className="muted">{note}</span>
          </dd>
        </div>
      ))}
    </dl>
  );
}

/** Zero and shared experts: named, and never hot. */
function Aside({ layer, snapshot }: { layer: LayerShape; snapshot: LayerSnapshot }) {
  const { t } = useTranslation();
  const { numIdentity, numShared } = layer;
  if (numIdentity + numShared === 0) return null;
  const names = (letter: string, count: number) => (count === 1 ? `${letter}0` : `${letter}0–${letter}${count - 1}`);
  return (
    <>
      <h4>{t("layer.aside")}</h4>
      <dl className="facts" data-testid="layer-aside">
        {numIdentity > 0 && (
          <div>
            <dt>
              {t("layer.identityExperts", { count: numIdentity })} <b className="num">{names("Z", numIdentity)}</b>
            </dt>
            <dd className="muted">
              {t("layer.identityNote", { count: numIdentity, slots: formatInteger(snapshot.numIdentitySlots) })}
            </dd>
          </div>
        )}
        {numShared > 0 && (
          <div>
            <dt>
              {t("layer.shared", { count: numShared })} <b className="num">{names("S", numShared)}</b>
            </dt>
            <dd className="muted">{t("layer.sharedNote", { count: numShared })}</dd>
          </div>
        )}
      </dl>
    </>
  );
}

function ExpertBars({ counts, total }: { counts: Float64Array; total: number }) {
  const { t } = useTranslation();
  const selected = useApp((state) => state.expert);
  const order = Array.from(counts, (count, id) => ({ id, count })).sort((a, b) => b.count - a.count || a.id - b.id);
  const most = order[0]?.count || 1;
  return (
    <>
      <ol className="expert-bars">
        {order.slice(0, MAX_BARS).map(({ id, count }) => (
          <li key={id}>
            <button
              type="button"
              aria-pressed={id === selected}
              onClick={() => useApp.setState({ expert: id })}
              className={count === 0 ? "unused" : undefined}
            >
              <span className="num">E{id}</span>
              <span className="bar-track">
                <span className="bar-fill" style={{ inlineSize: `${total ? (count / most) * 100 : 0}%` }} />
              </span>
              <span className="num">{formatRatio(loadRatio(count, total, counts.length))}</span>
              <span className="num muted">{formatInteger(count)}</span>
            </button>
          </li>
        ))}
      </ol>
      {order.length > MAX_BARS && (
        <p className="muted small">{t("layer.moreExperts", { shown: MAX_BARS, n: order.length })}</p>
      )}
    </>
  );
}
