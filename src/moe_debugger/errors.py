"""Every error that this package raises on purpose.

MoEDebuggerError
├── ModelNotSupportedError   the model has no MoE layer that we can read, or an unknown one
├── AlreadyAttachedError     a debugger watches this model already
├── SessionClosedError       the session was closed; start a new one
├── InvalidInputError        a value from the caller is wrong (also a ValueError)
│   └── QueryError           a query has a fault; says where, with a caret
│       └── QueryCostError   a query would read more than it may
├── ConfigError              settings or a config file are wrong; lists all problems at once
├── WireFormatError          bytes that are not, or not wholly, one of our messages
│   └── UnsupportedFormatError   written by a newer major version
├── RecordingError           a recording is damaged, or is none; names the part
├── FleetError               a part of the fleet cannot be reached, started or trusted
└── DependencyMissingError   an optional package is needed; the text names the extra to install
"""

__all__ = [
    "AlreadyAttachedError",
    "ConfigError",
    "DependencyMissingError",
    "FleetError",
    "InvalidInputError",
    "MoEDebuggerError",
    "ModelNotSupportedError",
    "QueryCostError",
    "QueryError",
    "RecordingError",
    "SessionClosedError",
    "UnsupportedFormatError",
    "WireFormatError",
]


class MoEDebuggerError(Exception):
    """Base of all errors of this package."""


class ModelNotSupportedError(MoEDebuggerError):
    """The model has no MoE layer that can be read."""


class AlreadyAttachedError(MoEDebuggerError):
    """A debugger watches this model already."""


class SessionClosedError(MoEDebuggerError):
    """The session was closed."""


class InvalidInputError(MoEDebuggerError, ValueError):
    """A value from the caller is wrong."""


class QueryError(InvalidInputError):
    """A query has a fault.

    Attributes:
        reason: what is wrong, in one line; the error's text adds the query's line with a caret under the place.
        query: the text of the query.
        start, end: the characters of it that are at fault; both equal to its length where something is missing there.
    """

    def __init__(self, reason: str, query: str = "", start: int = 0, end: int | None = None) -> None:
        self.reason = reason
        self.query = query
        self.start = min(max(0, start), len(query))
        self.end = min(max(self.start, self.start + 1 if end is None else end), len(query))
        super().__init__(f"{reason}\n{self._shown()}" if query else reason)

    def _shown(self) -> str:
        """Return the line at fault and a line of carets, cut to what a terminal shows."""
        first = self.query.rfind("\n", 0, self.start) + 1
        last = self.query.find("\n", self.start)
        line = self.query[first : len(self.query) if last < 0 else last]
        place, width = self.start - first, max(1, min(self.end - self.start, len(line) - (self.start - first)))
        if place > 60:
            line, place = "…" + line[place - 50 :], 51
        # A control character would move the caret, or the terminal.
        shown = "".join(each if each.isprintable() else " " for each in line[:100])
        return f"  {shown}\n  {' ' * place}{'^' * min(width, max(1, 100 - place))}"


class QueryCostError(QueryError):
    """A query would read, or has read, more than it may; the text says the cap, the cost and how to narrow it."""


class ConfigError(MoEDebuggerError):
    """Settings or a config file are wrong.

    Attributes:
        problems: one line for each problem, all of them.
    """

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {problem}" for problem in problems))


class WireFormatError(MoEDebuggerError):
    """Bytes that are not, or not wholly, one of our messages."""


class UnsupportedFormatError(WireFormatError):
    """A message of a newer major version than this program reads."""


class RecordingError(MoEDebuggerError):
    """A recording is damaged, is not whole, or is none.

    Attributes:
        part: the file at fault, relative to the recording's folder.
    """

    def __init__(self, text: str, *, part: str = "") -> None:
        self.part = part
        super().__init__(text)


class FleetError(MoEDebuggerError):
    """A part of the fleet cannot be reached, started or trusted."""


class DependencyMissingError(MoEDebuggerError):
    """An optional package is needed; the text names the extra to install."""
