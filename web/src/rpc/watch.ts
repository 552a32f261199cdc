// The page's one Watch stream: opens it, opens it again when it ends, fails or falls silent, and resumes where it was.
import { type Client, Code, ConnectError } from "@connectrpc/connect";
import type { DebuggerService, WatchResponse } from "../gen/moe_debugger/v1/gateway_pb";

export type Connection =
  | { state: "connecting" }
  | { state: "live" }
  | { state: "reconnecting"; attempt: number; reason: string; nextTryAt: number };

export interface WatchTarget {
  sessionId: string;
  maxHz: number;
}

export interface WatchEvents {
  onMessage(message: WatchResponse, target: WatchTarget): void;
  onConnection(connection: Connection): void;
  /** The gateway does not know the session (any more). */
  onUnknownSession(sessionId: string, detail: string): void;
  /** The newest sequence that is on screen for this session, 0 = none. */
  sequenceOf(sessionId: string): bigint;
}

export interface WatchTiming {
  silenceMs: number;
  firstDelayMs: number;
  maxDelayMs: number;
  random: () => number;
}

export const TIMING: WatchTiming = { silenceMs: 15_000, firstDelayMs: 500, maxDelayMs: 30_000, random: Math.random };

/** Delay before try number `attempt` (1 = the first retry): 0.5 s x 2^n up to the cap, the upper half at random. */
export function backoffDelay(attempt: number, timing: WatchTiming = TIMING): number {
  const full = Math.min(timing.maxDelayMs, timing.firstDelayMs * 2 ** Math.max(0, attempt - 1));
  return full * (0.5 + 0.5 * timing.random());
}

const SILENT = "silent";
const RETARGET = "retarget";

export class WatchConnection {
  #target: WatchTarget = { sessionId: "", maxHz: 10 };
  #controller: AbortController | null = null;
  #wake: (() => void) | null = null;
  #stopped = false;
  #attempt = 0;

  constructor(
    private readonly client: Pick<Client<typeof DebuggerService>, "watch">,
    private readonly events: WatchEvents,
    private readonly timing: WatchTiming = TIMING,
  ) {}

  start(target: WatchTarget): void {
    this.#target = target;
    void this.#run();
  }

  /** Watches another session, on a new stream. */
  retarget(target: WatchTarget): void {
    if (target.sessionId === this.#target.sessionId && target.maxHz === this.#target.maxHz) return;
    this.#target = target;
    this.#attempt = 0;
    this.#controller?.abort(RETARGET);
    this.#wake?.();
  }

  /** Tries now instead of at the end of the delay. */
  retryNow(): void {
    this.#wake?.();
  }

  stop(): void {
    this.#stopped = true;
    this.#controller?.abort("stopped");
    this.#wake?.();
  }

  async #run(): Promise<void> {
    this.events.onConnection({ state: "connecting" });
    while (!this.#stopped) {
      const reason = await this.#stream();
      if (this.#stopped) return;
      if (reason === RETARGET) continue;
      this.#attempt += 1;
      const delay = backoffDelay(this.#attempt, this.timing);
      this.events.onConnection({
        state: "reconnecting",
        attempt: this.#attempt,
        reason,
        nextTryAt: Date.now() + delay,
      });
      await this.#sleep(delay);
    }
  }

  /** Reads one stream to its end, and returns why it ended. */
  async #stream(): Promise<string> {
    const controller = new AbortController();
    const target = this.#target;
    this.#controller = controller;
    let silence: ReturnType<typeof setTimeout> | undefined;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(SILENT), this.timing.silenceMs);
    };
    heard();
    try {
      const request = {
        sessionId: target.sessionId,
        maxHz: target.maxHz,
        resumeAfterSequence: target.sessionId ? this.events.sequenceOf(target.sessionId) : 0n,
      };
      let first = true;
      for await (const message of this.client.watch(request, { signal: controller.signal })) {
        heard();
        // A message of the session before, that was on its way when the user chose another one.
        if (controller.signal.aborted) break;
        if (first) {
          first = false;
          this.#attempt = 0;
          this.events.onConnection({ state: "live" });
        }
        this.events.onMessage(message, target);
      }
      return controller.signal.aborted ? String(controller.signal.reason) : "ended";
    } catch (cause) {
      if (controller.signal.aborted) return String(controller.signal.reason);
      const error = ConnectError.from(cause);
      if (target.sessionId && (error.code === Code.NotFound || error.code === Code.InvalidArgument)) {
        this.events.onUnknownSession(target.sessionId, error.rawMessage);
        if (this.#target.sessionId !== target.sessionId) return RETARGET;
      }
      return error.rawMessage || Code[error.code];
    } finally {
      clearTimeout(silence);
      controller.abort("done");
    }
  }

  #sleep(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(done, ms);
      const self = this;
      function done() {
        clearTimeout(timer);
        self.#wake = null;
        resolve();
      }
      this.#wake = done;
    });
  }
}
