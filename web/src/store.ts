// What the page shows, in one store. The stream writes here at most five times a second.
import type { Client } from "@connectrpc/connect";
import { create } from "zustand";
import {
  type ComponentHealth,
  ComponentState,
  type DebuggerService,
  type GetServerInfoResponse,
} from "./gen/moe_debugger/v1/gateway_pb";
import { CaptureLevel } from "./gen/moe_debugger/v1/routing_pb";
import { type Finding, type Session, SessionState } from "./gen/moe_debugger/v1/session_pb";
import { LiveModel, type Pace, type Picture, throttle } from "./live";
import { type Connection, WatchConnection } from "./rpc/watch";

export type Panel = "experts" | "training" | "performance" | "console" | "tokens";
export type Mode = "whole" | "recent";
export type ThemeChoice = "system" | "dark" | "light";
export type SidebarTab = "diagnosis" | "layer" | "capture";

export const PANELS: Panel[] = ["experts", "training", "performance", "console", "tokens"];
const REACT_INTERVAL_MS = 200;
const MAX_COMPONENT_EVENTS = 50;

/** A change of a component's state, as the page saw it. */
export interface ComponentEvent {
  id: number;
  at: number;
  name: string;
  state: ComponentState;
  detail: string;
}

export interface AppState {
  connection: Connection;
  everLive: boolean;
  serverInfo: GetServerInfoResponse | null;
  sessions: Session[] | null;
  components: ComponentHealth[];
  componentEvents: ComponentEvent[];
  sessionId: string;
  isChosenByUser: boolean;
  unknownSession: string | null;
  picture: Picture | null;
  pace: Pace;
  isPaused: boolean;
  numNewWhilePaused: number;
  mode: Mode;
  /** Row of the selected layer. */
  row: number;
  expert: number | null;
  panel: Panel;
  sidebar: SidebarTab;
  /** The finding of the diagnosis: the one chosen, else the worst when it was first shown. */
  findingKey: string | null;
  /** What was silenced last on this page, until that is dismissed or taken back. */
  justSilenced: Finding | null;
  isTable: boolean;
  theme: ThemeChoice;
}

export const useApp = create<AppState>(() => ({
  connection: { state: "connecting" },
  everLive: false,
  serverInfo: null,
  sessions: null,
  components: [],
  componentEvents: [],
  sessionId: "",
  isChosenByUser: false,
  unknownSession: null,
  picture: null,
  pace: { hz: 0, lagMs: null, numConflated: 0 },
  isPaused: false,
  numNewWhilePaused: 0,
  mode: "whole",
  row: 0,
  expert: null,
  panel: "experts",
  sidebar: "diagnosis",
  findingKey: null,
  justSilenced: null,
  isTable: false,
  theme: "system",
}));

/** Whether no source sends rows: then there are sums and nothing else. */
export function useIsCountsOnly(): boolean {
  return useApp((state) => {
    const sources = state.picture?.snapshot.sources ?? [];
    return sources.length > 0 && sources.every(({ level }) => level === CaptureLevel.COUNTS);
  });
}

/** The session that a visitor most likely means: an open one that was heard of last, else the newest. */
export function defaultSession(sessions: readonly Session[]): Session | undefined {
  const rank = (session: Session) =>
    session.state === SessionState.OPEN ? 2 : session.state === SessionState.STALE ? 1 : 0;
  return [...sessions].sort(
    (a, b) =>
      rank(b) - rank(a) || Number(b.lastSeenAtUnixNs - a.lastSeenAtUnixNs) || (a.sessionId < b.sessionId ? 1 : -1),
  )[0];
}

let nextEventId = 1;

/** The events that lead from one list of components to the next; the first list tells only what is wrong. */
export function componentEvents(
  before: readonly ComponentHealth[],
  after: readonly ComponentHealth[],
  now: number,
): ComponentEvent[] {
  return after
    .filter((component) => {
      const old = before.find(({ name }) => name === component.name);
      if (!old) return component.state !== ComponentState.READY;
      return old.state !== component.state || (old.detail !== component.detail && component.detail !== "");
    })
    .map(({ name, state, detail }) => ({ id: nextEventId++, at: now, name, state, detail }));
}

export class App {
  readonly live: LiveModel;
  readonly watch: WatchConnection;

  constructor(readonly client: Client<typeof DebuggerService>) {
    const publish = throttle(() => this.#publish(), REACT_INTERVAL_MS);
    this.live = new LiveModel({
      onPicture: () => {
        if (useApp.getState().isPaused) {
          this.#numSkipped += 1;
        }
        publish();
      },
      onSessions: (sessions) => this.#onSessions(sessions),
      onComponents: (components) => this.#onComponents(components),
    });
    this.watch = new WatchConnection(client, {
      onMessage: (message, target) => {
        if (target.sessionId === useApp.getState().sessionId || message.event.case !== "snapshot") {
          this.live.handle(message, target.sessionId);
        }
      },
      onConnection: (connection) => {
        useApp.setState({ connection, ...(connection.state === "live" ? { everLive: true } : {}) });
        if (connection.state === "live") void this.#loadServerInfo();
      },
      onUnknownSession: (sessionId) => {
        useApp.setState({ unknownSession: sessionId });
        this.selectSession("", false);
      },
      sequenceOf: (sessionId) => (this.live.picture?.sessionId === sessionId ? this.live.picture.sequence : 0n),
    });
  }

  #numSkipped = 0;

  start(sessionId: string): void {
    useApp.setState({ sessionId, isChosenByUser: sessionId !== "" });
    this.watch.start({ sessionId, maxHz: 10 });
    // The pace falls to zero by itself when nothing arrives.
    setInterval(() => useApp.setState({ pace: this.live.pace() }), 1000);
    window.addEventListener("online", () => this.watch.retryNow());
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible" && useApp.getState().connection.state === "reconnecting") {
        this.watch.retryNow();
      }
    });
  }

  selectSession(sessionId: string, isChosenByUser = true): void {
    if (sessionId === useApp.getState().sessionId) return;
    useApp.setState({
      sessionId,
      isChosenByUser,
      picture: null,
      isPaused: false,
      numNewWhilePaused: 0,
      row: 0,
      expert: null,
      findingKey: null,
      justSilenced: null,
      ...(sessionId ? { unknownSession: null } : {}),
    });
    this.live.reset();
    this.watch.retarget({ sessionId, maxHz: 10 });
  }

  setPaused(isPaused: boolean): void {
    this.#numSkipped = 0;
    useApp.setState({ isPaused, numNewWhilePaused: 0 });
    if (!isPaused) this.#publish();
  }

  /** Acknowledges a finding of the session on screen, or takes that back. Rejects with what the gateway says. */
  async acknowledgeFinding({ ruleId }: Finding, undo: boolean): Promise<void> {
    const { sessionId } = useApp.getState();
    const { finding } = await this.client.acknowledgeFinding({ sessionId, ruleId, undo });
    this.#marked(sessionId, finding);
  }

  /** Silences a finding of the session on screen for some seconds; 0 = no more. */
  async silenceFinding({ ruleId }: Finding, durationS: number): Promise<void> {
    const { sessionId } = useApp.getState();
    const { finding } = await this.client.silenceFinding({ sessionId, ruleId, durationS });
    this.#marked(sessionId, finding);
    if (useApp.getState().sessionId === sessionId)
      useApp.setState({ justSilenced: durationS ? (finding ?? null) : null });
  }

  #marked(sessionId: string, finding: Finding | undefined): void {
    if (!finding) return;
    this.live.replaceFinding(sessionId, finding);
    // A paused view stands still but for what its own buttons do.
    const { picture } = useApp.getState();
    if (picture?.sessionId !== sessionId) return;
    const findings = picture.snapshot.findings.map((one) => (one.ruleId === finding.ruleId ? finding : one));
    useApp.setState({ picture: { ...picture, snapshot: { ...picture.snapshot, findings } } });
  }

  #publish(): void {
    const { isPaused, row, sessionId } = useApp.getState();
    const picture = this.live.picture;
    if (isPaused) {
      useApp.setState({ numNewWhilePaused: this.#numSkipped });
      return;
    }
    if (picture && picture.sessionId !== sessionId) return;
    const numLayers = picture?.whole.layers.length ?? 0;
    useApp.setState({ picture, pace: this.live.pace(), ...(row >= numLayers ? { row: 0 } : {}) });
  }

  #onSessions(sessions: Session[]): void {
    useApp.setState({ sessions });
    const { sessionId } = useApp.getState();
    if (sessionId === "") {
      const session = defaultSession(sessions);
      if (session) this.selectSession(session.sessionId, false);
    }
  }

  #onComponents(components: ComponentHealth[]): void {
    useApp.setState((state) => ({
      components,
      componentEvents: [...componentEvents(state.components, components, Date.now()), ...state.componentEvents].slice(
        0,
        MAX_COMPONENT_EVENTS,
      ),
    }));
  }

  async #loadServerInfo(): Promise<void> {
    try {
      useApp.setState({ serverInfo: await this.client.getServerInfo({}) });
    } catch {
      // The stream says what is wrong with the connection; the limits stay as they were.
    }
  }
}
