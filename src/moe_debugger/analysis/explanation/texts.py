"""Explanations in words, for terminals and logs."""

import math
from collections.abc import Sequence

from moe_debugger._plain_text import plain_text
from moe_debugger.analysis.explanation.model import Explanation, Onset, Remedy
from moe_debugger.messages import render

__all__ = ["effect_text", "explanation_text", "onset_text"]


def explanation_text(explanation: Explanation, locale: str = "en") -> list[str]:
    """Return an explanation as lines: since when, how it spread, causes with weights, what is missing, remedies.

    A space stands for each control character that names (of series, say) hold.
    """
    lines = [onset_text(explanation.started_at, explanation.spread, locale)]
    if len(explanation.spread) > 1:
        layers = ", ".join(f"{layer} (step {step})" for layer, step in explanation.spread)
        lines.append(render("explanation.spread", {"layers": layers}, locale))
    lines.append(render(f"explanation.{explanation.status}", explanation.status_args, locale))
    for cause in explanation.causes:
        words = render(f"cause.{cause.code}", cause.args, locale)
        lines.append(f"  {cause.weight:4.0%}  {words} [{cause.rule}, {cause.score:.1f} nats]")
    if explanation.causes and explanation.missing:
        names = ", ".join(one.name for one in explanation.missing)
        lines.append(render("remedy.supply_observations", {"names": names}, locale))
    for remedy in explanation.remedies:
        lines.append(f"> {render(f'remedy.{remedy.code}', remedy.args, locale)} ({effect_text(remedy, locale)})")
        lines += [f"    {line}" for line in remedy.change.splitlines()]
    if explanation.rows is not None:
        lines.append(f"rows: {explanation.rows.query}")
    return [plain_text(line) for line in lines]


def onset_text(onset: Onset | None, spread: Sequence[tuple[int, int]] = (), locale: str = "en") -> str:
    """Return where and when it began; a `spread` without a beginning was there from the first step seen."""
    if onset is None and spread:
        return render("explanation.from_the_first_step", {"layer": spread[0][0], "step": spread[0][1]}, locale)
    if onset is None:
        return render("explanation.no_start", {}, locale)
    code = "explanation.crossed_at" if math.isnan(onset.before) else "explanation.started_at"
    args = {
        "layer": onset.layer_index,
        "step": onset.step,
        "first": onset.first_step,
        "last": onset.last_step,
        "metric": onset.metric,
        "before": f"{onset.before:.3g}",
        "after": f"{onset.after:.3g}",
    }
    return render(code, args, locale)


def effect_text(remedy: Remedy, locale: str = "en") -> str:
    """Return the expected effect of a remedy."""
    scale = 100 if remedy.effect == "step_bound" else 1
    values = {"value": remedy.effect_value, "lower": remedy.effect_lower, "upper": remedy.effect_upper}
    return render(
        f"effect.{remedy.effect}",
        {name: f"{scale * value:.3g}" for name, value in values.items() if value is not None},
        locale,
    )
