import { lazy, Suspense, useEffect, useRef, useState } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "./context";
import { countFindings, findingKey, isAcknowledged, needsAttention, SEVERITY_NAME } from "./findings";
import { formatClockMs } from "./format";
import { Severity } from "./gen/moe_debugger/v1/session_pb";
import { useHistoryPolling } from "./history";
import { findingText } from "./i18n";
import { Console } from "./panels/Console";
import { Loading, NoSession } from "./panels/Empty";
import { useFindings } from "./panels/Findings";
import { Heatmap } from "./panels/Heatmap";
import { HistoryStrip } from "./panels/History";
import { RecordButton, RecordingsButton } from "./panels/Recordings";
import { Details, Diagnosis, Sidebar, useRequestList } from "./panels/Sidebar";
import { StatusBar } from "./panels/StatusBar";
import { TokensPanel } from "./panels/Tokens";
import {
  LiveBadge,
  NewSessionPill,
  PauseButton,
  PausedPill,
  reasonText,
  SessionPicker,
  ThemeButton,
} from "./panels/Toolbar";
import { useRecordingsPolling } from "./recordings";
import { PANELS, type Panel, useApp } from "./store";
import { useSeriesPolling, useTraining } from "./training";
import { ErrorBoundary } from "./ui/ErrorBoundary";
import {
  ConsoleIcon,
  ExpertsIcon,
  LogoIcon,
  PerformanceIcon,
  SeverityGlyph,
  TokensIcon,
  TrainingIcon,
} from "./ui/icons";
import { Tabs } from "./ui/Tabs";
import { useLocationSync } from "./url";

// Most sessions have no series: what draws them is loaded with the first look at the panel.
const TrainingPanel = lazy(() => import("./panels/Training"));
const PerformancePanel = lazy(() => import("./panels/Performance"));

// Loaded with the first finding that is silenced.
const LazyNotice = lazy(() => import("./panels/SilencedNotice"));

const PHONE = "(max-width: 720px)";

export function useIsPhone(): boolean {
  const [isPhone, setPhone] = useState(() => matchMedia(PHONE).matches);
  useEffect(() => {
    const query = matchMedia(PHONE);
    const listener = () => setPhone(query.matches);
    query.addEventListener("change", listener);
    return () => query.removeEventListener("change", listener);
  }, []);
  return isPhone;
}

export function AppShell() {
  const { t } = useTranslation();
  const panel = useApp((state) => state.panel);
  const isPhone = useIsPhone();
  useLocationSync();
  useShortcuts();
  useHistoryPolling();
  useSeriesPolling();
  useRecordingsPolling();
  useRequestList();
  return (
    <div className={`app ${isPhone ? "phone" : "desktop"}`} data-panel={panel}>
      <button type="button" className="skip" onClick={() => document.getElementById("panel-panel")?.focus()}>
        {t("app.skip")}
      </button>
      {isPhone ? <PhoneBar /> : <DesktopBars />}
      <ReconnectBar />
      <UnknownSession />
      <main className="main" id="panel-panel" role="tabpanel" aria-labelledby={`panel-tab-${panel}`} tabIndex={-1}>
        <Main isPhone={isPhone} />
      </main>
      {isPhone ? <PhoneTabs /> : <StatusBar />}
      <SilencedNotice />
      <Announcer />
    </div>
  );
}

function FindingBadges() {
  const counts = countFindings(useFindings());
  return (
    <>
      {counts.critical > 0 && (
        <span className="tab-count critical">
          <SeverityGlyph severity={Severity.CRITICAL} size={11} />
          {counts.critical}
        </span>
      )}
      {counts.warning > 0 && (
        <span className="tab-count warning">
          <SeverityGlyph severity={Severity.WARNING} size={11} />
          {counts.warning}
        </span>
      )}
    </>
  );
}

/** Training and Performance are there where the session has such series, and where a link points to them. */
function usePanels(): Panel[] {
  const panel = useApp((state) => state.panel);
  const hasSeries = useTraining((state) => state.hasSeries);
  const hasProfile = useTraining((state) => state.hasProfile);
  const isThere = { training: hasSeries, performance: hasProfile };
  return PANELS.filter((id) => !(id in isThere) || isThere[id as keyof typeof isThere] || panel === id);
}

const selectPanel = (panel: Panel) => useApp.setState({ panel });

function DesktopBars() {
  const { t } = useTranslation();
  const version = useApp((state) => state.serverInfo?.version);
  const panel = useApp((state) => state.panel);
  const panels = usePanels();
  return (
    <>
      <header className="top-bar">
        <span className="logo" title={t("app.name")}>
          <LogoIcon />
          <h1 className="visually-hidden">{t("app.name")}</h1>
        </span>
        <Tabs
          label={t("app.panels")}
          idPrefix="panel"
          className="tabs panels"
          items={panels.map((id) => ({
            id,
            label: (
              <>
                {t(`panel.${id}`)}
                {id === "console" && <FindingBadges />}
              </>
            ),
          }))}
          selected={panel}
          onSelect={selectPanel}
        />
        <span className="spacer" />
        {version && <span className="muted num">{t("status.version", { version })}</span>}
        <ThemeButton />
      </header>
      <div className="toolbar" role="toolbar" aria-label={t("toolbar.session")}>
        <PauseButton />
        <RecordButton />
        <RecordingsButton />
        <span className="rule" />
        <SessionPicker />
        <LiveBadge />
        <PausedPill />
        <NewSessionPill />
      </div>
    </>
  );
}

function PhoneBar() {
  const { t } = useTranslation();
  return (
    <header className="phone-bar">
      <h1 className="visually-hidden">{t("app.name")}</h1>
      <SessionPicker />
      <LiveBadge />
      <RecordButton />
      <RecordingsButton />
      <PauseButton />
      <ThemeButton />
    </header>
  );
}

const PANEL_ICON = {
  experts: ExpertsIcon,
  training: TrainingIcon,
  performance: PerformanceIcon,
  console: ConsoleIcon,
  tokens: TokensIcon,
};

function PhoneTabs() {
  const { t } = useTranslation();
  const panel = useApp((state) => state.panel);
  const counts = countFindings(useFindings());
  const panels = usePanels();
  return (
    <Tabs
      label={t("app.panels")}
      idPrefix="panel"
      className="phone-tabs"
      items={panels.map((id) => {
        const PanelIcon = PANEL_ICON[id];
        const n = counts.critical + counts.warning;
        return {
          id,
          label: (
            <>
              <PanelIcon />
              <span>{t(`panel.${id}`)}</span>
              {id === "console" && n > 0 && <span className="bubble">{n}</span>}
            </>
          ),
        };
      })}
      selected={panel}
      onSelect={selectPanel}
    />
  );
}

function Main({ isPhone }: { isPhone: boolean }) {
  const { t } = useTranslation();
  const { panel, picture, sessions, sessionId, connection, everLive } = useApp();
  if (panel === "console") {
    return (
      <ErrorBoundary name="console">
        <Console />
      </ErrorBoundary>
    );
  }
  if (panel === "tokens") {
    return (
      <ErrorBoundary name="tokens">
        <TokensPanel isFull />
      </ErrorBoundary>
    );
  }
  if (panel === "training" && sessionId) {
    return (
      <ErrorBoundary name="training">
        <Suspense fallback={<Loading isFailing={false} />}>
          <TrainingPanel />
        </Suspense>
      </ErrorBoundary>
    );
  }
  if (panel === "performance" && sessionId) {
    return (
      <ErrorBoundary name="performance">
        <Suspense fallback={<Loading isFailing={false} />}>
          <PerformancePanel />
        </Suspense>
      </ErrorBoundary>
    );
  }
  if (!picture) {
    const isFailing = !everLive && connection.state === "reconnecting" && connection.attempt >= 2;
    return sessions !== null && sessions.length === 0 && !sessionId ? <NoSession /> : <Loading isFailing={isFailing} />;
  }
  if (isPhone) {
    return (
      <div className="cards">
        <WorstCard />
        <div className="card">
          <ErrorBoundary name="heatmap">
            <Heatmap />
          </ErrorBoundary>
        </div>
        <div className="card">
          <ErrorBoundary name="layer">
            <Details of="layer" />
          </ErrorBoundary>
        </div>
        <div className="card">
          <ErrorBoundary name="capture">
            <Details of="capture" />
          </ErrorBoundary>
        </div>
      </div>
    );
  }
  return (
    <div className="experts">
      <ErrorBoundary name="history">
        <HistoryStrip />
      </ErrorBoundary>
      <div className={`experts-main${picture.whole.layers.length > 8 ? " is-tall" : ""}`}>
        <ErrorBoundary name="heatmap">
          <Heatmap />
        </ErrorBoundary>
        <ErrorBoundary name="tokens">
          <TokensPanel isFull={false} />
        </ErrorBoundary>
        <section className="drawer" aria-label={t("console.title")}>
          <ErrorBoundary name="console">
            <Console />
          </ErrorBoundary>
        </section>
      </div>
      <Sidebar />
    </div>
  );
}

function WorstCard() {
  const findings = useFindings();
  const selected = useApp((state) => state.findingKey);
  const shown = findings.find((finding) => findingKey(finding) === selected) ?? findings[0];
  const name = shown && needsAttention(shown) ? SEVERITY_NAME[shown.severity] : undefined;
  const severity = name === "critical" || name === "warning" ? name : "";
  return (
    <div className={`card worst ${severity}`}>
      <ErrorBoundary name="diagnosis">
        <Diagnosis />
      </ErrorBoundary>
    </div>
  );
}

function ReconnectBar() {
  const { t } = useTranslation();
  const { app } = useServices();
  const connection = useApp((state) => state.connection);
  const picture = useApp((state) => state.picture);
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    if (connection.state !== "reconnecting") return;
    setNow(Date.now());
    const timer = setInterval(() => setNow(Date.now()), 500);
    return () => clearInterval(timer);
  }, [connection]);
  if (connection.state !== "reconnecting") return null;
  const takenAt = picture ? Number(picture.snapshot.takenAtUnixNs / 1_000_000n) : 0;
  return (
    <div className="reconnect" role="status" data-testid="reconnecting" data-attempt={connection.attempt}>
      <span>
        {t("reconnect.line", {
          attempt: connection.attempt,
          seconds: Math.max(0, Math.ceil((connection.nextTryAt - now) / 1000)),
          clock: takenAt ? formatClockMs(takenAt) : "–",
        })}{" "}
        <span className="muted">{reasonText(t, connection.reason)}</span>
      </span>
      <button type="button" className="button" onClick={() => app.watch.retryNow()}>
        {t("reconnect.now")}
      </button>
    </div>
  );
}

function UnknownSession() {
  const { t } = useTranslation();
  const unknown = useApp((state) => state.unknownSession);
  if (!unknown) return null;
  return (
    <div className="reconnect" role="alert">
      {t("unknownSession", { id: unknown })}
      <button type="button" className="button" onClick={() => useApp.setState({ unknownSession: null })}>
        OK
      </button>
    </div>
  );
}

/** Speaks new errors, at most one line in five seconds; live numbers stay silent. */
function Announcer() {
  const { t } = useTranslation();
  const findings = useFindings();
  const known = useRef<Set<string> | null>(null);
  const spokenAt = useRef(0);
  const [line, setLine] = useState("");
  useEffect(() => {
    const critical = findings.filter(
      (finding) => finding.severity >= Severity.WARNING && needsAttention(finding) && !isAcknowledged(finding),
    );
    const keys = new Set(critical.map(findingKey));
    const fresh = known.current ? critical.find((finding) => !known.current?.has(findingKey(finding))) : undefined;
    if (fresh && Date.now() - spokenAt.current < 5000) return;
    known.current = keys;
    if (fresh) {
      spokenAt.current = Date.now();
      setLine(t("console.new", { title: findingText(fresh, "title") }));
    }
  }, [findings, t]);
  return (
    <div className="visually-hidden" aria-live="polite">
      {line}
    </div>
  );
}

/** Says what was silenced, in a region that is there before its words are. */
export function SilencedNotice() {
  const finding = useApp((state) => state.justSilenced);
  return (
    <div className="silenced-notice" role="status" data-testid="silenced-notice">
      {finding && (
        <Suspense fallback={null}>
          <LazyNotice finding={finding} key={findingKey(finding)} />
        </Suspense>
      )}
    </div>
  );
}

function useShortcuts(): void {
  const { app } = useServices();
  useEffect(() => {
    const onKeyDown = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (/^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName)) return;
      if (event.key === "t" || event.key === "T") {
        useApp.setState((state) => ({ isTable: !state.isTable }));
      } else if (event.key === " " && target.tagName !== "BUTTON" && useApp.getState().picture) {
        event.preventDefault();
        app.setPaused(!useApp.getState().isPaused);
      } else if (event.key === "/") {
        const filter = document.getElementById("console-filter");
        if (filter) {
          event.preventDefault();
          filter.focus();
        }
      }
    };
    window.addEventListener("keydown", onKeyDown);
    return () => window.removeEventListener("keydown", onKeyDown);
  }, [app]);
}
