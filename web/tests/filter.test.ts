import { describe, expect, it } from "vitest";
import { matchesFilter } from "../src/model/filter";
import { formatHash, parseHash } from "../src/url";

const item = {
  text: "Router collapse in layer 2",
  fields: { layer: 2, expert: undefined, severity: "warning", count: 12, code: "router_collapse" },
};

describe("filter", () => {
  it.each([
    ["", true],
    ["collapse", true],
    ["COLLAPSE router", true],
    ["collapse cold", false],
    ["-cold", true],
    ["-collapse", false],
    ["layer:2", true],
    ["layer:1-3", true],
    ["layer:3-9", false],
    ["-layer:2", false],
    ["count:>11", true],
    ["count:<=11", false],
    ["severity:warn", true],
    ["severity:critical", false],
    ["expert:3", false],
    ['"in layer"', true],
    ["layer:x", false],
    ["layer:", true],
    ["code:router_collapse layer:2 -dead", true],
  ])("%s -> %s", (query, expected) => {
    expect(matchesFilter(item, query)).toBe(expected);
  });
});

describe("address", () => {
  it("round-trips, and takes nothing that is no id", () => {
    const location = { panel: "tokens" as const, sessionId: "01k0000000000000000000fake", row: 3, expert: 5 };
    expect(parseHash(formatHash(location))).toEqual(location);
    expect(parseHash("#/nowhere?s=<script>&l=-1")).toEqual({ panel: "experts", sessionId: "", row: 0, expert: null });
  });
});
