import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { beforeEach, describe, expect, it, vi } from "vitest";
import { QueryResponseSchema } from "../src/gen/moe_debugger/v1/gateway_pb";
import { QueryColumnKind, QueryResultSchema } from "../src/gen/moe_debugger/v1/query_pb";
import { decodeResult, placeOf } from "../src/model/query-result";
import { completions } from "../src/model/query-words";
import { ask, connectQueries, runQuery, useQuery } from "../src/query";
import { useApp } from "../src/store";

const bytes = (array: ArrayBufferView) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

const result = create(QueryResultSchema, {
  query: "tokens",
  subject: "tokens",
  numRows: 2,
  columns: [
    { name: "layer", kind: QueryColumnKind.INTEGER, values: bytes(new BigInt64Array([3n, 4n])) },
    {
      name: "margin",
      kind: QueryColumnKind.NUMBER,
      values: bytes(new Float64Array([0.5, 0])),
      isMissing: new Uint8Array([0, 1]),
    },
    { name: "request", kind: QueryColumnKind.TEXT, texts: ["a", "b"] },
    { name: "kept", kind: QueryColumnKind.BOOLEAN, values: new Uint8Array([1, 0]) },
    {
      name: "experts",
      kind: QueryColumnKind.INTEGERS,
      values: bytes(new BigInt64Array([5n, 1n, 7n])),
      lengths: bytes(new Uint32Array([2, 1])),
    },
  ],
});

describe("results", () => {
  it("become columns of cells", () => {
    const table = decodeResult(result);
    expect(table.columns).toEqual([
      [3, 4],
      [0.5, null],
      ["a", "b"],
      [true, false],
      [[5, 1], [7]],
    ]);
    expect(table.isNumber).toEqual([true, true, false, false, true]);
    expect(placeOf(table, 0)).toEqual({ layer: 3, expert: null, request: "a", position: null });
  });
});

describe("completions", () => {
  it("are subjects first, then the subject's columns, and nothing inside of a text", () => {
    expect(completions("ex", 2)).toEqual({ start: 0, words: ["experts"] });
    expect(completions("experts where loa", 17).words).toEqual(["load"]);
    expect(completions("layers where eff", 16).words).toEqual(["effective_experts"]);
    expect(completions('series where name = "lo', 23).words).toEqual([]);
    expect(completions("experts where load > 8", 22).words).toEqual([]);
    expect(completions("experts ", 8).words).toEqual([]);
  });
});

describe("asking", () => {
  beforeEach(() => {
    useQuery.setState({ text: "", answers: [], history: [], focus: 0 });
    useApp.setState({ sessionId: "01k00000000000000000000000", panel: "experts" });
  });

  it("opens the console with the query and its answer", async () => {
    const query = vi.fn(async () => create(QueryResponseSchema, { result }));
    connectQueries({ query });
    runQuery("tokens where layer = 3 and expert = 5");
    await vi.waitFor(() => expect(useQuery.getState().answers[0]?.state).toBe("answered"));
    expect(useApp.getState().panel).toBe("console");
    expect(query).toHaveBeenCalledExactlyOnceWith(
      { sessionId: "01k00000000000000000000000", text: "tokens where layer = 3 and expert = 5" },
      expect.anything(),
    );
    expect(useQuery.getState().history).toEqual(["tokens where layer = 3 and expert = 5"]);
  });

  it("shows what the gateway says is wrong, with its carets", async () => {
    connectQueries({
      query: async () => {
        throw new ConnectError("no column\n  experts where lod\n                ^^^", Code.InvalidArgument);
      },
    });
    await ask("experts where lod");
    const [answer] = useQuery.getState().answers;
    expect(answer?.state).toBe("refused");
    expect(answer?.error).toEqual(["no column", "  experts where lod", "                ^^^"]);
  });

  it("keeps the newest answers and each query once in the history", async () => {
    connectQueries({ query: async () => create(QueryResponseSchema, { result }) });
    for (let n = 0; n < 25; n++) await ask(n % 2 ? "steps" : "layers");
    expect(useQuery.getState().answers).toHaveLength(20);
    expect(useQuery.getState().history).toEqual(["steps", "layers"]);
  });
});
