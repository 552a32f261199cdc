import { createClient, type Transport } from "@connectrpc/connect";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { I18nextProvider } from "react-i18next";
import { AppShell } from "./AppShell";
import { ServicesContext } from "./context";
import { DebuggerService } from "./gen/moe_debugger/v1/gateway_pb";
import { i18n, loadFindingWords } from "./i18n";
import { connectQueries } from "./query";
import { App, useApp } from "./store";
import "./styles.css";
import { Generator } from "./tokens";
import { ErrorBoundary } from "./ui/ErrorBoundary";
import { storedTheme } from "./ui/theme";
import { parseHash } from "./url";

export function mount(transport: Transport): void {
  const root = document.getElementById("root");
  if (!root) throw new Error("the page has no #root");
  const client = createClient(DebuggerService, transport);
  connectQueries(client);
  const app = new App(client);
  const { panel, sessionId, row, expert } = parseHash(window.location.hash);
  useApp.setState({ panel, row, expert, theme: storedTheme() });
  // Where it fails the stream fails too, and says so.
  loadFindingWords().catch(() => {});
  app.start(sessionId);
  createRoot(root).render(
    <StrictMode>
      <I18nextProvider i18n={i18n}>
        <ServicesContext value={{ app, generator: new Generator(app) }}>
          <ErrorBoundary name="page">
            <AppShell />
          </ErrorBoundary>
        </ServicesContext>
      </I18nextProvider>
    </StrictMode>,
  );
}
