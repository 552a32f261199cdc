// @vitest-environment happy-dom
import { create } from "@bufbuild/protobuf";
import { createClient } from "@connectrpc/connect";
import { fireEvent, render, screen, waitFor, within } from "@testing-library/react";
import { I18nextProvider } from "react-i18next";
import { beforeEach, describe, expect, it } from "vitest";
import { FakeGateway, SESSION_ID } from "../dev/fake-gateway";
import { accountNumbers } from "../src/account";
import { ServicesContext } from "../src/context";
import { ComponentState, DebuggerService } from "../src/gen/moe_debugger/v1/gateway_pb";
import { CaptureLevel, CheckStatus, ParallelCoordinatesSchema } from "../src/gen/moe_debugger/v1/routing_pb";
import { SessionState } from "../src/gen/moe_debugger/v1/session_pb";
import { i18n } from "../src/i18n";
import { recentWindow, wholeSession } from "../src/model/load";
import Capture from "../src/panels/Capture";
import { Console } from "../src/panels/Console";
import { NoSession } from "../src/panels/Empty";
import LayerDetails from "../src/panels/LayerDetails";
import { LoadTable } from "../src/panels/LoadTable";
import { TokensPanel } from "../src/panels/Tokens";
import { App, componentEvents, defaultSession, useApp } from "../src/store";
import { expectedRows, Generator, useTokens } from "../src/tokens";
import { useTraining } from "../src/training";

const initial = useApp.getState();
const initialTraining = useTraining.getState();
const initialTokens = useTokens.getState();

function show(fake: FakeGateway, element: React.ReactNode) {
  const app = new App(createClient(DebuggerService, fake.transport()));
  const services = { app, generator: new Generator(app) };
  render(
    <I18nextProvider i18n={i18n}>
      <ServicesContext value={services}>{element}</ServicesContext>
    </I18nextProvider>,
  );
  return services;
}

function picture(fake: FakeGateway) {
  const snapshot = fake.snapshot();
  return {
    sessionId: SESSION_ID,
    snapshot,
    whole: wholeSession(snapshot),
    recent: recentWindow(snapshot),
    sequence: snapshot.sequence,
    lastStep: snapshot.lastStep,
  };
}

beforeEach(() => {
  useApp.setState(initial, true);
  useTraining.setState(initialTraining, true);
  useTokens.setState(initialTokens, true);
});

describe("table", () => {
  it("holds the exact counts of every cell", () => {
    const fake = new FakeGateway();
    for (let i = 0; i < 1234; i++) fake.route((i * 31) % 251, i);
    show(fake, <LoadTable load={wholeSession(fake.snapshot())} range="whole session" />);
    const cells = screen.getAllByTestId("expert-cell");
    expect(cells).toHaveLength(32);
    for (const cell of cells) {
      const { layer, expert, count } = cell.dataset;
      expect(Number(count)).toBe(fake.counts[Number(layer)]?.[Number(expert)]);
      expect(cell.textContent?.replaceAll(",", "")).toBe(count);
    }
  });
});

describe("Console", () => {
  it("says what an empty list means", () => {
    const fake = new FakeGateway();
    show(fake, <Console />);
    expect(screen.getByText(/No session is selected/)).toBeTruthy();
  });

  it("counts the tokens behind an empty list", () => {
    const fake = new FakeGateway();
    fake.route(1, 0);
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <Console />);
    expect(screen.getByText(/No findings in 1 tokens/)).toBeTruthy();
  });

  it("shows a finding in the catalogue's words, opens its evidence and selects its layer", () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.route(1, 0);
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <Console />);
    const row = screen.getByTestId("finding");
    expect(row.dataset).toMatchObject({ code: "router_collapse", severity: "critical", layer: "2" });
    expect(row.textContent).toContain("Router collapse in layer 2");
    expect(row.textContent).not.toContain("{{");
    const expander = within(row).getByRole("button", { name: /Show the evidence/ });
    fireEvent.click(expander);
    expect(expander.getAttribute("aria-expanded")).toBe("true");
    expect(screen.getByText("< 3.0")).toBeTruthy();
    expect(screen.getByText("What to do")).toBeTruthy();
    expect(useApp.getState().row).toBe(2);
  });

  it("filters", () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.route(1, 0);
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <Console />);
    fireEvent.change(screen.getByRole("searchbox"), { target: { value: "layer:1" } });
    expect(screen.queryByTestId("finding")).toBeNull();
    expect(screen.getByText("Nothing matches the filter.")).toBeTruthy();
    fireEvent.change(screen.getByRole("searchbox"), { target: { value: "layer:2" } });
    expect(screen.getByTestId("finding")).toBeTruthy();
  });

  it("tells that a component went down and came back", () => {
    const fake = new FakeGateway();
    const ready = fake.components();
    fake.workerState = ComponentState.DOWN;
    const down = fake.components();
    const typed = (list: typeof ready) => list as unknown as Parameters<typeof componentEvents>[0];
    expect(componentEvents([], typed(ready), 1)).toEqual([]);
    const events = [...componentEvents(typed(down), typed(ready), 2), ...componentEvents(typed(ready), typed(down), 1)];
    useApp.setState({ sessionId: SESSION_ID, componentEvents: events });
    show(fake, <Console />);
    const rows = screen.getAllByTestId("component-event").map((row) => row.textContent);
    expect(rows[0]).toContain("Worker is ready");
    expect(rows[1]).toContain("Worker is down");
    expect(rows[1]).toContain("it is started again");
  });
});

describe("tokens", () => {
  it("generates, shows each token with its expert and ends when all rows are there", async () => {
    const fake = new FakeGateway();
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <TokensPanel isFull />);
    fireEvent.change(screen.getByTestId("prompt"), { target: { value: "héllo" } });
    fireEvent.change(screen.getByTestId("max-tokens"), { target: { value: "20" } });
    fireEvent.click(screen.getByTestId("generate"));
    const line = await screen.findByTestId("request-line");
    await waitFor(() => expect(line.dataset.final).toBe("true"), { timeout: 10_000 });
    expect(line.dataset).toMatchObject({ promptTokens: "6", generatedTokens: "20", rows: "25", state: "finished" });
    const tokens = within(screen.getByTestId("tokens")).getAllByRole("button");
    expect(tokens).toHaveLength(26);
    expect(tokens.filter(({ dataset }) => dataset.expert !== undefined)).toHaveLength(25);
    expect(tokens.at(-1)?.title).toContain("not routed");
    expect(
      screen.getAllByTestId("request-expert-cell").reduce((sum, { dataset }) => sum + Number(dataset.count), 0),
    ).toBe(25 * 2 * 4);
    fireEvent.click(tokens[3] as HTMLElement);
    expect(screen.getByTestId("route-table").dataset.position).toBe("3");
  });

  it("says what to do when the worker is down", async () => {
    const fake = new FakeGateway();
    fake.workerState = ComponentState.DOWN;
    show(fake, <TokensPanel isFull={false} />);
    fireEvent.change(screen.getByTestId("prompt"), { target: { value: "a" } });
    fireEvent.click(screen.getByTestId("generate"));
    const alert = await screen.findByRole("alert");
    expect(alert.textContent).toContain("It restarts by itself");
    expect(alert.textContent).toContain("the worker is down");
    expect(screen.getByTestId("generate")).toBeTruthy();
  });

  it("expects a row for every token but the last", () => {
    expect(expectedRows(6, 20)).toBe(25);
    expect(expectedRows(6, 0)).toBe(6);
  });
});

describe("sessions", () => {
  const session = (id: string, state: SessionState, seen: bigint) =>
    ({ ...new FakeGateway().session(), sessionId: id, state, lastSeenAtUnixNs: seen }) as unknown as Parameters<
      typeof defaultSession
    >[0][number];

  it("chooses the open one that was heard of last", () => {
    const chosen = defaultSession([
      session("a", SessionState.CLOSED, 9n),
      session("b", SessionState.OPEN, 1n),
      session("c", SessionState.OPEN, 2n),
      session("d", SessionState.STALE, 8n),
    ]);
    expect(chosen?.sessionId).toBe("c");
    expect(defaultSession([])).toBeUndefined();
  });

  it("says what to run where there is none", () => {
    show(new FakeGateway(), <NoSession />);
    expect(screen.getByText("moe-debugger demo --scenario collapse")).toBeTruthy();
  });
});

describe("account", () => {
  it("keeps sampled-out decisions apart from drops, and never shows less than nothing", () => {
    const account = {
      numProduced: 100n,
      numCounted: 60n,
      numInFlight: 5n,
      numMissingMessages: 1n,
      numLostStreamMessages: 2n,
      dropped: [
        { reason: 1, numDecisions: 10n },
        { reason: 2, numDecisions: 20n },
      ],
    } as unknown as Parameters<typeof accountNumbers>[0];
    expect(accountNumbers(account)).toEqual({
      produced: 100n,
      counted: 60n,
      dropped: 10n,
      sampledOut: 20n,
      inFlight: 5n,
      missing: 1n,
      unexplained: 5n,
    });
    expect(accountNumbers(undefined).unexplained).toBe(0n);
  });
});

describe("ranks", () => {
  function showRanks(element: React.ReactNode) {
    const fake = new FakeGateway();
    const shown = picture(fake);
    const [source] = shown.snapshot.sources;
    if (!source) throw new Error("the fake has a source");
    source.coordinates = create(ParallelCoordinatesSchema, {
      globalRank: 1,
      worldSize: 2,
      tensorParallelRank: 1,
      expertParallelRank: 1,
      replicaOfRank: 0,
    });
    shown.snapshot.layers.forEach((layer, row) => {
      // Opposite ranks: even in the sum over layers, and uneven in each.
      layer.expertParallelCounts = row % 2 ? [10n, 30n] : [30n, 10n];
      Object.assign(layer, { rankStepImbalance: 1.6, rankWasteShare: 0.375, numRankSteps: 40 });
    });
    useApp.setState({ sessionId: SESSION_ID, picture: shown });
    show(fake, element);
  }

  it("says which rank a source is, and whose replica", () => {
    showRanks(<Capture />);
    const row = screen.getByTestId("rank");
    expect(within(row).getByRole("rowheader").textContent).toContain("1");
    expect(within(row).getAllByRole("cell").slice(0, 5)).toMatchObject(
      ["0", "1", "1", "0", "replica of 0"].map((textContent) => ({ textContent })),
    );
    expect(screen.getByTestId("replica").textContent).toContain("replica of rank 0");
    expect(screen.getByTestId("ranks-missing").textContent).toContain("1 of 2 ranks have reported");
  });

  it("leads with the most uneven layer, and says of single steps and of the sum what they are", () => {
    showRanks(<Capture />);
    expect(screen.getByTestId("worst-rank").textContent).toBe("L0: ep 0 has 1.50× of the mean");
    expect(screen.getByTestId("ranks-load").textContent).toContain("1.50×");
    expect(screen.getByTestId("rank-steps").textContent).toContain("In single steps of L0 the fullest rank has 1.60×");
    expect(screen.getByTestId("rank-steps").textContent).toContain("wait for 38 % of their time");
    const sum = screen.getByTestId("ranks-sum").textContent;
    expect(sum).toContain("max/mean 1.00×");
    expect(sum).toContain("Layers that overload opposite ranks cancel out");
  });

  it("shows the load per expert-parallel rank", () => {
    showRanks(<LayerDetails />);
    const [first, second] = within(screen.getByTestId("rank-load")).getAllByRole("listitem");
    expect(first?.textContent).toContain("30");
    expect(first?.textContent).toContain("1.5");
    expect(second?.textContent).toContain("10");
  });

  it("shows many ranks as one small picture, with the numbers below it", () => {
    const fake = new FakeGateway();
    const shown = picture(fake);
    const counts = Array.from({ length: 32 }, (_, rank) => (rank === 5 ? 40n : 10n));
    for (const layer of shown.snapshot.layers) layer.expertParallelCounts = counts;
    useApp.setState({ sessionId: SESSION_ID, picture: shown });
    show(fake, <LayerDetails />);
    const columns = screen.getByTestId("rank-columns");
    expect(columns.querySelectorAll("rect")).toHaveLength(32);
    expect(columns.getAttribute("aria-label")).toContain("the fullest is ep 5, 3.66× of the mean");
    expect(within(screen.getByTestId("rank-load")).getAllByRole("listitem")).toHaveLength(32);
  });

  it("says nothing of ranks for a process on its own", () => {
    const fake = new FakeGateway();
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <Capture />);
    expect(screen.queryByTestId("rank")).toBeNull();
  });
});

describe("capture health", () => {
  const state = (name: string) =>
    screen.getAllByTestId("health-check").find((item) => item.dataset.check === name)?.dataset.state;

  it("is green where every check passes", () => {
    const fake = new FakeGateway();
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <Capture />);
    expect(screen.getByTestId("health-summary").textContent).toContain("Every check passes");
    expect(screen.getAllByTestId("health-check").map((item) => item.dataset.state)).toEqual(Array(4).fill("ok"));
  });

  it("is red where one fails, and gives the first fault as text", () => {
    const fake = new FakeGateway({ failedCheck: "range" });
    useApp.setState({ sessionId: SESSION_ID, picture: picture(fake) });
    show(fake, <Capture />);
    expect(screen.getByTestId("health-summary").textContent).toBe("1 check fails.");
    expect(state("range")).toBe("failed");
    expect(state("layers")).toBe("ok");
    expect(screen.getByText(/expert 9 of a layer whose ids are 0 to 7/)).toBeTruthy();
    expect(screen.getByText(/3 of 1,200 slots/)).toBeTruthy();
  });

  it("does not say that all is fine where a check is not known", () => {
    const fake = new FakeGateway();
    const shown = picture(fake);
    const check = shown.snapshot.sources[0]?.checks[0];
    if (check) check.status = CheckStatus.UNKNOWN;
    useApp.setState({ sessionId: SESSION_ID, picture: shown });
    show(fake, <Capture />);
    expect(screen.getByTestId("health-summary").textContent).toBe("No check fails; 1 is not known.");
  });

  it("says where a source reports no checks", () => {
    const fake = new FakeGateway();
    const shown = picture(fake);
    for (const source of shown.snapshot.sources) source.checks = [];
    useApp.setState({ sessionId: SESSION_ID, picture: shown });
    show(fake, <Capture />);
    expect(screen.getByText("This source reports no checks.")).toBeTruthy();
  });
});

describe("slots", () => {
  it("names zero and shared experts, and gives the share of slots that are no load", () => {
    const fake = new FakeGateway({ numExperts: 8, topK: 2 });
    for (let i = 0; i < 10; i++) fake.route(i, i);
    const shown = picture(fake);
    const layer = shown.snapshot.layers[0];
    if (!layer?.description) throw new Error("the fake describes its layers");
    layer.description.numIdentityExperts = 4;
    layer.description.numSharedExperts = 1;
    layer.numIdentitySlots = 5n;
    layer.numSkippedSlots = 1n;
    useApp.setState({ sessionId: SESSION_ID, picture: { ...shown, whole: wholeSession(shown.snapshot) } });
    show(fake, <LayerDetails />);
    const facts = screen.getByTestId("layer-facts").textContent;
    expect(facts).toMatch(/Slots to zero experts5 25\.0\s%\sof all slots/);
    expect(facts).toMatch(/Skipped slots1 5\.0\s%\sof all slots/);
    const aside = screen.getByTestId("layer-aside").textContent;
    expect(aside).toContain("Zero experts Z0–Z3compute nothing; 5 slots");
    expect(aside).toContain("Shared expert S0runs for every token, not routed");
    // Neither is among the experts by load.
    expect(screen.getAllByRole("button", { name: /^E\d/ })).toHaveLength(8);
    expect(facts).not.toContain("Unused slots");
  });
});

describe("the counts level", () => {
  it("says that there are no rows, and not that there were no requests", () => {
    const fake = new FakeGateway();
    const shown = picture(fake);
    for (const source of shown.snapshot.sources) source.level = CaptureLevel.COUNTS;
    useApp.setState({ sessionId: SESSION_ID, picture: shown });
    show(fake, <TokensPanel isFull />);
    expect(screen.getByTestId("counts-only").textContent).toContain("captured at level “counts”: sums only");
    expect(screen.getByText("None: level “counts” holds no requests.")).toBeTruthy();
  });

  it("says why a layer has no token entropy, and what the level leaves out", () => {
    const fake = new FakeGateway();
    const shown = picture(fake);
    for (const source of shown.snapshot.sources) source.level = CaptureLevel.COUNTS;
    for (const layer of shown.snapshot.layers) layer.meanRouterEntropy = Number.NaN;
    useApp.setState({ sessionId: SESSION_ID, picture: shown });
    show(
      fake,
      <>
        <LayerDetails />
        <Capture />
      </>,
    );
    expect(screen.getByTestId("layer-facts").textContent).toContain(
      "Mean token entropynot captured not at level “counts”",
    );
    expect(screen.getByTestId("level-note").textContent).toContain("no requests, no route of a single token");
  });
});
