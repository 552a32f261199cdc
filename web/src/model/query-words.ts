// What can come next in a query line: subjects first, then words and the subject's columns.
import columns from "./query-columns.json";

const SUBJECTS = Object.keys(columns);
const WORDS = ["where", "order by", "limit", "by", "show", "and", "or", "not", "desc", "between", "contains"];

/** Completions of the word before the cursor, at most eight; none inside of a text in quotes. */
export function completions(text: string, cursor: number): { start: number; words: string[] } {
  const before = text.slice(0, cursor);
  const word = /[a-z_]*$/i.exec(before)?.[0] ?? "";
  const start = cursor - word.length;
  const isInText = (before.match(/"/g)?.length ?? 0) % 2 === 1 || (before.match(/'/g)?.length ?? 0) % 2 === 1;
  if (isInText || /[0-9.]$/.test(before.slice(0, start))) return { start, words: [] };
  const subject = /^\s*([a-z_]+)/i.exec(text)?.[1]?.toLowerCase() ?? "";
  const isFirst = before.slice(0, start).trim() === "";
  const known = isFirst ? SUBJECTS : [...((columns as Record<string, string[]>)[subject] ?? []), ...WORDS];
  const lower = word.toLowerCase();
  if (!isFirst && lower === "") return { start, words: [] };
  return { start, words: known.filter((each) => each.startsWith(lower) && each !== lower).slice(0, 8) };
}
