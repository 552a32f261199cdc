import { fileURLToPath } from "node:url";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vitest/config";

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));
// `npm run dev` speaks to a running gateway: MOE_GATEWAY_URL=http://127.0.0.1:8080 npm run dev
const gateway = process.env.MOE_GATEWAY_URL ?? "http://127.0.0.1:8080";

export default defineConfig({
  plugins: [react()],
  resolve: { alias: { "@messages": here("../src/moe_debugger/messages") } },
  build: {
    outDir: here("../services/gateway/moe_gateway/static"),
    emptyOutDir: true,
    target: "es2022",
    // The content security policy allows nothing inline.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    // scripts/budget.mjs holds the limit that counts: what is sent, compressed.
    chunkSizeWarningLimit: 1000,
  },
  server: {
    host: "127.0.0.1",
    fs: { allow: [here("."), here("../src/moe_debugger/messages")] },
    proxy: { "/moe_debugger.v1.": { target: gateway, changeOrigin: true, headers: { origin: gateway } } },
  },
  test: {
    include: ["tests/**/*.test.{ts,tsx}"],
    setupFiles: ["tests/setup.ts"],
    reporters: ["default", "./tests/plain-reporter.ts"],
    testTimeout: 20_000,
  },
});
