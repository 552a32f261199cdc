import { useState } from "react";
import { useTranslation } from "react-i18next";
import { ComponentState } from "../gen/moe_debugger/v1/gateway_pb";
import { useApp } from "../store";

const ATTACH = `from moe_debugger import MoEDebugger

debugger = MoEDebugger(model, fleet="nats://…")  # the "nats" value of moe-debugger up --json`;

function Command({ text }: { text: string }) {
  const { t } = useTranslation();
  const [isCopied, setCopied] = useState(false);
  return (
    <div className="command" dir="ltr">
      <pre>{text}</pre>
      <button
        type="button"
        className="button"
        onClick={() => {
          void navigator.clipboard?.writeText(text).then(() => setCopied(true));
        }}
      >
        {t(isCopied ? "empty.copied" : "empty.copy")}
      </button>
    </div>
  );
}

/** No session yet: what happens by itself, and what to run. */
export function NoSession() {
  const { t } = useTranslation();
  const worker = useApp((state) => state.components.find(({ name }) => name === "worker"));
  const key =
    worker?.state === ComponentState.READY
      ? "empty.workerReady"
      : worker?.state === ComponentState.DOWN
        ? "empty.workerDown"
        : worker
          ? "empty.workerStarting"
          : "empty.noWorker";
  return (
    <div className="empty-state" data-testid="no-session">
      <h2>{t("empty.title")}</h2>
      <p>{t("empty.text")}</p>
      <p>
        <span
          className={`dot-state ${worker?.state === ComponentState.READY ? "ready" : worker?.state === ComponentState.DOWN ? "down" : worker ? "starting" : "off"}`}
        />{" "}
        {t("empty.worker")} {t(key)} <span className="muted">{worker?.detail}</span>
      </p>
      <h3>{t("empty.train")}</h3>
      <Command text="moe-debugger demo --scenario collapse" />
      <h3>{t("empty.attach")}</h3>
      <Command text={ATTACH} />
    </div>
  );
}

export function Loading({ isFailing }: { isFailing: boolean }) {
  const { t } = useTranslation();
  const sessionId = useApp((state) => state.sessionId);
  return (
    <div className="loading" data-testid="loading" role="status">
      {isFailing ? (
        <div className="empty-state">
          <p>{t("loading.failed")}</p>
          <Command text="moe-debugger up" />
        </div>
      ) : (
        <>
          <p className="muted">{t(sessionId ? "loading.session" : "loading.page")}</p>
          <div className="skeleton" aria-hidden="true">
            {Array.from({ length: 32 }, (_, i) => (
              // biome-ignore lint/suspicious/noArrayIndexKey: a fixed pattern
              <span key={i} />
            ))}
          </div>
        </>
      )}
    </div>
  );
}
