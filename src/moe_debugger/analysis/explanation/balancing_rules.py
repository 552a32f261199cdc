"""Causes in what keeps the load balanced: the balancing term, its coefficient and sign, the selection bias."""

import math
from collections.abc import Iterator

import numpy as np

from moe_debugger.analysis.explanation.association import CAP, Correlation, onset_score, rank_correlation
from moe_debugger.analysis.explanation.change_points import find_change
from moe_debugger.analysis.explanation.context import Context, Floats, began, cause, number
from moe_debugger.analysis.explanation.model import Cause
from moe_debugger.analysis.explanation.settings import Jump, Setting
from moe_debugger.analysis.findings import EvidenceRow, FindingKind

__all__ = ["balance_correlation", "balancing_causes"]

# Balancing term over task loss, below which it can hardly move a router. Fedus et al. 2021 (sec. 2.2) train with
# 0.01 * 1 beside a loss of about 2 to 3, which is 0.4 %.
_WEAK_SHARE = 1e-4
_STRONG_SHARE = 0.3
# A rank correlation of balancing loss and effective experts above this has the wrong sign.
_WRONG_SIGN = 0.5
# The balancing loss rises although its coefficient is positive: that it does not hold is seen, why it does not is not.
_NOT_HOLDING = math.log(2)
_MIN_POINTS = 5
_STRONG_KINDS = (FindingKind.LOW_CONFIDENCE, FindingKind.DRIFT, FindingKind.DUPLICATE_EXPERTS)


def balancing_causes(context: Context) -> Iterator[Cause]:
    """Yield what the balancing settings show."""
    coefficient = context.settings.get("balance_coef")
    if context.is_about_balance:
        if coefficient is not None:
            yield from _coefficient(context, coefficient)
        else:
            yield from _flat_loss(context)
        yield from _wrong_sign_of_loss(context)
        yield from _not_holding(context, coefficient)
        yield from _selection_bias(context)
    yield from _share_of_loss(context, coefficient)


def _coefficient(context: Context, setting: Setting) -> Iterator[Cause]:
    """balance.absent, balance.sign.coefficient and balance.coefficient.changed, of the coefficient's own values."""
    values = context.now(setting)
    if not len(values):
        values = setting.finite()[1]
    level = float(np.median(values))
    before = context.before(setting)
    was = float(np.median(before)) if len(before) else float("nan")
    jump, score = _nearest_jump(context, setting, level)
    row = EvidenceRow("balance_coef", level, "", None if math.isnan(was) else was, len(values))
    args = {"now": number(level), "before": number(was) if len(before) else "", "step": _step_of(jump)}
    if level < 0:
        row = EvidenceRow("balance_coef", level, "< 0", row.baseline, len(values))
        code = "balancing_sign_wrong" if jump is None else "balancing_sign_turned"
        yield cause(code, "balance.sign.coefficient", CAP + score, evidence=(row,), setting="balance_coef", **args)
    elif level == 0:
        row = EvidenceRow("balance_coef", level, "= 0", row.baseline, len(values))
        code = "balancing_absent" if jump is None else "balancing_turned_off"
        yield cause(code, "balance.absent", CAP + score, evidence=(row,), setting="balance_coef", **args)
    elif jump is not None and score > 0 and abs(level) < abs(jump.before):
        when = began(jump.step, context.onset)
        args |= {"now": number(jump.after), "before": number(jump.before), "when": when}
        row = EvidenceRow("balance_coef", jump.after, f"changed {when}", jump.before, len(values))
        yield cause("balancing_reduced", "onset.jump", score, evidence=(row,), setting="balance_coef", **args)


def _nearest_jump(context: Context, setting: Setting, level: float) -> tuple[Jump | None, float]:
    """Return the last jump to the level of now that came before the onset, and its score; None without one."""
    jumps = setting.jumps()
    towards = [one for one in jumps if math.isclose(one.after, level, rel_tol=0.5, abs_tol=1e-12)]
    scored = [
        (onset_score(one.step, context.onset, context.num_steps(setting), num_changes=len(jumps)), one)
        for one in towards
    ]
    if not scored:
        return None, 0.0
    score, jump = max(scored, key=lambda item: (item[0], item[1].step))
    return jump, score


def _step_of(jump: Jump | None) -> str:
    return "" if jump is None else str(jump.step)


def _flat_loss(context: Context) -> Iterator[Cause]:
    """balance.flat: the logged balancing loss does not move while the load does, so it does not see the load."""
    setting = context.settings.get("balance_loss")
    if setting is None or context.onset is None:
        return
    _, values = setting.finite()
    if len(values) < 2 * _MIN_POINTS or np.ptp(values) > 1e-9 * max(1.0, float(np.abs(values).max())):
        return
    row = EvidenceRow("balance_loss", float(values[0]), "constant while the load changed", None, len(values))
    yield cause(
        "balancing_does_not_see_load", "balance.flat", CAP, evidence=(row,), setting="balance_loss",
        value=number(float(values[0])),
    )  # fmt: skip


def balance_correlation(context: Context) -> Correlation | None:
    """Return the rank correlation of the balancing loss and the mean log of effective experts; -1 where it is right."""
    if "balance" not in context.cache:
        context.cache["balance"] = _balance_correlation(context)
    found: Correlation | None = context.cache["balance"]
    return found


def _balance_correlation(context: Context) -> Correlation | None:
    setting = context.settings.get("balance_loss")
    if setting is None or not context.histories:
        return None
    # A loss of the whole model goes with all its layers; each is taken over the buckets of the first.
    reference = next(iter(context.histories.values()))
    together: Floats = np.zeros(len(reference.steps))
    for history in context.histories.values():
        if len(history.steps):
            together += np.interp(reference.steps, history.steps, np.log(history.effective_experts))
    return rank_correlation(*_paired(setting, reference.steps, together))


def _paired(setting: Setting, steps: np.ndarray[tuple[int, ...], np.dtype[np.int64]], values: Floats) -> tuple[
    Floats, Floats
]:  # fmt: skip
    """Return the setting's mean in each bucket that begins at `steps`, and `values` of those buckets that have one."""
    own, numbers = setting.finite()
    place = np.searchsorted(steps, own, side="right") - 1
    inside = place >= 0
    sizes = np.bincount(place[inside], minlength=len(steps)).astype(np.float64)
    sums = np.bincount(place[inside], numbers[inside], minlength=len(steps))
    has = sizes > 0
    return sums[has] / sizes[has], values[has]


def _wrong_sign_of_loss(context: Context) -> Iterator[Cause]:
    """balance.sign.correlation: the logged loss is lowest where the load is least even, so minimising it collapses."""
    correlation = balance_correlation(context)
    if correlation is None or correlation.value < _WRONG_SIGN:
        return
    row = EvidenceRow(
        "rank_correlation(balance_loss, effective_experts)",
        correlation.value,
        f">= {_WRONG_SIGN}",
        -1.0,
        correlation.num_pairs,
    )
    yield cause(
        "balancing_loss_inverted", "balance.sign.correlation", correlation.score, evidence=(row,),
        setting="balance_loss", value=number(correlation.value),
    )  # fmt: skip


def _not_holding(context: Context, coefficient: Setting | None) -> Iterator[Cause]:
    """balance.rising: the loss rises with the onset although it is observed to be weighted positively."""
    setting, correlation = context.settings.get("balance_loss"), balance_correlation(context)
    if setting is None or coefficient is None or correlation is None or correlation.value >= _WRONG_SIGN:
        return
    weights = context.now(coefficient)
    if not len(weights) or np.median(weights) <= 0 or context.onset is None:
        return
    before, now = context.before(setting), context.now(setting)
    if len(before) < _MIN_POINTS or len(now) < _MIN_POINTS:
        return
    steps, values = setting.finite()
    change = find_change(values[-512:], direction=1)
    if change is None or not change.is_significant:
        return
    row = EvidenceRow(
        "balance_loss", float(np.median(now)), "rises since the onset", float(np.median(before)), len(now)
    )
    yield cause(
        "balancing_not_effective", "balance.rising", _NOT_HOLDING, evidence=(row,), setting="balance_loss",
        now=number(row.value), before=number(float(np.median(before))), coefficient=number(float(np.median(weights))),
        step=str(int(steps[-512:][change.onset])),
    )  # fmt: skip


def _share_of_loss(context: Context, coefficient: Setting | None) -> Iterator[Cause]:
    """balance.weak and balance.strong: the balancing term beside the task loss."""
    balance, loss = context.settings.get("balance_loss"), context.settings.get("loss")
    if coefficient is None or balance is None or loss is None:
        return
    parts = [context.now(one) for one in (coefficient, balance, loss)]
    if any(not len(part) for part in parts):
        return
    weight, term, task = (float(np.median(part)) for part in parts)
    if weight <= 0 or task == 0:
        return
    share = abs(weight * term / task)
    args = {"share": number(100 * share), "coefficient": number(weight)}
    sample = min(len(part) for part in parts)
    if context.is_about_balance and 0 < share < _WEAK_SHARE:
        row = EvidenceRow("balance_coef * balance_loss / loss", share, f"< {_WEAK_SHARE:g}", None, sample)
        yield cause(
            "balancing_too_weak", "balance.weak", math.log(_WEAK_SHARE / share), evidence=(row,),
            setting="balance_coef", **args,
        )  # fmt: skip
    if context.finding.kind in _STRONG_KINDS and share > _STRONG_SHARE:
        row = EvidenceRow("balance_coef * balance_loss / loss", share, f"> {_STRONG_SHARE:g}", None, sample)
        yield cause(
            "balancing_too_strong", "balance.strong", math.log(2 * share / _STRONG_SHARE), evidence=(row,),
            setting="balance_coef", **args,
        )  # fmt: skip


def _selection_bias(context: Context) -> Iterator[Cause]:
    """bias.wrong_way: around the onset, the wider the selection biases are spread, the fewer experts are used."""
    index = context.finding.layer_index
    if index is None or index not in context.histories:
        return
    low = context.settings.get("selection_bias_min", index)
    high = context.settings.get("selection_bias_max", index)
    if low is None or high is None:
        return
    steps, at_low, at_high = np.intersect1d(low.steps, high.steps, return_indices=True)
    spread = Setting("selection_bias_spread", index, steps, (high.values[at_high] - low.values[at_low])[:, :1])
    history, onset = context.histories[index], context.onset
    begin = 0
    if onset is not None:
        # Healthy biases spread, too, while they even out the load: as many buckets count before it as since it began.
        since = int(np.searchsorted(history.steps, onset.first_step))
        begin = max(0, 2 * since - len(history.steps))
    correlation = rank_correlation(*_paired(spread, history.steps[begin:], np.log(history.effective_experts[begin:])))
    if correlation is None or correlation.value > -_WRONG_SIGN:
        return
    before, now = context.before(spread), context.now(spread)
    evidence = (
        EvidenceRow(
            "rank_correlation(selection_bias_spread, effective_experts)",
            correlation.value,
            f"<= {-_WRONG_SIGN}",
            None,
            correlation.num_pairs,
        ),
        EvidenceRow(
            "selection_bias_spread",
            float(np.median(now)) if len(now) else float("nan"),
            "",
            float(np.median(before)) if len(before) else None,
            len(now),
        ),
    )
    yield cause(
        "selection_bias_wrong_way", "bias.wrong_way", correlation.score, evidence=evidence,
        setting="selection_bias_max", layer=str(index), value=number(correlation.value),
    )  # fmt: skip
