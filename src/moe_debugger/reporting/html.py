"""Renders reports and comparisons as one page each: no script, one style whose hash the page's own policy names."""

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from moe_debugger._plain_text import plain_text
from moe_debugger.errors import DependencyMissingError
from moe_debugger.reporting.content import say, show

if TYPE_CHECKING:
    from jinja2 import Environment

    from moe_debugger.reporting.building import Report
    from moe_debugger.reporting.comparing import Diff

__all__ = ["diff_html", "report_html"]

# A page that lists more is read by nobody; JSON has all of them.
_MAX_CARDS, _MAX_FINDINGS = 20, 500
_MAX_PLACES = 12
_MAX_PASTE = 600
_GOOD, _FAIR = 75.0, 50.0


def report_html(report: "Report") -> str:
    """Return the page of a report."""
    return _page("report.html.j2", report=report)


def diff_html(diff: "Diff") -> str:
    """Return the page of a comparison."""
    return _page("diff.html.j2", diff=diff)


def tone_of(score: float | None) -> str:
    """Return "good", "fair", "poor" or "none" of a score."""
    if score is None:
        return "none"
    return "good" if score >= _GOOD else "fair" if score >= _FAIR else "poor"


def _page(template: str, **values: Any) -> str:
    environment, style = _environment(), _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    page = environment.get_template(template).render(
        style=style,
        style_hash=digest,
        max_cards=_MAX_CARDS,
        max_findings=_MAX_FINDINGS,
        max_places=_MAX_PLACES,
        max_paste=_MAX_PASTE,
        **values,
    )
    # Escaping keeps marks of text direction, which would turn round what follows a name.
    return plain_text(page, "\n\t")


@cache
def _environment() -> "Environment":
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise DependencyMissingError(
            "a page needs jinja2, which is not installed; run: pip install 'moe-debugger[report]'"
        ) from error
    from moe_debugger.reporting import svg

    made = Environment(
        loader=PackageLoader("moe_debugger.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["show"] = show
    made.filters["is_number"] = lambda value: isinstance(value, int | float)
    # The style is ours, and no text of a recording gets into it.
    made.filters["as_css"] = Markup
    made.globals.update(t=lambda code, **args: say(code, **args).text, draw=svg.draw, gauge=svg.gauge, tone_of=tone_of)
    return made


@cache
def _style() -> str:
    from moe_debugger.reporting.colours import css

    own = (resources.files("moe_debugger.reporting") / "templates" / "style.css").read_text("utf-8")
    dark, light = css("dark"), css("light")
    return own.replace("/*ramp:dark*/", dark).replace("/*ramp:light*/", light)
