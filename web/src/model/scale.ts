// Colour of a load: log2(load / uniform) on a fixed diverging scale. The middle is quiet (a healthy layer draws no
// attention), the cold end is 1/8, the hot end is E/k, the most that one expert can get with top-k routing.

export type Theme = "dark" | "light";

export const COLD_END = -3;
// The share of each half that one factor of two takes, so that 1/2x..2x stays near neutral whatever E/k is.
const QUIET = 0.25;

const RAMPS: Record<Theme, string[]> = {
  dark: [
    "#3a8ade",
    "#357bc6",
    "#306cac",
    "#2c5e95",
    "#2a507a",
    "#284363",
    "#27384c",
    "#273342",
    "#272d36",
    "#34312e",
    "#523d29",
    "#86532a",
    "#bd6c2c",
    "#da893b",
    "#faa84d",
    "#ffc981",
    "#ffedc3",
  ],
  light: [
    "#0e5eae",
    "#2973bb",
    "#488ac8",
    "#669fd4",
    "#8eb7df",
    "#b2cee9",
    "#d3e2f1",
    "#e0e9f3",
    "#eef1f5",
    "#f3e9dd",
    "#f3d7b7",
    "#ebb882",
    "#e1974c",
    "#cf7a2f",
    "#bc5b0f",
    "#944206",
    "#632700",
  ],
};

export type Rgb = readonly [number, number, number];

function parse(hex: string): Rgb {
  const value = Number.parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function buildLut(theme: Theme): Uint32Array {
  const stops = RAMPS[theme].map(parse);
  const lut = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const a = stops[low] as Rgb;
    const b = stops[low + 1] as Rgb;
    const mix = (channel: 0 | 1 | 2) => Math.round(a[channel] + (b[channel] - a[channel]) * (at - low));
    // ImageData is RGBA in memory: ABGR as a little-endian number.
    lut[i] = ((255 << 24) | (mix(2) << 16) | (mix(1) << 8) | mix(0)) >>> 0;
  }
  return lut;
}

/** 256 colours from cold to hot, as little-endian RGBA words for ImageData. */
export const LUTS: Record<Theme, Uint32Array> = { dark: buildLut("dark"), light: buildLut("light") };

/** log2 of the largest load that top-k routing allows. */
export function hotEnd(numExperts: number, topK: number): number {
  return Math.max(1, Math.log2(numExperts / Math.max(1, topK)));
}

/** Place of a load on the scale, 0 (cold end) to 1 (hot end), 0.5 = uniform. */
export function scalePosition(ratio: number, hot: number): number {
  if (!(ratio > 0)) return 0;
  const value = Math.log2(ratio);
  if (value <= 0) return 0.5 * (1 - Math.min(1, value / COLD_END));
  const quietEnd = Math.min(1, hot / 2);
  const t =
    value <= quietEnd ? (QUIET * value) / quietEnd : QUIET + ((1 - QUIET) * (value - quietEnd)) / (hot - quietEnd);
  return 0.5 + 0.5 * Math.min(1, t);
}

/** Index into a LUT. */
export function scaleIndex(ratio: number, hot: number): number {
  return Math.round(scalePosition(ratio, hot) * 255);
}

export function lutRgb(theme: Theme, index: number): Rgb {
  const word = LUTS[theme][index] as number;
  return [word & 255, (word >> 8) & 255, (word >> 16) & 255];
}

/** Black or white ink, whichever reads better on that colour (WCAG relative luminance). */
export function inkOn([r, g, b]: Rgb): "#000000" | "#ffffff" {
  const linear = (channel: number) => {
    const c = channel / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  };
  const luminance = 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  return luminance > 0.179 ? "#000000" : "#ffffff";
}

export interface Tick {
  at: number;
  label: string;
}

/** Marks of the legend: the ends, half, uniform and double. */
export function scaleTicks(hot: number): Tick[] {
  const ticks: Tick[] = [
    { at: 0, label: "⅛×" },
    { at: scalePosition(0.5, hot), label: "½×" },
    { at: 0.5, label: "1×" },
  ];
  if (hot > 3) ticks.push({ at: scalePosition(4, hot), label: "4×" });
  const most = 2 ** hot;
  ticks.push({ at: 1, label: `${most >= 10 ? Math.round(most) : Number(most.toFixed(1))}×` });
  return ticks;
}
