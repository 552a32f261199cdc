// Words of the page, and sentences of findings from the one catalogue that the CLI reads too.
import i18next from "i18next";
import { initReactI18next } from "react-i18next";
import type { EvidenceRow, Finding } from "./gen/moe_debugger/v1/session_pb";
import en from "./locales/en.json";

export const i18n = i18next.createInstance();

// Resources are in the bundle, so this is done when the call returns.
void i18n.use(initReactI18next).init({
  lng: "en",
  fallbackLng: "en",
  initAsync: false,
  resources: { en: { page: en, findings: {} } },
  defaultNS: "page",
  // Words that come later show as soon as they are there.
  react: { bindI18nStore: "added" },
  // React escapes.
  interpolation: { escapeValue: false },
});

/** Loads the sentences of findings, which the first paint does without; until then findings show their codes. */
export async function loadFindingWords(): Promise<void> {
  const { default: words } = await import("@messages/en.json");
  i18n.addResourceBundle("en", "findings", words);
}

/** The sentence of a key of the catalogue, such as "cause.data_changed"; unknown ones show as themselves. */
export function catalogueText(key: string, args: Record<string, unknown>): string {
  if (i18n.exists(key, { ns: "findings" })) return String(i18n.t(key, { ns: "findings", ...args }));
  const values = Object.entries(args).map(([name, value]) => `${name} = ${value}`);
  return values.length > 0 ? `${key} (${values.join(", ")})` : key;
}

/** A sentence of a finding; a code that this page does not know shows as itself with its arguments. */
export function findingText(finding: Pick<Finding, "code" | "args">, part: "title" | "summary" | "remedy"): string {
  const key = `finding.${finding.code}.${part}`;
  if (i18n.exists(key, { ns: "findings" })) return String(i18n.t(key, { ns: "findings", ...finding.args }));
  // Detectors of others bring their own words as arguments.
  const own = finding.args[part];
  if (own !== undefined) return own;
  if (part === "remedy") return "";
  const args = Object.entries(finding.args).map(([name, value]) => `${name} = ${value}`);
  if (part === "summary") return args.join(", ");
  const [plugin, code] = finding.code.split(/\.(.*)/, 2);
  return code ? `${code.replaceAll("_", " ")} (${plugin})` : finding.code;
}

/** The name of a metric. */
export function metricName(metric: string): string {
  const key = `metric.${metric}`;
  if (i18n.exists(key, { ns: "findings" })) return String(i18n.t(key, { ns: "findings" }));
  const words = metric.replace(/^num_/, "").replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** What a row of evidence counts as n, such as "tokens"; empty where the catalogue does not say. */
export function sampleUnit({ metric, unit }: Pick<EvidenceRow, "metric" | "unit">, code: string): string {
  const family = metric.split("_")[0];
  // A check of the capture counts the same things as its violations.
  if (family === "capture") return unit;
  const keys = [`sample.${code}.${metric}`, `sample.${metric}`, `sample.${family}`];
  const key = keys.find((each) => i18n.exists(each, { ns: "findings" }));
  return key ? String(i18n.t(key, { ns: "findings" })) : "";
}
