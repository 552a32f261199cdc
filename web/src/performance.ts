// The newest profile of the selected session, asked for every five seconds while its panel is open.
import { ConnectError } from "@connectrpc/connect";
import { useEffect } from "react";
import { create } from "zustand";
import { useServices } from "./context";
import { PROFILE_SERIES } from "./model/performance";
import { decodeSeries, type SeriesLine } from "./model/series";
import { useApp } from "./store";

interface PerformanceState {
  sessionId: string;
  /** Null until the first answer. */
  lines: SeriesLine[] | null;
  error: string | null;
  /** Empty = the first source. */
  sourceId: string;
  numRetries: number;
}

const FRESH = { lines: null, error: null, sourceId: "" };

export const usePerformance = create<PerformanceState>(() => ({ ...FRESH, sessionId: "", numRetries: 0 }));

const POLL_MS = 5000;

/** Keeps the store filled; used once, by the panel. */
export function usePerformancePolling(): void {
  const { app } = useServices();
  const sessionId = useApp((state) => state.sessionId);
  const numRetries = usePerformance((state) => state.numRetries);
  // biome-ignore lint/correctness/useExhaustiveDependencies: a retry runs it again
  useEffect(() => {
    if (usePerformance.getState().sessionId !== sessionId) usePerformance.setState({ ...FRESH, sessionId });
    if (!sessionId) return;
    const controller = new AbortController();
    const { signal } = controller;
    const load = async () => {
      try {
        // Two points: one that took a bottleneck back must not hide what was said before it.
        const answer = await app.client.getSeries({ sessionId, names: PROFILE_SERIES, maxPoints: 2 }, { signal });
        usePerformance.setState({ lines: decodeSeries(answer.series), error: null });
      } catch (cause) {
        if (!signal.aborted) usePerformance.setState({ error: ConnectError.from(cause).rawMessage });
      }
    };
    void load();
    const timer = setInterval(
      () => document.visibilityState === "visible" && !useApp.getState().isPaused && void load(),
      POLL_MS,
    );
    return () => {
      clearInterval(timer);
      controller.abort();
    };
  }, [app, sessionId, numRetries]);
}
