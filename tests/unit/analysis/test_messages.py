"""The catalogue and its renderer."""

import pytest

from moe_debugger.errors import InvalidInputError
from moe_debugger.messages import catalogue, render, render_finding, sample_unit


def test_render_fills_in_the_arguments() -> None:
    assert (
        render("finding.dead_expert.title", {"layer": 3, "expert": "6"})
        == "Expert 6 in layer 3 is unused on this workload"
    )


def test_render_keeps_an_argument_that_was_not_given_and_a_code_that_it_does_not_know() -> None:
    assert (
        render("finding.dead_expert.title", {"layer": 3}) == "Expert {{expert}} in layer 3 is unused on this workload"
    )
    assert render("finding.from_the_future.title", {"b": 2, "a": 1}) == "finding.from_the_future.title (a=1, b=2)"
    assert render("nothing", {}) == "nothing"


def test_findings_of_plugins_bring_their_own_words() -> None:
    args = {"title": "Layer 3 idles", "layer": "3"}
    assert render_finding("quiet-half.half_is_idle", args, "title") == "Layer 3 idles"
    assert render_finding("quiet-half.half_is_idle", args, "summary") == "Layer 3 idles"
    without = [
        render_finding("quiet-half.half_is_idle", {"layer": "3"}, part) for part in ("title", "summary", "remedy")
    ]
    assert without == ["half is idle (quiet-half)", "half is idle (quiet-half)", ""]
    # Words of our own findings cannot be replaced by an argument.
    assert render_finding("dead_expert", {**args, "expert": "6"}, "title").startswith("Expert 6 in layer 3")


def test_every_finding_has_a_title_a_summary_and_a_remedy() -> None:
    keys = {key for key in catalogue() if key.startswith("finding.")}
    codes = {key.rsplit(".", 1)[0] for key in keys}
    assert {f"{code}.{part}" for code in codes for part in ("title", "summary", "remedy")} == keys


@pytest.mark.parametrize(
    ("metric", "code", "unit", "expected"),
    [
        ("effective_experts", "router_collapse", "experts", "tokens"),
        ("effective_experts", "collapse_warning", "experts", "points of steps"),
        ("p_value", "hot_expert", "", "blocks"),
        ("profile_slow_expert_low", "profile_slow_expert", "x", "calls"),
        ("capture_range", "capture_unhealthy", "slots", "slots"),
        ("mine", "mine.skew", "x", ""),
    ],
)
def test_a_sample_size_has_the_unit_of_its_metric(metric: str, code: str, unit: str, expected: str) -> None:
    assert sample_unit(metric, code, unit) == expected


@pytest.mark.parametrize("locale", ["xx", "../en", "en/../../secret"])
def test_an_unknown_locale_is_refused(locale: str) -> None:
    with pytest.raises(InvalidInputError, match="no message catalogue"):
        catalogue(locale)
