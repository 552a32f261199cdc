import { create } from "@bufbuild/protobuf";
import { describe, expect, it } from "vitest";
import { encodeF64, encodeU64 } from "../dev/fake-gateway";
import { SeriesSchema } from "../src/gen/moe_debugger/v1/session_pb";
import {
  countUnreadable,
  decodeSeries,
  expertLines,
  heatGrid,
  indexAt,
  layerSeries,
  medianOf,
  modelSeries,
  nearestStep,
  newest,
  newestSteps,
  niceTicks,
  type SeriesLine,
  seriesPath,
  seriesSources,
  stepDomain,
  valueAt,
  valueExtent,
} from "../src/model/series";
import { pointsFor } from "../src/training";

function line(name: string, steps: number[], values: number[], rest: Partial<SeriesLine> = {}): SeriesLine {
  return {
    sourceId: "a",
    globalRank: 0,
    name,
    layerIndex: null,
    numValues: 1,
    steps: Float64Array.from(steps),
    values: Float64Array.from(values),
    ...rest,
  };
}

describe("decoding", () => {
  it("reads steps and values at any offset of the message's buffer", () => {
    const bytes = new Uint8Array(3 + 16);
    bytes.set(encodeF64([1.5, Number.NaN]), 3);
    const [decoded] = decodeSeries([
      create(SeriesSchema, {
        sourceId: "a",
        globalRank: 2,
        name: "loss",
        numValues: 1,
        step: encodeU64([7, 2 ** 40]),
        value: bytes.subarray(3),
      }),
    ]);
    expect(decoded).toMatchObject({ globalRank: 2, layerIndex: null, numValues: 1 });
    expect([...(decoded?.steps ?? [])]).toEqual([7, 2 ** 40]);
    expect([...(decoded?.values ?? [])]).toEqual([1.5, Number.NaN]);
  });

  it("keeps layer 0 apart from the whole model", () => {
    const [decoded] = decodeSeries([create(SeriesSchema, { name: "x", layerIndex: 0, numValues: 1 })]);
    expect(decoded?.layerIndex).toBe(0);
  });

  it("refuses values that do not fit the steps", () => {
    const message = create(SeriesSchema, {
      name: "loss",
      numValues: 2,
      step: encodeU64([1, 2]),
      value: encodeF64([1, 2, 3]),
    });
    expect(() => decodeSeries([message])).toThrow(/series loss: 3 values for 2 steps of 2 values each/);
  });
});

describe("groups", () => {
  const lines = [
    line("zeta", [1], [1]),
    line("lr", [1], [1]),
    line("loss", [1], [1], { sourceId: "b", globalRank: 1 }),
    line("loss", [1], [1]),
    line("router_gradient_norm", [1], [1], { layerIndex: 4 }),
    line("router_gradient_norm", [1], [1], { layerIndex: 2 }),
    line("router_gradient_norm", [1], [1], { layerIndex: 2, sourceId: "b", globalRank: 1 }),
    line("expert_gradient_norm", [1], [1, 2], { layerIndex: 2, numValues: 2 }),
  ];

  it("orders the model's series as people look for them, one line for each source", () => {
    expect([...modelSeries(lines)].map(([name, own]) => [name, own.length])).toEqual([
      ["loss", 2],
      ["lr", 1],
      ["zeta", 1],
    ]);
  });

  it("takes the layers of one source, in order", () => {
    const groups = layerSeries(lines, "a");
    expect([...groups.keys()]).toEqual(["router_gradient_norm"]);
    expect(groups.get("router_gradient_norm")?.map(({ layerIndex }) => layerIndex)).toEqual([2, 4]);
  });

  it("lists the sources by rank", () => {
    expect(seriesSources(lines).map(({ sourceId }) => sourceId)).toEqual(["a", "b"]);
  });

  it("gives each expert its own line", () => {
    const experts = expertLines(line("g", [1, 2], [1, 2, 3, 4, 5, 6], { numValues: 3 }));
    expect(experts.map(({ values }) => [...values])).toEqual([
      [1, 4],
      [2, 5],
      [3, 6],
    ]);
  });
});

describe("the step axis", () => {
  it("spans all lines", () => {
    expect(stepDomain([line("a", [5, 9], [1, 1]), line("b", [2], [1])])).toEqual([2, 9]);
    expect(stepDomain([line("a", [], [])])).toBeNull();
  });

  it("begins where lines were cut, and not at the past of a sparse one", () => {
    const dense = line("loss", [800, 900, 1000], [1, 1, 1]);
    const sparse = line("eval_loss", [100, 1000], [1, 1]);
    expect(stepDomain([dense, sparse], 3)).toEqual([800, 1000]);
    expect(stepDomain([dense, sparse], 4)).toEqual([100, 1000]);
  });

  it("finds points by step", () => {
    const steps = Float64Array.from([10, 20, 40]);
    expect([5, 10, 39, 99].map((step) => indexAt(steps, step))).toEqual([-1, 0, 1, 2]);
    expect([0, 14, 31, 99].map((step) => nearestStep(steps, step))).toEqual([10, 10, 40, 40]);
    expect(nearestStep(new Float64Array(), 1)).toBeNull();
    expect(valueAt(line("a", [10, 20], [1, 2]), 20)).toBe(2);
    expect(valueAt(line("a", [10, 20], [1, 2]), 15)).toBeNull();
    expect(newestSteps([line("a", [1, 3], [0, 0]), line("b", [2, 3], [0, 0])], 2)).toEqual([3, 2]);
  });

  it("has round marks, of whole steps", () => {
    expect(niceTicks([1, 120], 4, true)).toEqual([50, 100]);
    expect(niceTicks([1, 3], 10, true)).toEqual([1, 2, 3]);
    expect(niceTicks([2.4, 9.4], 4)).toEqual([4, 6, 8]);
    expect(niceTicks([0.1, 0.3], 2)).toEqual([0.1, 0.2, 0.3]);
    expect(niceTicks([5, 5], 3)).toEqual([5]);
  });
});

describe("values", () => {
  const broken = line("loss", [1, 2, 3, 4], [2, Number.NaN, Number.POSITIVE_INFINITY, 1]);

  it("leaves what is no number out of the range, and counts it", () => {
    expect(valueExtent([broken])).toEqual([1, 2]);
    expect(valueExtent([line("a", [1, 2], [0, 3])], true)).toEqual([3, 3]);
    expect(valueExtent([line("a", [1], [Number.NaN])])).toBeNull();
    expect(countUnreadable([broken])).toEqual({ nan: 1, infinite: 1 });
    expect(newest(line("a", [1, 2], [7, Number.NaN]))).toEqual({ step: 1, value: 7 });
    expect(newest(line("a", [1], [Number.NaN]))).toBeNull();
    expect(medianOf([line("a", [1, 2, 3, 4], [0, 9, 1, 4])])).toBe(4);
  });

  it("breaks the path where a value is missing, and draws a lone point", () => {
    const path = seriesPath(
      broken,
      (step) => step * 10,
      (value) => value,
    );
    expect(path).toBe("M10.0 2.0h0.01M40.0 1.0h0.01");
  });

  it("keeps both ends of what shares a pixel", () => {
    const dense = line("loss", [1, 2, 3, 4], [5, 100, 1, 6]);
    const path = seriesPath(
      dense,
      (step) => step / 100,
      (value) => value,
    );
    expect(path).toBe("M0.0 5.0L0.0 1.0L0.0 100.0L0.0 6.0");
  });
});

describe("the grid of layers and steps", () => {
  it("has a column for each step with a point, also where steps are apart", () => {
    const rows = [line("g", [10, 20, 30], [1, 2, Number.NaN]), line("g", [10, 30], [4, 5])];
    const grid = heatGrid(rows, [10, 30], 100);
    expect(grid.numColumns).toBe(3);
    expect([...grid.cells]).toEqual([1, 2, Number.NaN, 4, Number.NaN, 5]);
    // NaN with a point: nothing to read. Without: nothing was recorded.
    expect([...grid.hasPoint]).toEqual([1, 1, 1, 1, 0, 1]);
  });

  it("shows the largest value of a column of several steps, and nothing before the domain", () => {
    const grid = heatGrid([line("g", [1, 2, 3, 4, 5], [99, 1, 7, 3, 2])], [2, 5], 2);
    expect([...grid.cells]).toEqual([7, 3]);
  });
});

describe("the size of an answer", () => {
  it("falls with the number of series, within bounds", () => {
    expect(pointsFor(6)).toBe(2000);
    expect(pointsFor(260)).toBe(307);
    expect(pointsFor(100_000)).toBe(100);
  });
});
