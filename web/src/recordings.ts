// Recordings of the fleet: what runs, what there is, and the two requests that begin and end one.
import { ConnectError } from "@connectrpc/connect";
import { useEffect } from "react";
import { create } from "zustand";
import { useServices } from "./context";
import { type Recording, RecordingState } from "./gen/moe_debugger/v1/session_pb";
import { type App, useApp } from "./store";

interface RecordingsState {
  /** Of all sessions, newest first; null until the first answer. */
  recordings: Recording[] | null;
  error: string | null;
  /** A start or a stop is on its way. */
  isBusy: boolean;
  /** The list is on screen. */
  isListOpen: boolean;
}

export const useRecordings = create<RecordingsState>(() => ({
  recordings: null,
  error: null,
  isBusy: false,
  isListOpen: false,
}));

const FAST_MS = 1000;
const SLOW_MS = 15_000;

export const isRunning = ({ state }: Recording): boolean =>
  state === RecordingState.RECORDING || state === RecordingState.STOPPING;

/** The recording of a session that runs now. */
export function runningOf(recordings: readonly Recording[] | null, sessionId: string): Recording | undefined {
  return recordings?.find((one) => one.sessionId === sessionId && isRunning(one));
}

/** Seconds that a recording took, or has taken until now. */
export function durationS(recording: Recording, nowMs: number): number {
  const end = recording.endedAtUnixNs > 0n ? Number(recording.endedAtUnixNs / 1_000_000n) : nowMs;
  return Math.max(0, (end - Number(recording.startedAtUnixNs / 1_000_000n)) / 1000);
}

/** 62 -> "1:02", 3725 -> "1:02:05". */
export function formatDuration(seconds: number): string {
  const whole = Math.floor(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const tail = `${String(rest).padStart(2, "0")}`;
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

/** A word of a shell's command line, in quotes where it needs them. */
export function shellWord(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

/** What can be done with a recording next; `other` is one to compare with. */
export function nextCommands(recording: Recording, other: Recording | undefined): { id: string; command: string }[] {
  const path = shellWord(recording.path);
  return [
    { id: "report", command: `moe-debugger report ${path}` },
    { id: "diff", command: `moe-debugger diff ${other ? shellWord(other.path) : "OTHER"} ${path}` },
    { id: "query", command: `moe-debugger query ${path} "experts where load > 4x order by load desc"` },
    { id: "replay", command: `moe-debugger replay ${path} --speed 4` },
  ];
}

/** Keeps the list fresh; used once, by the shell. */
export function useRecordingsPolling(): void {
  const { app } = useServices();
  const isLive = useApp((state) => state.connection.state === "live");
  const isFast = useRecordings((state) => state.isListOpen || (state.recordings ?? []).some(isRunning));
  useEffect(() => {
    if (!isLive) return;
    const controller = new AbortController();
    void load(app, controller.signal);
    const look = () => document.visibilityState === "visible" && void load(app, controller.signal);
    const timer = setInterval(look, isFast ? FAST_MS : SLOW_MS);
    return () => {
      clearInterval(timer);
      controller.abort();
    };
  }, [app, isLive, isFast]);
}

async function load(app: App, signal?: AbortSignal): Promise<void> {
  try {
    const { recordings } = await app.client.listRecordings({}, signal ? { signal } : {});
    useRecordings.setState({ recordings });
  } catch {
    // The connection's own line says what is wrong; the list stays as it was.
  }
}

/** Begins to record the session on screen. */
export async function startRecording(app: App): Promise<void> {
  await run(app, () => app.client.startRecording({ sessionId: useApp.getState().sessionId }));
}

/** Ends a recording. */
export async function stopRecording(app: App, recording: Recording): Promise<void> {
  await run(app, () => app.client.stopRecording({ recordingId: recording.recordingId }));
}

async function run(app: App, request: () => Promise<unknown>): Promise<void> {
  useRecordings.setState({ isBusy: true, error: null });
  try {
    await request();
  } catch (error) {
    useRecordings.setState({ error: ConnectError.from(error).rawMessage, isListOpen: true });
  } finally {
    useRecordings.setState({ isBusy: false });
    await load(app);
  }
}
