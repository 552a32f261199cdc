// A running profile as the fleet sends it: series with the prefix profile_, here by layer with their newest values.
import { newest, type SeriesLine } from "./series";

export const PROFILE_PREFIX = "profile_";

/** What a block's time is made of, in the order of a forward. */
export const PARTS = ["router", "dispatch", "experts", "shared", "combine", "wait", "rest"] as const;
export type Part = (typeof PARTS)[number];

const LAYER_NAMES = [
  "layer_ms",
  "layer_p95_ms",
  "layer_share",
  ...PARTS.map((part) => `${part}_ms`),
  "layer_distinct_experts",
  "layer_intensity",
  "layer_gflops",
  "layer_gbps",
  "layer_calls",
  "estimate_error",
  "estimate_fitted",
  "estimate_held_out",
  "estimate_worst",
  "estimate_worst_rows",
  "estimate_unknown_rows",
  "estimate_merged",
];
const MODEL_NAMES = [
  "forward_ms",
  "num_forwards",
  "overhead_share",
  "num_dropped",
  "step_experts",
  "step_bytes",
  "intensity",
  "gflops",
  "gbps",
  "peak_gflops",
  "peak_gbps",
];
export const BOTTLENECKS = [
  "slow_layer",
  "slow_expert",
  "expert_imbalance",
  "router_share",
  "glue_share",
  "wait_share",
  "memory_bound",
  "compute_bound",
  "below_roof",
] as const;
export type BottleneckKind = (typeof BOTTLENECKS)[number];

/** What the calls could not tell apart, in the order of the numbers that are sent. */
export const MERGED = ["nothing", "all", "rows", "active", "rows_and_active"] as const;

/** The series that the panel asks for. */
export const PROFILE_SERIES = [
  ...LAYER_NAMES,
  ...MODEL_NAMES,
  ...BOTTLENECKS.flatMap((kind) => ["", "_low", "_calls"].map((ending) => `bottleneck_${kind}${ending}`)),
  "expert_ms",
  "expert_ms_estimated",
].map((name) => PROFILE_PREFIX + name);

/** How far estimated experts can be trusted. */
export interface Estimate {
  /** Of the cost model on calls that it was not fitted to, weighted by time; NaN without one. */
  error: number;
  numFitted: number;
  numHeldOut: number;
  /** The error for the calls of the size for which it is largest, and their rows. */
  worst: number;
  worstRows: number;
  /** Rows of calls for which no error is known; 0 = none. */
  unknownRows: number;
  merged: (typeof MERGED)[number];
}

export interface LayerTimes {
  layerIndex: number;
  numCalls: number;
  ms: number;
  p95Ms: number;
  share: number;
  /** Milliseconds; a part without a number is not there. */
  parts: Partial<Record<Part, number>>;
  distinctExperts: number;
  intensity: number;
  gflops: number;
  gbps: number;
  estimate: Estimate;
  /** Milliseconds of a call by expert, NaN for experts without rows; null where nothing is known. */
  experts: Float64Array | null;
  isEstimated: boolean;
}

export interface Bottleneck {
  kind: BottleneckKind;
  layerIndex: number | null;
  expertId: number | null;
  /** A ratio or a share; of `below_roof` the share of the roof that is not reached. */
  value: number;
  /** Below which the value does not lie; NaN where it was not sent. */
  low: number;
  numCalls: number;
}

export interface Performance {
  forwardMs: number;
  numForwards: number;
  overheadShare: number;
  numDropped: number;
  stepExperts: number;
  stepBytes: number;
  intensity: number;
  gflops: number;
  gbps: number;
  peakGflops: number;
  peakGbps: number;
  layers: LayerTimes[];
  bottlenecks: Bottleneck[];
}

/** What one source sent, its newest values; null where it sent nothing. */
export function performanceOf(lines: readonly SeriesLine[], sourceId: string): Performance | null {
  const own = lines.filter((line) => line.sourceId === sourceId && line.name.startsWith(PROFILE_PREFIX));
  if (own.length === 0) return null;
  const found = new Map(
    own.map((line) => [`${line.name.slice(PROFILE_PREFIX.length)}/${line.layerIndex ?? ""}`, line]),
  );
  const value = (name: string, layer: number | "" = "") => {
    const line = found.get(`${name}/${layer}`);
    return (line && newest(line)?.value) ?? Number.NaN;
  };
  const indices = own
    .filter(({ name }) => name === `${PROFILE_PREFIX}layer_ms`)
    .map(({ layerIndex }) => layerIndex ?? 0);
  return {
    forwardMs: value("forward_ms"),
    numForwards: value("num_forwards"),
    overheadShare: value("overhead_share"),
    numDropped: value("num_dropped"),
    stepExperts: value("step_experts"),
    stepBytes: value("step_bytes"),
    intensity: value("intensity"),
    gflops: value("gflops"),
    gbps: value("gbps"),
    peakGflops: value("peak_gflops"),
    peakGbps: value("peak_gbps"),
    layers: indices
      .sort((a, b) => a - b)
      .map((layer) => {
        const measured = found.get(`expert_ms/${layer}`);
        const estimated = found.get(`expert_ms_estimated/${layer}`);
        const experts = measured ?? estimated;
        return {
          layerIndex: layer,
          numCalls: value("layer_calls", layer),
          ms: value("layer_ms", layer),
          p95Ms: value("layer_p95_ms", layer),
          share: value("layer_share", layer),
          parts: Object.fromEntries(
            PARTS.map((part) => [part, value(`${part}_ms`, layer)]).filter(([, ms]) => Number.isFinite(ms)),
          ),
          distinctExperts: value("layer_distinct_experts", layer),
          intensity: value("layer_intensity", layer),
          gflops: value("layer_gflops", layer),
          gbps: value("layer_gbps", layer),
          estimate: {
            error: value("estimate_error", layer),
            numFitted: value("estimate_fitted", layer),
            numHeldOut: value("estimate_held_out", layer),
            worst: value("estimate_worst", layer),
            worstRows: value("estimate_worst_rows", layer),
            unknownRows: value("estimate_unknown_rows", layer),
            merged: MERGED[value("estimate_merged", layer)] ?? "nothing",
          },
          experts: experts ? lastRow(experts) : null,
          isEstimated: measured === undefined,
        };
      }),
    bottlenecks: bottlenecksOf(own),
  };
}

function lastRow({ steps, values, numValues }: SeriesLine): Float64Array {
  return values.slice((steps.length - 1) * numValues, steps.length * numValues);
}

/** A bottleneck that is gone was taken back with NaN: only the very last values count. Of experts there is a row. */
function bottlenecksOf(own: readonly SeriesLine[]): Bottleneck[] {
  const last = (name: string, layerIndex: number | null) => {
    const line = own.find((one) => one.name === PROFILE_PREFIX + name && one.layerIndex === layerIndex);
    return line && line.steps.length > 0 ? [...lastRow(line)] : [];
  };
  const found: Bottleneck[] = [];
  for (const kind of BOTTLENECKS) {
    const name = `bottleneck_${kind}`;
    const ofKind: Bottleneck[] = [];
    for (const { layerIndex } of own.filter((line) => line.name === PROFILE_PREFIX + name)) {
      const [low, numCalls] = [last(`${name}_low`, layerIndex), last(`${name}_calls`, layerIndex)];
      last(name, layerIndex).forEach((value, at) => {
        if (!Number.isFinite(value)) return;
        const expertId = kind === "slow_expert" ? at : null;
        ofKind.push({
          kind,
          layerIndex,
          expertId,
          value,
          low: low[at] ?? Number.NaN,
          numCalls: numCalls[at] ?? Number.NaN,
        });
      });
    }
    found.push(...ofKind.sort((a, b) => b.value - a.value));
  }
  return found;
}

export interface Scale {
  low: number;
  high: number;
}

/** Whole powers of ten around the values above 0; null without any. */
export function decades(values: readonly number[]): Scale | null {
  const known = values.filter((value) => Number.isFinite(value) && value > 0);
  if (known.length === 0) return null;
  const low = Math.floor(Math.log10(Math.min(...known)));
  const high = Math.ceil(Math.log10(Math.max(...known)));
  return { low, high: Math.max(high, low + 1) };
}

/** Where a value above 0 lies on a scale, 0..1. */
export const along = ({ low, high }: Scale, value: number): number => (Math.log10(value) - low) / (high - low);
