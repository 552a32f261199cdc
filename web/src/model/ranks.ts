// Load of expert-parallel ranks: whose experts get how much.
import type { LayerSnapshot } from "../gen/moe_debugger/v1/session_pb";

export interface RankLoad {
  /** Assignments of the experts that each rank owns, over all layers. */
  totals: number[];
  maxOverMean: number;
  /** The layer whose fullest rank stands out most, which is where ranks wait. */
  worst: { row: number; rank: number; maxOverMean: number } | null;
}

/** The fullest over the mean; 1 is even, NaN where nothing was routed. */
export function maxOverMean(counts: readonly number[]): number {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return total > 0 ? (Math.max(...counts) / total) * counts.length : Number.NaN;
}

/** Null where experts are not spread over ranks. */
export function rankLoad(layers: readonly LayerSnapshot[]): RankLoad | null {
  const numRanks = Math.max(0, ...layers.map(({ expertParallelCounts }) => expertParallelCounts.length));
  if (numRanks === 0) return null;
  const totals = new Array<number>(numRanks).fill(0);
  let worst: RankLoad["worst"] = null;
  layers.forEach(({ expertParallelCounts }, row) => {
    const counts = expertParallelCounts.map(Number);
    counts.forEach((count, rank) => {
      totals[rank] = (totals[rank] as number) + count;
    });
    const ratio = maxOverMean(counts);
    if (ratio > (worst?.maxOverMean ?? 0)) {
      worst = { row, rank: counts.indexOf(Math.max(...counts)), maxOverMean: ratio };
    }
  });
  return { totals, maxOverMean: maxOverMean(totals), worst };
}
