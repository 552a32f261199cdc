import { useTranslation } from "react-i18next";
import { accountNumbers, componentClass, formatSampling } from "../account";
import { formatInteger, formatPercent } from "../format";
import { useApp } from "../store";

export function StatusBar() {
  const { t } = useTranslation();
  const { connection, pace, components, picture } = useApp();
  const numbers = accountNumbers(picture?.snapshot.account);
  const sources = picture?.snapshot.sources ?? [];
  const source = sources.find(({ isLive }) => isLive) ?? sources[0];
  const overhead = Math.max(0, ...sources.filter(({ isLive }) => isLive).map(({ hookTimeShare }) => hookTimeShare));
  const parts: [string, bigint, boolean][] = [
    ["produced", numbers.produced, false],
    ["counted", numbers.counted, false],
    ["dropped", numbers.dropped, true],
    ["inFlight", numbers.inFlight, false],
    ["missing", numbers.missing, true],
  ];
  return (
    <footer className="status">
      <span className={`connection ${connection.state}`} data-testid="connection" data-state={connection.state}>
        <span className="dot-state" />
        {connection.state === "live"
          ? t("status.connected")
          : connection.state === "connecting"
            ? t("status.connecting")
            : t("status.reconnecting", { attempt: connection.attempt })}
      </span>
      <span className="num">
        {t("status.hz", { hz: pace.hz.toFixed(pace.hz < 10 ? 1 : 0) })} · {t("status.lag")}{" "}
        <b>{pace.lagMs === null ? "–" : t("status.ms", { ms: formatInteger(Math.round(pace.lagMs)) })}</b>
      </span>
      {pace.numConflated > 0 && (
        <span className="num">{t("status.conflated", { n: formatInteger(pace.numConflated) })}</span>
      )}
      {picture && (
        <button
          type="button"
          className="account num"
          data-testid="account"
          onClick={() => useApp.setState({ sidebar: "capture", panel: "experts" })}
        >
          {parts.map(([name, value, isBad]) => (
            <span
              key={name}
              data-name={name}
              data-count={String(value)}
              className={isBad && value > 0n ? "warning" : undefined}
            >
              {t(`status.${name}`)} <b>{formatInteger(value)}</b>
            </span>
          ))}
        </button>
      )}
      <span className="spacer" />
      {source && (
        <>
          <span>{t("status.level", { level: t(`level.${source.level}`) })}</span>
          <span className="num">{t("status.sampling", { rate: formatSampling(source.samplingRate) })}</span>
          <span>
            {t("status.overhead")} <b className="num">{formatPercent(overhead, 1)}</b>
          </span>
        </>
      )}
      <span className="components">
        {components.map(({ name, state, detail }) => (
          <span
            key={name}
            data-testid="component"
            data-component={name}
            data-state={componentClass(state)}
            title={`${t(`component.state.${state}`)}${detail ? `: ${detail}` : ""}`}
          >
            <span className={`dot-state ${componentClass(state)}`} aria-hidden="true" />
            {t(`component.name.${name}`, { defaultValue: name })}
            {componentClass(state) !== "ready" && <b className="warning"> {t(`component.state.${state}`)}</b>}
            <span className="visually-hidden"> {t(`component.state.${state}`)}</span>
          </span>
        ))}
      </span>
    </footer>
  );
}
