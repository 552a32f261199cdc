// Fails the build where the first load (all scripts and styles that index.html asks for) is above the budget.
import { readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const BUDGET_KB = 180;
const dist = resolve(dirname(fileURLToPath(import.meta.url)), "../../services/gateway/moe_gateway/static");
const html = readFileSync(join(dist, "index.html"), "utf8");
const assets = [...html.matchAll(/(?:src|href)="\/([^"]+\.(?:js|css))"/g)].map((match) => match[1]);
const bytes = assets.reduce((sum, asset) => sum + gzipSync(readFileSync(join(dist, asset))).length, 0);
const kb = bytes / 1000;
console.log(`first load: ${kb.toFixed(1)} kB gzip in ${assets.length} files (budget ${BUDGET_KB} kB)`);
if (kb > BUDGET_KB) process.exit(1);
