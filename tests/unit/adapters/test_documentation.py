"""docs/adapters.md: its adapter is the one of the example, and every field and method is on the page."""

import ast
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from unit.adapters.stand_ins import (
    GLAM_FOLDER,
    Decoder,
    DenseLayer,
    SequenceFirstAdapter,
    example,
    make,
)

import moe_debugger
from moe_debugger import Adapter, LayerShape, Routing, check_adapter
from moe_debugger.adapter_check.replay import _TOLERANCES
from moe_debugger.capture.adapter import ENTRY_POINT_GROUP

PAGE = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()


def snippet(*words: str) -> str:
    """Return the one snippet of Python on the page that holds all of `words`."""
    found: list[str] = [
        each for each in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if all(w in each for w in words)
    ]
    assert len(found) == 1
    return found[0]


def methods(code: str) -> dict[str, str]:
    """Return what each method of the adapter in `code` gives back, without its docstring and its types."""
    adapter = next(
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef) and node.name == "GlamAdapter"
    )
    return {
        node.name: re.sub(r"\b(out|routing)\b", "it", ast.unparse(node.body[-1]))
        for node in adapter.body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_adapter_of_the_page_is_that_of_the_example_and_is_proven() -> None:
    glam, code = example("modeling_glam"), snippet("class GlamAdapter")
    names: dict[str, Any] = {}
    exec(code.replace("register_adapter(GlamAdapter())", ""), names)
    result = check_adapter(names["GlamAdapter"](), glam.tiny_model(), max_experts=8)
    assert result.agrees, result
    of_example = methods((GLAM_FOLDER / "glam_adapter.py").read_text())
    of_page = methods(code)
    assert of_page.keys() == of_example.keys()
    assert all(of_page[name] == of_example[name] for name in of_page if name != "expert_output")


def test_the_other_snippets_of_the_page_work() -> None:
    exec(
        snippet("raise_if_wrong"),
        {
            "moe_debugger": moe_debugger,
            "GlamAdapter": example("glam_adapter").GlamAdapter,
            "tiny_model": example("modeling_glam").tiny_model,
        },
    )
    names: dict[str, Any] = {"Routing": Routing, "SequenceFirstAdapter": SequenceFirstAdapter}
    exec("class Shown(SequenceFirstAdapter):\n" + textwrap.indent(snippet("transpose(0, 1)"), "    "), names)
    model = make(Decoder(DenseLayer(), is_sequence_first=True))
    assert check_adapter(names["Shown"](), model).agrees


@pytest.mark.parametrize("kind", [LayerShape, Routing])
def test_every_field_is_on_the_page(kind: Any) -> None:
    section = PAGE.split(f"### `{kind.__name__}`")[1].split("\n#")[0]
    for field in fields(kind):
        assert f"`{field.name}`" in section, field.name
        if isinstance(field.default, str):
            assert f'`"{field.default}"`' in section, field.default


def test_every_method_the_group_and_the_tolerances_are_on_the_page() -> None:
    section = PAGE.split("### The methods")[1].split("\n#")[0]
    for name in vars(Adapter):
        if not name.startswith("_"):
            assert re.search(rf"`{name}[`(]", section), name
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]' in PAGE
    for dtype, tolerance in _TOLERANCES.items():
        mantissa, exponent = f"{tolerance:.0e}".split("e")
        assert f"{mantissa}e{int(exponent)} in {dtype.removeprefix('torch.')}" in re.sub(r"\s+", " ", PAGE), dtype
