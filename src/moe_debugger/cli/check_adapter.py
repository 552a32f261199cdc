"""`moe-debugger check-adapter`: proves an adapter of the user's by experiment."""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_debugger.cli._output import echo
from moe_debugger.errors import DependencyMissingError, InvalidInputError

if TYPE_CHECKING:
    from moe_debugger.capture import Adapter

__all__ = ["check_adapter"]

_EXIT_REFUSED = 1


def check_adapter(
    adapter: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="The adapter, as Python would import it.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Returns the model, or (model, inputs); or a local folder with safetensors weights.",
        ),
    ],
    max_experts: Annotated[int, typer.Option(min=1, help="Silence at most so many experts of a layer.")] = 64,
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Prove an adapter: silence one expert at a time, and compare which tokens' outputs move with what it reads.

    Modules are looked for in the current folder and among the installed packages, and are run: give only code that
    you trust. Ends with 1 where the adapter is refused. See docs/adapters.md.

    Examples:

    \b
      moe-debugger check-adapter glam_adapter:GlamAdapter --model modeling_glam:tiny_model
      moe-debugger check-adapter my_package.adapters:MyAdapter --model ./my-model --max-experts 16
    """
    if importlib.util.find_spec("torch") is None:
        raise DependencyMissingError(
            "torch is not installed, and it is needed to run a model: pip install 'moe-debugger[collector]'"
        )
    from moe_debugger.adapter_check import check_adapter as check

    checked = _adapter(adapter)
    built, inputs = _model(model)
    result = check(checked, built, inputs, max_experts=max_experts)
    if is_json:
        sys.stdout.write(json.dumps(_without_nan(result.to_dict()), allow_nan=False) + "\n")
    else:
        echo(str(result), err=not result.agrees)
    if not result.agrees:
        raise typer.Exit(_EXIT_REFUSED)


def _adapter(source: str) -> "Adapter":
    from moe_debugger.capture import Adapter

    found = _found(source, "the adapter")
    try:
        made = found if isinstance(found, Adapter) else found()
    except Exception as error:
        raise InvalidInputError(f"{source} could not be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, Adapter):
        raise InvalidInputError(f"{source} is a {type(made).__name__}, expected a subclass of moe_debugger.Adapter")
    return made


def _model(source: str) -> tuple[Any, Mapping[str, Any] | None]:
    if ":" not in source or Path(source).is_dir():
        from moe_debugger.models import load_model

        return load_model(source).model, None
    found = _found(source, "--model")
    try:
        made = found()
    except Exception as error:
        raise InvalidInputError(f"--model {source} raised {type(error).__name__}: {error}") from error
    if isinstance(made, tuple):
        if len(made) != 2 or not isinstance(made[1], Mapping):
            raise InvalidInputError(f"--model {source} returned a tuple; expected (model, inputs), inputs a mapping")
        return made[0], made[1]
    return made, None


def _found(source: str, what: str) -> Any:
    """Import what `module:name` names, as Python in the current folder would.

    Raises:
        InvalidInputError: there is no such thing, or importing it failed.
    """
    module_name, _, name = source.partition(":")
    if not module_name or not name:
        raise InvalidInputError(f"{what} {source!r}: expected MODULE:NAME, such as glam_adapter:GlamAdapter")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise InvalidInputError(
            f"{what} {source!r} cannot be imported: {type(error).__name__}: {error}; it is looked for in {folder} and "
            "among the installed packages"
        ) from error
    if not callable(found) and what == "--model":
        raise InvalidInputError(f"--model {source} is a {type(found).__name__}, expected a function without arguments")
    return found


def _without_nan(value: Any) -> Any:
    """Return `value` with None for NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
