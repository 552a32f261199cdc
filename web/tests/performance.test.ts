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

  it("prefers measured experts, and drops a bottleneck that was taken back", () => {
    const profile = performanceOf(
      [
        line("layer_ms", [1], 0),
        line("expert_ms", [4, 5], 0, 2),
        line("bottleneck_slow_layer", [3, Number.NaN], 0),
        line("bottleneck_slow_expert", [2.5], 0),
        line("bottleneck_slow_expert_id", [1], 0),
        line("bottleneck_memory_bound", [0.5]),
      ],
      "a",
    );
    expect(profile?.layers[0]?.isEstimated).toBe(false);
    expect(profile?.bottlenecks).toEqual([
      { kind: "slow_expert", layerIndex: 0, expertId: 1, value: 2.5 },
      { kind: "memory_bound", layerIndex: null, expertId: null, value: 0.5 },
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
