// Roll-ups of the selected session, asked for every two seconds while it is open.
import { ConnectError } from "@connectrpc/connect";
import { useEffect, useState } from "react";
import { create } from "zustand";
import { useServices } from "./context";
import { type RollUp, SessionState } from "./gen/moe_debugger/v1/session_pb";
import { decodeF32 } from "./model/columns";
import { useApp } from "./store";

export interface HistoryPoint {
  atMs: number;
  durationS: number;
  numTokens: number;
  loadEntropy: Float32Array;
  minEntropy: number;
}

export type Resolution = 1 | 10 | 60;

interface HistoryState {
  resolution: Resolution;
  points: HistoryPoint[] | null;
  error: string | null;
  sessionId: string;
  drawnResolution: Resolution;
}

/** Points of each resolution that are drawn: of the finer ones the analyzer keeps no more. */
export const NUM_POINTS: Record<Resolution, number> = { 1: 120, 10: 120, 60: 300 };
const POLL_MS = 2000;

export const useHistoryStore = create<HistoryState>(() => ({
  resolution: 1,
  points: null,
  error: null,
  sessionId: "",
  drawnResolution: 1,
}));

/**
 * Points with each layer's load entropy in 0..1. It is taken from the effective experts, exp(H), and the layer's own E,
 * so that layers of different sizes share one axis.
 */
export function decodeRollUps(rollUps: readonly RollUp[], numExperts: readonly number[]): HistoryPoint[] {
  return rollUps
    .map((rollUp) => {
      const loadEntropy = decodeF32(rollUp.effectiveExperts, "effective_experts").map((effective, row) => {
        const size = numExperts[row] ?? 0;
        return size > 1 ? Math.log(effective) / Math.log(size) : Number.NaN;
      });
      let minEntropy = Number.NaN;
      for (const value of loadEntropy) {
        if (!Number.isNaN(value) && !(minEntropy <= value)) minEntropy = value;
      }
      return {
        atMs: Number(rollUp.startUnixNs / 1_000_000n),
        durationS: rollUp.durationS || 1,
        numTokens: Number(rollUp.numTokens),
        loadEntropy,
        minEntropy,
      };
    })
    .sort((a, b) => a.atMs - b.atMs);
}

/** Keeps the history store filled; used once, by the shell. */
export function useHistoryPolling(): void {
  const { app } = useServices();
  const sessionId = useApp((state) => state.sessionId);
  const resolution = useHistoryStore((state) => state.resolution);
  const isOver = useApp((state) => (state.picture?.snapshot.session?.state ?? 0) >= SessionState.CLOSED);
  const isLive = useApp((state) => state.connection.state === "live" && state.picture !== null);
  useEffect(() => {
    // A lost connection keeps what is drawn; another session or span starts anew.
    const drawn = useHistoryStore.getState();
    if (drawn.sessionId !== sessionId || drawn.drawnResolution !== resolution) {
      useHistoryStore.setState({ points: null, error: null, sessionId, drawnResolution: resolution });
    }
    if (!sessionId || !isLive) return;
    const controller = new AbortController();
    const load = async () => {
      try {
        const { points } = await app.client.getHistory(
          { sessionId, resolutionS: resolution, maxPoints: NUM_POINTS[resolution] },
          { signal: controller.signal },
        );
        const { isPaused, picture } = useApp.getState();
        const numExperts = picture?.whole.layers.map((layer) => layer.numExperts);
        if (!isPaused && numExperts) {
          useHistoryStore.setState({ points: decodeRollUps(points, numExperts), error: null });
        }
      } catch (cause) {
        if (!controller.signal.aborted) useHistoryStore.setState({ error: ConnectError.from(cause).rawMessage });
      }
    };
    void load();
    const timer = isOver
      ? undefined
      : setInterval(() => document.visibilityState === "visible" && void load(), POLL_MS);
    return () => {
      clearInterval(timer);
      controller.abort();
    };
  }, [app, sessionId, resolution, isOver, isLive]);
}

/** The time at the right end of the history: now while the session runs, else its last point. */
export function useHistoryEnd(): number {
  const points = useHistoryStore((state) => state.points);
  const session = useApp((state) => state.picture?.snapshot.session);
  const [now, setNow] = useState(Date.now);
  useEffect(() => {
    const timer = setInterval(() => !useApp.getState().isPaused && setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, []);
  const last = points?.at(-1);
  const isOpen = session?.state === SessionState.OPEN;
  return isOpen || !last ? now : last.atMs + last.durationS * 1000;
}

/** A path through the points, broken where time without data lies between them. */
export function linePath(
  points: readonly HistoryPoint[],
  entropyOf: (point: HistoryPoint) => number,
  x: (ms: number) => number,
  y: (value: number) => number,
): string {
  let path = "";
  let previous: HistoryPoint | null = null;
  for (const point of points) {
    const value = entropyOf(point);
    if (Number.isNaN(value)) {
      previous = null;
      continue;
    }
    const width = point.durationS * 1000;
    const isJoined = previous !== null && point.atMs - previous.atMs <= width * 2.5;
    const at = `${x(point.atMs + width / 2).toFixed(1)} ${y(value).toFixed(1)}`;
    // A lone point is drawn one second wide, so that it can be seen.
    path += isJoined ? `L${at}` : `M${x(point.atMs).toFixed(1)} ${y(value).toFixed(1)}L${at}`;
    previous = point;
  }
  return path;
}
