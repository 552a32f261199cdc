// The list of recordings: what each holds, how it ended, and the commands that read it.
import { useEffect, useRef, useState } from "react";
import { useTranslation } from "react-i18next";
import { formatBytes, formatClock, formatInteger } from "../format";
import { type Recording, RecordingState } from "../gen/moe_debugger/v1/session_pb";
import { durationS, formatDuration, isRunning, nextCommands, useRecordings } from "../recordings";
import { Elapsed, RecordButton } from "./Recordings";

const day = new Intl.DateTimeFormat("en-GB", { day: "2-digit", month: "short" });

const STATE_CLASS: Record<number, string> = {
  [RecordingState.RECORDING]: "critical",
  [RecordingState.STOPPING]: "warning",
  [RecordingState.FAILED]: "critical",
  [RecordingState.INTERRUPTED]: "warning",
};

export default function RecordingList() {
  const { t } = useTranslation();
  const recordings = useRecordings((state) => state.recordings);
  const error = useRecordings((state) => state.error);
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    dialog.current?.showModal();
  }, []);
  const close = () => useRecordings.setState({ isListOpen: false, error: null });
  return (
    <dialog
      ref={dialog}
      className="recordings"
      aria-label={t("recordings.title")}
      data-testid="recording-list"
      onClose={close}
    >
      <header className="recordings-head">
        <h2>{t("recordings.title")}</h2>
        <RecordButton />
        <span className="spacer" />
        <button type="button" className="button" onClick={() => dialog.current?.close()}>
          {t("recordings.close")}
        </button>
      </header>
      <p className="muted recordings-note">{t("recordings.privacy")}</p>
      {error && (
        <p className="recordings-error critical" role="alert">
          {error}
        </p>
      )}
      {recordings === null ? (
        <p className="muted">{t("recordings.loading")}</p>
      ) : recordings.length === 0 ? (
        <p className="muted">{t("recordings.none")}</p>
      ) : (
        <ol className="recordings-rows">
          {recordings.map((recording) => (
            <RecordingRow
              key={recording.recordingId}
              recording={recording}
              other={recordings.find(
                (one) => one.recordingId !== recording.recordingId && !isRunning(one) && one.numRows > 0n,
              )}
            />
          ))}
        </ol>
      )}
    </dialog>
  );
}

function RecordingRow({ recording, other }: { recording: Recording; other: Recording | undefined }) {
  const { t } = useTranslation();
  const { state, numRows, numSources, numMissingMessages, numDecisionsDropped } = recording;
  const startedMs = Number(recording.startedAtUnixNs / 1_000_000n);
  const lost = Object.entries(recording.numRowsNotWritten);
  return (
    <li
      className="recording"
      data-testid="recording"
      data-id={recording.recordingId}
      data-state={t(`recordings.state.${state}`)}
      data-rows={String(numRows)}
      data-path={recording.path}
    >
      <div className="recording-line">
        <b className="recording-name">{recording.name}</b>
        <span className={`recording-state ${STATE_CLASS[state] ?? "muted"}`}>{t(`recordings.state.${state}`)}</span>
        <span className="spacer" />
        <span className="muted num">
          {day.format(startedMs)} {formatClock(recording.startedAtUnixNs)}
        </span>
      </div>
      <div className="recording-facts num">
        <span>{t("recordings.rows", { count: Number(numRows), formatted: formatInteger(numRows) })}</span>
        <span>{formatBytes(Number(recording.sizeBytes))}</span>
        <span>
          {isRunning(recording) ? <Elapsed recording={recording} /> : formatDuration(durationS(recording, 0))}
        </span>
        <span>{t("recordings.sources", { count: numSources })}</span>
        {recording.sessionName !== recording.name && (
          <span className="muted">{t("recordings.session", { name: recording.sessionName })}</span>
        )}
        {numMissingMessages > 0n && (
          <span className="warning">{t("recordings.missing", { count: Number(numMissingMessages) })}</span>
        )}
        {numDecisionsDropped > 0n && (
          <span className="warning">{t("recordings.dropped", { n: formatInteger(numDecisionsDropped) })}</span>
        )}
        {lost.map(([reason, n]) => (
          <span className="warning" key={reason}>
            {t("recordings.notWritten", { n: formatInteger(n), reason: reason.replaceAll("_", " ") })}
          </span>
        ))}
      </div>
      {recording.detail && <p className="recording-detail muted">{recording.detail}</p>}
      {!isRunning(recording) && (
        <details className="recording-next">
          <summary>{t("recordings.next")}</summary>
          <dl>
            <dt>{t("recordings.folder")}</dt>
            <Copyable text={recording.path} />
            {nextCommands(recording, other).map(({ id, command }) => (
              <div className="recording-command" key={id} data-command={id}>
                <dt>{t(`recordings.command.${id}`)}</dt>
                <Copyable text={command} />
              </div>
            ))}
          </dl>
        </details>
      )}
    </li>
  );
}

function Copyable({ text }: { text: string }) {
  const { t } = useTranslation();
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return (
    <dd className="copyable">
      <code>{text}</code>
      <button type="button" className="link" onClick={() => void copy()}>
        {t(isCopied ? "recordings.copied" : "recordings.copy")}
      </button>
    </dd>
  );
}
