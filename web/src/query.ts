// The query line of the Console: what was asked in this visit, and what came back. Queries only read.
import { type Client, Code, ConnectError } from "@connectrpc/connect";
import { create } from "zustand";
import type { DebuggerService } from "./gen/moe_debugger/v1/gateway_pb";
import { decodeResult, type ResultTable } from "./model/query-result";
import { useApp } from "./store";

export interface Answer {
  id: number;
  text: string;
  sessionId: string;
  state: "asking" | "answered" | "refused";
  table: ResultTable | null;
  isTruncated: boolean;
  numMatched: number | null;
  numScanned: number;
  elapsedS: number;
  notes: string[];
  /** What is wrong, the query's line, and the carets under the place. */
  error: string[];
}

export interface QueryState {
  text: string;
  answers: Answer[];
  history: string[];
  /** Grows when the line should have the focus. */
  focus: number;
}

const MAX_ANSWERS = 20;
const MAX_HISTORY = 50;
const STORAGE_KEY = "moe-debugger.queries";

export const useQuery = create<QueryState>(() => ({ text: "", answers: [], history: storedHistory(), focus: 0 }));

function storedHistory(): string[] {
  try {
    const found: unknown = JSON.parse(sessionStorage.getItem(STORAGE_KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((each) => typeof each === "string").slice(-MAX_HISTORY) : [];
  } catch {
    return [];
  }
}

let client: Pick<Client<typeof DebuggerService>, "query"> | null = null;
let nextId = 1;
let controller: AbortController | null = null;

/** Says whom to ask; called once by the page. */
export function connectQueries(to: Pick<Client<typeof DebuggerService>, "query">): void {
  client = to;
}

/** Opens the Console with a query, and asks it. */
export function runQuery(text: string): void {
  useApp.setState({ panel: "console" });
  useQuery.setState((state) => ({ text, focus: state.focus + 1 }));
  void ask(text);
}

export function clearAnswers(): void {
  controller?.abort();
  useQuery.setState({ answers: [] });
}

function change(id: number, values: Partial<Answer>): void {
  useQuery.setState(({ answers }) => ({
    answers: answers.map((answer) => (answer.id === id ? { ...answer, ...values } : answer)),
  }));
}

export async function ask(text: string): Promise<void> {
  const { sessionId } = useApp.getState();
  if (!client || !sessionId || text.trim() === "") return;
  // One at a time: an answer that nobody waits for any more only costs.
  controller?.abort();
  controller = new AbortController();
  const { signal } = controller;
  const id = nextId++;
  const history = [...useQuery.getState().history.filter((each) => each !== text), text].slice(-MAX_HISTORY);
  try {
    sessionStorage.setItem(STORAGE_KEY, JSON.stringify(history));
  } catch {
    // Without storage the history lasts as long as the page.
  }
  const answer: Answer = {
    id,
    text,
    sessionId,
    state: "asking",
    table: null,
    isTruncated: false,
    numMatched: null,
    numScanned: 0,
    elapsedS: 0,
    notes: [],
    error: [],
  };
  useQuery.setState(({ answers }) => ({ history, answers: [answer, ...answers].slice(0, MAX_ANSWERS) }));
  try {
    const { result } = await client.query({ sessionId, text }, { signal });
    if (!result) throw new ConnectError("the gateway gave no result", Code.Internal);
    change(id, {
      state: "answered",
      table: decodeResult(result),
      isTruncated: result.isTruncated,
      numMatched: result.numMatched === undefined ? null : Number(result.numMatched),
      numScanned: Number(result.numRowsScanned),
      elapsedS: result.elapsedS,
      notes: result.notes,
    });
  } catch (cause) {
    if (signal.aborted) {
      useQuery.setState(({ answers }) => ({ answers: answers.filter((each) => each.id !== id) }));
      return;
    }
    change(id, { state: "refused", error: ConnectError.from(cause).rawMessage.split("\n") });
  }
}
