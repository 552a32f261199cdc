"""docs/configuration.md says what the code does: variables of the services, keys of the file, its example."""

import importlib
import re
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr
from pydantic_settings import BaseSettings

from moe_debugger.config import Config, load_config

_DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"
_SERVICES = ("moe_analyzer", "moe_gateway", "moe_collector")
_ROW = re.compile(r"^\| (moe_\w+) \| `(MOE_\w+)` \| (.*?) \| (.*) \|$", re.MULTILINE)


def _settings(service: str) -> tuple[str, type[BaseSettings]]:
    """Return the prefix and the one settings class of a service."""
    module = importlib.import_module(f"{service}.settings")
    (found,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseSettings) and value.__module__ == module.__name__
    ]
    return module.ENV_PREFIX, found


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Path):
        return "the package's `static`"
    return f"`{value}`" if value not in ("", None) else "(empty)"


@pytest.mark.parametrize("service", _SERVICES)
def test_the_table_of_variables_is_what_the_service_reads(service: str) -> None:
    prefix, settings = _settings(service)
    in_code = [
        (prefix + name.upper(), _shown(field.get_default(call_default_factory=True)), field.description)
        for name, field in settings.model_fields.items()
    ]
    in_document = [row[1:] for row in _ROW.findall(_DOCUMENT.read_text(encoding="utf-8")) if row[0] == service]
    assert in_document == in_code


def test_every_variable_that_a_configuration_sets_exists() -> None:
    config = Config.model_validate(
        {
            "model": {"path": "demo", "device": "cpu", "precision": "float32"},
            "capture": {"level": "routes", "sampling_rate": 0.5, "buffer_size": 1 << 20},
            "thresholds": {"dead_expert": 0.1, "load_balance": 0.5, "routing_confidence": 0.1},
            "performance": {"batch_size": 2},
        }
    )
    known = {prefix + name.upper() for prefix, cls in map(_settings, _SERVICES) for name in cls.model_fields}
    assert config.service_env().keys() <= known


def test_the_example_names_every_key_and_is_accepted(tmp_path: Path) -> None:
    example = _DOCUMENT.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    path = tmp_path / "config.yaml"
    path.write_text(example, encoding="utf-8")
    config = load_config(path)
    for section, info in Config.model_fields.items():
        assert f"{section}:" in example
        assert isinstance(info.annotation, type)
        assert issubclass(info.annotation, BaseModel)
        for key in info.annotation.model_fields:
            assert re.search(rf"^  (# )?{key}\b", example, re.MULTILINE), f"{section}.{key}"
    # What the example shows are the defaults of the services.
    _, collector = _settings("moe_collector")
    for variable, value in config.service_env().items():
        if variable.startswith("MOE_COLLECTOR_"):
            default = collector.model_fields[variable.removeprefix("MOE_COLLECTOR_").lower()].default
            assert value.lower() == str(default).lower(), variable


def test_the_thresholds_of_a_file_are_those_of_the_analyzer(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_analyzer.settings import load_settings

    sections = {"thresholds": {"dead_expert": 0.1, "load_balance": 0.5, "routing_confidence": 0.2}}
    for variable, value in Config.model_validate(sections).service_env().items():
        monkeypatch.setenv(variable, value)
    thresholds = load_settings().thresholds
    assert (thresholds.dead_expert, thresholds.load_balance, thresholds.routing_confidence) == (0.1, 0.5, 0.2)
