"""The YAML configuration of `--config`: checked as a whole, every problem with its line.

Each key acts on something; a key whose feature is not there yet is refused, never ignored. The reference is
docs/configuration.md.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moe_debugger.analysis import Thresholds
from moe_debugger.errors import ConfigError

__all__ = [
    "CaptureConfig",
    "Config",
    "ModelConfig",
    "PerformanceConfig",
    "ThresholdsConfig",
    "load_config",
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE_PATTERN = re.compile(r"(\d+(?:\.\d+)?) *([A-Za-z]*)")


def _to_bytes(value: object) -> object:
    """Turn `64 MiB` into a number of bytes; leave anything else for the type check to judge."""
    if isinstance(value, str):
        match = _SIZE_PATTERN.fullmatch(value.strip())
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError("expected a number of bytes, or a size such as 64 MiB")
        return int(float(match[1]) * _UNITS[match[2].upper()])
    return value


def _to_device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return value


def _refuse_memory_limit(_: object) -> None:
    raise ValueError(
        "the worker's memory cannot be limited yet; remove the line, and limit capture.buffer_size, "
        "performance.batch_size or the process (ulimit, systemd, containers) instead"
    )


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(_Section):
    """Which model runs, and how."""

    path: str | None = Field(default=None, min_length=1, description="`demo`, or a folder with safetensors weights.")
    device: Annotated[str, AfterValidator(_to_device)] | None = Field(
        default=None, description="auto, cpu, cuda or cuda:N."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Of the weights."
    )


class CaptureConfig(_Section):
    """What is captured."""

    level: Literal["counts", "routes", "routes+tokens", "full"] | None = Field(
        default=None, description="How much of it."
    )
    sampling_rate: float | None = Field(
        default=None, gt=0, le=1, description="Share of the requests that are captured."
    )
    buffer_size: Annotated[int, BeforeValidator(_to_bytes), Field(ge=1 << 20, le=1 << 34)] | None = Field(
        default=None, description="Most bytes that wait to be sent: a number, or a size such as 64 MiB."
    )
    gradients: bool | None = Field(
        default=None, description="In training, also norms of gradients and weights of routers and experts."
    )


class ThresholdsConfig(_Section):
    """From where on something is a finding; the values' meaning is in docs/metrics.md."""

    dead_expert: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="An unused expert is dead where its share is proved below this part of 1/E.",
    )
    load_balance: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Load is skewed below this many effective experts, as a part of all experts.",
    )
    routing_confidence: float | None = Field(
        default=None, gt=0, lt=1, description="A router is undecided below this 1 - token entropy / ln E."
    )


class PerformanceConfig(_Section):
    """What the worker may use."""

    batch_size: int | None = Field(default=None, ge=1, le=256, description="Most requests that share a forward.")
    profiling: bool | None = Field(
        default=None, description="Time routers and experts by layer; see docs/profiling.md."
    )
    memory_limit: Annotated[None, BeforeValidator(_refuse_memory_limit)] = Field(
        default=None, description="Not there yet: any value is refused."
    )


class Config(_Section):
    """A whole configuration; what is not set is None, and the part that it concerns uses its default."""

    model: ModelConfig = ModelConfig()
    capture: CaptureConfig = CaptureConfig()
    thresholds: ThresholdsConfig = ThresholdsConfig()
    performance: PerformanceConfig = PerformanceConfig()

    def debugger_options(self) -> dict[str, Any]:
        """Return the arguments of `MoEDebugger` and `MoEDebuggerCallback` that this configuration sets.

        For training: ``MoEDebuggerCallback(**load_config("config.yaml").debugger_options())``.
        """
        values: dict[str, Any] = {
            "level": self.capture.level,
            "sampling_rate": self.capture.sampling_rate,
            "buffer_bytes": self.capture.buffer_size,
            "gradients": self.capture.gradients,
            "profiling": self.performance.profiling,
        }
        thresholds = {name: value for name, value in self.thresholds.model_dump().items() if value is not None}
        if thresholds:
            values["thresholds"] = Thresholds(**thresholds)
        return {name: value for name, value in values.items() if value is not None}

    def service_env(self) -> dict[str, str]:
        """Return the settings of the fleet's services that this configuration sets, by environment variable."""
        values = {
            "MOE_COLLECTOR_MODEL": self.model.path,
            "MOE_COLLECTOR_DEVICE": self.model.device,
            "MOE_COLLECTOR_PRECISION": self.model.precision,
            "MOE_COLLECTOR_LEVEL": self.capture.level,
            "MOE_COLLECTOR_SAMPLING_RATE": self.capture.sampling_rate,
            "MOE_COLLECTOR_BUFFER_BYTES": self.capture.buffer_size,
            "MOE_COLLECTOR_MAX_BATCH_SIZE": self.performance.batch_size,
            "MOE_COLLECTOR_PROFILING": self.performance.profiling,
            "MOE_ANALYZER_DEAD_EXPERT": self.thresholds.dead_expert,
            "MOE_ANALYZER_LOAD_BALANCE": self.thresholds.load_balance,
            "MOE_ANALYZER_ROUTING_CONFIDENCE": self.thresholds.routing_confidence,
        }
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in values.items()
            if value is not None
        }


def load_config(path: Path | str) -> Config:
    """Read and check a configuration file; a relative `model.path` is one beside the file.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; lists every problem with its line.
    """
    file = Path(path).expanduser().absolute()
    try:
        document = YAML(typ="rt").load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    except YAMLError as error:
        raise ConfigError(str(path), [_syntax_problem(error)]) from error
    if document is None:
        return Config()
    if not isinstance(document, CommentedMap):
        raise ConfigError(str(path), [f"line 1: expected sections ({', '.join(Config.model_fields)})"])
    try:
        config = Config.model_validate(_plain(document))
    except ValidationError as error:
        problems = sorted(_problem(document, entry) for entry in error.errors())
        raise ConfigError(str(path), [f"line {line}: {text}" for line, text in problems]) from None
    return _with_absolute_model(config, file.parent)


def _with_absolute_model(config: Config, folder: Path) -> Config:
    source = config.model.path
    if source is None or source == "demo":
        return config
    model = config.model.model_copy(update={"path": str(folder / Path(source).expanduser())})
    return config.model_copy(update={"model": model})


def _plain(node: object) -> Any:
    """Return plain Python values: the loader's own number and string types would fail the strict checks."""
    if isinstance(node, dict):
        # A section without any line under it is the same as none.
        return {
            str(key): {} if value is None and key in Config.model_fields else _plain(value)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _syntax_problem(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        text = (error.problem or error.context or "not YAML").splitlines()[0]
        return f"line {mark.line + 1}: {text}" if mark is not None else text
    return str(error).splitlines()[0]


def _line_of(document: CommentedMap, location: tuple[int | str, ...]) -> int:
    """Return the 1-based line of the deepest part of `location` that the file has."""
    line, node = 1, document
    for name in location:
        if not isinstance(node, CommentedMap):
            break
        key = next((key for key in node if str(key) == str(name)), None)
        if key is None:
            break
        line = node.lc.key(key)[0] + 1
        node = node[key]
    return line


def _all_keys() -> Iterator[str]:
    for section, info in Config.model_fields.items():
        yield section
        assert isinstance(info.annotation, type)
        assert issubclass(info.annotation, BaseModel)
        for key in info.annotation.model_fields:
            yield f"{section}.{key}"


def _suggestion(name: str, location: tuple[int | str, ...]) -> str:
    """Return what the writer of an unknown key may have meant."""
    keys = list(_all_keys())
    close = difflib.get_close_matches(name, keys, n=1, cutoff=0.7)
    if not close:
        by_last = {key.rpartition(".")[2]: key for key in keys}
        close = [by_last[last] for last in difflib.get_close_matches(str(location[-1]), list(by_last), n=1, cutoff=0.7)]
    if close:
        return f"did you mean {close[0]}?"
    section = str(location[0])
    known = [key.partition(".")[2] for key in keys if key.startswith(f"{section}.")]
    if known:
        return f"the keys of {section} are {', '.join(known)}"
    return f"the sections are {', '.join(Config.model_fields)}"


def _problem(document: CommentedMap, entry: ErrorDetails) -> tuple[int, str]:
    location = entry["loc"]
    # The branches of a union add their own names at the end.
    known = location[:2]
    name = ".".join(str(part) for part in known)
    line = _line_of(document, known)
    if entry["type"] == "extra_forbidden":
        return line, f"{name}: unknown; {_suggestion(name, location)}"
    if entry["type"] == "model_type":
        return line, f"{name}: expected a section with keys, got {entry['input']!r}"
    message = entry["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "expected")
    shown = entry["input"]
    return line, f"{name}: {message}" if shown is None else f"{name}: {message}; got {shown!r}"
