import { create } from "@bufbuild/protobuf";
import { describe, expect, it } from "vitest";
import { CheckStatus } from "../src/gen/moe_debugger/v1/routing_pb";
import {
  LayerSnapshotSchema,
  type SessionSnapshot,
  SessionSnapshotSchema,
} from "../src/gen/moe_debugger/v1/session_pb";
import { layerNames } from "../src/layers";
import { rangeOf, unseenRows, wholeSession } from "../src/model/load";
import { maxOverMean, rankLoad } from "../src/model/ranks";
import { expertName } from "../src/model/routes";
import { geometry, rowRight } from "../src/panels/heatmap-paint";

interface Layer {
  stack?: string;
  site?: string;
  index?: number;
  tokens?: number;
  experts?: number;
}

function snapshot(layers: Layer[], layersCheck?: CheckStatus): SessionSnapshot {
  return create(SessionSnapshotSchema, {
    layers: layers.map(({ stack = "decoder", site = "mlp", index, tokens = 0, experts = 4 }, layerIndex) => ({
      description: { layerIndex, modelLayerIndex: index ?? layerIndex, stack, site, numExperts: experts, topK: 1 },
      numTokens: BigInt(tokens),
    })),
    sources: layersCheck === undefined ? [] : [{ checks: [{ name: "layers", status: layersCheck }] }],
  });
}

const namesOf = (layers: Layer[]) => layerNames(wholeSession(snapshot(layers)).layers);

describe("names of layers", () => {
  it("are an index where that says all", () => {
    expect(namesOf([{}, {}]).map(({ short, title }) => [short, title])).toEqual([
      ["L0", "Layer 0"],
      ["L1", "Layer 1"],
    ]);
  });

  it("tell equal model layers of two stacks apart", () => {
    const names = namesOf([
      { stack: "encoder", index: 1 },
      { stack: "decoder", index: 1 },
      { stack: "bridge", index: 1 },
    ]);
    expect(names.map(({ short }) => short)).toEqual(["enc L0", "dec L1", "brid L2"]);
    expect(names[0]?.title).toBe("Layer 0 · encoder layer 1");
    expect(names[2]?.place).toBe("bridge layer 1");
  });

  it("tell routed attention from the MLP of the same layer", () => {
    const names = namesOf([
      { site: "attention", index: 0 },
      { site: "mlp", index: 0 },
    ]);
    expect(names.map(({ short }) => short)).toEqual(["L0 attn", "L1"]);
    expect(names.map(({ place }) => place)).toEqual(["decoder layer 0, attention", "decoder layer 0, MLP"]);
  });

  it("name a vision tower that is watched alone", () => {
    expect(namesOf([{ stack: "vision" }])[0]?.short).toBe("vis L0");
  });

  it("call the experts behind the routed ones zero experts", () => {
    expect([0, 3, 4, 6].map((id) => expertName({ numExperts: 4 }, id))).toEqual(["E0", "E3", "Z0", "Z2"]);
  });
});

describe("layers that were not seen", () => {
  const layers = [{ tokens: 10 }, { tokens: 0 }, { stack: "encoder", tokens: 0 }];

  it("are those without tokens beside others of their stack", () => {
    expect(unseenRows(snapshot(layers, CheckStatus.FAILED))).toEqual([false, true, false]);
    expect(unseenRows(snapshot(layers))).toEqual([false, true, false]);
  });

  it("are idle where the capture's own check says that all was seen", () => {
    expect(unseenRows(snapshot(layers, CheckStatus.OK))).toEqual([false, false, false]);
  });

  it("are none before the first token", () => {
    expect(unseenRows(snapshot([{}, {}], CheckStatus.UNKNOWN))).toEqual([false, false]);
  });
});

describe("layers of different sizes", () => {
  it("have rows of different widths", () => {
    const { layers, maxExperts } = wholeSession(snapshot([{ experts: 16 }, { experts: 4 }]));
    expect(rangeOf(layers, ({ numExperts }) => numExperts)).toEqual([4, 16]);
    const g = geometry(layers.length, maxExperts, 1000, 300, 0);
    expect(rowRight(g, 16)).toBeCloseTo(g.left + g.plotWidth);
    expect(rowRight(g, 4) - g.left).toBeCloseTo(g.plotWidth / 4);
  });

  it("leave room for long names, and for what is no load", () => {
    const plain = geometry(4, 16, 1000, 300, 0);
    expect(geometry(4, 16, 1000, 300, 0, { labelLength: 11 }).left).toBeGreaterThan(plain.left + 30);
    const aside = geometry(4, 16, 1000, 300, 0, { hasAside: true });
    expect(aside.asideX + aside.asideWidth).toBeLessThanOrEqual(aside.entropyX);
    expect(aside.plotWidth).toBe(plain.plotWidth - aside.asideWidth);
  });
});

describe("ranks", () => {
  const layer = (counts: bigint[], imbalance?: number) =>
    create(LayerSnapshotSchema, {
      expertParallelCounts: counts,
      rankStepImbalance: imbalance,
      rankWasteShare: imbalance && 1 - 1 / imbalance,
      numRankSteps: imbalance ? 64 : 0,
    });

  it("name the most uneven layer, which a sum over layers with opposite ranks hides", () => {
    expect(rankLoad([layer([30n, 10n]), layer([0n, 0n]), layer([10n, 30n])])).toEqual({
      worst: { row: 0, rank: 0, counts: [30, 10], maxOverMean: 1.5 },
      worstSteps: null,
      totals: [40, 40],
    });
  });

  it("name the layer that is most uneven in single steps, which a sum over steps hides", () => {
    const load = rankLoad([layer([30n, 10n], 1.6), layer([20n, 20n], 2), layer([20n, 20n])]);
    expect(load?.worst?.row).toBe(0);
    expect(load?.worstSteps).toEqual({ row: 1, imbalance: 2, waste: 0.5, numSteps: 64 });
  });

  it("are null where experts are not spread", () => {
    expect(rankLoad([layer([])])).toBeNull();
    expect(maxOverMean([0, 0])).toBeNaN();
  });
});
