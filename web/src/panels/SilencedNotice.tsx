import { ConnectError } from "@connectrpc/connect";
import { useEffect, useRef, useState } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { findingText } from "../i18n";
import { useApp } from "../store";

/** Says what was silenced, and takes it back: a list that leaves out what is silenced has no row left for that. */
export function SilencedNotice() {
  const { t } = useTranslation();
  const { app } = useServices();
  const finding = useApp((state) => state.justSilenced);
  const undo = useRef<HTMLButtonElement>(null);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    setProblem("");
    // The button that silenced it may have gone with its row, and the keyboard's place with it.
    if (finding && document.activeElement === document.body) undo.current?.focus();
  }, [finding]);
  const close = () => {
    useApp.setState({ justSilenced: null });
    document.getElementById("panel-panel")?.focus();
  };
  const takeBack = async () => {
    if (!finding) return;
    try {
      await app.silenceFinding(finding, 0);
      close();
    } catch (cause) {
      setProblem(t("life.failed", { problem: ConnectError.from(cause).rawMessage }));
    }
  };
  return (
    <div className="silenced-notice" role="status" data-testid="silenced-notice">
      {finding && (
        <>
          <span>
            {t("life.silencedNow", { title: findingText(finding, "title") })}
            {problem && <span className="critical"> {problem}</span>}
          </span>
          <button type="button" className="button" ref={undo} onClick={() => void takeBack()}>
            {t("life.silencedUndo")}
          </button>
          <button type="button" className="button" aria-label={t("life.dismiss")} onClick={close}>
            ✕
          </button>
        </>
      )}
    </div>
  );
}
