"""Causes in the rest of the training's settings: learning rate, gradients, and any setting that jumped at the onset."""

from collections.abc import Iterator

import numpy as np

from moe_debugger.analysis.explanation.association import CAP, onset_score
from moe_debugger.analysis.explanation.change_points import find_change
from moe_debugger.analysis.explanation.context import Context, began, cause, number
from moe_debugger.analysis.explanation.model import Cause
from moe_debugger.analysis.explanation.settings import Jump, Setting
from moe_debugger.analysis.findings import EvidenceRow, FindingKind

__all__ = ["training_causes"]

_LR_FACTOR = 2.0
_GRADIENT_FACTOR = 5.0
# A gradient that fell to less than this part has vanished.
_VANISHED = 0.1
_MIN_POINTS = 5
# A setting is changed by hand a few times; a series that jumps more often, or is noisy, is something measured.
_MAX_JUMPS = 5
# Measured, not set; and the settings that have rules of their own.
_OUTCOMES = ("loss", "eval_loss", "balance_loss", "grad_norm", "router_z_loss", "balance_coef", "lr")


def training_causes(context: Context) -> Iterator[Cause]:
    """Yield what learning rate, gradients and other settings show."""
    if context.finding.kind in (FindingKind.CAPTURE_UNHEALTHY, FindingKind.RANK_STRAGGLER):
        return
    yield from _spike(context, "lr", _LR_FACTOR, "learning_rate_spike", "lr.spike")
    yield from _spike(context, "grad_norm", _GRADIENT_FACTOR, "gradient_spike", "gradient.spike")
    yield from _router_gradient(context)
    yield from _expert_gradient(context)
    for setting in context.settings.model_settings():
        if setting.name not in _OUTCOMES:
            yield from _other_setting(context, setting)


def _spike(context: Context, name: str, factor: float, code: str, rule: str) -> Iterator[Cause]:
    """lr.spike, gradient.spike: a value above the largest of the ten before it, `factor` times, before the onset."""
    setting = context.settings.get(name)
    if setting is None:
        return
    spikes = setting.spikes(factor)
    best = _best(context, setting, spikes)
    if best is None:
        return
    score, spike = best
    row = EvidenceRow(name, spike.after, f">= {factor:g} x the 10 values before", spike.before, len(setting.steps))
    yield cause(
        code, rule, score, evidence=(row,), setting=name,
        before=number(spike.before), now=number(spike.after), step=str(spike.step),
        when=began(spike.step, context.onset),
    )  # fmt: skip


def _best(context: Context, setting: Setting, jumps: list[Jump]) -> tuple[float, Jump] | None:
    scored = [
        (onset_score(one.step, context.onset, context.num_steps(setting), num_changes=len(jumps)), one) for one in jumps
    ]
    best = max(scored, key=lambda item: (item[0], item[1].step), default=None)
    return best if best is not None and best[0] > 0 else None


def _router_gradient(context: Context) -> Iterator[Cause]:
    """gradient.router.none: zero where other layers have one; gradient.router.vanished: it fell before the onset."""
    index = context.finding.layer_index
    if index is None:
        return
    setting = context.settings.get("router_gradient_norm", index)
    if setting is None:
        return
    steps, values = setting.finite()
    if len(values) < _MIN_POINTS:
        return
    others = [
        one.finite()[1] for layer, one in context.settings.layers("router_gradient_norm").items() if layer != index
    ]
    if not values.any():
        if any(other.any() for other in others):
            row = EvidenceRow("router_gradient_norm", 0.0, "= 0, other layers have one", None, len(values))
            yield cause(
                "router_gets_no_gradient", "gradient.router.none", CAP, evidence=(row,),
                setting="router_gradient_norm", layer=str(index),
            )  # fmt: skip
        return
    smallest = float(values[values > 0].min())
    change = find_change(np.log(np.maximum(values, smallest * 1e-3))[-512:], direction=-1)
    if change is None or not change.is_significant or np.exp(change.after - change.before) > _VANISHED:
        return
    at = int(steps[-512:][change.onset])
    score = onset_score(at, context.layer_onset, context.num_steps(setting))
    if score <= 0:
        return
    before, after = float(np.exp(change.before)), float(np.exp(change.after))
    row = EvidenceRow("router_gradient_norm", after, f"< {_VANISHED:g} x before", before, len(values))
    yield cause(
        "router_gradient_vanished", "gradient.router.vanished", score, evidence=(row,),
        setting="router_gradient_norm", layer=str(index), before=number(before), now=number(after), step=str(at),
        when=began(at, context.layer_onset),
    )  # fmt: skip


def _expert_gradient(context: Context) -> Iterator[Cause]:
    """gradient.expert.none: an expert that gets tokens and no gradient is frozen or detached."""
    index, expert = context.finding.layer_index, context.finding.expert_id
    if index is None or expert is None:
        return
    setting, history = context.settings.get("expert_gradient_norm", index), context.histories.get(index)
    if setting is None or history is None or expert >= min(setting.values.shape[1], history.num_experts):
        return
    column = setting.values[:, expert]
    known = np.isfinite(column)
    others = np.delete(setting.values, expert, axis=1)
    load = float(history.counts[:, expert].sum())
    if known.sum() < _MIN_POINTS or column[known].any() or not np.nansum(others) > 0 or not load:
        return
    row = EvidenceRow("expert_gradient_norm", 0.0, "= 0 although it gets tokens", None, int(known.sum()))
    yield cause(
        "expert_gets_no_gradient", "gradient.expert.none", CAP, evidence=(row,), setting="expert_gradient_norm",
        layer=str(index), expert=str(expert), assignments=f"{load:.0f}",
    )  # fmt: skip


def _other_setting(context: Context, setting: Setting) -> Iterator[Cause]:
    """onset.jump: any other observed setting of the model that jumped before the onset or as it began."""
    jumps = setting.jumps()
    if not 0 < len(jumps) <= _MAX_JUMPS or not setting.looks_set():
        return
    best = _best(context, setting, jumps)
    if best is None:
        return
    score, jump = best
    when = began(jump.step, context.onset)
    row = EvidenceRow(setting.name, jump.after, f"changed {when}", jump.before, len(setting.steps))
    yield cause(
        "setting_changed", "onset.jump", score, evidence=(row,), setting=setting.name,
        name=setting.name, before=number(jump.before), now=number(jump.after), step=str(jump.step),
        when=when,
    )  # fmt: skip
