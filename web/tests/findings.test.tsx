// @vitest-environment happy-dom
import { create } from "@bufbuild/protobuf";
import { createClient } from "@connectrpc/connect";
import { act, fireEvent, render, screen, waitFor, within } from "@testing-library/react";
import { I18nextProvider } from "react-i18next";
import { beforeEach, describe, expect, it } from "vitest";
import { FakeGateway, SESSION_ID } from "../dev/fake-gateway";
import { SilencedNotice } from "../src/AppShell";
import { ServicesContext } from "../src/context";
import { countFindings, filterable, findingKey, sortFindings } from "../src/findings";
import { DebuggerService } from "../src/gen/moe_debugger/v1/gateway_pb";
import {
  EarlyWarningStatus,
  EvidenceRowSchema,
  ExplanationSchema,
  type Finding,
  FindingSchema,
  FindingState,
  Severity,
} from "../src/gen/moe_debugger/v1/session_pb";
import { findingText, i18n } from "../src/i18n";
import type { Picture } from "../src/live";
import { matchesFilter } from "../src/model/filter";
import { recentWindow, wholeSession } from "../src/model/load";
import { Console } from "../src/panels/Console";
import { EvidenceTable } from "../src/panels/Findings";
import { Diagnosis } from "../src/panels/Sidebar";
import { useQuery } from "../src/query";
import { App, useApp } from "../src/store";
import { Generator } from "../src/tokens";

const initial = useApp.getState();
const NOW = 1_700_000_000_000_000_000n;

const finding = (ruleId: string, severity: Severity, more: Record<string, unknown> = {}) =>
  create(FindingSchema, { ruleId, severity, state: FindingState.OPEN, ...more });

let numShown = 0;

function show(fake: FakeGateway, element: React.ReactNode) {
  // Each in a session of its own: what an earlier test's app has yet to publish is not of this one.
  const sessionId = `${SESSION_ID}-${++numShown}`;
  fake.route(1, 0);
  const app = new App(createClient(DebuggerService, fake.transport()));
  const snapshot = fake.snapshot();
  const picture = {
    sessionId,
    snapshot,
    whole: wholeSession(snapshot),
    recent: recentWindow(snapshot),
    sequence: snapshot.sequence,
    lastStep: snapshot.lastStep,
  };
  app.live.picture = picture;
  useApp.setState({ sessionId, picture });
  render(
    <I18nextProvider i18n={i18n}>
      <ServicesContext value={{ app, generator: new Generator(app) }}>{element}</ServicesContext>
    </I18nextProvider>,
  );
}

beforeEach(() => useApp.setState(initial, true));

describe("order and counts", () => {
  const all = [
    finding("closed", Severity.CRITICAL, { state: FindingState.CLOSED }),
    finding("silenced", Severity.CRITICAL, { silencedUntilUnixNs: NOW }),
    finding("covered", Severity.CRITICAL, { state: FindingState.SUPERSEDED, supersededBy: "bad" }),
    finding("info", Severity.INFO),
    finding("seen", Severity.WARNING, { acknowledgedAtUnixNs: NOW }),
    finding("bad", Severity.CRITICAL),
    // An analyzer that says nothing of a state means that it is there.
    finding("old", Severity.WARNING, { state: FindingState.UNSPECIFIED, lastSeenAtUnixNs: 1n }),
  ];

  it("puts what needs attention first", () => {
    const order = ["bad", "old", "seen", "info", "silenced", "covered", "closed"];
    expect(sortFindings(all).map(({ ruleId }) => ruleId)).toEqual(order);
  });

  it("counts what needs attention, acknowledged or not", () => {
    expect(countFindings(all)).toEqual({ critical: 1, warning: 2, info: 1, silenced: 1, superseded: 1, closed: 1 });
  });

  it("are found by every word that is true of them", () => {
    const both = finding("both", Severity.WARNING, { acknowledgedAtUnixNs: NOW, silencedUntilUnixNs: NOW });
    const found = (query: string) =>
      [...all, both].filter((one) => matchesFilter(filterable(one), query)).map(({ ruleId }) => ruleId);
    expect(found("state:acknowledged")).toEqual(["seen", "both"]);
    expect(found("state:silenced")).toEqual(["silenced", "both"]);
    expect(found("state:open")).toEqual(["silenced", "info", "seen", "bad", "old", "both"]);
    expect(found("state:open -state:silenced")).toEqual(["info", "seen", "bad", "old"]);
    expect(found("state:superseded")).toEqual(["covered"]);
    expect(found("state:closed")).toEqual(["closed"]);
  });
});

describe("evidence", () => {
  const table = (...rows: Record<string, unknown>[]) => {
    const evidence = rows.map((row) => create(EvidenceRowSchema, row));
    show(new FakeGateway(), <EvidenceTable rows={evidence} severity="warning" code="collapse_warning" isFinding />);
    return [...screen.getByTestId("evidence").querySelectorAll("tbody tr")].map((row) =>
      [...row.children].map(({ textContent }) => textContent),
    );
  };

  it("says what n counts, and no unit of nothing", () => {
    expect(
      table(
        { metric: "max_over_mean", value: 2.5, sampleSize: 76_800n },
        { metric: "design_effect", value: Number.NaN, unit: "from requests", sampleSize: 62n },
        // Of a finding of this code it counts something else.
        { metric: "effective_experts", value: 2.31, unit: "experts", rule: "< 3", sampleSize: 2n },
        { metric: "num_requests", value: 50, unit: "requests" },
        { metric: "share_of_steps_slowest", value: 1, unit: "of steps", sampleSize: 23n },
      ),
    ).toEqual([
      ["Max/mean load", "2.5", "", "76,800 tokens"],
      ["Design effect", "–", "", "62 blocks"],
      ["Effective experts", "2.31 experts", "< 3", "2 points of steps"],
      ["Requests", "50", "", "–"],
      ["Share of steps slowest", "100 % of steps", "", "23 steps"],
    ]);
    expect(screen.getByText(/No baseline was given/)).toBeTruthy();
  });

  it("has a column of baselines where one row has one", () => {
    const rows = table({ metric: "effective_experts", value: 2, baseline: 7.8 }, { metric: "p_value", value: 0.001 });
    expect(rows.map((row) => row[2])).toEqual(["7.8", "–"]);
    expect(screen.queryByText(/No baseline was given/)).toBeNull();
  });
});

describe("Console", () => {
  it("acknowledges, and takes it back", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    show(fake, <Console />);
    const row = screen.getByTestId("finding");
    expect(row.dataset.state).toBe("open");
    fireEvent.click(within(row).getByRole("button", { name: /Show the evidence/ }));
    fireEvent.click(screen.getByRole("button", { name: "Acknowledge: Router collapse in layer 2" }));
    await waitFor(() => expect(screen.getByTestId("finding").dataset.state).toBe("acknowledged"));
    await waitFor(() => expect(screen.getByTestId("acknowledge").getAttribute("aria-disabled")).toBe("false"));
    expect(screen.getByTestId("finding-life").textContent).toContain("acknowledged by local user");
    expect(screen.getByRole("button", { name: /1 error/ })).toBeTruthy();
    fireEvent.click(screen.getByRole("button", { name: /^Take back/ }));
    await waitFor(() => expect(screen.getByTestId("finding").dataset.state).toBe("open"));
  });

  it("silences: it stays in the list, marked, and leaves the counts", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    show(fake, <Console />);
    expect(screen.queryByRole("button", { name: /silenced/ })).toBeNull();
    fireEvent.click(screen.getByRole("button", { name: /Show the evidence/ }));
    fireEvent.click(screen.getByRole("button", { name: /^Silence 1 h/ }));
    await waitFor(() => expect(screen.getByTestId("finding").dataset.state).toBe("silenced"));
    const hour = Number(fake.life.silencedUntilUnixNs) / 1e6 - Date.now();
    expect(hour).toBeGreaterThan(3_590_000);
    expect(screen.getByRole("button", { name: /0 errors/ })).toBeTruthy();
    fireEvent.click(screen.getByRole("button", { name: /0 errors/ }));
    expect(screen.queryByTestId("finding")).toBeNull();
    fireEvent.click(screen.getByRole("button", { name: "1 silenced" }));
    expect(screen.getByTestId("finding")).toBeTruthy();
    fireEvent.click(screen.getByRole("button", { name: /Show the evidence/ }));
    fireEvent.click(screen.getByRole("button", { name: /^Unsilence/ }));
    await waitFor(() => expect(screen.queryByTestId("finding")).toBeNull());
    expect(fake.life.silencedUntilUnixNs).toBe(0n);
  });

  it("says what was silenced, and takes it back", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    show(
      fake,
      <>
        <Console />
        <SilencedNotice />
      </>,
    );
    fireEvent.click(screen.getByRole("button", { name: "1 error" }));
    fireEvent.click(screen.getByRole("button", { name: /Show the evidence/ }));
    const silence = screen.getByRole("button", { name: /^Silence 1 h/ });
    silence.focus();
    fireEvent.click(silence);
    // The row is gone from under the filter; the keyboard is where it can be taken back.
    await waitFor(() => expect(screen.queryByTestId("finding")).toBeNull());
    const notice = screen.getByRole("status");
    await waitFor(() => expect(notice.textContent).toContain("Silenced for 1 h: Router collapse in layer 2"));
    const undo = screen.getByRole("button", { name: "Undo" });
    await waitFor(() => expect(document.activeElement).toBe(undo));
    fake.findingError = "not now";
    fireEvent.click(undo);
    await waitFor(() => expect(screen.getByRole("status").textContent).toContain("Not done: not now"));
    fake.findingError = "";
    fireEvent.click(undo);
    await waitFor(() => expect(screen.getByRole("status").textContent).toBe(""));
    expect(screen.getByTestId("finding").dataset.state).toBe("open");
  });

  it("says why it was not done, and lets one try again", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.findingError = "the catalogue does not answer the analyzer; try again";
    show(fake, <Console />);
    fireEvent.click(screen.getByRole("button", { name: /Show the evidence/ }));
    fireEvent.click(screen.getByTestId("acknowledge"));
    expect((await screen.findByRole("alert")).textContent).toContain("the catalogue does not answer");
    await waitFor(() => expect(screen.getByTestId("acknowledge").getAttribute("aria-disabled")).toBe("false"));
    expect(screen.getByTestId("finding").dataset.state).toBe("open");
    fake.findingError = "";
    fireEvent.click(screen.getByTestId("acknowledge"));
    await waitFor(() => expect(screen.getByTestId("finding").dataset.state).toBe("acknowledged"));
    expect(screen.queryByRole("alert")).toBeNull();
  });

  it("works while the view is paused", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    show(fake, <Console />);
    useApp.setState({ isPaused: true });
    fireEvent.click(screen.getByRole("button", { name: /Show the evidence/ }));
    fireEvent.click(screen.getByTestId("acknowledge"));
    await waitFor(() => expect(screen.getByTestId("finding").dataset.state).toBe("acknowledged"));
  });

  it("finds closed ones by their state", () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.life = { state: FindingState.CLOSED, closedAtUnixNs: NOW, numReopened: 2 };
    show(fake, <Console />);
    const row = screen.getByTestId("finding");
    expect(row.textContent).toContain("closed");
    fireEvent.change(screen.getByRole("searchbox"), { target: { value: "state:open" } });
    expect(screen.queryByTestId("finding")).toBeNull();
    fireEvent.change(screen.getByRole("searchbox"), { target: { value: "state:closed" } });
    fireEvent.click(screen.getByRole("button", { name: /Show the evidence/ }));
    expect(screen.getByTestId("finding-life").textContent).toContain("came back 2 times");
    expect(screen.getByTestId("finding-life").textContent).toContain("seen in 37 seconds of data");
  });
});

describe("Diagnosis", () => {
  it("shows how long it has been quiet, and since which step it is there", () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.life = { numQuietSeconds: 4 };
    show(fake, <Diagnosis />);
    expect(screen.getByTestId("finding-life").textContent).toMatch(
      /, by the rows from step 120 on .*quiet for 4 of 10 s/,
    );
  });

  it("says what a finding is part of, and does not call it closed", () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.life = { state: FindingState.SUPERSEDED, supersededBy: "router_collapse.l2" };
    useApp.setState({ findingKey: findingKey(fake.snapshot().findings[0] as Finding) });
    show(fake, <Diagnosis />);
    expect(screen.getByTestId("diagnosis").querySelector(".state-tag")?.textContent).toBe("superseded");
    const life = screen.getByTestId("finding-life").textContent;
    expect(life).toContain("superseded by router_collapse.l2: not judged on its own");
    expect(life).not.toContain("closed");
  });

  it("stays with the finding that it shows when that is silenced or a worse one comes", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.life = { severity: Severity.WARNING };
    show(fake, <Diagnosis />);
    const rule = () => screen.getByTestId("diagnosis").dataset.rule;
    const silence = screen.getByTestId("silence");
    silence.focus();
    fireEvent.click(silence);
    await screen.findByRole("button", { name: /^Unsilence/ });
    expect(rule()).toBe("MOE-R001");
    expect(document.activeElement).toBe(silence);
    const worse = finding("worse.l1", Severity.CRITICAL, { code: "worse", lastSeenAtUnixNs: NOW });
    act(() => {
      const picture = useApp.getState().picture as Picture;
      const findings = [...picture.snapshot.findings, worse];
      useApp.setState({ picture: { ...picture, snapshot: { ...picture.snapshot, findings } } });
    });
    expect(rule()).toBe("MOE-R001");
    fireEvent.click(within(screen.getByTestId("worse")).getByRole("button", { name: "Show it" }));
    expect(rule()).toBe("worse.l1");
    expect(screen.queryByTestId("worse")).toBeNull();
  });

  it("does not open what is over by itself", () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.life = { state: FindingState.CLOSED, closedAtUnixNs: NOW };
    show(fake, <Diagnosis />);
    expect(screen.getByText(/No finding is open/)).toBeTruthy();
    fireEvent.click(screen.getByRole("button", { name: "Show 1 closed or silenced finding" }));
    expect(screen.getByTestId("diagnosis").dataset.rule).toBe("MOE-R001");
    expect(screen.getByTestId("diagnosis").textContent).toContain("closed");
  });
});

describe("explanation", () => {
  const explanation = create(ExplanationSchema, {
    startedAt: {
      layerIndex: 2,
      step: 48_020n,
      firstStep: 48_000n,
      lastStep: 48_040n,
      metric: "effective_experts",
      before: 7.8,
      after: 2.3,
      rule: "change_point",
    },
    spread: [
      { layerIndex: 2, step: 48_020n },
      { layerIndex: 1, step: 48_110n },
    ],
    causes: [
      {
        code: "balancing_turned_off",
        args: { step: "47900", before: "0.01" },
        weight: 0.62,
        score: 2.4,
        rule: "balance.off",
        isAssociation: true,
        evidence: [{ metric: "balance_coef", value: 0, baseline: 0.01, rule: "= 0", sampleSize: 120n }],
      },
      { code: "cause_of_tomorrow", args: { why: "new" }, weight: 0.11, score: 0.4, rule: "x", isAssociation: true },
    ],
    unexplained: 0.27,
    status: "ranked",
    statusArgs: { percent: "27" },
    missing: [{ code: "setting", name: "grad_norm", change: "debugger.step(n, series={...})" }],
    remedies: [
      {
        code: "restore_coefficient",
        args: { before: "0.01" },
        change: "aux_loss_coef = 0.01",
        effect: "not_predicted",
      },
      {
        code: "apply_placement",
        args: { layer: "2", strategy: "greedy", ranks: "4", moved: "3" },
        effect: "step_bound",
        effectValue: 0.124,
        effectLower: 0.1,
        effectUpper: 0.15,
      },
    ],
    rows: { query: "tokens where layer = 2 and step >= 48020", python: "(rows.layer_index == 2)" },
  });

  it("says where it began, why, what was not seen and what to do, and copies the change", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.explanation = explanation;
    show(fake, <Diagnosis />);
    const section = await screen.findByTestId("explanation");
    expect(screen.getByTestId("onset").textContent).toMatch(/^It began in layer 2 at step 48,020 .* 7\.8 to 2\.3\.$/);
    expect(within(section).getByRole("list", { name: /crossed the limit/ }).textContent).toBe("L2 48,020L1 +90");
    const [known, unknown] = screen.getAllByTestId("cause");
    expect(known?.textContent).toContain("The balancing term was turned off at step 47900");
    expect(known?.textContent).toContain("0.62");
    expect(known?.textContent).toContain("rule balance.off, 2.4 nats");
    expect(unknown?.textContent).toContain("cause.cause_of_tomorrow (why = new)");
    expect(section.textContent).toContain("association, not proof");
    expect(section.textContent).toContain("27 % of the weight stays unexplained");
    expect(screen.getByTestId("missing").textContent).toContain("The series grad_norm was not recorded.");
    expect(screen.getAllByTestId("remedy")[1]?.textContent).toContain("falls by 12.4 % (10 to 15 %)");
    expect(section.textContent).not.toContain("{{");
    // What the catalogue advises in general gives way to what was worked out.
    expect(screen.getAllByText("What to do")).toHaveLength(1);
    const copied: string[] = [];
    Object.defineProperty(navigator, "clipboard", {
      configurable: true,
      value: { writeText: async (text: string) => void copied.push(text) },
    });
    fireEvent.click(
      screen.getByRole("button", { name: "Copy: Set the coefficient of the balancing term back to 0.01." }),
    );
    expect(await screen.findByText("Copied")).toBeTruthy();
    fireEvent.click(screen.getByRole("button", { name: /^Copy the query/ }));
    fireEvent.click(screen.getByRole("button", { name: /^Copy as Python/ }));
    expect(copied).toEqual([
      "aux_loss_coef = 0.01",
      "tokens where layer = 2 and step >= 48020",
      "(rows.layer_index == 2)",
    ]);
    fireEvent.click(screen.getByRole("button", { name: "L1" }));
    expect(useApp.getState().row).toBe(1);
    fireEvent.click(screen.getByRole("button", { name: "Show the rows" }));
    expect(useApp.getState().panel).toBe("console");
    expect(useQuery.getState().text).toBe("tokens where layer = 2 and step >= 48020");
  });

  it("says so where nothing was observable and where the browser does not copy", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.explanation = create(ExplanationSchema, {
      status: "not_observable",
      statusArgs: { names: "balance_coef" },
      missing: [{ code: "setting", name: "balance_coef", change: "record it" }],
    });
    show(fake, <Diagnosis />);
    const section = await screen.findByTestId("explanation");
    expect(section.textContent).toContain("Cause not observable; supply balance_coef.");
    expect(screen.getByTestId("onset").textContent).toContain("when it began is not known");
    expect(screen.queryAllByTestId("cause")).toHaveLength(0);
    // Without a change of its own, the general advice stays.
    expect(screen.getByText("What to do")).toBeTruthy();
    Object.defineProperty(navigator, "clipboard", { configurable: true, value: undefined });
    fireEvent.click(screen.getByTestId("copy"));
    expect(await screen.findByText(/select the text/)).toBeTruthy();
  });
});

describe("assurance", () => {
  it("states the rate of false alarms, also where nothing was found", async () => {
    show(new FakeGateway(), <Diagnosis />);
    expect(screen.getByText("No finding")).toBeTruthy();
    expect((await screen.findByTestId("false-alarms")).textContent).toBe(
      "False alarms on healthy data: at most 10 of 1,000 windows (stated)",
    );
    expect(screen.getByTestId("assurance").textContent).toContain("measured on a fake");
    // No training: no early warning.
    expect(screen.queryByTestId("early-warning")).toBeNull();
  });

  it("says which layers learn, which are watched and which fall", async () => {
    const fake = new FakeGateway({ isCollapsed: true });
    fake.earlyWarning = [
      { layerIndex: 0, status: EarlyWarningStatus.LEARNING, numPoints: 60 },
      { layerIndex: 1, status: EarlyWarningStatus.WATCHING, numPoints: 300, baseline: 7.8, effectiveExperts: 7.75 },
      { layerIndex: 2, status: EarlyWarningStatus.WARNED, numPoints: 300, baseline: 7.8, effectiveExperts: 5.5 },
    ];
    show(fake, <Diagnosis />);
    expect((await screen.findByTestId("early-warning")).textContent).toBe(
      "Early warning of collapse: 1 layer is falling, learning the baseline of 1 layer (60 steps so far), watching 1 layer",
    );
    expect(
      screen.getAllByTestId("early-layer").map(({ dataset, textContent }) => [dataset.status, textContent]),
    ).toEqual([
      ["learning", "L0 learning baseline"],
      ["watching", "L1 watching 7.75 effective experts, baseline 7.8"],
      ["warned", "L2 falling 5.5 effective experts, baseline 7.8"],
    ]);
    expect(screen.getByTestId("assurance").textContent).toContain("at most once in 625K steps");
  });
});

it("names a finding of a plug-in without words by its code and its detector", () => {
  const args = { share: "50 %" };
  expect(findingText({ code: "quiet-half.half_is_idle", args }, "title")).toBe("half is idle (quiet-half)");
  expect(findingText({ code: "quiet-half.half_is_idle", args }, "summary")).toBe("share = 50 %");
  expect(findingText({ code: "quiet-half.x", args: { title: "Half is idle" } }, "title")).toBe("Half is idle");
  expect(findingText({ code: "unheard_of", args: {} }, "title")).toBe("unheard_of");
});
