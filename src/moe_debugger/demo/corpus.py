"""Four kinds of text that every machine with Python has, or that are generated here.

- code: the source of Python's standard library, without comments and docstrings (those are prose);
- prose: the English of pydoc's topics and of the standard library's docstrings, whole paragraphs only;
- numbers: generated sums, products, sequences and columns of decimals;
- structured: generated JSON (compact and indented) and CSV.

The same Python and the same seed give the same bytes. A document is in the held-out split as a whole or not at all:
by its name where it is a file or a topic, by its seed where it is generated.
"""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import random
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from moe_debugger.errors import DependencyMissingError

__all__ = ["KINDS", "Corpus", "Kind", "Split", "build_corpus"]

Kind = Literal["code", "prose", "numbers", "structured"]
Split = Literal["train", "held_out"]

KINDS: Final[tuple[Kind, ...]] = ("code", "prose", "numbers", "structured")

_HELD_OUT_ONE_IN: Final = 10
_NUM_GENERATED_DOCUMENTS: Final = 600
_MIN_BYTES: Final = 20_000
_MAX_INDENT: Final = 12
_RUN: Final = re.compile(r"(.)\1{3}")


@dataclass(frozen=True)
class Corpus:
    """The texts of one split: for each kind all its documents, one after the other."""

    split: Split
    texts: Mapping[Kind, bytes]

    def window(self, kind: Kind, num_bytes: int, rng: random.Random) -> bytes:
        """Return that many bytes from a random place in one kind's text."""
        text = self.texts[kind]
        start = rng.randrange(len(text) - num_bytes + 1)
        return text[start : start + num_bytes]


def build_corpus(split: Split, *, seed: int = 0) -> Corpus:
    """Collect and generate one split's texts (a few seconds: the standard library is parsed).

    Raises:
        DependencyMissingError: this Python has no source or no pydoc topics to read.
    """
    modules = _standard_library_modules(split)
    texts: dict[Kind, bytes] = {
        "code": _join(module.code for module in modules),
        "prose": _join(_prose(split, modules)),
        "numbers": _join(_generated(split, seed, "numbers", _numbers_document)),
        "structured": _join(_generated(split, seed, "structured", _structured_document)),
    }
    for kind, text in texts.items():
        if len(text) < _MIN_BYTES:
            raise DependencyMissingError(
                f"this Python has only {len(text)} bytes of {kind} text for the {split} split, {_MIN_BYTES} are "
                "needed; use a Python whose standard library is installed as source files, as from python.org or Debian"
            )
    return Corpus(split=split, texts=texts)


def _join(documents: Iterator[str]) -> bytes:
    return "\n\n".join(documents).encode()


def _is_in_split(name: str, split: Split) -> bool:
    is_held_out = zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0
    return is_held_out == (split == "held_out")


@dataclass(frozen=True)
class _Module:
    """One file of the standard library, as its code and its docstrings."""

    code: str
    docstrings: list[str]


def _standard_library_modules(split: Split) -> list[_Module]:
    folder = Path(sysconfig.get_path("stdlib"))
    # Generated tables are not code that a person wrote.
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith(("_sysconfigdata", "__"))]
    return [_parse(path.read_text(encoding="utf-8")) for path in paths if _is_in_split(path.name, split)]


def _parse(source: str) -> _Module:
    docstrings: list[str] = []
    prose_lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            docstrings.append(docstring)
            expression = node.body[0]
            prose_lines.update(range(expression.lineno, (expression.end_lineno or expression.lineno) + 1))
    lines = [
        line.rstrip()
        for number, line in enumerate(source.splitlines(), start=1)
        if number not in prose_lines and _is_plain_code(line)
    ]
    return _Module(code=re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n"), docstrings=docstrings)


def _is_plain_code(line: str) -> bool:
    """Whether the line is ASCII code without long runs of one character.

    A model of this size does not learn to count to 20: with deep and aligned indentation in its texts, the most likely
    continuation of almost any code is spaces without end.
    """
    code = line.lstrip(" ")
    return (
        len(line) - len(code) <= _MAX_INDENT and code.isascii() and not code.startswith("#") and not _RUN.search(code)
    )


def _prose(split: Split, modules: list[_Module]) -> Iterator[str]:
    for name, topic in sorted(pydoc_data.topics.topics.items()):
        if _is_in_split(name, split):
            yield from _paragraphs(topic)
    for module in modules:
        for docstring in module.docstrings:
            yield from _paragraphs(docstring)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as English, each on one line."""
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        paragraph = re.sub(r"[`*\"]+", "", " ".join(block.split()))
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if (
            len(paragraph) >= 80
            and paragraph.isascii()
            and paragraph[0].isupper()
            and paragraph.endswith((".", ":"))
            and letters >= 0.92 * len(paragraph)
        ):
            yield paragraph.rstrip(":") + ("." if paragraph.endswith(":") else "")


def _generated(split: Split, seed: int, kind: str, make: Callable[[random.Random], str]) -> Iterator[str]:
    size = _NUM_GENERATED_DOCUMENTS // (1 if split == "train" else _HELD_OUT_ONE_IN)
    for number in range(size):
        # A string seed is hashed with SHA-512 by random.Random, the same on every machine.
        yield make(random.Random(f"{seed}/{kind}/{split}/{number}"))  # noqa: S311


def _numbers_document(rng: random.Random) -> str:
    make = rng.choice((_sums, _sums, _products, _sequences, _decimals))
    return "\n".join(make(rng) for _ in range(rng.randint(8, 30)))


def _sums(rng: random.Random) -> str:
    limit = rng.choice((20, 100, 1000))
    left, right = rng.randrange(limit), rng.randrange(limit)
    if rng.random() < 0.3:
        return f"{left + right} - {right} = {left}"
    return f"{left} + {right} = {left + right}"


def _products(rng: random.Random) -> str:
    left, right = rng.randrange(2, 100), rng.randrange(2, 13)
    return f"{left} * {right} = {left * right}"


def _sequences(rng: random.Random) -> str:
    start, step = rng.randrange(100), rng.randrange(1, 13)
    return ", ".join(str(start + step * position) for position in range(rng.randint(6, 14)))


def _decimals(rng: random.Random) -> str:
    return " ".join(f"{rng.uniform(-100, 100):.{rng.randint(1, 4)}f}" for _ in range(rng.randint(4, 9)))


_FIRST = (
    "ada",
    "alan",
    "grace",
    "edsger",
    "barbara",
    "donald",
    "frances",
    "john",
    "margaret",
    "niklaus",
    "radia",
    "tony",
)
_CITIES = (
    "berlin",
    "lagos",
    "lima",
    "london",
    "nairobi",
    "osaka",
    "oslo",
    "paris",
    "quito",
    "seoul",
    "sydney",
    "toronto",
)
_STATES = ("active", "blocked", "closed", "draft", "new", "open", "pending")
_TAGS = ("alpha", "beta", "blue", "fast", "green", "large", "local", "remote", "small", "stable")


def _record(rng: random.Random) -> dict[str, object]:
    fields: list[tuple[str, object]] = [
        ("id", rng.randrange(10_000)),
        ("name", rng.choice(_FIRST)),
        ("city", rng.choice(_CITIES)),
        ("state", rng.choice(_STATES)),
        ("score", round(rng.random() * 10, 2)),
        ("active", rng.random() < 0.5),
        ("tags", rng.sample(_TAGS, rng.randint(0, 3))),
        ("email", f"{rng.choice(_FIRST)}@{rng.choice(_CITIES)}.example"),
        ("parent", None if rng.random() < 0.5 else {"id": rng.randrange(10_000), "name": rng.choice(_FIRST)}),
    ]
    kept = sorted(rng.sample(range(len(fields)), rng.randint(4, len(fields))))
    return dict(fields[position] for position in kept)


def _structured_document(rng: random.Random) -> str:
    shape = rng.choice(("lines", "indented", "csv"))
    if shape == "lines":
        return "\n".join(json.dumps(_record(rng)) for _ in range(rng.randint(3, 8)))
    if shape == "indented":
        return json.dumps([_record(rng) for _ in range(rng.randint(2, 4))], indent=2)
    rows = [
        f"{rng.randrange(10_000)},{rng.choice(_FIRST)},{rng.choice(_CITIES)},{rng.choice(_STATES)},{rng.choice(_TAGS)}"
        for _ in range(rng.randint(5, 15))
    ]
    return "\n".join(["id,name,city,state,tag", *rows])
