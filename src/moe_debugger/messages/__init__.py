"""Texts for people: a code and its args become a sentence by one catalogue, which the web page reads as well.

Templates are i18next's: ``{{name}}`` is replaced by the argument of that name. Findings have three keys each:
``finding.<code>.title``, ``.summary`` and ``.remedy``. ``sample.<metric>`` says what the sample size of a row of
evidence counts; ``sample.<code>.<metric>`` where a finding or cause of that code counts something else.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources

from moe_debugger.errors import InvalidInputError

__all__ = ["catalogue", "render", "render_finding", "sample_unit"]

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@cache
def catalogue(locale: str = "en") -> Mapping[str, str]:
    """Return all templates of `locale` by key.

    Raises:
        InvalidInputError: there is no such catalogue.
    """
    available = sorted(
        entry.name.removesuffix(".json")
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".json")
    )
    # Compared with the list, so that a locale from outside is never a path.
    if locale not in available:
        raise InvalidInputError(f"no message catalogue for locale {locale!r}; there are {available}")
    loaded: dict[str, str] = json.loads((resources.files(__name__) / f"{locale}.json").read_text("utf-8"))
    return loaded


def render(code: str, args: Mapping[str, object], locale: str = "en") -> str:
    """Return the sentence of `code` (a catalogue key) with `args` filled in.

    An unknown code renders as itself with its args, and an argument that is not given stays visible as ``{{name}}``:
    a message of a newer version must still say something.
    """
    template = catalogue(locale).get(code)
    if template is None:
        values = ", ".join(f"{name}={value}" for name, value in sorted(args.items()))
        return f"{code} ({values})" if values else code
    return _PLACEHOLDER.sub(lambda match: str(args.get(match[1], match[0])), template)


def render_finding(code: str, args: Mapping[str, object], part: str = "summary", locale: str = "en") -> str:
    """Return a finding's ``title``, ``summary`` or ``remedy``.

    Detectors of others bring their own words: where the catalogue has none, an argument of the part's name is the text.
    Of findings of plug-ins (``<plugin>.<code>``) without it, the title stands for the summary and the code for the
    title, and the remedy is empty.
    """
    if f"finding.{code}.{part}" in catalogue(locale):
        return render(f"finding.{code}.{part}", args, locale)
    if args.get(part):
        return str(args[part])
    plugin, _, own_code = code.partition(".")
    if not own_code:
        return render(f"finding.{code}.{part}", args, locale)
    if part == "remedy":
        return ""
    return str(args.get("title") or f"{own_code.replace('_', ' ')} ({plugin})")


def sample_unit(metric: str, code: str = "", unit: str = "", locale: str = "en") -> str:
    """Return what the sample size of a row of evidence counts, such as "tokens"; empty where that is not known.

    Args:
        metric: name of the row.
        code: of the finding or cause that the row is of.
        unit: of the row's value.
    """
    family = metric.split("_", 1)[0]
    # A check of the capture counts the same things as its violations.
    if family == "capture":
        return unit
    words = catalogue(locale)
    keys = (f"sample.{code}.{metric}", f"sample.{metric}", f"sample.{family}")
    return next((words[key] for key in keys if key in words), "")
