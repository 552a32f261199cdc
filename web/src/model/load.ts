// The load of one session: a matrix layers x experts of assignments, and what each row says.

import type { WatchFrame } from "../gen/moe_debugger/v1/gateway_pb";
import { CheckStatus } from "../gen/moe_debugger/v1/routing_pb";
import type { SessionSnapshot } from "../gen/moe_debugger/v1/session_pb";
import { decodeU64 } from "./columns";

export interface LayerShape {
  layerIndex: number;
  modelLayerIndex: number;
  moduleName: string;
  /** "decoder", "encoder", "vision"; layers of two stacks may have the same modelLayerIndex. */
  stack: string;
  /** True where attention is routed, and not the MLP. */
  isAttention: boolean;
  /** Routed experts alone. */
  numExperts: number;
  topK: number;
  /** "Zero" experts, which compute nothing: their ids follow those of the routed ones. */
  numIdentity: number;
  /** Experts that every token runs through; no router chooses them. */
  numShared: number;
}

/** Counts of every layer. Layers may differ in E: row i holds `counts[offsets[i] .. offsets[i + 1]]`. */
export interface LoadMatrix {
  layers: LayerShape[];
  offsets: number[];
  counts: Float64Array;
  numTokens: Float64Array;
  maxExperts: number;
}

export interface RowStats {
  total: number;
  /** -sum p ln p / ln E, in 0..1; NaN where the layer has no assignment. */
  entropy: number;
  /** exp(H): as many equally loaded experts would give the same entropy. */
  effectiveExperts: number;
  hottestExpert: number;
  /** Share of the hottest expert over the fair share 1/E. */
  hottestRatio: number;
  numUnused: number;
}

function shapesOf(snapshot: SessionSnapshot): LayerShape[] {
  return snapshot.layers.map((layer, row) => ({
    layerIndex: layer.description?.layerIndex ?? row,
    modelLayerIndex: layer.description?.modelLayerIndex ?? row,
    moduleName: layer.description?.moduleName ?? "",
    stack: layer.description?.stack || "decoder",
    isAttention: layer.description?.site === "attention",
    numExperts: layer.description?.numExperts ?? layer.expertCounts.byteLength / 8,
    topK: layer.description?.topK ?? 1,
    numIdentity: layer.description?.numIdentityExperts ?? 0,
    numShared: layer.description?.numSharedExperts ?? 0,
  }));
}

function matrix(layers: LayerShape[], rows: Float64Array[], numTokens: Float64Array): LoadMatrix {
  const offsets = [0];
  for (const layer of layers) offsets.push((offsets.at(-1) as number) + layer.numExperts);
  const counts = new Float64Array(offsets.at(-1) as number);
  rows.forEach((row, i) => {
    const size = (layers[i] as LayerShape).numExperts;
    if (row.length !== size && row.length !== 0) {
      throw new RangeError(`layer ${i}: ${row.length} counts, expected ${size}`);
    }
    counts.set(row, offsets[i]);
  });
  return { layers, offsets, counts, numTokens, maxExperts: Math.max(0, ...layers.map((layer) => layer.numExperts)) };
}

export function wholeSession(snapshot: SessionSnapshot): LoadMatrix {
  return matrix(
    shapesOf(snapshot),
    snapshot.layers.map((layer) => decodeU64(layer.expertCounts, "expert_counts")),
    Float64Array.from(snapshot.layers, (layer) => Number(layer.numTokens)),
  );
}

export function recentWindow(snapshot: SessionSnapshot): LoadMatrix {
  return matrix(
    shapesOf(snapshot),
    snapshot.layers.map((layer) => decodeU64(layer.recentExpertCounts, "recent_expert_counts")),
    Float64Array.from(snapshot.layers, (layer) => Number(layer.recentNumTokens)),
  );
}

/** The matrix after a frame; null where the frame does not fit its shape (a new snapshot is on its way). */
export function applyFrame(before: LoadMatrix, frame: WatchFrame): LoadMatrix | null {
  if (frame.expertCounts.byteLength !== before.counts.length * 8) return null;
  if (frame.numTokens.byteLength !== before.layers.length * 8) return null;
  return {
    ...before,
    counts: decodeU64(frame.expertCounts, "expert_counts"),
    numTokens: decodeU64(frame.numTokens, "num_tokens"),
  };
}

export function rowOf(load: LoadMatrix, row: number): Float64Array {
  return load.counts.subarray(load.offsets[row], load.offsets[row + 1]);
}

export function rowStats(counts: Float64Array): RowStats {
  let total = 0;
  let hottestExpert = 0;
  let numUnused = 0;
  counts.forEach((count, expert) => {
    total += count;
    if (count === 0) numUnused++;
    if (count > (counts[hottestExpert] as number)) hottestExpert = expert;
  });
  if (total === 0) {
    return {
      total,
      entropy: Number.NaN,
      effectiveExperts: Number.NaN,
      hottestExpert: 0,
      hottestRatio: Number.NaN,
      numUnused,
    };
  }
  let nats = 0;
  for (const count of counts) {
    if (count > 0) nats -= (count / total) * Math.log(count / total);
  }
  return {
    total,
    entropy: counts.length > 1 ? nats / Math.log(counts.length) : 1,
    effectiveExperts: Math.exp(nats),
    hottestExpert,
    hottestRatio: ((counts[hottestExpert] as number) / total) * counts.length,
    numUnused,
  };
}

/** Load of one expert over uniform: 1 is the fair share; NaN where nothing was routed. */
export function loadRatio(count: number, total: number, numExperts: number): number {
  return total > 0 ? (count / total) * numExperts : Number.NaN;
}

/**
 * Rows whose load is not known: nothing was captured there, though other layers of the stack routed tokens. A layer that
 * the sources' own checks say saw all its tokens is idle, and zero is right.
 */
export function unseenRows(snapshot: SessionSnapshot): boolean[] {
  const checks = snapshot.sources.flatMap((source) => source.checks.filter(({ name }) => name === "layers"));
  const isComplete = checks.length > 0 && checks.every(({ status }) => status === CheckStatus.OK);
  const stackOf = (layer: SessionSnapshot["layers"][number]) => layer.description?.stack || "decoder";
  const active = new Set(snapshot.layers.filter(({ numTokens }) => numTokens > 0n).map(stackOf));
  return snapshot.layers.map(
    (layer) => !isComplete && layer.numTokens === 0n && layer.numPaddingTokens === 0n && active.has(stackOf(layer)),
  );
}

/** Smallest and largest of a property over the layers. */
export function rangeOf(layers: readonly LayerShape[], of: (layer: LayerShape) => number): [number, number] {
  const values = layers.map(of);
  return values.length > 0 ? [Math.min(...values), Math.max(...values)] : [0, 0];
}
