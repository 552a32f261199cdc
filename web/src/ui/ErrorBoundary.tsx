import { Component, type ReactNode } from "react";
import { i18n } from "../i18n";

/** One broken panel never blanks the page. */
export class ErrorBoundary extends Component<{ name: string; children: ReactNode }, { error: Error | null }> {
  override state: { error: Error | null } = { error: null };

  static getDerivedStateFromError(error: unknown): { error: Error } {
    return { error: error instanceof Error ? error : new Error(String(error)) };
  }

  override render(): ReactNode {
    const { error } = this.state;
    if (!error) return this.props.children;
    return (
      <div className="panel-error" role="alert">
        <p>{i18n.t("error.panel", { message: error.message })}</p>
        <button type="button" className="button" onClick={() => this.setState({ error: null })}>
          {i18n.t("error.retry")}
        </button>
        <button
          type="button"
          className="button"
          onClick={() => void navigator.clipboard?.writeText(`${this.props.name}: ${error.stack ?? error.message}`)}
        >
          {i18n.t("error.details")}
        </button>
      </div>
    );
  }
}
