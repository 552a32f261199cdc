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
  "estimate_error",
];
const MODEL_NAMES = [
  "forward_ms",
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
] as const;
export type BottleneckKind = (typeof BOTTLENECKS)[number];

/** The series that the panel asks for. */
export const PROFILE_SERIES = [
  ...LAYER_NAMES,
  ...MODEL_NAMES,
  ...BOTTLENECKS.flatMap((kind) => [`bottleneck_${kind}`, `bottleneck_${kind}_id`]),
  "expert_ms",
  "expert_ms_estimated",
].map((name) => PROFILE_PREFIX + name);

export interface LayerTimes {
  layerIndex: number;
  ms: number;
  p95Ms: number;
  share: number;
  /** Milliseconds; a part without a number is not there. */
  parts: Partial<Record<Part, number>>;
  distinctExperts: number;
  intensity: number;
  gflops: number;
  gbps: number;
  /** Of the cost model on calls that it was not fitted to; NaN without one. */
  estimateError: number;
  /** Milliseconds of a call by expert, NaN for experts without rows; null where nothing is known. */
  experts: Float64Array | null;
  isEstimated: boolean;
}

export interface Bottleneck {
  kind: BottleneckKind;
  layerIndex: number | null;
  expertId: number | null;
  value: number;
}

export interface Performance {
  forwardMs: number;
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
          estimateError: value("estimate_error", layer),
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

/** A bottleneck that is gone was taken back with NaN: only the very last value counts. */
function bottlenecksOf(own: readonly SeriesLine[]): Bottleneck[] {
  const last = (kind: string, layerIndex: number | null) => {
    const line = own.find((one) => one.name === `${PROFILE_PREFIX}${kind}` && one.layerIndex === layerIndex);
    return line && line.steps.length > 0 ? (line.values[line.steps.length - 1] as number) : Number.NaN;
  };
  const found: Bottleneck[] = [];
  for (const kind of BOTTLENECKS) {
    const name = `bottleneck_${kind}`;
    const layers = own.filter((line) => line.name === PROFILE_PREFIX + name).map(({ layerIndex }) => layerIndex);
    for (const layerIndex of layers) {
      const value = last(name, layerIndex);
      const expert = last(`${name}_id`, layerIndex);
      if (Number.isFinite(value))
        found.push({ kind, layerIndex, value, expertId: Number.isFinite(expert) ? expert : null });
    }
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
