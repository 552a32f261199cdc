// Load of expert-parallel ranks: whose experts get how much. Layer by layer first, because ranks wait at every layer.
import type { LayerSnapshot } from "../gen/moe_debugger/v1/session_pb";

export interface RankSteps {
  /** Mean over sampled steps of the fullest rank over the mean: `layer_imbalance` of docs/metrics.md. */
  imbalance: number;
  /** Part of the ranks' time in this layer's experts that is waiting, 0..1, if time grows with tokens: `waste_share`. */
  waste: number;
  numSteps: number;
}

export interface RankLoad {
  /** The layer whose fullest rank stands out most over the whole session; null before the first token. */
  worst: { row: number; rank: number; counts: number[]; maxOverMean: number } | null;
  /** The layer that is most uneven in single steps: sums hide an imbalance that moves from rank to rank. */
  worstSteps: ({ row: number } & RankSteps) | null;
  /** Assignments of the experts that each rank owns, over all layers: opposite layers cancel out. */
  totals: number[];
}

/** The fullest over the mean; 1 is even, NaN where nothing was routed. */
export function maxOverMean(counts: readonly number[]): number {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return total > 0 ? (Math.max(...counts) / total) * counts.length : Number.NaN;
}

/** How uneven the ranks are in single steps of a layer; null where no step was kept. */
export function rankSteps({ rankStepImbalance, rankWasteShare, numRankSteps }: LayerSnapshot): RankSteps | null {
  if (rankStepImbalance === undefined || rankWasteShare === undefined) return null;
  return { imbalance: rankStepImbalance, waste: rankWasteShare, numSteps: numRankSteps };
}

/** Null where experts are not spread over ranks. */
export function rankLoad(layers: readonly LayerSnapshot[]): RankLoad | null {
  const numRanks = Math.max(0, ...layers.map(({ expertParallelCounts }) => expertParallelCounts.length));
  if (numRanks === 0) return null;
  const load: RankLoad = { worst: null, worstSteps: null, totals: new Array<number>(numRanks).fill(0) };
  layers.forEach((layer, row) => {
    const counts = layer.expertParallelCounts.map(Number);
    counts.forEach((count, rank) => {
      load.totals[rank] = (load.totals[rank] as number) + count;
    });
    const ratio = maxOverMean(counts);
    if (ratio > (load.worst?.maxOverMean ?? 0)) {
      load.worst = { row, rank: counts.indexOf(Math.max(...counts)), counts, maxOverMean: ratio };
    }
    const steps = rankSteps(layer);
    if (steps && steps.imbalance > (load.worstSteps?.imbalance ?? 0)) load.worstSteps = { row, ...steps };
  });
  return load;
}
