import { describe, expect, it } from "vitest";
import { hotEnd, inkOn, LUTS, lutRgb, scaleIndex, scalePosition, scaleTicks } from "../src/model/scale";

describe("colour scale", () => {
  it.each([
    [8, 2, 4],
    [256, 8, 32],
    [64, 1, 64],
  ])("ends at E/k for %i experts, top-%i", (numExperts, topK, most) => {
    const hot = hotEnd(numExperts, topK);
    expect(2 ** hot).toBeCloseTo(most);
    expect(scalePosition(most, hot)).toBe(1);
    expect(scalePosition(most * 2, hot)).toBe(1);
  });

  it("has uniform in the middle and an eighth at the cold end", () => {
    expect(scalePosition(1, 5)).toBe(0.5);
    expect(scalePosition(1 / 8, 5)).toBe(0);
    expect(scalePosition(0, 5)).toBe(0);
    expect(scalePosition(Number.NaN, 5)).toBe(0);
  });

  it.each([1, 2, 5, 8])("rises with the load and keeps 1/2x..2x near the middle (hot end 2^%i)", (hot) => {
    let before = -1;
    for (let log = -4; log <= hot; log += 0.05) {
      const at = scalePosition(2 ** log, hot);
      expect(at).toBeGreaterThanOrEqual(before);
      before = at;
    }
    if (hot >= 2) expect(scalePosition(2, hot)).toBeLessThanOrEqual(0.63);
    expect(scalePosition(0.5, hot)).toBeGreaterThanOrEqual(0.33);
  });

  it.each(["dark", "light"] as const)("has 256 opaque colours in the %s theme, and ink that reads on each", (theme) => {
    expect(LUTS[theme]).toHaveLength(256);
    expect(LUTS[theme].every((word) => word >>> 24 === 255)).toBe(true);
    const luminance = ([r, g, b]: readonly number[]) => {
      const linear = (c: number) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
      return 0.2126 * linear(r as number) + 0.7152 * linear(g as number) + 0.0722 * linear(b as number);
    };
    for (let i = 0; i < 256; i++) {
      const ground = lutRgb(theme, i);
      const ink = inkOn(ground);
      const inkLuminance = ink === "#ffffff" ? 1 : luminance([0, 0, 0]);
      const [high, low] = [Math.max(inkLuminance, luminance(ground)), Math.min(inkLuminance, luminance(ground))];
      expect((high + 0.05) / (low + 0.05)).toBeGreaterThanOrEqual(4.5);
    }
  });

  it("maps to indices of the table, and labels its ends", () => {
    expect(scaleIndex(1 / 8, 2)).toBe(0);
    expect(scaleIndex(4, 2)).toBe(255);
    expect(scaleTicks(2).map(({ label }) => label)).toEqual(["⅛×", "½×", "1×", "4×"]);
    expect(scaleTicks(5).at(-1)?.label).toBe("32×");
  });
});
