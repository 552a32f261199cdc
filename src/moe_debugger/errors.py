"""Every error that this package raises on purpose.

MoEDebuggerError
├── ModelNotSupportedError   the model has no MoE layer that we can read, or an unknown one
├── AlreadyAttachedError     a debugger watches this model already
├── SessionClosedError       the session was closed; start a new one
├── InvalidInputError        a value from the caller is wrong (also a ValueError)
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
