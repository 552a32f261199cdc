// The view in the address, so that it is a link: #/experts?s=<session>&l=<layer>&e=<expert>
import { useEffect } from "react";
import { useServices } from "./context";
import { PANELS, type Panel, useApp } from "./store";

export interface Location {
  panel: Panel;
  sessionId: string;
  row: number;
  expert: number | null;
}

const ID = /^[0-7][0-9a-hjkmnp-tv-z]{25}$/;

export function parseHash(hash: string): Location {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?");
  const parameters = new URLSearchParams(query);
  const session = parameters.get("s") ?? "";
  const number = (key: string) => {
    const value = parameters.get(key);
    return value !== null && /^\d{1,5}$/.test(value) ? Number(value) : null;
  };
  return {
    panel: PANELS.find((panel) => panel === path) ?? "experts",
    sessionId: ID.test(session) ? session : "",
    row: number("l") ?? 0,
    expert: number("e"),
  };
}

export function formatHash({ panel, sessionId, row, expert }: Location): string {
  const parameters = new URLSearchParams();
  if (sessionId) parameters.set("s", sessionId);
  if (row > 0) parameters.set("l", String(row));
  if (expert !== null) parameters.set("e", String(expert));
  const query = parameters.toString();
  return `#/${panel}${query ? `?${query}` : ""}`;
}

/** A change of panel or session is a step of the history, a change of layer or expert is not. */
export function useLocationSync(): void {
  const { app } = useServices();
  const { panel, sessionId, isChosenByUser, row, expert } = useApp();
  useEffect(() => {
    const wanted = formatHash({ panel, sessionId: isChosenByUser ? sessionId : "", row, expert });
    if (window.location.hash === wanted) return;
    const now = parseHash(window.location.hash);
    const isStep = window.location.hash !== "" && now.panel !== panel;
    if (isStep) window.history.pushState(null, "", wanted);
    else window.history.replaceState(null, "", wanted);
  }, [panel, sessionId, isChosenByUser, row, expert]);
  useEffect(() => {
    const onPopState = () => {
      const location = parseHash(window.location.hash);
      if (location.sessionId) app.selectSession(location.sessionId);
      useApp.setState({ panel: location.panel, row: location.row, expert: location.expert });
    };
    window.addEventListener("popstate", onPopState);
    window.addEventListener("hashchange", onPopState);
    return () => {
      window.removeEventListener("popstate", onPopState);
      window.removeEventListener("hashchange", onPopState);
    };
  }, [app]);
}
