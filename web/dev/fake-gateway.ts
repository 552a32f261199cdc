// A gateway in memory, for tests and for `npm run dev` without a fleet. It is never part of the build.
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, createRouterTransport, type Transport } from "@connectrpc/connect";
import {
  ComponentState,
  DebuggerService,
  type WatchResponse,
  WatchResponseSchema,
} from "../src/gen/moe_debugger/v1/gateway_pb";
import { CaptureLevel, CheckStatus } from "../src/gen/moe_debugger/v1/routing_pb";
import {
  type Finding,
  FindingKind,
  FindingState,
  type LayerEarlyWarning,
  type RequestRoutes,
  RequestRoutesSchema,
  type SessionSnapshot,
  SessionSnapshotSchema,
  SessionState,
  Severity,
} from "../src/gen/moe_debugger/v1/session_pb";

const CHECKS: [string, string][] = [
  ["conservation", "slots"],
  ["distinctness", "rows"],
  ["range", "slots"],
  ["layers", "layer forwards"],
];

export const SESSION_ID = "01k0000000000000000000fake";

export function encodeU64(values: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(values.length * 8);
  const view = new DataView(bytes.buffer);
  values.forEach((value, i) => {
    view.setBigUint64(i * 8, BigInt(value), true);
  });
  return bytes;
}

export function encodeF32(values: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(values.length * 4);
  const view = new DataView(bytes.buffer);
  values.forEach((value, i) => {
    view.setFloat32(i * 4, value, true);
  });
  return bytes;
}

export function encodeF64(values: readonly number[]): Uint8Array {
  const bytes = new Uint8Array(values.length * 8);
  const view = new DataView(bytes.buffer);
  values.forEach((value, i) => {
    view.setFloat64(i * 8, value, true);
  });
  return bytes;
}

function encodeInts(values: readonly number[], width: 2 | 4): Uint8Array {
  const bytes = new Uint8Array(values.length * width);
  const view = new DataView(bytes.buffer);
  values.forEach((value, i) => {
    if (width === 2) view.setUint16(i * 2, value, true);
    else view.setUint32(i * 4, value, true);
  });
  return bytes;
}

/** Half precision of a weight in 0..1: enough for the fake. */
function encodeF16(values: readonly number[]): Uint8Array {
  return encodeInts(
    values.map((value) => {
      if (value <= 0) return 0;
      const exponent = Math.max(-14, Math.floor(Math.log2(value)));
      const fraction = Math.round((value / 2 ** exponent - 1) * 1024);
      return ((exponent + 15) << 10) + fraction;
    }),
    2,
  );
}

export interface FakeOptions {
  numLayers?: number;
  numExperts?: number;
  topK?: number;
  isCollapsed?: boolean;
  /** Name of a check of the capture's health that fails. */
  failedCheck?: string;
  hasSession?: boolean;
  /** Training series of this many steps. */
  numSteps?: number;
}

interface FakeRequest {
  tokens: number[];
  numPrompt: number;
  experts: number[][];
}

export class FakeGateway {
  readonly numLayers: number;
  readonly numExperts: number;
  readonly topK: number;
  readonly counts: number[][];
  readonly numTokens: number[];
  readonly requests = new Map<string, FakeRequest>();
  sequence = 1n;
  watchCalls: { sessionId: string; resumeAfterSequence: bigint }[] = [];
  isDown = false;
  workerState = ComponentState.READY;
  /** What people and time did to the one finding. */
  life: Partial<
    Pick<
      Finding,
      | "state"
      | "severity"
      | "supersededBy"
      | "closedAtUnixNs"
      | "numReopened"
      | "numQuietSeconds"
      | "acknowledgedAtUnixNs"
      | "acknowledgedBy"
      | "silencedUntilUnixNs"
      | "silencedBy"
    >
  > = {};
  earlyWarning: Pick<LayerEarlyWarning, "layerIndex" | "status" | "numPoints" | "baseline" | "effectiveExperts">[] = [];
  /** Why the one finding, where that was looked for. */
  explanation: Finding["explanation"];
  /** What the RPCs about findings answer instead, where it is not empty. */
  findingError = "";
  #wakers = new Set<() => void>();
  #startedAt = Date.now() - 200_000;

  constructor(readonly options: FakeOptions = {}) {
    this.numLayers = options.numLayers ?? 4;
    this.numExperts = options.numExperts ?? 8;
    this.topK = options.topK ?? 2;
    this.counts = Array.from({ length: this.numLayers }, () => new Array<number>(this.numExperts).fill(0));
    this.numTokens = new Array<number>(this.numLayers).fill(0);
  }

  /** Routes one token, and returns its experts in each layer. */
  route(token: number, position: number): number[][] {
    const own = Array.from({ length: this.numLayers }, (_, layer) => {
      const isCollapsed = this.options.isCollapsed && layer === 2;
      const first = isCollapsed ? 3 : (token * 7 + layer * 3 + (position % 3)) % this.numExperts;
      const experts = [first];
      while (experts.length < this.topK) {
        const next =
          isCollapsed && position % 9 ? 5 : (first + 1 + ((token + layer) % (this.numExperts - 1))) % this.numExperts;
        experts.push(experts.includes(next) ? (Math.max(...experts) + 1) % this.numExperts : next);
      }
      return experts;
    });
    own.forEach((experts, layer) => {
      for (const expert of experts)
        (this.counts[layer] as number[])[expert] = ((this.counts[layer] as number[])[expert] as number) + 1;
      this.numTokens[layer] = (this.numTokens[layer] as number) + 1;
    });
    this.sequence += 1n;
    return own;
  }

  wake(): void {
    for (const waker of this.#wakers) waker();
  }

  /** Ends all streams, as a restart does. */
  restart(): void {
    this.isDown = false;
    this.#generation += 1;
    this.wake();
  }

  #generation = 0;

  session() {
    const now = BigInt(Date.now()) * 1_000_000n;
    return {
      sessionId: SESSION_ID,
      name: "fake",
      modelName: "not a model",
      modelType: "mixtral",
      state: SessionState.OPEN,
      createdAtUnixNs: BigInt(this.#startedAt) * 1_000_000n,
      lastSeenAtUnixNs: now,
      numSources: 1,
      numLiveSources: 1,
    };
  }

  snapshot(): SessionSnapshot {
    const produced = BigInt(this.numTokens.reduce((sum, n) => sum + n, 0));
    return create(SessionSnapshotSchema, {
      session: this.session(),
      sequence: this.sequence,
      layers: this.counts.map((counts, layer) => ({
        description: {
          layerIndex: layer,
          modelLayerIndex: layer,
          moduleName: `model.layers.${layer}.block_sparse_moe`,
          numExperts: this.numExperts,
          topK: this.topK,
        },
        numTokens: BigInt(this.numTokens[layer] as number),
        expertCounts: encodeU64(counts),
        recentNumTokens: BigInt(this.numTokens[layer] as number),
        recentExpertCounts: encodeU64(counts),
        meanRouterEntropy: 1.21,
        meanTop1Probability: 0.58,
      })),
      account: { numProduced: produced, numCounted: produced },
      sources: [
        {
          sourceId: "01k00000000000000000source",
          kind: "worker",
          hostName: "localhost",
          processId: 42,
          isLive: true,
          isHealthy: true,
          level: CaptureLevel.ROUTES_TOKENS,
          samplingRate: 1,
          hookTimeShare: 0.018,
          lastSequence: this.sequence,
          checks: CHECKS.map(([name, unit]) => {
            const isBroken = name === this.options.failedCheck;
            return {
              name,
              unit,
              status: isBroken ? CheckStatus.FAILED : CheckStatus.OK,
              numChecked: 1200n,
              numViolations: isBroken ? 3n : 0n,
              example: isBroken ? "layer 1, forward 7: expert 9 of a layer whose ids are 0 to 7" : "",
            };
          }),
        },
      ],
      findings: this.options.isCollapsed
        ? [
            {
              ruleId: "MOE-R001",
              kind: FindingKind.ROUTER_COLLAPSE,
              severity: Severity.CRITICAL,
              layerIndex: 2,
              sinceStep: 120n,
              code: "router_collapse",
              args: {
                layer: "2",
                effective: "2.3",
                experts: "8",
                upper: "2.6",
                requests: "14",
                limit: "3.0",
                topK: "2",
                hottest: "3",
              },
              evidence: [
                { metric: "effective_experts", value: 2.31, baseline: 7.8, rule: "< 3.0", sampleSize: 1240n, unit: "" },
                { metric: "load_entropy", value: 0.402, rule: "", sampleSize: 1240n, unit: "" },
              ],
              firstSeenAtUnixNs: BigInt(this.#startedAt) * 1_000_000n,
              lastSeenAtUnixNs: BigInt(Date.now()) * 1_000_000n,
              numOccurrences: 37,
              state: FindingState.OPEN,
              openedAtUnixNs: BigInt(this.#startedAt) * 1_000_000n,
              numQuietSecondsToClose: 10,
              explanation: this.explanation,
              ...this.life,
            },
          ]
        : [],
      lastStep: this.sequence,
      recentWindowS: 10,
      takenAtUnixNs: BigInt(Date.now()) * 1_000_000n,
      falseAlarmsPer1000Windows: 10,
      falseAlarmNote: "measured on a fake",
      earlyWarning: this.earlyWarning,
      earlyWarningRunLength: 625_000,
    });
  }

  /** Changes the life of the finding, and returns it. */
  mark(ruleId: string, life: FakeGateway["life"]): { finding: Finding } {
    if (this.findingError) throw new ConnectError(this.findingError, Code.Unavailable);
    this.life = { ...this.life, ...life };
    const finding = this.snapshot().findings.find((one) => one.ruleId === ruleId);
    if (!finding) throw new ConnectError(`no finding ${ruleId}`, Code.NotFound);
    return { finding };
  }

  components() {
    return ["nats", "redis", "analyzer", "worker"].map((name) => ({
      name,
      state: name === "worker" ? this.workerState : ComponentState.READY,
      detail: name === "worker" && this.workerState === ComponentState.DOWN ? "it ended; it is started again" : "",
    }));
  }

  routes(requestId: string): RequestRoutes {
    const request = this.requests.get(requestId);
    if (!request) throw new ConnectError(`no routes of request ${requestId}`, Code.NotFound);
    const { tokens, experts, numPrompt } = request;
    const n = experts.length / this.numLayers;
    return create(RequestRoutesSchema, {
      summary: { requestId, numTokens: BigInt(n), hasRoutes: true },
      numTokens: n,
      position: encodeInts(
        Array.from({ length: n }, (_, i) => i),
        4,
      ),
      phase: Uint8Array.from({ length: n }, (_, i) => (i < numPrompt ? 1 : 2)),
      tokenId: encodeInts(tokens.slice(0, n), 4),
      layers: Array.from({ length: this.numLayers }, (_, layer) => {
        const own = Array.from({ length: n }, (_, i) => experts[i * this.numLayers + layer] as number[]);
        const counts = new Array<number>(this.numExperts).fill(0);
        for (const expert of own.flat()) counts[expert] = (counts[expert] as number) + 1;
        return {
          layerIndex: layer,
          numExperts: this.numExperts,
          topK: this.topK,
          expertIds: encodeInts(own.flat(), 2),
          gateWeights: encodeF16(
            own.flatMap((row) => row.map((_, slot) => (slot === 0 ? 0.625 : 0.375 / (row.length - 1)))),
          ),
          expertCounts: encodeU64(counts),
        };
      }),
    });
  }

  /** What GetSeries answers; the error, where there is one. */
  seriesError = "";
  numSeriesCalls = 0;

  series(names: readonly string[], maxPoints: number) {
    this.numSeriesCalls += 1;
    if (this.seriesError) throw new ConnectError(this.seriesError, Code.Unavailable);
    const steps = Array.from({ length: this.options.numSteps ?? 0 }, (_, i) => i + 1).slice(-maxPoints);
    if (steps.length === 0) return { series: [] };
    const one = (name: string, numValues: number, of: (step: number, i: number) => number, layerIndex?: number) => ({
      sourceId: "01k00000000000000000source",
      name,
      layerIndex,
      numValues,
      isPerExpert: name === "expert_gradient_norm",
      step: encodeU64(steps),
      value: encodeF64(steps.flatMap((step) => Array.from({ length: numValues }, (_, i) => of(step, i)))),
    });
    const layers = Array.from({ length: this.numLayers }, (_, layer) => layer);
    const byName = {
      loss: () => [one("loss", 1, (step) => 2 + 8 * Math.exp(-step / 40))],
      lr: () => [one("lr", 1, () => 3e-4)],
      router_gradient_norm: () =>
        layers.map((l) => one("router_gradient_norm", 1, (s) => (l === 1 ? Number.NaN : (l + 1) / (s + 9)), l)),
      expert_gradient_norm: () =>
        layers.map((l) => one("expert_gradient_norm", this.numExperts, (s, i) => (i + 1) / (s + 9), l)),
    };
    const series = Object.entries(byName)
      .filter(([name]) => (names.length > 0 ? names.includes(name) : name !== "expert_gradient_norm"))
      .flatMap(([, make]) => make());
    return { series, numPointsNotKept: 0n };
  }

  transport(): Transport {
    const fake = this;
    return createRouterTransport(({ service }) => {
      service(DebuggerService, {
        getServerInfo: () => ({
          version: "0.0.0-fake",
          components: fake.components(),
          maxPromptBytes: 65536,
          maxWatchHz: 30,
          hasWorker: true,
        }),
        listSessions: () => ({ sessions: fake.options.hasSession === false ? [] : [fake.session()] }),
        getSession: () => ({ snapshot: fake.snapshot() }),
        getHistory: () => ({
          points: Array.from({ length: 200 }, (_, i) => ({
            startUnixNs: BigInt(Math.floor(Date.now() / 1000) - 200 + i) * 1_000_000_000n,
            durationS: 1,
            numTokens: BigInt(i % 40 < 30 ? 200 + ((i * 37) % 90) : 0),
            effectiveExperts: encodeF32(
              Array.from({ length: fake.numLayers }, (_, l) =>
                i % 40 < 30
                  ? fake.options.isCollapsed && l === 2
                    ? fake.numExperts ** Math.max(0.4, 0.99 - i / 250)
                    : fake.numExperts ** (0.94 + ((i * (l + 3)) % 7) / 120)
                  : Number.NaN,
              ),
            ),
          })),
        }),
        getSeries: ({ names, maxPoints }) => fake.series(names, maxPoints),
        listRequests: () => ({
          requests: [...fake.requests].map(([requestId, { experts }]) => ({
            requestId,
            numTokens: BigInt(experts.length / fake.numLayers),
            hasRoutes: true,
            firstSeenAtUnixNs: BigInt(Date.now()) * 1_000_000n,
          })),
        }),
        getRequestRoutes: ({ requestId }) => ({ routes: fake.routes(requestId) }),
        closeSession: () => ({ session: fake.session() }),
        acknowledgeFinding: ({ ruleId, undo }) =>
          fake.mark(ruleId, {
            acknowledgedAtUnixNs: undo ? 0n : BigInt(Date.now()) * 1_000_000n,
            acknowledgedBy: undo ? "" : "local user",
          }),
        silenceFinding: ({ ruleId, durationS }) =>
          fake.mark(ruleId, {
            silencedUntilUnixNs: durationS ? BigInt(Date.now() + durationS * 1000) * 1_000_000n : 0n,
            silencedBy: durationS ? "local user" : "",
          }),
        async *watch({ sessionId, resumeAfterSequence }, { signal }): AsyncGenerator<WatchResponse> {
          fake.watchCalls.push({ sessionId, resumeAfterSequence });
          if (fake.isDown) throw new ConnectError("connection refused", Code.Unavailable);
          const generation = fake.#generation;
          const sessions = fake.options.hasSession === false ? [] : [fake.session()];
          yield create(WatchResponseSchema, {
            event: { case: "components", value: { components: fake.components() } },
          });
          yield create(WatchResponseSchema, { event: { case: "sessions", value: { sessions } } });
          if (sessionId && sessionId !== SESSION_ID) throw new ConnectError(`no session ${sessionId}`, Code.NotFound);
          if (sessionId)
            yield create(WatchResponseSchema, { event: { case: "snapshot", value: { snapshot: fake.snapshot() } } });
          let sequence = fake.sequence;
          while (!signal.aborted) {
            await new Promise<void>((resolve) => {
              const done = () => {
                fake.#wakers.delete(done);
                signal.removeEventListener("abort", done);
                resolve();
              };
              fake.#wakers.add(done);
              signal.addEventListener("abort", done);
            });
            if (generation !== fake.#generation) throw new ConnectError("the gateway restarts", Code.Unavailable);
            if (sessionId && fake.sequence !== sequence) {
              sequence = fake.sequence;
              yield create(WatchResponseSchema, {
                event: {
                  case: "frame",
                  value: {
                    sequence,
                    expertCounts: encodeU64(fake.counts.flat()),
                    numTokens: encodeU64(fake.numTokens),
                    lastStep: sequence,
                  },
                },
              });
            }
          }
        },
        async *generate({ request }, { signal }) {
          const requestId = request?.requestId ?? "";
          if (fake.workerState !== ComponentState.READY) throw new ConnectError("the worker is down", Code.Unavailable);
          const prompt = [...new TextEncoder().encode(request?.prompt ?? "")];
          const state: FakeRequest = { tokens: [...prompt], numPrompt: prompt.length, experts: [] };
          fake.requests.set(requestId, state);
          const piece = (token: number) => ({ tokenId: token, text: Uint8Array.of(token) });
          yield {
            response: {
              event: {
                case: "started" as const,
                value: { requestId, sessionId: SESSION_ID, promptTokens: prompt.map(piece) },
              },
            },
          };
          prompt.forEach((token, i) => {
            state.experts.push(...fake.route(token, i));
          });
          const text = [...new TextEncoder().encode(' merge(a, b):\n    return "é" + [a[0]] # two lists\n')];
          const size = request?.maxNewTokens || 64;
          for (let i = 0; i < size && !signal.aborted; i++) {
            const token = text[i % text.length] as number;
            const position = prompt.length + i;
            state.tokens.push(token);
            yield { response: { event: { case: "token" as const, value: { position, piece: piece(token) } } } };
            if (i < size - 1) state.experts.push(...fake.route(token, position));
            fake.wake();
            await new Promise((resolve) => setTimeout(resolve, 2));
          }
          yield {
            response: {
              event: {
                case: "finished" as const,
                value: { reason: 1, numPromptTokens: prompt.length, numGeneratedTokens: size, durationS: size * 0.002 },
              },
            },
          };
        },
      });
    });
  }
}
