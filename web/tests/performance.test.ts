import { describe, expect, it } from "vitest";
import { along, decades, performanceOf } from "../src/model/performance";
import type { SeriesLine } from "../src/model/series";

function line(name: string, values: number[], layerIndex: number | null = null, numValues = 1): SeriesLine {
  const steps = Float64Array.from({ length: values.length / numValues }, (_, i) => i);
  return {
    sourceId: "a",
    globalRank: 0,
    name: `profile_${name}`,
    layerIndex,
    numValues,
    steps,
    values: Float64Array.from(values),
  };
}

describe("performanceOf", () => {
  it("takes the newest values of one source, by layer", () => {
    const profile = performanceOf(
      [
        line("forward_ms", [9, 8]),
        line("layer_ms", [1, 2], 1),
        line("layer_ms", [3], 0),
        line("router_ms", [0.5], 1),
        line("expert_ms_estimated", [1, 2, 3, Number.NaN], 1, 2),
        { ...line("forward_ms", [1]), sourceId: "b" },
      ],
      "a",
    );
    expect(profile?.forwardMs).toBe(8);
    expect(profile?.layers.map(({ layerIndex, ms }) => [layerIndex, ms])).toEqual([
      [0, 3],
      [1, 2],
    ]);
    expect(profile?.layers[1]?.parts).toEqual({ router: 0.5 });
    expect([...(profile?.layers[1]?.experts ?? [])]).toEqual([3, Number.NaN]);
    expect(profile?.layers[1]?.isEstimated).toBe(true);
    expect(profile?.layers[0]?.experts).toBeNull();
    expect(performanceOf([line("forward_ms", [1])], "b")).toBeNull();
  });

  it("says how many calls a number is of, and how far estimates can be trusted", () => {
    const profile = performanceOf(
      [
        line("num_forwards", [256]),
        line("layer_ms", [1], 0),
        line("layer_calls", [255], 0),
        line("estimate_error", [0.2], 0),
        line("estimate_fitted", [204], 0),
        line("estimate_held_out", [49], 0),
        line("estimate_worst", [1.5], 0),
        line("estimate_worst_rows", [1200], 0),
        line("estimate_unknown_rows", [0], 0),
        line("estimate_merged", [4], 0),
      ],
      "a",
    );
    expect(profile?.numForwards).toBe(256);
    expect(profile?.layers[0]?.numCalls).toBe(255);
    expect(profile?.layers[0]?.estimate).toEqual({
      error: 0.2,
      numFitted: 204,
      numHeldOut: 49,
      worst: 1.5,
      worstRows: 1200,
      unknownRows: 0,
      merged: "rows_and_active",
    });
  });

  it("prefers measured experts, drops a bottleneck that was taken back, and has every slow expert", () => {
    const profile = performanceOf(
      [
        line("layer_ms", [1], 0),
        line("expert_ms", [4, 5], 0, 2),
        line("bottleneck_slow_layer", [3, Number.NaN], 0),
        line("bottleneck_slow_expert", [Number.NaN, 2.5, Number.NaN, 7], 0, 4),
        line("bottleneck_slow_expert_low", [Number.NaN, 2.1, Number.NaN, 6], 0, 4),
        line("bottleneck_slow_expert_calls", [Number.NaN, 30, Number.NaN, 40], 0, 4),
        line("bottleneck_below_roof", [0.95]),
      ],
      "a",
    );
    expect(profile?.layers[0]?.isEstimated).toBe(false);
    expect(profile?.bottlenecks).toEqual([
      { kind: "slow_expert", layerIndex: 0, expertId: 3, value: 7, low: 6, numCalls: 40 },
      { kind: "slow_expert", layerIndex: 0, expertId: 1, value: 2.5, low: 2.1, numCalls: 30 },
      { kind: "below_roof", layerIndex: null, expertId: null, value: 0.95, low: Number.NaN, numCalls: Number.NaN },
    ]);
  });
});

describe("log scales", () => {
  it("reach from a power of ten to another", () => {
    expect(decades([0.5, 38])).toEqual({ low: -1, high: 2 });
    expect(decades([10])).toEqual({ low: 1, high: 2 });
    expect(decades([0, Number.NaN])).toBeNull();
    expect(along({ low: -1, high: 1 }, 1)).toBeCloseTo(0.5);
  });
});
