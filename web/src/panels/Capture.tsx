// What was captured: the account of decisions, the sources with their health and ranks, and the fleet's components.
import { useTranslation } from "react-i18next";
import { accountNumbers, componentClass, formatSampling } from "../account";
import { formatBytes, formatInteger, formatPercent, formatValue } from "../format";
import { CheckStatus } from "../gen/moe_debugger/v1/routing_pb";
import type { Source } from "../gen/moe_debugger/v1/session_pb";
import { useApp } from "../store";
import { HealthList } from "./Health";
import { RankLoadPicture, SourcesTable } from "./Ranks";

const MAX_OPEN_SOURCES = 2;

export default function Capture() {
  const { t } = useTranslation();
  const account = useApp((state) => state.picture?.snapshot.account);
  const snapshot = useApp((state) => state.picture?.snapshot);
  const sources = snapshot?.sources ?? [];
  const components = useApp((state) => state.components);
  const numbers = accountNumbers(account);
  const rows: [string, bigint, boolean?][] = [
    [t("capture.produced"), numbers.produced],
    [t("capture.counted"), numbers.counted],
    [t("capture.dropped"), numbers.dropped, true],
    [t("capture.sampledOut"), numbers.sampledOut],
    [t("capture.inFlight"), numbers.inFlight],
    [t("capture.difference"), numbers.unexplained, true],
    [t("capture.missing"), account?.numMissingMessages ?? 0n, true],
    [t("capture.lost"), account?.numLostStreamMessages ?? 0n, true],
    [t("capture.late"), account?.numLate ?? 0n],
    [t("capture.deadLettered"), account?.numDeadLettered ?? 0n, true],
  ];
  return (
    <div className="capture">
      <h3>{t("capture.account")}</h3>
      <dl className="facts">
        {rows.map(([name, value, isBad]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd className={isBad && value > 0n ? "num warning" : "num"}>{formatInteger(value)}</dd>
          </div>
        ))}
        {(account?.dropped ?? []).map(({ reason, numDecisions }) => (
          <div key={reason} className="sub">
            <dt>{t(`dropReason.${reason}`)}</dt>
            <dd className="num">{formatInteger(numDecisions)}</dd>
          </div>
        ))}
      </dl>
      <p className="muted small">{t("capture.accountNote")}</p>
      {snapshot && <RankLoadPicture snapshot={snapshot} />}
      <h4>{t("capture.sources")}</h4>
      {sources.length === 0 && <p className="muted">{t("capture.noSources")}</p>}
      <SourcesTable sources={sources} />
      {sources.map((source) => (
        <SourceDetails source={source} isOpen={sources.length <= MAX_OPEN_SOURCES} key={source.sourceId} />
      ))}
      <h4>{t("capture.components")}</h4>
      {components.map(({ name, state, detail }) => (
        <p key={name}>
          <span className={`dot-state ${componentClass(state)}`} />{" "}
          {t(`component.name.${name}`, { defaultValue: name })}{" "}
          <span className="muted">
            {t(`component.state.${state}`)} {detail}
          </span>
        </p>
      ))}
    </div>
  );
}

interface SourceDetailsProps {
  source: Source;
  /** Many sources are folded; one with a fault never is. */
  isOpen: boolean;
}

function SourceDetails({ source, isOpen }: SourceDetailsProps) {
  const { t } = useTranslation();
  const { coordinates } = source;
  const hasFault =
    source.problems.length > 0 ||
    source.tailUnknownBytes > 0n ||
    source.checks.some(({ status }) => status === CheckStatus.FAILED);
  const series = Object.entries(source.series).sort(([a], [b]) => (a < b ? -1 : 1));
  return (
    <details className="source" open={isOpen || hasFault} data-testid="source" data-source={source.sourceId}>
      <summary>
        <span className={`dot-state ${source.isLive ? "ready" : "off"}`} /> <b>{source.kind || source.hostName}</b>{" "}
        <span className="muted">
          {coordinates && coordinates.worldSize > 1 && `${t("ranks.nth", { rank: coordinates.globalRank })} · `}
          {source.hostName}:{source.processId} ·{" "}
          {source.isLive ? t("capture.live") : source.saidGoodbye ? t("capture.goodbye") : t("capture.gone")}
        </span>
      </summary>
      <p className="muted small num">
        {t("capture.level")} {t(`level.${source.level}`)} ·{" "}
        {t("status.sampling", { rate: formatSampling(source.samplingRate) })} ·{" "}
        {t("capture.sequence", { n: formatInteger(source.lastSequence) })} ·{" "}
        {t("capture.overhead", { share: formatPercent(source.hookTimeShare, 1) })}
      </p>
      <p className="muted small" data-testid="level-note" data-level={source.level}>
        {t(`levelNote.${source.level}`)}
      </p>
      {coordinates?.replicaOfRank !== undefined && (
        <p className="muted small" data-testid="replica">
          {t("capture.replica", { rank: coordinates.replicaOfRank })}
        </p>
      )}
      {source.tailUnknownBytes > 0n && (
        <p className="warning small">
          {t("capture.tailUnknown", { bytes: formatBytes(Number(source.tailUnknownBytes)) })}
        </p>
      )}
      <h4>{t("health.title")}</h4>
      <HealthList checks={source.checks} />
      {source.problems.map((problem) => (
        <p className="warning small" key={problem}>
          {problem}
        </p>
      ))}
      {series.length > 0 && (
        <>
          <h4>
            {t("capture.series")}{" "}
            <button type="button" className="link" onClick={() => useApp.setState({ panel: "training" })}>
              {t("capture.openSeries")}
            </button>
          </h4>
          <dl className="facts">
            {series.map(([name, value]) => (
              <div key={name} className="sub">
                <dt className="mono">{name}</dt>
                <dd className="num">{formatValue(value)}</dd>
              </div>
            ))}
          </dl>
        </>
      )}
    </details>
  );
}
