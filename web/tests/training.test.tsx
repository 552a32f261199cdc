// @vitest-environment happy-dom
import { createClient } from "@connectrpc/connect";
import { fireEvent, render, screen, waitFor, within } from "@testing-library/react";
import { I18nextProvider } from "react-i18next";
import { beforeEach, describe, expect, it } from "vitest";
import { FakeGateway, SESSION_ID } from "../dev/fake-gateway";
import { ServicesContext } from "../src/context";
import { DebuggerService } from "../src/gen/moe_debugger/v1/gateway_pb";
import { i18n } from "../src/i18n";
import { recentWindow, wholeSession } from "../src/model/load";
import TrainingPanel from "../src/panels/Training";
import { App, type Panel, useApp } from "../src/store";
import { Generator } from "../src/tokens";
import { useSeriesPolling, useTraining } from "../src/training";

const initial = useApp.getState();
const initialTraining = useTraining.getState();

function Shell() {
  useSeriesPolling();
  return useApp((state) => state.panel) === "training" ? <TrainingPanel /> : null;
}

function show(fake: FakeGateway, panel: Panel = "training") {
  const snapshot = fake.snapshot();
  useApp.setState({
    sessionId: SESSION_ID,
    panel,
    connection: { state: "live" },
    picture: {
      sessionId: SESSION_ID,
      snapshot,
      whole: wholeSession(snapshot),
      recent: recentWindow(snapshot),
      sequence: 1n,
      lastStep: 1n,
    },
  });
  const app = new App(createClient(DebuggerService, fake.transport()));
  render(
    <I18nextProvider i18n={i18n}>
      <ServicesContext value={{ app, generator: new Generator(app) }}>
        <Shell />
      </ServicesContext>
    </I18nextProvider>,
  );
}

beforeEach(() => {
  useApp.setState(initial, true);
  useTraining.setState(initialTraining, true);
});

describe("Training", () => {
  it("says that it loads, then draws every series with its newest value", async () => {
    show(new FakeGateway({ numSteps: 50 }));
    expect(screen.getByTestId("training-loading")).toBeTruthy();
    const charts = await screen.findAllByTestId("series-chart");
    expect(charts.map(({ dataset }) => dataset.series)).toEqual(["loss", "lr"]);
    expect(within(charts[0] as HTMLElement).getByTestId("series-value").textContent).toBe("4.292");
    expect(screen.getByText(/global steps 1 to 50/)).toBeTruthy();
    const heat = screen.getByTestId("series-heat");
    expect(heat.dataset).toMatchObject({ series: "router_gradient_norm", rows: "4" });
  });

  it("says what to do where there is no series", async () => {
    show(new FakeGateway());
    const empty = await screen.findByTestId("training-empty");
    expect(empty.textContent).toContain("debugger.step(n)");
    expect(useTraining.getState().hasSeries).toBe(false);
  });

  it("says what failed and tries again, and keeps what was drawn", async () => {
    const fake = new FakeGateway({ numSteps: 5 });
    fake.seriesError = "the analyzer restarts";
    show(fake);
    const alert = await screen.findByTestId("training-error");
    expect(alert.textContent).toContain("the analyzer restarts");
    fake.seriesError = "";
    fireEvent.click(within(alert).getByRole("button", { name: "Try again" }));
    await screen.findAllByTestId("series-chart");
    expect(screen.queryByTestId("training-error")).toBeNull();
    fake.seriesError = "gone";
    useTraining.setState({ numRetries: 9 });
    expect((await screen.findByTestId("training-error")).textContent).toContain("what is drawn is older");
    expect(screen.getAllByTestId("series-chart")).toHaveLength(2);
  });

  it("moves one cursor for all charts with the keyboard, and speaks it", async () => {
    show(new FakeGateway({ numSteps: 50 }));
    const [loss, lr] = (await screen.findAllByTestId("series-chart")) as [HTMLElement, HTMLElement];
    const plot = within(loss).getByRole("img");
    expect(plot.getAttribute("aria-label")).toContain("Loss over global steps 1 to 50");
    fireEvent.keyDown(plot, { key: "Home" });
    expect(within(lr).getByTestId("series-step").textContent).toBe("step 1");
    fireEvent.keyDown(plot, { key: "ArrowRight", shiftKey: true });
    expect(within(lr).getByTestId("series-step").textContent).toBe("step 11");
    expect(screen.getByTestId("training-spoken").textContent).toBe("step 11: Loss 8.077, Learning rate 0.0003");
    fireEvent.keyDown(plot, { key: "Escape" });
    expect(within(lr).getByTestId("series-step").textContent).toBe("step 50");
  });

  it("selects the layer, which is the one of the whole page", async () => {
    show(new FakeGateway({ numSteps: 9 }));
    const heat = await screen.findByTestId("series-heat");
    fireEvent.keyDown(within(heat).getByRole("img"), { key: "ArrowDown" });
    expect(useApp.getState().row).toBe(1);
    expect(within(heat).getByTestId("series-value").textContent).toBe("–");
  });

  it("has all numbers as tables", async () => {
    show(new FakeGateway({ numSteps: 3 }));
    fireEvent.click(await screen.findByRole("button", { name: /Table/ }));
    const rows = within(screen.getByTestId("series-table")).getAllByRole("row");
    expect(rows.map((row) => within(row).queryByRole("rowheader")?.textContent)).toEqual([undefined, "3", "2", "1"]);
    const layers = within(screen.getByTestId("layer-series-table")).getAllByRole("row");
    expect(layers).toHaveLength(5);
    expect(layers[2]?.textContent).toContain("nothing to read");
  });

  it("asks for the experts only once they are opened", async () => {
    const fake = new FakeGateway({ numSteps: 3 });
    show(fake);
    await screen.findAllByTestId("series-chart");
    expect(screen.getAllByTestId("series-heat")).toHaveLength(1);
    useTraining.setState({ isShowingExperts: true });
    await waitFor(() => expect(screen.getAllByTestId("series-heat")).toHaveLength(2));
    expect(screen.getAllByTestId("series-heat")[1]?.dataset.rows).toBe("8");
  });

  it("only looks whether there are series while another panel is open", async () => {
    const fake = new FakeGateway({ numSteps: 3 });
    show(fake, "experts");
    await waitFor(() => expect(useTraining.getState().hasSeries).toBe(true));
    expect(fake.numSeriesCalls).toBe(1);
    expect(useTraining.getState().lines).toBeNull();
  });
});
