import { useMemo } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { formatInteger } from "../format";
import { type Session, SessionState } from "../gen/moe_debugger/v1/session_pb";
import { type ThemeChoice, useApp } from "../store";
import { ChevronIcon, MoonIcon, PauseIcon, PlayIcon, SunIcon, SystemIcon } from "../ui/icons";
import { setTheme } from "../ui/theme";

const STATE_CLASS: Record<number, string> = {
  [SessionState.OPEN]: "ready",
  [SessionState.STALE]: "starting",
};

export function useSession(): Session | undefined {
  const sessions = useApp((state) => state.sessions);
  const sessionId = useApp((state) => state.sessionId);
  const inPicture = useApp((state) => state.picture?.snapshot.session);
  return sessions?.find((session) => session.sessionId === sessionId) ?? inPicture;
}

export function SessionPicker() {
  const { t } = useTranslation();
  const { app } = useServices();
  const sessions = useApp((state) => state.sessions) ?? [];
  const session = useSession();
  const sorted = useMemo(
    () => [...sessions].sort((a, b) => Number(b.lastSeenAtUnixNs - a.lastSeenAtUnixNs)),
    [sessions],
  );
  return (
    <span className="picker">
      <span className={`dot-state ${session ? (STATE_CLASS[session.state] ?? "off") : "off"}`} />
      <select
        aria-label={t("toolbar.session")}
        data-testid="session-picker"
        value={session?.sessionId ?? ""}
        disabled={sorted.length === 0}
        onChange={(event) => app.selectSession(event.target.value)}
      >
        {!session && <option value="">{t("toolbar.noSession")}</option>}
        {sorted.map((item) => (
          <option key={item.sessionId} value={item.sessionId}>
            {item.name} · {item.modelName || item.modelType} ({t(`sessionState.${item.state}`)})
          </option>
        ))}
      </select>
      <ChevronIcon />
    </span>
  );
}

export function LiveBadge() {
  const { t } = useTranslation();
  const connection = useApp((state) => state.connection);
  const isPaused = useApp((state) => state.isPaused);
  const lastStep = useApp((state) => state.picture?.lastStep);
  const session = useSession();
  const [kind, hint] =
    connection.state === "reconnecting"
      ? ([
          "reconnecting",
          t("badge.reconnectingHint", { attempt: connection.attempt, reason: reasonText(t, connection.reason) }),
        ] as const)
      : connection.state === "connecting"
        ? (["connecting", ""] as const)
        : isPaused
          ? (["paused", ""] as const)
          : !session
            ? (["idle", ""] as const)
            : session.state === SessionState.STALE
              ? (["stale", t("badge.staleHint")] as const)
              : session.state >= SessionState.CLOSED
                ? (["closed", t("badge.closedHint")] as const)
                : (["live", ""] as const);
  return (
    <span className="badge-line">
      <span className={`badge ${kind}`} data-testid="badge" data-state={kind} title={hint} role="status">
        <span className="badge-dot" />
        {t(`badge.${kind}`)}
      </span>
      {lastStep !== undefined && (
        <span className="num muted step">{t("toolbar.step", { step: formatInteger(lastStep) })}</span>
      )}
    </span>
  );
}

type Translate = (key: string) => string;

export function reasonText(t: Translate, reason: string): string {
  return reason === "ended" ? t("reconnect.ended") : reason === "silent" ? t("reconnect.silent") : reason;
}

export function PauseButton() {
  const { t } = useTranslation();
  const { app } = useServices();
  const isPaused = useApp((state) => state.isPaused);
  const hasPicture = useApp((state) => state.picture !== null);
  const label = t(isPaused ? "toolbar.resume" : "toolbar.pause");
  return (
    <button
      type="button"
      className="icon-button"
      aria-pressed={isPaused}
      aria-label={label}
      title={label}
      disabled={!hasPicture}
      onClick={() => app.setPaused(!isPaused)}
    >
      {isPaused ? <PlayIcon /> : <PauseIcon />}
    </button>
  );
}

const NEXT_THEME: Record<ThemeChoice, ThemeChoice> = { system: "dark", dark: "light", light: "system" };

export function ThemeButton() {
  const { t } = useTranslation();
  const theme = useApp((state) => state.theme);
  const label = t("toolbar.theme", { theme: t(`theme.${theme}`) });
  return (
    <button
      type="button"
      className="icon-button"
      data-testid="theme"
      aria-label={label}
      title={label}
      onClick={() => setTheme(NEXT_THEME[theme])}
    >
      {theme === "dark" ? <MoonIcon /> : theme === "light" ? <SunIcon /> : <SystemIcon />}
    </button>
  );
}

/** A session that was opened after the one on screen: one click away, never switched to by itself. */
export function NewSessionPill() {
  const { t } = useTranslation();
  const { app } = useServices();
  const sessions = useApp((state) => state.sessions);
  const current = useSession();
  const newer = useMemo(
    () =>
      sessions
        ?.filter(
          (session) =>
            session.state === SessionState.OPEN && current && session.createdAtUnixNs > current.createdAtUnixNs,
        )
        .sort((a, b) => Number(b.createdAtUnixNs - a.createdAtUnixNs))[0],
    [sessions, current],
  );
  if (!newer) return null;
  return (
    <button type="button" className="pill" onClick={() => app.selectSession(newer.sessionId)}>
      {t("toolbar.newSession", { name: newer.name })} <b>{t("toolbar.watchIt")}</b>
    </button>
  );
}

export function PausedPill() {
  const { t } = useTranslation();
  const { app } = useServices();
  const isPaused = useApp((state) => state.isPaused);
  const n = useApp((state) => state.numNewWhilePaused);
  if (!isPaused) return null;
  return (
    <button type="button" className="pill" onClick={() => app.setPaused(false)}>
      {t("toolbar.pausedNew", { n })} <b>{t("toolbar.resumeWord")}</b>
    </button>
  );
}
