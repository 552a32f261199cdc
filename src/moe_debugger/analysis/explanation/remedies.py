"""What to change, for each cause and for each kind of finding. Values are those that were observed, never guessed."""

from collections.abc import Iterator

import numpy as np

from moe_debugger.analysis.explanation.context import Context, number
from moe_debugger.analysis.explanation.data_rules import capacity_factor_needed
from moe_debugger.analysis.explanation.model import Cause, Missing, Remedy
from moe_debugger.analysis.explanation.placement_rules import PLACEMENT_KINDS, placement_remedies
from moe_debugger.analysis.findings import FindingKind

__all__ = ["missing_of", "remedies_of"]

# Fedus et al. 2021 (arXiv:2101.03961), sec. 2.2: for a task loss in nats and the loss of eq. 4.
_SWITCH_COEFFICIENT = 0.01
_LOSS = "loss = task_loss + balance_coef * balance_loss  # plus: minus drives the load onto few experts"
_BIAS = (
    "expert_bias += update_rate * torch.sign(load.mean() - load)  # up where the load is below the mean "
    "(arXiv:2408.15664, algorithm 1)"
)
_UNFREEZE = (
    "for name, parameter in model.named_parameters():\n"
    "    if {module!r} in name:\n"
    "        assert parameter.requires_grad, name  # and is in an optimizer group; detach() nowhere in its path"
)


def remedies_of(context: Context, causes: tuple[Cause, ...], missing: tuple[Missing, ...]) -> Iterator[Remedy]:
    """Yield the changes, those of the likeliest cause first; then those of the finding itself."""
    for one in causes:
        yield from _of_cause(context, one)
    yield from placement_remedies(context)
    yield from _of_finding(context)
    if missing and not causes:
        yield Remedy(
            "supply_observations",
            {"names": ", ".join(one.name for one in missing)},
            change="\n".join(dict.fromkeys(one.change for one in missing if one.change)),
            language="python",
        )


def _of_cause(context: Context, one: Cause) -> Iterator[Remedy]:
    code, args = one.code, one.args
    if code in ("balancing_sign_turned", "balancing_turned_off", "balancing_reduced"):
        yield from _restored(one)
        if code == "balancing_sign_turned":
            yield Remedy("add_the_balancing_loss", {}, _LOSS, "python", cause=code)
    elif code == "balancing_sign_wrong":
        value = abs(float(args["now"]))
        yield Remedy("add_the_balancing_loss", {}, _LOSS, "python", cause=code)
        yield Remedy(
            "turn_coefficient",
            {"now": args["now"], "value": number(value)},
            f"router_aux_loss_coef: {value:g}  # observed as balance_coef: {args['now']}",
            "yaml",
            cause=code,
        )
    elif code == "balancing_absent":
        yield Remedy(
            "turn_balancing_on",
            {"value": number(_SWITCH_COEFFICIENT)},
            f"router_aux_loss_coef: {_SWITCH_COEFFICIENT:g}  # observed as balance_coef: 0; "
            "Fedus et al. 2021, sec. 2.2, use this value",
            "yaml",
            cause=code,
        )
    elif code in ("balancing_too_weak", "balancing_too_strong"):
        observed = float(args["coefficient"])
        # To a share of the task loss of 0.4 %, which is what 0.01 times 1 is beside a loss of 2.5 nats.
        value = observed * 0.4 / float(args["share"])
        yield Remedy(
            "rescale_coefficient",
            {"now": args["coefficient"], "value": number(value)},
            f"router_aux_loss_coef: {value:.2g}  # observed as balance_coef: {observed:g}; makes it 0.4 % of the loss",
            "yaml",
            cause=code,
        )
    elif code in ("balancing_loss_inverted", "balancing_does_not_see_load"):
        yield Remedy(
            "fix_balancing_loss",
            {},
            "balance_loss = num_experts * (load_share.detach() * mean_probability).sum()  # per layer, 1 at balance",
            "python",
            cause=code,
        )
    elif code == "balancing_not_effective":
        yield Remedy("add_the_balancing_loss", {}, _LOSS, "python", cause=code)
    elif code == "selection_bias_wrong_way":
        yield Remedy("turn_bias_update", {"layer": args["layer"]}, _BIAS, "python", cause=code)
    elif code == "learning_rate_spike":
        yield Remedy(
            "lower_learning_rate",
            {"before": args["before"], "now": args["now"]},
            f"learning_rate: {args['before']}  # observed: {args['now']} at step {args['step']}",
            "yaml",
            cause=code,
        )
    elif code == "gradient_spike":
        yield Remedy(
            "clip_gradients",
            {"value": args["before"]},
            f"torch.nn.utils.clip_grad_norm_(model.parameters(), {args['before']})  # grad_norm before step "
            f"{args['step']} (median)",
            "python",
            cause=code,
        )
    elif code in ("router_gets_no_gradient", "router_gradient_vanished", "expert_gets_no_gradient"):
        module = "experts" if code.startswith("expert") else "gate"
        yield Remedy("check_gradient_path", args, _UNFREEZE.format(module=module), "python", cause=code)
    elif code == "setting_changed":
        yield Remedy(
            "restore_setting",
            {"name": args["name"], "before": args["before"], "now": args["now"]},
            f"{args['name']}: {args['before']}  # observed: {args['now']} since step {args['step']}",
            "yaml",
            cause=code,
        )
    elif code == "data_changed":
        yield Remedy(
            "compare_data",
            {"step": args["step"], "kind": args["kind"]},
            f"tokens where step >= {args['step']} by token_id show count() order by count() desc limit 20",
            "query",
            cause=code,
        )
    elif code in ("one_token_dominates", "one_request_dominates"):
        yield from _dominating(context, one)


def _restored(one: Cause) -> Iterator[Remedy]:
    before = float(one.args["before"]) if one.args["before"] else float("nan")
    if before > 0:
        yield Remedy(
            "restore_coefficient",
            {"before": one.args["before"], "now": one.args["now"], "step": one.args["step"]},
            f"router_aux_loss_coef: {one.args['before']}  # observed as balance_coef before step {one.args['step']}; "
            f"since then {one.args['now']}",
            "yaml",
            cause=one.code,
        )


def _dominating(context: Context, one: Cause) -> Iterator[Remedy]:
    column = "token_id" if one.code == "one_token_dominates" else "request"
    value = one.args["name"] if column == "token_id" else '"' + one.args["name"].replace('"', "'") + '"'
    row = one.evidence[0]
    yield Remedy(
        "look_at_dominating_rows",
        {"name": one.args["name"], "layer": one.args["layer"]},
        f"tokens where layer = {one.args['layer']} and {column} = {value}",
        "query",
        effect="metric_without",
        effect_value=row.baseline,
        cause=one.code,
    )


def _of_finding(context: Context) -> Iterator[Remedy]:
    finding = context.finding
    if finding.kind is FindingKind.CAPACITY_OVERFLOW and finding.layer_index is not None and context.rows is not None:
        history = context.histories.get(finding.layer_index)
        limit = next((_limit(row.rule) for row in finding.evidence if row.metric == "dropped_share"), None)
        if history is None or limit is None:
            return
        factor = capacity_factor_needed(context.rows, finding.layer_index, history.num_experts, limit)
        if factor is not None:
            yield Remedy(
                "raise_capacity_factor",
                {"factor": number(factor), "limit": number(100 * limit)},
                f"capacity_factor: {factor:.2f}",
                "yaml",
                effect="dropped_share_at_most",
                effect_value=limit,
            )
    if finding.kind in (FindingKind.DEAD_EXPERT, FindingKind.COLD_EXPERT):
        yield Remedy(
            "send_other_workloads",
            {"expert": str(finding.expert_id), "layer": str(finding.layer_index)},
            'with debugger.requests(["code-1"], workload="code"):\n    model.generate(**code_inputs)',
            "python",
        )


def _limit(rule: str) -> float | None:
    try:
        return float(rule.lstrip("<>= "))
    except ValueError:
        return None


# What bears on balance in a training, in the order in which it helps most. Selection biases come with the gradients,
# where the router has any.
_TRAINING = ("balance_coef", "balance_loss", "lr", "router_gradient_norm")
_LOSS_SETTINGS = ("balance_coef", "balance_loss")
_GRADIENTS = ("router_gradient_norm", "selection_bias_max", "expert_gradient_norm", "selection_bias_min")


def missing_of(context: Context) -> tuple[Missing, ...]:
    """Return what bears on this kind of finding and was not given, with the lines that supply it."""
    found: list[Missing] = []
    kind = context.finding.kind
    if kind is FindingKind.CAPTURE_UNHEALTHY:
        return ()
    if context.is_training and kind is not FindingKind.RANK_STRAGGLER:
        biases = context.settings.layers("selection_bias_max").values()
        # Where selection biases balance, there need not be a balancing loss.
        needless = _LOSS_SETTINGS if any(np.nan_to_num(one.values).any() for one in biases) else ()
        found += [
            _setting(name) for name in _TRAINING if name not in needless and not context.settings.is_observed(name)
        ]
    if not context.histories:
        found.append(
            Missing(
                "steps",
                "load history",
                "with debugger.step(n):  # n: one global step; without it steps of several sources cannot be ordered",
            )
        )
    if kind in (FindingKind.HOT_EXPERT, FindingKind.LOAD_IMBALANCE) and not context.is_training:
        if context.rows is None or context.rows.get("token_id") is None:
            found.append(Missing("token_ids", "rows with token ids", 'MoEDebugger(model, level="routes+tokens")'))
        if context.mix is None:
            found.append(
                Missing(
                    "workloads", "workload labels", 'decisions["workload"] = labels  # the kind of each row\'s text'
                )
            )
    if kind in PLACEMENT_KINDS and not context.is_training:
        if context.placement is None:
            found.append(
                Missing("ranks", "num_ranks", "explain(finding, placement=PlacementOptions(num_ranks=8), ...)")
            )
        if not any(np.size(one) for one in context.step_loads.values()):
            found.append(
                Missing(
                    "step_loads",
                    "loads of single steps",
                    'loads = loads_from_decisions(session.decisions(), num_experts=64, phase="decode")',
                )
            )
    return tuple(found)


def _setting(name: str) -> Missing:
    if name in _GRADIENTS:
        return Missing("setting", name, "MoEDebugger(model, gradients=True)", {"name": name})
    return Missing("setting", name, f"debugger.step(n, {name}={name})", {"name": name})
