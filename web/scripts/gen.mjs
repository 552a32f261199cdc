// Generates src/gen from ../protos, with the same compiler as the Python code (grpcio-tools).
// `--check` compares with what is committed instead. The interpreter: MOE_PROTO_PYTHON, else one that has grpc_tools.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const web = resolve(dirname(fileURLToPath(import.meta.url)), "..");
const root = resolve(web, "..");
const PROTOS = ["gateway", "query", "session", "collector", "routing"].map((name) => `moe_debugger/v1/${name}.proto`);

function findPython() {
  const candidates = [
    process.env.MOE_PROTO_PYTHON,
    join(root, ".venv-proto/bin/python"),
    join(root, ".venv/bin/python"),
    "python3",
  ];
  for (const candidate of candidates.filter(Boolean)) {
    if (candidate.includes("/") && !existsSync(candidate)) continue;
    if (spawnSync(candidate, ["-c", "import grpc_tools.protoc"], { stdio: "ignore" }).status === 0) return candidate;
  }
  console.error("gen: no Python with grpc_tools found; run `make proto` once, or set MOE_PROTO_PYTHON");
  process.exit(2);
}

function generate(target) {
  mkdirSync(target, { recursive: true });
  const result = spawnSync(
    findPython(),
    [
      "-m",
      "grpc_tools.protoc",
      "-I",
      "protos",
      `--plugin=protoc-gen-es=${join(web, "node_modules/.bin/protoc-gen-es")}`,
      `--es_out=${target}`,
      "--es_opt=target=ts",
      ...PROTOS,
    ],
    { cwd: root, stdio: "inherit" },
  );
  if (result.status !== 0) process.exit(result.status ?? 1);
}

function files(folder) {
  return readdirSync(join(folder, "moe_debugger/v1")).sort();
}

const committed = join(web, "src/gen");
if (process.argv.includes("--check")) {
  const fresh = mkdtempSync(join(tmpdir(), "moe-web-gen-"));
  try {
    generate(fresh);
    const names = files(fresh);
    const stale = names.filter((name) => {
      const path = join(committed, "moe_debugger/v1", name);
      return !existsSync(path) || !readFileSync(path).equals(readFileSync(join(fresh, "moe_debugger/v1", name)));
    });
    const extra = files(committed).filter((name) => !names.includes(name));
    if (stale.length || extra.length) {
      console.error(`gen: not fresh: ${[...stale, ...extra].join(", ")}; run \`npm run gen\` and commit web/src/gen`);
      process.exitCode = 1;
    } else {
      console.log(`gen: ${names.length} files are fresh`);
    }
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
} else {
  rmSync(committed, { recursive: true, force: true });
  generate(committed);
}
