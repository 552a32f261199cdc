import { create } from "@bufbuild/protobuf";
import { describe, expect, it } from "vitest";
import { encodeF32, encodeU64, FakeGateway, SESSION_ID } from "../dev/fake-gateway";
import { WatchFrameSchema, WatchResponseSchema } from "../src/gen/moe_debugger/v1/gateway_pb";
import { RequestRoutesSchema } from "../src/gen/moe_debugger/v1/session_pb";
import { decodeRollUps, linePath } from "../src/history";
import { LiveModel } from "../src/live";
import { decodeF16, decodeU16, decodeU32, decodeU64 } from "../src/model/columns";
import { newId } from "../src/model/ids";
import { applyFrame, loadRatio, rowOf, rowStats, wholeSession } from "../src/model/load";
import { colourExperts, decodeRoutes, expertName, NO_EXPERT, slotsOf, topExpert } from "../src/model/routes";

describe("columns", () => {
  it("reads u64 little-endian exactly, at any offset of the buffer", () => {
    const values = [0, 1, 255, 2 ** 32 - 1, 2 ** 32, 2 ** 40 + 7, Number.MAX_SAFE_INTEGER];
    const bytes = encodeU64(values);
    const shifted = new Uint8Array(bytes.length + 3);
    shifted.set(bytes, 3);
    expect([...decodeU64(shifted.subarray(3))]).toEqual(values);
  });

  it("refuses a column that is cut short", () => {
    expect(() => decodeU64(new Uint8Array(9), "expert_counts")).toThrow("expert_counts has 9 bytes");
  });

  it("reads u16, u32 and half precision", () => {
    expect([...decodeU16(Uint8Array.of(1, 0, 255, 255))]).toEqual([1, 65535]);
    expect([...decodeU32(Uint8Array.of(1, 2, 0, 0))]).toEqual([513]);
    // 1, -2, 0.5, smallest subnormal, infinity, NaN
    const halves = Uint8Array.of(0, 0x3c, 0, 0xc0, 0, 0x38, 1, 0, 0, 0x7c, 1, 0x7c);
    expect([...decodeF16(halves)]).toEqual([1, -2, 0.5, 2 ** -24, Number.POSITIVE_INFINITY, Number.NaN]);
  });
});

describe("load", () => {
  const fake = new FakeGateway({ numLayers: 2, numExperts: 4 });
  for (let i = 0; i < 20; i++) fake.route(i * 3, i);
  const load = wholeSession(fake.snapshot());

  it("takes counts from a snapshot, and absolute counts from a frame", () => {
    expect([...rowOf(load, 1)]).toEqual(fake.counts[1]);
    fake.route(5, 20);
    const frame = create(WatchFrameSchema, {
      sequence: 9n,
      expertCounts: encodeU64(fake.counts.flat()),
      numTokens: encodeU64(fake.numTokens),
    });
    const next = applyFrame(load, frame);
    expect([...(next?.counts ?? [])]).toEqual(fake.counts.flat());
    expect([...(next?.numTokens ?? [])]).toEqual([21, 21]);
  });

  it("leaves out a frame of another shape", () => {
    const frame = create(WatchFrameSchema, { expertCounts: encodeU64([1]), numTokens: encodeU64([1]) });
    expect(applyFrame(load, frame)).toBeNull();
  });

  it("computes a row's statistics", () => {
    const even = rowStats(Float64Array.of(5, 5, 5, 5));
    expect(even.entropy).toBeCloseTo(1);
    expect(even.effectiveExperts).toBeCloseTo(4);
    expect(even.hottestRatio).toBeCloseTo(1);
    const one = rowStats(Float64Array.of(0, 9, 0, 0));
    expect(one).toMatchObject({ entropy: 0, hottestExpert: 1, hottestRatio: 4, numUnused: 3, total: 9 });
    expect(rowStats(new Float64Array(4)).entropy).toBeNaN();
    expect(loadRatio(3, 0, 8)).toBeNaN();
  });

  it("keeps the counts that it has when a resumed stream leaves them out", () => {
    const model = new LiveModel({ onPicture: () => {}, onSessions: () => {}, onComponents: () => {} });
    const snapshot = fake.snapshot();
    model.handle(create(WatchResponseSchema, { event: { case: "snapshot", value: { snapshot } } }), SESSION_ID);
    const resumed = fake.snapshot();
    for (const layer of resumed.layers) {
      layer.expertCounts = new Uint8Array();
      layer.recentExpertCounts = new Uint8Array();
    }
    model.handle(
      create(WatchResponseSchema, { event: { case: "snapshot", value: { snapshot: resumed } } }),
      SESSION_ID,
    );
    expect([...(model.picture?.whole.counts ?? [])]).toEqual(fake.counts.flat());
  });
});

describe("routes", () => {
  const fake = new FakeGateway({ numLayers: 2, numExperts: 16, topK: 2 });
  const tokens = [10, 20, 30];
  fake.requests.set("r", { tokens, numPrompt: 2, experts: tokens.flatMap((token, i) => fake.route(token, i)) });
  const routes = decodeRoutes(fake.routes("r"));

  it("gives each position its experts, the largest weight first", () => {
    const layer = routes.layers[1];
    if (!layer) throw new Error("no layer");
    expect(routes.rowOfPosition.get(2)).toBe(2);
    expect([...routes.tokenId]).toEqual(tokens);
    const slots = slotsOf(layer, 2);
    expect(slots).toHaveLength(2);
    expect(slots[0]?.weight).toBeCloseTo(0.625);
    expect(topExpert(layer, 2)).toBe(slots[0]?.expert);
    expect(layer.expertCounts.reduce((sum, n) => sum + n, 0)).toBe(6);
  });

  it("leaves out slots that reached no expert", () => {
    const layer = {
      layerIndex: 0,
      numExperts: 4,
      topK: 2,
      expertIds: Uint16Array.of(NO_EXPERT, 3),
      weights: Float32Array.of(0, 1),
      expertCounts: new Float64Array(4),
    };
    expect(slotsOf(layer, 0)).toEqual([{ expert: 3, weight: 1 }]);
  });

  it("colours six experts by rank, the rest grey, and keeps a colour", () => {
    const ids = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7];
    const layer = (experts: number[]) => ({
      layerIndex: 0,
      numExperts: 8,
      topK: 1,
      expertIds: Uint16Array.from(experts),
      weights: Float32Array.from(experts, () => 1),
      expertCounts: new Float64Array(8),
    });
    const first = colourExperts(layer(ids), ids.length);
    expect(first.top.map(({ expert }) => expert)).toEqual([0, 1, 2, 3, 4, 5]);
    expect(first.numOthers).toBe(2);
    const more = [...ids, 7, 7, 7, 7];
    const second = colourExperts(layer(more), more.length, first.colourOf);
    expect(second.top[0]?.expert).toBe(7);
    for (const expert of [0, 1, 2, 3]) expect(second.colourOf.get(expert)).toBe(first.colourOf.get(expert));
    expect(new Set(second.colourOf.values()).size).toBe(6);
  });
});

describe("history", () => {
  it("sorts points, takes the smallest entropy and breaks the line at a gap", () => {
    const point = (second: number, values: number[]) => ({
      $typeName: "moe_debugger.v1.RollUp" as const,
      startUnixNs: BigInt(second) * 1_000_000_000n,
      durationS: 1,
      numTokens: 4n,
      loadEntropy: new Uint8Array(),
      effectiveExperts: encodeF32(values),
      firstStep: 0n,
      lastStep: 0n,
    });
    const points = decodeRollUps(
      [point(12, [2, Number.NaN]), point(10, [4, 2]), point(11, [4, 1]), point(20, [4, 4])],
      [4, 4],
    );
    expect(points.map(({ minEntropy }) => minEntropy)).toEqual([0.5, 0, 0.5, 1]);
    const path = linePath(
      points,
      ({ minEntropy }) => minEntropy,
      (ms) => ms / 1000,
      (value) => value,
    );
    expect(path.match(/M/g)).toHaveLength(2);
  });
});

describe("ids", () => {
  it("are lowercase ULIDs that sort by time", () => {
    const pattern = /^[0-7][0-9a-hjkmnp-tv-z]{25}$/;
    expect(newId()).toMatch(pattern);
    expect(newId(1_000) < newId(2_000_000)).toBe(true);
    expect(newId(0).slice(0, 10)).toBe("0000000000");
  });
});

describe("stacks", () => {
  it("takes the decoder's rows for the text, and leaves an encoder's out", () => {
    const u16 = (values: number[]) => new Uint8Array(Uint16Array.from(values).buffer);
    const routes = decodeRoutes(
      create(RequestRoutesSchema, {
        numTokens: 5,
        position: new Uint8Array(Uint32Array.of(0, 1, 0, 1, 2).buffer),
        phase: Uint8Array.of(1, 1, 1, 1, 1),
        stacks: ["decoder", "encoder"],
        stackIndex: Uint8Array.of(0, 0, 1, 1, 1),
        layers: [{ layerIndex: 3, numExperts: 4, topK: 1, expertIds: u16([2, 5, 65535, 65535, 65535]) }],
      }),
    );
    expect(routes.numTokens).toBe(2);
    expect(routes.rowOfPosition.get(1)).toBe(1);
    expect([...routes.position]).toEqual([0, 1]);
    const [layer] = routes.layers;
    if (!layer) throw new Error("there is one layer");
    expect(expertName(layer, topExpert(layer, 0) ?? -1)).toBe("E2");
    expect(expertName(layer, topExpert(layer, 1) ?? -1)).toBe("Z1");
  });
});
