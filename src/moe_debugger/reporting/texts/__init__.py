"""Words of reports and comparisons: a code and its args become a sentence by one catalogue for each locale.

They have a catalogue of their own because the page, which loads the one of the findings, shows none of them.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources

__all__ = ["catalogue", "sentence"]

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@cache
def catalogue(locale: str = "en") -> Mapping[str, str]:
    """Return all templates of `locale` by code; there is "en" so far."""
    loaded: dict[str, str] = json.loads((resources.files(__name__) / f"{locale}.json").read_text("utf-8"))
    return loaded


def sentence(code: str, args: Mapping[str, str]) -> str:
    """Return the sentence of `code`; one that is not known, as of a newer version, renders as itself with its args."""
    template = catalogue().get(code)
    if template is None:
        return f"{code} ({', '.join(f'{name}={value}' for name, value in sorted(args.items()))})" if args else code
    return _PLACEHOLDER.sub(lambda match: args.get(match[1], match[0]), template)
