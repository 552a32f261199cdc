// Requests that this page generated or opened, and their routes.
import { Code, ConnectError } from "@connectrpc/connect";
import { create } from "zustand";
import type { TokenPiece } from "./gen/moe_debugger/v1/collector_pb";
import type { RequestSummary } from "./gen/moe_debugger/v1/session_pb";
import { newId } from "./model/ids";
import { decodeRoutes, type Routes } from "./model/routes";
import type { App } from "./store";
import { useApp } from "./store";

export type RequestState = "waiting" | "generating" | "finished" | "stopped" | "failed" | "reopened";

export interface Piece {
  tokenId: number;
  bytes: Uint8Array;
}

export interface OpenRequest {
  requestId: string;
  sessionId: string;
  state: RequestState;
  prompt: Piece[];
  generated: Piece[];
  finishReason: number;
  durationS: number;
  routes: Routes | null;
  /** Rows that the request will have; null where only the fleet knows. */
  isFinal: boolean;
  routesError: string | null;
  error: GenerateError | null;
}

export interface GenerateError {
  code: string;
  message: string;
}

export interface TokensState {
  requests: Record<string, OpenRequest>;
  /** The request on screen. */
  currentId: string | null;
  /** The position whose route is shown. */
  position: number | null;
  list: RequestSummary[];
  listError: string | null;
  /** Pieces by session and token id, as the worker sent them: they give earlier requests their text. */
  vocabulary: Map<string, Uint8Array>;
  prompt: string;
  maxNewTokens: number;
  temperature: number;
}

export const useTokens = create<TokensState>(() => ({
  requests: {},
  currentId: null,
  position: null,
  list: [],
  listError: null,
  vocabulary: new Map(),
  prompt: "",
  maxNewTokens: 128,
  // Greedy text of a small model soon repeats itself.
  temperature: 0.7,
}));

const POLL_MS = 400;
const SETTLE_MS = 15_000;
const MAX_LIST = 50;
const MAX_KEPT = 30;

/** Token rows that the routers see: every prompt token, and every generated one but the last. */
export function expectedRows(numPrompt: number, numGenerated: number): number {
  return numGenerated > 0 ? numPrompt + numGenerated - 1 : numPrompt;
}

/** A new text each time, where the temperature is above 0. */
function newSeed(): bigint {
  return BigInt(crypto.getRandomValues(new Uint32Array(1))[0] as number);
}

function describe(cause: unknown): GenerateError {
  const error = ConnectError.from(cause);
  return { code: Code[error.code] ?? "Unknown", message: error.rawMessage };
}

export class Generator {
  #controller: AbortController | null = null;
  #polls = new Map<string, AbortController>();

  constructor(private readonly app: App) {}

  get isRunning(): boolean {
    return this.#controller !== null;
  }

  async generate(prompt: string, maxNewTokens: number, temperature: number): Promise<void> {
    if (this.#controller) return;
    const controller = new AbortController();
    this.#controller = controller;
    const requestId = newId();
    const request: OpenRequest = {
      requestId,
      sessionId: "",
      state: "waiting",
      prompt: [],
      generated: [],
      finishReason: 0,
      durationS: 0,
      routes: null,
      isFinal: false,
      routesError: null,
      error: null,
    };
    useTokens.setState((state) => ({
      requests: keepNewest({ ...state.requests, [requestId]: request }),
      currentId: requestId,
      position: null,
    }));
    try {
      const stream = this.app.client.generate(
        { request: { prompt, maxNewTokens, temperature, requestId, seed: newSeed() } },
        { signal: controller.signal },
      );
      for await (const { response } of stream) {
        const event = response?.event;
        if (event?.case === "started") {
          this.#started(requestId, event.value.sessionId, event.value.promptTokens);
        } else if (event?.case === "token" && event.value.piece) {
          this.#token(requestId, event.value.piece);
        } else if (event?.case === "finished") {
          const { reason, durationS } = event.value;
          update(requestId, () => ({ state: "finished", finishReason: reason, durationS }));
        }
      }
      update(requestId, (now) =>
        now.state === "finished" ? {} : { state: "failed", error: { code: "Unavailable", message: "" } },
      );
    } catch (cause) {
      update(requestId, () =>
        controller.signal.aborted ? { state: "stopped" } : { state: "failed", error: describe(cause) },
      );
    } finally {
      this.#controller = null;
      flushTokens();
      // One more render for the buttons.
      useTokens.setState({});
      void this.loadList();
    }
  }

  stop(): void {
    this.#controller?.abort("stopped by the user");
  }

  /** Shows a request of the list. */
  open(requestId: string): void {
    const sessionId = useApp.getState().sessionId;
    useTokens.setState((state) => ({
      currentId: requestId,
      position: null,
      requests: state.requests[requestId]
        ? state.requests
        : keepNewest({
            ...state.requests,
            [requestId]: {
              requestId,
              sessionId,
              state: "reopened",
              prompt: [],
              generated: [],
              finishReason: 0,
              durationS: 0,
              routes: null,
              isFinal: false,
              routesError: null,
              error: null,
            },
          }),
    }));
    const request = useTokens.getState().requests[requestId];
    if (request && !request.isFinal && request.sessionId) void this.#pollRoutes(requestId);
  }

  async loadList(): Promise<void> {
    const { sessionId } = useApp.getState();
    if (!sessionId) {
      useTokens.setState({ list: [], listError: null });
      return;
    }
    try {
      const { requests } = await this.app.client.listRequests({ sessionId, maxResults: MAX_LIST });
      if (useApp.getState().sessionId !== sessionId) return;
      useTokens.setState({ list: requests, listError: null });
    } catch (cause) {
      useTokens.setState({ listError: describe(cause).message });
    }
  }

  #started(requestId: string, sessionId: string, tokens: TokenPiece[]): void {
    const prompt = tokens.map(({ tokenId, text }) => ({ tokenId, bytes: text }));
    learn(sessionId, prompt);
    update(requestId, () => ({ state: "generating", sessionId, prompt }));
    // The routes of this request are in the worker's session: show that one.
    if (sessionId) this.app.selectSession(sessionId);
    void this.#pollRoutes(requestId);
  }

  #token(requestId: string, { tokenId, text }: TokenPiece): void {
    const piece = { tokenId, bytes: text };
    learn(useTokens.getState().requests[requestId]?.sessionId ?? "", [piece]);
    bufferToken(requestId, piece);
  }

  /** Asks for the routes until all rows are there. */
  async #pollRoutes(requestId: string): Promise<void> {
    this.#polls.get(requestId)?.abort();
    const controller = new AbortController();
    this.#polls.set(requestId, controller);
    let endedAt: number | null = null;
    let lastRows = -1;
    while (!controller.signal.aborted) {
      const request = useTokens.getState().requests[requestId];
      if (!request) break;
      try {
        const { routes } = await this.app.client.getRequestRoutes(
          { sessionId: request.sessionId, requestId },
          { signal: controller.signal },
        );
        if (routes) update(requestId, () => ({ routes: decodeRoutes(routes), routesError: null }));
      } catch (cause) {
        if (controller.signal.aborted) break;
        // NotFound: the first rows are still on their way.
        const error = ConnectError.from(cause);
        if (error.code !== Code.NotFound) update(requestId, () => ({ routesError: error.rawMessage }));
        else if (request.state === "reopened") update(requestId, () => ({ routesError: error.rawMessage }));
      }
      const now = useTokens.getState().requests[requestId];
      if (!now) break;
      if (now.state !== "waiting" && now.state !== "generating") {
        endedAt ??= Date.now();
        const rows = now.routes ? now.routes.numTokens + now.routes.numRowsNotKept : 0;
        const expected = expectedRows(now.prompt.length, now.generated.length);
        const isComplete =
          now.state === "finished" ? rows === expected && rows > 0 : rows > 0 && rows >= expected && rows === lastRows;
        lastRows = rows;
        if (isComplete) {
          update(requestId, () => ({ isFinal: true }));
          break;
        }
        if (Date.now() - endedAt > SETTLE_MS) break;
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    if (this.#polls.get(requestId) === controller) this.#polls.delete(requestId);
  }

  isPolling(requestId: string): boolean {
    return this.#polls.has(requestId);
  }
}

function update(requestId: string, change: (request: OpenRequest) => Partial<OpenRequest>): void {
  flushTokens();
  useTokens.setState((state) => {
    const request = state.requests[requestId];
    return request ? { requests: { ...state.requests, [requestId]: { ...request, ...change(request) } } } : {};
  });
}

// Tokens come faster than React should render: they are gathered for a fifth of a second.
const buffered = new Map<string, Piece[]>();
let flushTimer: ReturnType<typeof setTimeout> | undefined;

function bufferToken(requestId: string, piece: Piece): void {
  const pieces = buffered.get(requestId);
  if (pieces) pieces.push(piece);
  else buffered.set(requestId, [piece]);
  flushTimer ??= setTimeout(flushTokens, 200);
}

function flushTokens(): void {
  clearTimeout(flushTimer);
  flushTimer = undefined;
  if (buffered.size === 0) return;
  const batches = [...buffered];
  buffered.clear();
  useTokens.setState((state) => {
    const requests = { ...state.requests };
    for (const [requestId, pieces] of batches) {
      const request = requests[requestId];
      if (request) requests[requestId] = { ...request, generated: [...request.generated, ...pieces] };
    }
    return { requests };
  });
}

function keepNewest(requests: Record<string, OpenRequest>): Record<string, OpenRequest> {
  // Ids are ULIDs: they sort by time.
  return Object.fromEntries(
    Object.entries(requests)
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .slice(-MAX_KEPT),
  );
}

function learn(sessionId: string, pieces: readonly Piece[]): void {
  const { vocabulary } = useTokens.getState();
  for (const { tokenId, bytes } of pieces) vocabulary.set(vocabularyKey(sessionId, tokenId), bytes);
}

function vocabularyKey(sessionId: string, tokenId: number): string {
  return `${sessionId}/${tokenId}`;
}

/** The demo model's tokens are bytes: id 0..255 is that byte (docs/demo-model.md). */
const DEMO_MODEL = "demo";

function isDemoModel(sessionId: string): boolean {
  return useApp.getState().sessions?.find((session) => session.sessionId === sessionId)?.modelName === DEMO_MODEL;
}

function byteOf(tokenId: number): Uint8Array | undefined {
  return tokenId < 256 ? Uint8Array.of(tokenId) : undefined;
}

/** The pieces of a request: as the worker streamed them, else by the token ids of its routes. */
export function piecesOf(request: OpenRequest): {
  pieces: (Piece | { tokenId: number | null; bytes: null })[];
  numPrompt: number;
} {
  if (request.prompt.length + request.generated.length > 0) {
    return { pieces: [...request.prompt, ...request.generated], numPrompt: request.prompt.length };
  }
  const routes = request.routes;
  if (!routes || routes.numTokens === 0) return { pieces: [], numPrompt: 0 };
  const { vocabulary } = useTokens.getState();
  const isByteLevel = isDemoModel(request.sessionId);
  const size = (routes.position[routes.position.length - 1] as number) + 1;
  const pieces: (Piece | { tokenId: number | null; bytes: null })[] = Array.from({ length: size }, () => ({
    tokenId: null,
    bytes: null,
  }));
  let numPrompt = 0;
  routes.position.forEach((position, row) => {
    if (routes.phase[row] === 1) numPrompt = Math.max(numPrompt, position + 1);
    const tokenId = routes.tokenId[row];
    if (tokenId === undefined) return;
    const bytes =
      vocabulary.get(vocabularyKey(request.sessionId, tokenId)) ?? (isByteLevel ? byteOf(tokenId) : undefined);
    pieces[position] = bytes ? { tokenId, bytes } : { tokenId, bytes: null };
  });
  return { pieces, numPrompt };
}
