// Training series of the selected session: looked for quietly, and asked for every two seconds while their panel is open.
import { ConnectError } from "@connectrpc/connect";
import { useEffect } from "react";
import { create } from "zustand";
import { useServices } from "./context";
import { SessionState } from "./gen/moe_debugger/v1/session_pb";
import { PROFILE_PREFIX } from "./model/performance";
import { decodeSeries, type SeriesLine } from "./model/series";
import { type App, useApp } from "./store";

export const EXPERT_SERIES = "expert_gradient_norm";

interface TrainingState {
  sessionId: string;
  /** Null until the first answer with points. */
  lines: SeriesLine[] | null;
  maxPoints: number;
  numNotKept: number;
  error: string | null;
  /** Whether the session has any series of a training; null = not known yet. */
  hasSeries: boolean | null;
  /** Whether it sends times of its layers, which have a panel of their own. */
  hasProfile: boolean;
  /** Lines with a value for each expert; asked for only while they are shown. */
  expertLines: SeriesLine[] | null;
  expertError: string | null;
  isShowingExperts: boolean;
  /** The step under the pointer or the keyboard's cursor, in all charts. */
  cursor: number | null;
  /** The source whose layers are shown; empty = the first. */
  sourceId: string;
  isLog: boolean;
  numRetries: number;
}

const FRESH = {
  lines: null,
  maxPoints: 0,
  numNotKept: 0,
  error: null,
  hasSeries: null,
  hasProfile: false,
  expertLines: null,
  expertError: null,
  cursor: null,
  sourceId: "",
};

export const useTraining = create<TrainingState>(() => ({
  ...FRESH,
  sessionId: "",
  isShowingExperts: false,
  isLog: false,
  numRetries: 0,
}));

const POLL_MS = 2000;
const PROBE_MS = 10_000;
const EXPERTS_MS = 10_000;
// Values of one answer, so that a model with many layers does not fetch megabytes every two seconds.
const MAX_VALUES = 80_000;
const MAX_EXPERT_VALUES = 200_000;

/** Points of each series that one answer may hold. */
export function pointsFor(numSeries: number, budget = MAX_VALUES): number {
  return Math.max(100, Math.min(2000, Math.floor(budget / Math.max(1, numSeries))));
}

/** Keeps the store filled; used once, by the shell. */
export function useSeriesPolling(): void {
  const { app } = useServices();
  const sessionId = useApp((state) => state.sessionId);
  const isOpen = useApp((state) => state.panel === "training");
  const isOver = useApp((state) => (state.picture?.snapshot.session?.state ?? 0) >= SessionState.CLOSED);
  const isLive = useApp((state) => state.connection.state === "live" && state.picture !== null);
  const isShowingExperts = useTraining((state) => state.isShowingExperts);
  const numRetries = useTraining((state) => state.numRetries);
  // biome-ignore lint/correctness/useExhaustiveDependencies: a retry runs it again
  useEffect(() => {
    if (useTraining.getState().sessionId !== sessionId) useTraining.setState({ ...FRESH, sessionId });
    if (!sessionId || !isLive) return;
    const controller = new AbortController();
    const { signal } = controller;
    const timers = [
      every(isOver, isOpen ? POLL_MS : PROBE_MS, () => (isOpen ? load(app, signal) : probe(app, signal))),
      ...(isOpen && isShowingExperts ? [every(isOver, EXPERTS_MS, () => loadExperts(app, signal))] : []),
    ];
    return () => {
      for (const timer of timers) clearInterval(timer);
      controller.abort();
    };
  }, [app, sessionId, isOpen, isOver, isLive, isShowingExperts, numRetries]);
}

function every(isOnce: boolean, ms: number, action: () => Promise<void>): ReturnType<typeof setInterval> | undefined {
  void action();
  if (isOnce) return undefined;
  return setInterval(() => document.visibilityState === "visible" && !useApp.getState().isPaused && void action(), ms);
}

/** Looks whether there are series, so that the panel can be offered. */
async function probe(app: App, signal: AbortSignal): Promise<void> {
  const { sessionId, hasSeries, hasProfile } = useTraining.getState();
  if (hasSeries && hasProfile) return;
  try {
    const { series } = await app.client.getSeries({ sessionId, maxPoints: 1 }, { signal });
    useTraining.setState({ hasSeries: series.some(isOfTraining), hasProfile: !series.every(isOfTraining) });
  } catch {
    // The panel says what is wrong once it is open.
  }
}

const isOfTraining = ({ name }: { name: string }): boolean => !name.startsWith(PROFILE_PREFIX);

async function load(app: App, signal: AbortSignal): Promise<void> {
  const { sessionId, lines } = useTraining.getState();
  try {
    // How many series there are is known from the answer before.
    let maxPoints = pointsFor(lines?.length ?? MAX_VALUES);
    let answer = await app.client.getSeries({ sessionId, maxPoints }, { signal });
    if (lines === null && pointsFor(answer.series.length) > maxPoints) {
      maxPoints = pointsFor(answer.series.length);
      answer = await app.client.getSeries({ sessionId, maxPoints }, { signal });
    }
    useTraining.setState({
      lines: decodeSeries(answer.series.filter(isOfTraining)),
      maxPoints,
      numNotKept: Number(answer.numPointsNotKept),
      hasSeries: answer.series.some(isOfTraining),
      hasProfile: !answer.series.every(isOfTraining),
      error: null,
    });
  } catch (cause) {
    if (!signal.aborted) useTraining.setState({ error: ConnectError.from(cause).rawMessage });
  }
}

async function loadExperts(app: App, signal: AbortSignal): Promise<void> {
  const { sessionId } = useTraining.getState();
  const numCells = useApp.getState().picture?.whole.counts.length ?? 1;
  const maxPoints = Math.max(1, Math.min(200, Math.floor(MAX_EXPERT_VALUES / Math.max(1, numCells))));
  try {
    const { series } = await app.client.getSeries({ sessionId, names: [EXPERT_SERIES], maxPoints }, { signal });
    useTraining.setState({ expertLines: decodeSeries(series), expertError: null });
  } catch (cause) {
    if (!signal.aborted) useTraining.setState({ expertError: ConnectError.from(cause).rawMessage });
  }
}
