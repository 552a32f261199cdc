// Record and stop in the toolbar; the list of recordings and what to do with them in a dialog.
import { lazy, Suspense, useEffect, useState } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { formatBytes } from "../format";
import { type Recording, RecordingState, SessionState } from "../gen/moe_debugger/v1/session_pb";
import { i18n } from "../i18n";
import words from "../locales/en.recordings.json";
import { durationS, formatDuration, runningOf, startRecording, stopRecording, useRecordings } from "../recordings";
import { useApp } from "../store";
import { useSession } from "./Toolbar";
import "./recordings.css";

i18n.addResourceBundle("en", "page", words, true, true);

const RecordingList = lazy(() => import("./RecordingList"));

const RecordIcon = ({ isRunning }: { isRunning: boolean }) => (
  <svg className="icon record-icon" width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">
    {isRunning ? (
      <rect x="2.5" y="2.5" width="9" height="9" rx="1.5" fill="currentColor" />
    ) : (
      <circle cx="7" cy="7" r="4.8" fill="currentColor" />
    )}
  </svg>
);

const ListIcon = () => (
  <svg className="icon" width="16" height="16" viewBox="0 0 16 16" aria-hidden="true" stroke="currentColor">
    <path d="M2.5 4h1M6 4h7.5M2.5 8h1M6 8h7.5M2.5 12h1M6 12h7.5" strokeWidth="1.5" strokeLinecap="round" />
  </svg>
);

/** The clock of a recording that runs. */
export function Elapsed({ recording }: { recording: Recording }) {
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, []);
  return <>{formatDuration(durationS(recording, now))}</>;
}

/** Begins to record the session on screen, or ends that. */
export function RecordButton() {
  const { t } = useTranslation();
  const { app } = useServices();
  const session = useSession();
  const sessionId = useApp((state) => state.sessionId);
  const isBusy = useRecordings((state) => state.isBusy);
  const running = useRecordings((state) => runningOf(state.recordings, sessionId));
  const canRecord = session !== undefined && session.state < SessionState.CLOSED;
  if (running) {
    const isStopping = isBusy || running.state === RecordingState.STOPPING;
    return (
      <button
        type="button"
        className="record-button is-running"
        data-testid="record"
        data-state={isStopping ? "stopping" : "recording"}
        aria-label={t("recordings.stop")}
        title={t("recordings.stop")}
        disabled={isStopping}
        onClick={() => void stopRecording(app, running)}
      >
        <RecordIcon isRunning />
        <span className="num record-clock">
          <Elapsed recording={running} />
        </span>
        <span className="num muted record-size">{formatBytes(Number(running.sizeBytes))}</span>
      </button>
    );
  }
  return (
    <button
      type="button"
      className="record-button"
      data-testid="record"
      data-state="idle"
      aria-label={t("recordings.record")}
      title={t(canRecord ? "recordings.recordHint" : "recordings.cannot")}
      disabled={isBusy || !canRecord}
      onClick={() => void startRecording(app)}
    >
      <RecordIcon isRunning={false} />
      <span className="record-word">{t("recordings.record")}</span>
    </button>
  );
}

/** Opens the list. */
export function RecordingsButton() {
  const { t } = useTranslation();
  const isListOpen = useRecordings((state) => state.isListOpen);
  const n = useRecordings((state) => state.recordings?.length ?? 0);
  const label = t("recordings.open", { n });
  return (
    <>
      <button
        type="button"
        className="icon-button"
        data-testid="recordings"
        aria-label={label}
        aria-haspopup="dialog"
        title={label}
        onClick={() => useRecordings.setState({ isListOpen: true })}
      >
        <ListIcon />
      </button>
      {isListOpen && (
        <Suspense fallback={null}>
          <RecordingList />
        </Suspense>
      )}
    </>
  );
}
