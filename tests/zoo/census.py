"""A reader of the library's source that finds the model packages which hold mixtures of experts.

It reads the syntax trees and imports nothing, so a package counts by what its code is, not by a list of names. Its
signs go from certain to broad: a broad one finds dense models too, which a caller excludes with a reason each.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

# "experts": a class that holds a pool of experts. "sized": a layer with one row or column for each expert. "top-k": a
# class that chooses the k best of something. "word": a name in code speaks of experts, routers or gating. "wraps": the
# configuration names a model type of a package that has one of the first two.
SignKind = Literal["experts", "sized", "top-k", "word", "wraps"]


class Sign(NamedTuple):
    """What was seen: the kind, and the class, the word or the model type."""

    kind: SignKind
    name: str


_WORD = re.compile(r"expert|router|gating|(^|_)moe(_|$)|MoE|Moe[A-Z]", re.IGNORECASE)
_POOL = re.compile(r"expert|moe", re.IGNORECASE)
_COUNT = re.compile(r"experts\b", re.IGNORECASE)


def scan(models: Path) -> dict[str, set[Sign]]:
    """Return the signs of every package under `models`, the folder `transformers/models`, that has any."""
    signs: dict[str, set[Sign]] = defaultdict(set)
    for file in models.glob("*/modeling_*.py"):
        source = file.read_text()
        # Every sign holds one of these texts, and three quarters of the files hold none.
        if file.parent.name != "auto" and re.search("expert|topk|router|gating|moe", source, re.IGNORECASE):
            signs[file.parent.name] |= signs_in(source)
    certain = {name for name, seen in signs.items() if any(sign.kind in ("experts", "sized") for sign in seen)}
    sources = {file: file.read_text() for file in models.glob("*/configuration_*.py") if file.parent.name != "auto"}
    types: set[str] = set()
    for file, source in sources.items():
        if file.parent.name in certain:
            types |= model_types(ast.parse(source))
    for file, source in sources.items():
        if file.parent.name not in certain and any(type_ in source for type_ in types):
            signs[file.parent.name] |= {Sign("wraps", type_) for type_ in strings_in(ast.parse(source)) & types}
    return {name: seen for name, seen in signs.items() if seen}


def signs_in(source: str) -> set[Sign]:
    """Return the signs in the source of a modeling file; all kinds but "wraps"."""
    tree = ast.parse(source)
    signs = {Sign("word", name) for name in names_in(tree) if _WORD.search(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            signs |= {Sign(kind, node.name) for kind in _kinds(node)}
    return signs


def _kinds(class_: ast.ClassDef) -> Iterator[SignKind]:
    if any("use_experts_implementation" in names_in(decorator) for decorator in class_.decorator_list):
        yield "experts"
    if _POOL.search(class_.name) and any(_is_list_of_modules(base) for base in class_.bases):
        yield "experts"
    for node in ast.walk(class_):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _is_list_of_modules(node.value.func):
            if any(_POOL.search(ast.unparse(target)) for target in node.targets):
                yield "experts"
        elif isinstance(node, ast.Call):
            yield from _kinds_of_call(node)


def _kinds_of_call(call: ast.Call) -> Iterator[SignKind]:
    called = _last_name(call.func)
    if called == "topk":
        yield "top-k"
    elif called in ("Parameter", "Linear", "Embedding"):
        sizes = _sizes(call)
        if any(_COUNT.search(size) for size in sizes):
            yield "experts" if called == "Parameter" and len(sizes) >= 3 else "sized"


def _sizes(call: ast.Call) -> list[str]:
    """Return the sizes given to a layer, or to the tensor inside `nn.Parameter(torch.empty(...))`, as source text."""
    arguments: list[ast.expr] = list(call.args)
    if _last_name(call.func) == "Parameter":
        arguments = list(arguments[0].args) if arguments and isinstance(arguments[0], ast.Call) else []
        if len(arguments) == 1 and isinstance(arguments[0], ast.Tuple | ast.List):
            arguments = list(arguments[0].elts)
    return [ast.unparse(argument) for argument in arguments]


def _is_list_of_modules(node: ast.expr) -> bool:
    return _last_name(node) in ("ModuleList", "ModuleDict")


def _last_name(node: ast.expr) -> str:
    """Return `c` of `a.b.c`, the name of a plain name, and nothing of other expressions."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def names_in(tree: ast.AST) -> set[str]:
    """Return the names that a tree's code uses: not its comments, not its texts."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return names


def model_types(tree: ast.AST) -> set[str]:
    """Return the values of `model_type = "..."` in the configuration classes of a tree."""
    return {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and _last_name(node.targets[0]) == "model_type"
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def strings_in(tree: ast.AST) -> set[str]:
    """Return the texts that a tree's code holds."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
