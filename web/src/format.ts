// Numbers and times for people, through Intl alone.
const integer = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const formatInteger = (value: number | bigint): string => integer.format(value);
export const formatCompact = (value: number): string =>
  value < 10_000 ? integer.format(Math.round(value)) : compact.format(value);

export function formatFixed(value: number, digits = 2): string {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

export function formatPercent(share: number, digits = 0): string {
  return Number.isFinite(share) ? `${(share * 100).toFixed(digits)} %` : "–";
}

export function formatRatio(ratio: number): string {
  if (!Number.isFinite(ratio)) return "–";
  return `${ratio >= 10 ? ratio.toFixed(1) : ratio.toFixed(2)}×`;
}

/** A measured value with as many digits as it deserves. */
export function formatValue(value: number): string {
  if (Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return integer.format(value);
  const size = Math.abs(value);
  if (size >= 1000) return integer.format(Math.round(value));
  return size >= 100 ? value.toFixed(1) : size >= 0.01 ? String(Number(value.toFixed(3))) : value.toExponential(1);
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export function formatClock(unixNs: bigint): string {
  return unixNs > 0n ? clock.format(Number(unixNs / 1_000_000n)) : "–";
}

export function formatClockMs(unixMs: number): string {
  return clock.format(unixMs);
}

export function formatBytes(bytes: number): string {
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 1024 * 1024 ? `${(bytes / 1024).toFixed(0)} KiB` : `${(bytes / 1024 / 1024).toFixed(1)} MiB`;
}
