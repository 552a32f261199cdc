"""Rule about expert-parallel ranks: one that gets more load than the others, so that they wait for it."""

from collections.abc import Iterator

import numpy as np

from moe_debugger.analysis.findings import EvidenceRow, Finding, FindingKind, Severity
from moe_debugger.analysis.intervals import Blocks, benjamini_hochberg, share_tests
from moe_debugger.analysis.rules.look import Look, formatted

__all__ = ["rank_stragglers"]


def rank_stragglers(look: Look, layers: list[int]) -> Iterator[Finding]:
    """Find ranks whose long-run share of a layer's load lies above the floor, and say what their steps wait for."""
    floor = look.thresholds.rank_straggler
    tested = []
    for index in layers:
        ranks = look.expert_ranks.get(index)
        if ranks is None or look.shortage(index):
            continue
        num_ranks = int(ranks.max()) + 1
        if num_ranks < 2:
            continue
        spread = np.zeros((len(ranks), num_ranks))
        spread[np.arange(len(ranks)), ranks] = 1
        blocks = Blocks(look.blocks[index].table @ spread, look.blocks[index].kind)
        tests = share_tests(blocks, look.state.layers[index].routed_per_token, hot=floor, cold=0.0)
        if tests is not None:
            tested.append((index, spread, tests[0]))
    if not tested:
        return
    significant = benjamini_hochberg(np.concatenate([p for *_, p in tested]), look.thresholds.false_discovery_rate)
    at = 0
    for index, spread, p_values in tested:
        for rank in np.flatnonzero(significant[at : at + len(p_values)]).tolist():
            yield _straggler(look, index, rank, spread, float(p_values[rank]))
        at += len(p_values)


def _straggler(look: Look, index: int, rank: int, spread: np.ndarray, p_value: float) -> Finding:
    layer, floor, metrics = look.state.layers[index], look.thresholds.rank_straggler, look.metrics[index]
    loads = layer.counts.astype(np.float64) @ spread
    ratio = float(loads[rank] / loads.mean())
    evidence = [
        EvidenceRow("rank_load_ratio", ratio, f"> {formatted(floor)}", None, layer.num_tokens, "x mean of the ranks"),
        EvidenceRow("p_value", p_value, "Benjamini-Hochberg", None, metrics.num_blocks),
    ]
    sample = layer.step_sample
    share_slowest = float("nan")
    if sample is not None and len(sample.counts):
        steps = sample.counts.astype(np.float64) @ spread
        # Per-step maxima before sums: what is even in the sum may wait in every step.
        waste = 1 - float(steps.mean(axis=1).sum() / steps.max(axis=1).sum())
        share_slowest = float((steps.argmax(axis=1) == rank).mean())
        evidence += [
            EvidenceRow("critical_path_waste", waste, "", None, len(steps), "of the experts' time, if linear in load"),
            EvidenceRow("share_of_steps_slowest", share_slowest, "", None, len(steps), "of steps"),
        ]
    return Finding(
        FindingKind.RANK_STRAGGLER,
        Severity.WARNING if look.rests_on_requests(index) else Severity.INFO,
        "rank_straggler",
        index,
        since_step=layer.first_step,
        args={
            "layer": str(index),
            "rank": str(rank),
            "ranks": str(spread.shape[1]),
            "ratio": formatted(ratio),
            "floor": formatted(floor),
            "slowest": "unknown" if np.isnan(share_slowest) else formatted(100 * share_slowest),
        },
        evidence=tuple(evidence),
        statistic=ratio,
    )
