// Words of the page, and sentences of findings from the one catalogue that the CLI reads too.
import findings from "@messages/en.json";
import i18next from "i18next";
import { initReactI18next } from "react-i18next";
import type { Finding } from "./gen/moe_debugger/v1/session_pb";
import en from "./locales/en.json";

export const i18n = i18next.createInstance();

// Resources are in the bundle, so this is done when the call returns.
void i18n.use(initReactI18next).init({
  lng: "en",
  fallbackLng: "en",
  initAsync: false,
  resources: { en: { page: en, findings } },
  defaultNS: "page",
  // React escapes.
  interpolation: { escapeValue: false },
});

/** A sentence of a finding; a code that this page does not know shows as itself with its arguments. */
export function findingText(finding: Pick<Finding, "code" | "args">, part: "title" | "summary" | "remedy"): string {
  const key = `finding.${finding.code}.${part}`;
  if (i18n.exists(key, { ns: "findings" })) return String(i18n.t(key, { ns: "findings", ...finding.args }));
  // Detectors of others bring their own words as arguments.
  const own = finding.args[part];
  if (own !== undefined) return own;
  if (part === "remedy") return "";
  const args = Object.entries(finding.args).map(([name, value]) => `${name} = ${value}`);
  return part === "title" ? finding.code : args.join(", ");
}

/** The name of a metric. */
export function metricName(metric: string): string {
  const key = `metric.${metric}`;
  if (i18n.exists(key, { ns: "findings" })) return String(i18n.t(key, { ns: "findings" }));
  const words = metric.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}
