import { afterEach } from "vitest";
import { loadFindingWords } from "../src/i18n";

await loadFindingWords();

// Components run in happy-dom, the rest in node.
if (typeof document !== "undefined") {
  const { cleanup, configure } = await import("@testing-library/react");
  // A loaded machine is slow, not wrong.
  configure({ asyncUtilTimeout: 10_000 });
  afterEach(cleanup);
  globalThis.matchMedia ??= ((query: string) => ({
    matches: false,
    media: query,
    addEventListener: () => {},
    removeEventListener: () => {},
  })) as unknown as typeof matchMedia;
}
