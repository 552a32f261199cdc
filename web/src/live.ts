// The hot path, outside React: messages of the stream land here, painters pull the newest picture on an animation
// frame, and React hears of it at most five times a second.
import type { ComponentHealth, WatchFrame, WatchResponse } from "./gen/moe_debugger/v1/gateway_pb";
import type { Finding, Session, SessionSnapshot } from "./gen/moe_debugger/v1/session_pb";
import { applyFrame, type LoadMatrix, recentWindow, wholeSession } from "./model/load";

export interface Picture {
  sessionId: string;
  snapshot: SessionSnapshot;
  whole: LoadMatrix;
  recent: LoadMatrix;
  sequence: bigint;
  lastStep: bigint;
}

export interface Pace {
  /** Pictures per second over the last three seconds. */
  hz: number;
  /** From the server's clock to here; null until a message carried a time. */
  lagMs: number | null;
  numConflated: number;
}

export interface LiveListener {
  onPicture(picture: Picture | null): void;
  onSessions(sessions: Session[]): void;
  onComponents(components: ComponentHealth[]): void;
}

const PACE_WINDOW_MS = 3000;

export class LiveModel {
  picture: Picture | null = null;
  #arrivals: number[] = [];
  #lagMs: number | null = null;
  #numConflated = 0;
  #painters = new Set<() => void>();
  #frameRequested = false;

  constructor(
    private readonly listener: LiveListener,
    private readonly now: () => number = Date.now,
  ) {}

  /** Calls `paint` on the next animation frame after each change. */
  addPainter(paint: () => void): () => void {
    this.#painters.add(paint);
    return () => this.#painters.delete(paint);
  }

  reset(): void {
    this.picture = null;
    this.#arrivals = [];
    this.#lagMs = null;
    this.#numConflated = 0;
    this.#changed();
  }

  pace(): Pace {
    const since = this.now() - PACE_WINDOW_MS;
    this.#arrivals = this.#arrivals.filter((at) => at >= since);
    return {
      hz: this.#arrivals.length / (PACE_WINDOW_MS / 1000),
      lagMs: this.#lagMs,
      numConflated: this.#numConflated,
    };
  }

  handle(message: WatchResponse, sessionId: string): void {
    switch (message.event.case) {
      case "snapshot":
        if (message.event.value.snapshot) this.#snapshot(message.event.value.snapshot, sessionId);
        break;
      case "frame":
        this.#frame(message.event.value);
        break;
      case "sessions":
        this.listener.onSessions(message.event.value.sessions);
        break;
      case "components":
        this.listener.onComponents(message.event.value.components);
        break;
      case "heartbeat":
        this.#clock(message.event.value.sentAtUnixNs);
        break;
    }
  }

  /** Puts a finding that an RPC answered with in its place, until the next snapshot says the same. */
  replaceFinding(sessionId: string, finding: Finding): void {
    const before = this.picture;
    if (before?.sessionId !== sessionId) return;
    const findings = before.snapshot.findings.map((one) => (one.ruleId === finding.ruleId ? finding : one));
    this.picture = { ...before, snapshot: { ...before.snapshot, findings } };
    this.#changed();
  }

  #snapshot(snapshot: SessionSnapshot, sessionId: string): void {
    const before = this.picture?.sessionId === sessionId ? this.picture : null;
    const fresh = wholeSession(snapshot);
    // A resumed stream leaves out the counts that are here already.
    const isWithoutCounts = snapshot.layers.length > 0 && snapshot.layers.every((l) => l.expertCounts.byteLength === 0);
    const keep = isWithoutCounts && before?.whole.counts.length === fresh.counts.length ? before : null;
    this.picture = {
      sessionId,
      snapshot,
      whole: keep ? keep.whole : fresh,
      recent: recentWindow(snapshot),
      sequence: snapshot.sequence,
      lastStep: snapshot.lastStep,
    };
    this.#arrivals.push(this.now());
    this.#clock(snapshot.takenAtUnixNs);
    this.#changed();
  }

  #frame(frame: WatchFrame): void {
    this.#numConflated += frame.numConflated;
    const before = this.picture;
    if (!before) return;
    const whole = applyFrame(before.whole, frame);
    if (!whole) return;
    this.picture = { ...before, whole, sequence: frame.sequence, lastStep: frame.lastStep };
    this.#arrivals.push(this.now());
    this.#changed();
  }

  #clock(unixNs: bigint): void {
    if (unixNs > 0n) this.#lagMs = Math.max(0, this.now() - Number(unixNs / 1_000_000n));
  }

  #changed(): void {
    this.listener.onPicture(this.picture);
    if (this.#frameRequested || this.#painters.size === 0) return;
    this.#frameRequested = true;
    requestAnimationFrame(() => {
      this.#frameRequested = false;
      for (const paint of this.#painters) paint();
    });
  }
}

/** Runs `action` at most every `ms`, the last call always. */
export function throttle(action: () => void, ms: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let last = Number.NEGATIVE_INFINITY;
  return () => {
    if (timer !== undefined) return;
    const wait = Math.max(0, last + ms - performance.now());
    timer = setTimeout(() => {
      timer = undefined;
      last = performance.now();
      action();
    }, wait);
  };
}
