// The filter line of the Console: words and `key:value` terms joined by AND, `-` negates, numbers take ranges and
// comparisons. `layer:2-4 severity:warning -collapse count:>3`. Keys are never translated.

export interface Filterable {
  text: string;
  /** Of several words any may match. */
  fields: Record<string, string | number | readonly string[] | undefined>;
}

interface Term {
  negated: boolean;
  key: string | null;
  value: string;
}

export function parseFilter(query: string): Term[] {
  const terms: Term[] = [];
  for (const [raw] of query.matchAll(/-?(?:[a-z_]+:)?"[^"]*"|\S+/gi)) {
    const negated = raw.startsWith("-") && raw.length > 1;
    const body = negated ? raw.slice(1) : raw;
    const match = /^([a-z_]+):(.*)$/i.exec(body);
    const value = (match ? (match[2] as string) : body).replaceAll('"', "").toLowerCase();
    if (value === "") continue;
    terms.push({ negated, key: match ? (match[1] as string).toLowerCase() : null, value });
  }
  return terms;
}

function matchesNumber(actual: number, value: string): boolean | null {
  const range = /^(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)$/.exec(value);
  if (range) return actual >= Number(range[1]) && actual <= Number(range[2]);
  const compared = /^(>=|<=|>|<)(\d+(?:\.\d+)?)$/.exec(value);
  if (compared) {
    const limit = Number(compared[2]);
    switch (compared[1]) {
      case ">":
        return actual > limit;
      case "<":
        return actual < limit;
      case ">=":
        return actual >= limit;
      default:
        return actual <= limit;
    }
  }
  return /^\d+(?:\.\d+)?$/.test(value) ? actual === Number(value) : null;
}

function matchesTerm(item: Filterable, { key, value }: Term): boolean {
  if (key === null) return item.text.toLowerCase().includes(value);
  const field = item.fields[key];
  if (field === undefined) return false;
  if (typeof field === "number") return matchesNumber(field, value) ?? false;
  return [field].flat().some((word) => word.toLowerCase().startsWith(value));
}

export function matchesFilter(item: Filterable, query: string): boolean {
  return parseFilter(query).every((term) => matchesTerm(item, term) !== term.negated);
}
