// Routes of one request: for each token and layer its experts and weights.
import type { RequestRoutes } from "../gen/moe_debugger/v1/session_pb";
import { decodeF16, decodeU16, decodeU32, decodeU64 } from "./columns";

export const NO_EXPERT = 65535;

export interface LayerRoutes {
  layerIndex: number;
  numExperts: number;
  topK: number;
  expertIds: Uint16Array;
  weights: Float32Array;
  expertCounts: Float64Array;
}

export interface Routes {
  requestId: string;
  numTokens: number;
  /** Row of each position. */
  rowOfPosition: Map<number, number>;
  position: Uint32Array;
  phase: Uint8Array;
  /** Empty where the capture level holds no tokens. */
  tokenId: Uint32Array;
  layers: LayerRoutes[];
  numRowsNotKept: number;
}

export interface Slot {
  expert: number;
  weight: number;
}

/** "E3", and "Z0" for the first of the experts that compute nothing, whose ids follow those of the routed ones. */
export function expertName(layer: { numExperts: number }, expert: number): string {
  return expert < layer.numExperts ? `E${expert}` : `Z${expert - layer.numExperts}`;
}

export function decodeRoutes(message: RequestRoutes): Routes {
  const all = decodeU32(message.position, "position");
  // The text is the decoder's: an encoder's tokens are rows of their own behind them.
  const numOthers = message.stackIndex.findIndex((stack) => stack !== 0);
  const numTokens = numOthers < 0 ? message.numTokens : numOthers;
  const position = all.subarray(0, numTokens);
  return {
    requestId: message.summary?.requestId ?? "",
    numTokens,
    rowOfPosition: new Map(Array.from(position, (value, row) => [value, row])),
    position,
    phase: message.phase,
    tokenId: decodeU32(message.tokenId, "token_id"),
    layers: message.layers.map((layer) => ({
      layerIndex: layer.layerIndex,
      numExperts: layer.numExperts,
      topK: layer.topK,
      expertIds: decodeU16(layer.expertIds, "expert_ids"),
      weights: decodeF16(layer.gateWeights, "gate_weights"),
      expertCounts: decodeU64(layer.expertCounts, "expert_counts"),
    })),
    numRowsNotKept: Number(message.numRowsNotKept),
  };
}

/** Slots of a row, the largest weight first; slots that reached no expert are left out. */
export function slotsOf(layer: LayerRoutes, row: number): Slot[] {
  const slots: Slot[] = [];
  for (let slot = 0; slot < layer.topK; slot++) {
    const at = row * layer.topK + slot;
    const expert = layer.expertIds[at];
    if (expert === undefined || expert === NO_EXPERT) continue;
    slots.push({ expert, weight: layer.weights[at] ?? Number.NaN });
  }
  return slots.sort((a, b) => (b.weight || 0) - (a.weight || 0));
}

/** The expert with the largest weight, or null where the row reached none. */
export function topExpert(layer: LayerRoutes, row: number): number | null {
  return slotsOf(layer, row)[0]?.expert ?? null;
}

export const MAX_COLOURED = 6;

export interface ExpertShare {
  expert: number;
  numTokens: number;
  share: number;
  /** 0..5, an entry of the palette. */
  colour: number;
}

export interface Colouring {
  top: ExpertShare[];
  numOthers: number;
  otherShare: number;
  colourOf: Map<number, number>;
}

/**
 * Colours for the top-1 experts of a layer: the six that take most tokens, the rest is grey. An expert keeps its colour
 * while it stays in the set.
 */
export function colourExperts(
  layer: LayerRoutes | undefined,
  numRows: number,
  before?: Map<number, number>,
): Colouring {
  const tokens = new Map<number, number>();
  if (layer) {
    for (let row = 0; row < numRows; row++) {
      const expert = topExpert(layer, row);
      if (expert !== null) tokens.set(expert, (tokens.get(expert) ?? 0) + 1);
    }
  }
  const ranked = [...tokens].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const total = ranked.reduce((sum, [, count]) => sum + count, 0);
  const chosen = ranked.slice(0, MAX_COLOURED);
  const colourOf = new Map<number, number>();
  const free = new Set(Array.from({ length: MAX_COLOURED }, (_, i) => i));
  for (const [expert] of chosen) {
    const kept = before?.get(expert);
    if (kept !== undefined && free.delete(kept)) colourOf.set(expert, kept);
  }
  for (const [expert] of chosen) {
    if (colourOf.has(expert)) continue;
    const colour = Math.min(...free);
    free.delete(colour);
    colourOf.set(expert, colour);
  }
  const others = ranked.slice(MAX_COLOURED);
  return {
    top: chosen.map(([expert, count]) => ({
      expert,
      numTokens: count,
      share: count / total,
      colour: colourOf.get(expert) as number,
    })),
    numOthers: others.length,
    otherShare: total ? others.reduce((sum, [, count]) => sum + count, 0) / total : 0,
    colourOf,
  };
}
