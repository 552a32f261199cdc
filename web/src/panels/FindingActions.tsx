import { ConnectError } from "@connectrpc/connect";
import { useState } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { isAcknowledged, isSilenced } from "../findings";
import type { Finding } from "../gen/moe_debugger/v1/session_pb";
import { findingText } from "../i18n";

const HOUR_S = 3600;

/** Acknowledge and silence, for everybody who watches the session. */
export function FindingActions({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const { app } = useServices();
  const [isBusy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  const title = findingText(finding, "title");
  const act = async (action: () => Promise<void>) => {
    if (isBusy) return;
    setBusy(true);
    setProblem("");
    try {
      await action();
    } catch (cause) {
      setProblem(ConnectError.from(cause).rawMessage);
    } finally {
      setBusy(false);
    }
  };
  const acknowledged = isAcknowledged(finding);
  const silenced = isSilenced(finding);
  const acknowledge = t(acknowledged ? "life.undo" : "life.acknowledge");
  const silence = t(silenced ? "life.unsilence" : "life.silence");
  // Not `disabled`: that would take the focus away from a keyboard.
  return (
    <div className="finding-actions">
      <button
        type="button"
        className="button"
        data-testid="acknowledge"
        aria-disabled={isBusy}
        aria-label={`${acknowledge}: ${title}`}
        title={t("life.acknowledgeHint")}
        onClick={() => void act(() => app.acknowledgeFinding(finding, acknowledged))}
      >
        {acknowledge}
      </button>
      <button
        type="button"
        className="button"
        data-testid="silence"
        aria-disabled={isBusy}
        aria-label={`${silence}: ${title}`}
        title={t("life.silenceHint")}
        onClick={() => void act(() => app.silenceFinding(finding, silenced ? 0 : HOUR_S))}
      >
        {silence}
      </button>
      {problem && (
        <p className="critical small" role="alert">
          {t("life.failed", { problem })}
        </p>
      )}
    </div>
  );
}
