"""The modes: ways of running a model, each a function of a build that gives a `Comparison`, a column of the table.

A file `modes_*.py` holds modes that belong together; `oracle.columns` imports them all.
"""

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

from oracle.builds import EVERY_BUILD
from oracle.compare import Comparison
from oracle.outcome import source_key
from zoo.build import Build

__all__ = ["FAMILIES", "MODES", "Mode", "builds_of", "key_of", "mode_cell", "register_mode"]

Mode = Callable[[Build], Comparison]

# Every reader of the capture, every kind of call to the experts, and every scoring function, at least once.
FAMILIES = (
    "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "switch_transformers", "nllb_moe", "llama4_text",
    "jetmoe", "dbrx", "granitemoe", "phimoe", "longcat_flash", "zaya", "gemma4_text", "deepseek_v4", "doge",
    "vitpose_backbone", "glam", "old_style_linear_gate", "old_style_gate_module",
)  # fmt: skip
# By the name of the column: what to run, and for which builds (None: for all).
MODES: dict[str, tuple[Mode, tuple[str, ...] | None]] = {}


def register_mode(name: str, families: tuple[str, ...] | None = FAMILIES) -> Callable[[Mode], Mode]:
    """Make a function the column `name`, for the named builds; for all of them where that is None."""

    def register(mode: Mode) -> Mode:
        MODES[name] = (mode, families)
        return mode

    return register


def builds_of(name: str) -> tuple[str, ...]:
    """Return the builds that a mode is run for."""
    families = MODES[name][1]
    return tuple(EVERY_BUILD) if families is None else families


@cache
def key_of(column: str) -> str:
    """Return the `source_key` of a column of the matrix, or of a mode with the files whose names begin as its own."""
    if column not in MODES:
        return source_key()
    file = Path(inspect.getfile(MODES[column][0]))
    return source_key(*sorted(file.parent.glob(f"{file.stem}*.py")))


def mode_cell(arch: str, name: str) -> Comparison:
    """Check one cell.

    Raises:
        Impossible: the bare model cannot run so.
        NotAccepted: the architecture has nothing to run so.
    """
    return MODES[name][0](EVERY_BUILD[arch])
