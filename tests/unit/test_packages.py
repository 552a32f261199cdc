"""What may be imported where: the gateway and the analyzer run without torch, transformers and ray."""

import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "ray", "pandas"):
    sys.modules[name] = None
for root in {roots!r}:
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, root + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import moe_debugger
from moe_debugger import MoEDebugger, analyze
"""


@pytest.mark.parametrize(
    "roots",
    [
        ["moe_gateway"],
        ["moe_analyzer"],
        [
            "moe_debugger.v1",
            "moe_debugger.wire",
            "moe_debugger.analysis",
            "moe_debugger.planning",
            "moe_debugger.publish",
            "moe_debugger.embedded",
        ],
        ["moe_debugger.cli", "moe_debugger.config"],
    ],
    ids=lambda roots: roots[0],
)
def test_everything_but_the_model_side_imports_without_torch(roots: list[str]) -> None:
    if roots[-1] == "moe_debugger.config":
        code = IMPORT_ALL.format(roots=roots[:-1]) + "import moe_debugger.config\n"
    else:
        code = IMPORT_ALL.format(roots=roots)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_these() -> None:
    import moe_debugger

    expected = {"MoEDebugger", "Session", "analyze", "Analysis", "Thresholds", "Finding"}
    assert expected <= set(moe_debugger.__all__)
    for name in moe_debugger.__all__:
        assert getattr(moe_debugger, name) is not None
