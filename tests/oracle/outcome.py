"""What came out of one case, and the file that keeps it, so that a long run can be taken up again."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from oracle.compare import Comparison

__all__ = ["RESULTS", "ROOT", "Impossible", "NotAccepted", "Outcome", "Results", "source_key"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "exactness" / "results.jsonl"
# What every result depends on, beside the versions: the capture itself, and what checks it.
_SOURCES = (
    "src/moe_debugger/capture",
    "src/moe_debugger/_debugger.py",
    "src/moe_debugger/_session.py",
    "src/moe_debugger/_decisions.py",
    "src/moe_debugger/_row_blocks.py",
    "src/moe_debugger/_row_packing.py",
    "src/moe_debugger/parallel.py",
    "src/moe_debugger/wire",
    "tests/oracle",
    "tests/zoo",
)
# These describe results; or hold modes (`modes_*.py`), of which each depends on its own file alone.
_NOT_CHECKING = ("table.py", "describe.py", "outcome.py", "columns.py", "registry.py")

Status = Literal["exact", "wrong", "impossible", "not accepted"]


class Impossible(Exception):
    """The model itself, without a debugger, cannot do this."""


class NotAccepted(Exception):
    """The architecture does not take this option, or its experts pay no heed to it."""


@dataclass(frozen=True)
class Outcome:
    """One cell of the table.

    Attributes:
        arch: name of the build.
        column: what was done with it.
        status: "exact"; "wrong"; "impossible" where the bare model fails; "not accepted" where it has no such option.
        detail: the error or the difference, empty where exact.
    """

    arch: str
    column: str
    status: Status
    detail: str = ""
    num_rows: int = 0
    num_slots: int = 0
    num_wrong_ids: int = 0
    max_weight_error: float = 0.0
    num_unseen_slots: int = 0
    num_rows_without_expert: int = 0
    num_identity_rows: int = 0

    @classmethod
    def of(cls, arch: str, column: str, run: Callable[[], Comparison]) -> "Outcome":
        """Return the outcome of `run`, whatever it raises."""
        try:
            comparison = run()
        except Impossible as error:
            return cls(arch, column, "impossible", str(error))
        except NotAccepted as error:
            return cls(arch, column, "not accepted", str(error))
        except Exception as error:
            return cls(arch, column, "wrong", f"{type(error).__name__}: {error}")
        return cls(
            arch,
            column,
            "exact" if comparison.is_exact else "wrong",
            "" if comparison.is_exact else comparison.summary(),
            num_rows=comparison.num_rows,
            num_slots=comparison.num_slots,
            num_wrong_ids=comparison.num_wrong_ids,
            max_weight_error=comparison.max_weight_error,
            num_unseen_slots=comparison.num_unseen_slots,
            num_rows_without_expert=comparison.num_rows_without_expert,
            num_identity_rows=comparison.num_identity_rows,
        )


@cache
def source_key(*more: Path) -> str:
    """Return a digest of the versions and sources that a result depends on, and of the files `more`."""
    digest = hashlib.sha256(f"transformers {version('transformers')} torch {version('torch')}".encode())
    paths = [ROOT / source for source in _SOURCES]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    checking = (file for file in files if file.name not in _NOT_CHECKING and not file.name.startswith("modes_"))
    for file in [*checking, *more]:
        digest.update(file.relative_to(ROOT).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Outcomes as JSON lines; a later line of the same cell replaces an earlier one.

    Args:
        key_of: tells for a column the `source_key` of what it depends on; lines with another key do not count.
        path: of the file; made at the first `add`.
    """

    def __init__(self, key_of: Callable[[str], str], path: Path = RESULTS) -> None:
        self._key_of = key_of
        self.path = path

    def read(self, *, any_key: bool = False) -> dict[tuple[str, str], Outcome]:
        """Return the newest outcome of each (arch, column); with `any_key`, also those of other sources."""
        found: dict[tuple[str, str], Outcome] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            # A run that was killed may have left half a line.
            record = _parsed(line)
            if record is None or (record.pop("key") != self._key_of(record["column"]) and not any_key):
                continue
            outcome = Outcome(**record)
            found[outcome.arch, outcome.column] = outcome
        return found

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Append `outcomes`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": self._key_of(outcome.column), **asdict(outcome)}) + "\n" for outcome in outcomes]
        with self.path.open("a+b") as file:
            # A run that was killed may have left half a line: the next one starts on its own.
            size = file.seek(0, 2)
            is_torn = size > 0 and (file.seek(size - 1), file.read(1))[1] != b"\n"
            file.write(("\n" * is_torn + "".join(lines)).encode())

    def once(self, arch: str, column: str, run: Callable[[], Comparison]) -> Outcome:
        """Return the outcome of this cell: the kept one, unless it was wrong; else run it and keep what came out."""
        kept = self.read().get((arch, column))
        if kept is not None and kept.status != "wrong":
            return kept
        outcome = Outcome.of(arch, column, run)
        self.add([outcome])
        return outcome


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "key" in record else None
