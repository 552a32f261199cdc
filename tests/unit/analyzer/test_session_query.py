"""What the page links to can be asked of a live session."""

import pytest

from moe_analyzer.session_query import _capabilities
from moe_debugger.analysis import Finding, FindingKind, Severity
from moe_debugger.analysis.explanation.explain import _rows
from moe_debugger.query import FLEET_LIMITS, parse
from moe_debugger.query.binding import bind


@pytest.mark.parametrize("kind", list(FindingKind))
@pytest.mark.parametrize("expert_id", [None, 5])
@pytest.mark.parametrize("since", [None, 120])
def test_the_rows_behind_every_finding_can_be_asked_for(
    kind: FindingKind, expert_id: int | None, since: int | None
) -> None:
    link = _rows(Finding(kind, Severity.WARNING, str(kind), layer_index=3, expert_id=expert_id), since)
    if link is None:
        assert kind in (FindingKind.CAPTURE_UNHEALTHY, FindingKind.RANK_STRAGGLER)
        return
    plan = bind(parse(link.query), link.query, _capabilities("mixtral", True, True), FLEET_LIMITS)
    assert plan.scope.layers == frozenset({3})


@pytest.mark.parametrize(
    ("has_rows", "has_token_ids", "name", "text", "is_refused"),
    [
        (True, True, "demo", 'experts where token = "a"', False),
        (True, True, "mixtral", 'experts where token = "a"', True),
        (True, True, "mixtral", "experts where token_id = 5", False),
        (True, False, "demo", "experts where token_id = 5", True),
        (True, False, "demo", "tokens where layer = 3", False),
        (False, False, "demo", "tokens where layer = 3", True),
        (False, False, "demo", "steps where layer = 3", False),
        (False, False, "demo", "experts where load > 2x", False),
    ],
)
def test_what_the_sources_do_not_send_is_refused_with_the_reason(
    *, has_rows: bool, has_token_ids: bool, name: str, text: str, is_refused: bool
) -> None:
    capabilities = _capabilities(name, has_rows, has_token_ids)
    if is_refused:
        with pytest.raises(ValueError, match="a live session has no"):
            bind(parse(text), text, capabilities, FLEET_LIMITS)
    else:
        assert bind(parse(text), text, capabilities, FLEET_LIMITS)
