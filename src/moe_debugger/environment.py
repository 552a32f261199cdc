"""A service's settings from its environment variables, with all problems at once."""

import os
from collections.abc import Collection, Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from moe_debugger.errors import ConfigError

__all__ = ["read_settings"]

_Settings = TypeVar("_Settings", bound=BaseModel)


def read_settings(
    settings: type[_Settings],
    *,
    prefix: str,
    service: str,
    secrets: Collection[str],
    environ: Mapping[str, str] | None = None,
) -> _Settings:
    """Read the variables that begin with `prefix`.

    Args:
        settings: the class; `<prefix><FIELD>` is the variable of a field.
        prefix: of all variables of this service.
        service: the service's name in the error's text.
        secrets: fields whose values no text shows.
        environ: instead of this process's environment.

    Raises:
        ConfigError: a value is wrong or a variable is unknown; the error lists all of them.
    """
    names = {prefix + name.upper() for name in settings.model_fields}
    source = os.environ if environ is None else environ
    found = {key: value for key, value in source.items() if key.startswith(prefix)}
    problems = [
        f"{key}: there is no such setting; the settings are {', '.join(sorted(names))}"
        for key in sorted(found.keys() - names)
    ]
    values = {key.removeprefix(prefix).lower(): value for key, value in found.items() if key in names}

    def problem(location: tuple[int | str, ...], message: str, value: object) -> str:
        message = message.removeprefix("Value error, ")
        if not location:
            return message
        name = str(location[0])
        shown = "(not shown)" if name in secrets else repr(value)
        return f"{prefix}{name.upper()}={shown}: {message}"

    try:
        result = settings.model_validate(values)
    except ValidationError as error:
        problems += [problem(entry["loc"], entry["msg"], entry["input"]) for entry in error.errors()]
        raise ConfigError(f"environment of the {service}", problems) from None
    if problems:
        raise ConfigError(f"environment of the {service}", problems)
    return result
