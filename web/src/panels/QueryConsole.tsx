import { type KeyboardEvent, useEffect, useId, useRef, useState } from "react";
import { useTranslation } from "react-i18next";
import { useServices } from "../context";
import { formatInteger, formatPercent, formatRatio, formatValue } from "../format";
import { type Cell, placeOf, type ResultTable } from "../model/query-result";
import { completions } from "../model/query-words";
import { type Answer, ask, clearAnswers, useQuery } from "../query";
import { useApp } from "../store";
import { useTokens } from "../tokens";
import "./query.css";

const EXAMPLES = [
  "experts order by load desc limit 10",
  "layers order by effective_experts",
  "findings where severity >= warning",
  "tokens by layer, expert show count order by count desc limit 20",
];
const MAX_SHOWN = 200;

/** The query line, and the answers of this visit, the newest first. */
export default function QueryConsole() {
  const { t } = useTranslation();
  const answers = useQuery((state) => state.answers);
  return (
    <section className={`query${answers.length > 0 ? " has-answers" : ""}`} aria-label={t("query.title")}>
      <QueryLine />
      {answers.length > 0 && (
        <div className="query-answers" role="log" aria-label={t("query.answers")}>
          {answers.map((answer) => (
            <AnswerBlock answer={answer} key={answer.id} />
          ))}
        </div>
      )}
    </section>
  );
}

function QueryLine() {
  const { t } = useTranslation();
  const listId = useId();
  const input = useRef<HTMLInputElement>(null);
  const text = useQuery((state) => state.text);
  const focus = useQuery((state) => state.focus);
  const hasAnswers = useQuery((state) => state.answers.length > 0);
  const sessionId = useApp((state) => state.sessionId);
  const [cursor, setCursor] = useState(0);
  const [chosen, setChosen] = useState(-1);
  const [isOpen, setOpen] = useState(false);
  /** Place in the history, from its end; 0 = the line that is being written. */
  const [back, setBack] = useState(0);
  const draft = useRef("");
  const { start, words } = completions(text, cursor);
  const offered = isOpen ? words : [];
  useEffect(() => {
    if (focus > 0) input.current?.focus();
  }, [focus]);
  const write = (next: string, at = next.length) => {
    useQuery.setState({ text: next });
    setCursor(at);
    setChosen(-1);
    requestAnimationFrame(() => input.current?.setSelectionRange(at, at));
  };
  const complete = (word: string) => {
    const at = start + word.length + 1;
    write(`${text.slice(0, start)}${word} ${text.slice(cursor).trimStart()}`, at);
    input.current?.focus();
  };
  const recall = (step: number) => {
    const { history } = useQuery.getState();
    const next = Math.min(Math.max(back + step, 0), history.length);
    if (next === back) return;
    if (back === 0) draft.current = text;
    setBack(next);
    setOpen(false);
    write(next === 0 ? draft.current : (history[history.length - next] as string));
  };
  const submit = (query: string) => {
    setOpen(false);
    setBack(0);
    void ask(query);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    const word = offered[chosen];
    if (event.key === "Enter") {
      event.preventDefault();
      if (word) complete(word);
      else submit(text);
    } else if (event.key === "Tab" && !event.shiftKey && offered.length > 0) {
      event.preventDefault();
      complete(word ?? (offered[0] as string));
    } else if (event.key === "Escape") {
      setOpen(false);
      setChosen(-1);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      event.preventDefault();
      const step = event.key === "ArrowUp" ? -1 : 1;
      // The history is what the arrows are for, until one has gone down into the list.
      if (offered.length > 0 && (chosen >= 0 || step > 0))
        setChosen(Math.max(-1, Math.min(offered.length - 1, chosen + step)));
      else recall(-step);
    }
  };
  return (
    <div className="query-bar">
      <span className="query-prompt" aria-hidden="true">
        ›
      </span>
      <span className="query-field">
        <input
          ref={input}
          type="text"
          id="query-line"
          role="combobox"
          aria-label={t("query.title")}
          aria-expanded={offered.length > 0}
          aria-controls={listId}
          aria-autocomplete="list"
          aria-activedescendant={chosen >= 0 ? `${listId}-${chosen}` : undefined}
          autoComplete="off"
          autoCapitalize="off"
          spellCheck={false}
          maxLength={4000}
          value={text}
          placeholder={t("query.hint")}
          onChange={(event) => {
            useQuery.setState({ text: event.target.value });
            setCursor(event.target.selectionStart ?? event.target.value.length);
            setChosen(-1);
            setOpen(true);
          }}
          onSelect={(event) => setCursor(event.currentTarget.selectionStart ?? 0)}
          onBlur={() => setOpen(false)}
          onKeyDown={onKeyDown}
        />
        {offered.length > 0 && (
          <div className="query-words" id={listId} role="listbox" aria-label={t("query.words")}>
            {offered.map((word, at) => (
              <div
                key={word}
                id={`${listId}-${at}`}
                role="option"
                tabIndex={-1}
                aria-selected={at === chosen}
                className={at === chosen ? "chosen" : undefined}
                onMouseDown={(event) => {
                  event.preventDefault();
                  complete(word);
                }}
              >
                {word}
              </div>
            ))}
          </div>
        )}
      </span>
      {text === "" && !hasAnswers && (
        <select
          className="query-examples"
          aria-label={t("query.examples")}
          value=""
          onChange={(event) => {
            write(event.target.value);
            submit(event.target.value);
          }}
        >
          <option value="">{t("query.examples")}</option>
          {EXAMPLES.map((example) => (
            <option key={example}>{example}</option>
          ))}
        </select>
      )}
      <button type="button" className="button" disabled={!sessionId || text.trim() === ""} onClick={() => submit(text)}>
        {t("query.run")}
      </button>
      {hasAnswers && (
        <button type="button" className="button" onClick={clearAnswers}>
          {t("query.clear")}
        </button>
      )}
    </div>
  );
}

function AnswerBlock({ answer }: { answer: Answer }) {
  const { t } = useTranslation();
  const { table, error, state } = answer;
  return (
    <article className={`query-answer ${state}`} data-testid="query-answer" data-state={state}>
      <button
        type="button"
        className="query-text"
        title={t("query.again")}
        onClick={() => useQuery.setState(({ focus }) => ({ text: answer.text, focus: focus + 1 }))}
      >
        <span aria-hidden="true">› </span>
        {answer.text}
      </button>
      {state === "asking" && <p className="muted">{t("query.asking")}</p>}
      {state === "refused" && (
        <div className="query-error" role="alert" data-testid="query-error">
          <p>{error[0]}</p>
          {error.length > 1 && <pre>{error.slice(1).join("\n")}</pre>}
        </div>
      )}
      {table && (
        <>
          {table.numRows > 0 && <ResultRows table={table} sessionId={answer.sessionId} />}
          <p className="query-footer muted num" data-testid="query-footer">
            {answer.isTruncated
              ? t("query.truncated", {
                  rows: formatInteger(table.numRows),
                  of: answer.numMatched === null ? t("query.more") : formatInteger(answer.numMatched),
                })
              : t("query.rows", { count: table.numRows, rows: formatInteger(table.numRows) })}
            {" · "}
            {t("query.scanned", {
              rows: formatInteger(answer.numScanned),
              ms: formatInteger(Math.round(answer.elapsedS * 1000)),
            })}
          </p>
          {answer.notes.map((note) => (
            <p className="query-footer muted" key={note}>
              {note}
            </p>
          ))}
        </>
      )}
    </article>
  );
}

function ResultRows({ table, sessionId }: { table: ResultTable; sessionId: string }) {
  const { t } = useTranslation();
  const { generator } = useServices();
  const layers = useApp((state) => state.picture?.whole.layers);
  const [selected, setSelected] = useState(-1);
  const isOfThisSession = useApp((state) => state.sessionId === sessionId);
  const shown = Math.min(table.numRows, MAX_SHOWN);
  const select = (row: number) => {
    const { layer, expert, request, position } = placeOf(table, row);
    setSelected(row);
    const place = layer === null || !layers ? -1 : layers.findIndex(({ layerIndex }) => layerIndex === layer);
    useApp.setState({
      ...(place >= 0 ? { row: place, sidebar: "layer" as const } : {}),
      ...(place >= 0 && expert !== null ? { expert } : {}),
    });
    if (request !== null) generator.open(request);
    if (request !== null && position !== null) useTokens.setState({ position });
  };
  const canSelect = (row: number) => {
    const { layer, request } = placeOf(table, row);
    return isOfThisSession && (layer !== null || request !== null);
  };
  return (
    <div className="table-scroll query-table">
      <table>
        <thead>
          <tr>
            {table.names.map((name, at) => (
              <th scope="col" key={name} className={table.isNumber[at] ? "number" : undefined}>
                {name}
                {UNIT[table.units[at] ?? ""] && <span className="muted"> {UNIT[table.units[at] ?? ""]}</span>}
              </th>
            ))}
            <th>
              <span className="visually-hidden">{t("query.show")}</span>
            </th>
          </tr>
        </thead>
        <tbody>
          {Array.from({ length: shown }, (_, row) => (
            // biome-ignore lint/suspicious/noArrayIndexKey: a result never changes, so a row's place is its identity
            <tr key={row} className={row === selected ? "selected" : undefined} data-testid="query-row">
              {table.columns.map((column, at) => (
                <td key={table.names[at]} className={table.isNumber[at] ? "num number" : undefined}>
                  <bdi>{cellText(column[row] ?? null, table.units[at] ?? "")}</bdi>
                </td>
              ))}
              <td>
                {canSelect(row) && (
                  <button type="button" className="link" onClick={() => select(row)}>
                    {t("query.show")}
                  </button>
                )}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      {table.numRows > shown && <p className="muted">{t("query.notShown", { rows: table.numRows - shown })}</p>}
    </div>
  );
}

const UNIT: Record<string, string> = { nats: "nats", s: "" };

function cellText(cell: Cell, unit: string): string {
  if (cell === null) return "–";
  if (Array.isArray(cell)) return cell.map((each) => (typeof each === "number" ? formatValue(each) : each)).join(" ");
  if (typeof cell === "boolean") return cell ? "yes" : "no";
  // A token may be a line break, or a space, which nobody would see.
  if (typeof cell === "string") {
    const text = cell.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    return text === text.trim() ? text : `"${text}"`;
  }
  if (unit === "x") return formatRatio(cell);
  if (unit === "1") return formatPercent(cell, 1);
  if (unit === "s") return new Date(cell * 1000).toISOString().slice(0, 19).replace("T", " ");
  return Number.isInteger(cell) ? String(cell) : formatValue(cell);
}
