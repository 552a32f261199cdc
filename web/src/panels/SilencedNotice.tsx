import { ConnectError } from "@connectrpc/connect";
import { useEffect, useRef, useState } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import type { Finding } from "../gen/moe_debugger/v1/session_pb";
import { findingText } from "../i18n";
import { useApp } from "../store";

/** What was silenced, and how to take it back: a list that leaves out what is silenced has no row left for that. */
export default function SilencedNotice({ finding }: { finding: Finding }) {
  const { t } = useTranslation();
  const { app } = useServices();
  const undo = useRef<HTMLButtonElement>(null);
  const [isBusy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    // The button that silenced it may have gone with its row, and the keyboard's place with it.
    if (document.activeElement === document.body) undo.current?.focus();
  }, []);
  const close = () => {
    useApp.setState({ justSilenced: null });
    document.getElementById("panel-panel")?.focus();
  };
  const takeBack = async () => {
    if (isBusy) return;
    setBusy(true);
    setProblem("");
    try {
      await app.silenceFinding(finding, 0);
      close();
    } catch (cause) {
      setProblem(t("life.failed", { problem: ConnectError.from(cause).rawMessage }));
    } finally {
      setBusy(false);
    }
  };
  return (
    <>
      <span>
        {t("life.silencedNow", { title: findingText(finding, "title") })}
        {problem && <span className="critical"> {problem}</span>}
      </span>
      <button type="button" className="button" ref={undo} aria-disabled={isBusy} onClick={() => void takeBack()}>
        {t("life.silencedUndo")}
      </button>
      <button type="button" className="button" aria-label={t("life.dismiss")} onClick={close}>
        ✕
      </button>
    </>
  );
}
