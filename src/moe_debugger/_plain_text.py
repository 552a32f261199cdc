"""Texts of others (recordings, models, plug-ins), before they are shown on a page or a terminal."""

import re

__all__ = ["plain_text"]

# What a terminal or a page would obey, and what cannot be sent: C0 and C1 controls, marks of text direction, line and
# paragraph separators, surrogates.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_text(text: str, keeps: str = "") -> str:
    """Return `text` with a space for each control character but those of `keeps`.

    Data in files (JSON, CSV, Parquet) stays as it is; this is for what people look at.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keeps else " ", text)
