"""The placement to apply: computed on the finding's layer, judged on held-out steps, or honestly none."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moe_debugger.analysis import EvidenceRow, Finding, FindingKind, Severity, finding_from_proto, finding_to_proto
from moe_debugger.analysis.explanation import Explanation, PlacementOptions, explain
from moe_debugger.planning import Placement

Floats = npt.NDArray[np.float64]


def loads(share: list[float], *, steps: int = 96, seed: int = 0) -> Floats:
    """Return [steps, 8] loads of 2,000 assignments a step."""
    return np.random.default_rng(seed).multinomial(2000, share, steps).astype(np.float64)


def explained(
    counts: Floats, kind: FindingKind = FindingKind.RANK_STRAGGLER, layer: int | None = 2, **options: Any
) -> Explanation:
    finding = Finding(kind, Severity.WARNING, kind.value, layer, evidence=(EvidenceRow("rank_imbalance", 2, "> 1.2"),))
    return explain(
        finding,
        is_training=False,
        top_k={2: 2},
        step_loads={2: counts},
        placement=PlacementOptions(num_ranks=4, **options),
    )


# Rank 0 holds both busy experts.
UNEVEN = [0.3, 0.3, *[0.4 / 6] * 6]


def test_hot_experts_on_one_rank_get_a_placement_with_its_gain_and_interval() -> None:
    found = explained(loads(UNEVEN))
    cause = found.causes[0]
    assert (cause.code, cause.rule) == ("placement_uneven", "placement.gain")
    remedy = found.remedies[0]
    assert (remedy.code, remedy.language, remedy.effect) == ("apply_placement", "json", "step_bound")
    assert remedy.effect_value is not None
    assert remedy.effect_lower is not None
    assert remedy.effect_upper is not None
    # Contiguous: 0.6 of the load on rank 0. Apart, one rank holds 0.3 + 0.067: a gain of 1 - 0.367 / 0.6 = 0.39;
    # copies do better.
    assert 0.38 < remedy.effect_lower <= remedy.effect_value <= remedy.effect_upper < 0.6
    change = json.loads(remedy.change)
    assert change.pop("layer_index") == 2
    placement = Placement.from_dict(change)
    ranks_of_busy = {int(rank) for rank in placement.slot_ranks[np.isin(placement.physical_to_logical[0], [0, 1])]}
    assert len(ranks_of_busy) > 1


def test_an_even_load_is_left_where_it_is() -> None:
    found = explained(loads([1 / 8] * 8))
    assert found.causes == ()
    assert (found.remedies[0].code, found.remedies[0].change) == ("keep_placement", "")
    assert found.remedies[0].args["reason"]


def test_the_placement_that_runs_is_what_it_is_compared_with() -> None:
    apart = {2: (0, 1, 2, 3, 0, 1, 2, 3)}
    found = explained(loads(UNEVEN), owners=apart)
    contiguous = explained(loads(UNEVEN))
    gain, other = found.remedies[0].effect_value, contiguous.remedies[0].effect_value
    assert gain is not None
    assert other is not None
    assert gain < other


def test_without_ranks_or_loads_it_says_what_to_supply() -> None:
    finding = Finding(FindingKind.RANK_STRAGGLER, Severity.WARNING, "rank_straggler", 2)
    found = explain(finding, is_training=False)
    assert [one.name for one in found.missing] == ["load history", "num_ranks", "loads of single steps"]
    assert found.status == "not_observable"
    assert found.remedies[0].code == "supply_observations"


def test_too_few_steps_are_no_ground_for_moving_experts() -> None:
    found = explained(loads(UNEVEN, steps=12))
    assert found.causes == ()
    assert found.remedies[0].code == "keep_placement"
    assert found.remedies[0].effect == "not_predicted"


def test_a_finding_keeps_its_explanation_on_the_wire() -> None:
    finding = Finding(FindingKind.RANK_STRAGGLER, Severity.WARNING, "rank_straggler", 2)
    found = explained(loads(UNEVEN))
    with_it = Finding(
        **{**{name: getattr(finding, name) for name in finding.__dataclass_fields__}, "explanation": found}
    )
    message = finding_to_proto(with_it)
    back = finding_from_proto(message).explanation
    assert back is not None
    assert back.to_dict() == {**found.to_dict(), "rule_id": "rank_straggler.l2"}
    assert message.explanation.causes[0].is_association
    assert message.explanation.status == "ranked"
    assert not finding_to_proto(finding).HasField("explanation")


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_that_do_not_divide_the_experts_are_planned_with_spare_slots(ranks: int) -> None:
    finding = Finding(FindingKind.HOT_EXPERT, Severity.WARNING, "hot_expert", 2, 0)
    found = explain(
        finding,
        is_training=False,
        top_k={2: 2},
        step_loads={2: loads(UNEVEN)},
        placement=PlacementOptions(num_ranks=ranks),
    )
    remedy = next(one for one in found.remedies if one.code in ("apply_placement", "keep_placement"))
    assert remedy.args["ranks"] == str(ranks)
