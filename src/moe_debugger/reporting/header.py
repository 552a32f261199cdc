"""What is said first: what is missing of a recording, then which model, where, how and when it was recorded."""

import datetime

from moe_debugger.capture_health import CheckStatus
from moe_debugger.reporting.content import Fact, Notice, Text, Tone, say, show
from moe_debugger.reporting.material import Material, layer_range

__all__ = ["facts", "notices", "when"]


def when(unix_ns: int | None) -> str:
    """Return a time in UTC to the second, "" where there is none."""
    if unix_ns is None:
        return ""
    try:
        moment = datetime.datetime.fromtimestamp(unix_ns / 1e9, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return f"{unix_ns} ns after 1970"
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def notices(material: Material) -> list[Notice]:
    """Return what is missing or in doubt, worst first; a recording that is whole gets one line that says so."""
    found: list[Notice] = []

    def add(tone: Tone, text: Text) -> None:
        found.append(Notice(tone=tone, text=text))

    manifest, check, health = material.manifest, material.verification, material.health
    if material.source == "analysis":
        add("info", say("notice.analysis"))
    if check is not None and not check.is_whole:
        add("critical", say("notice.damaged", parts=len(check.problems), rows=check.num_rows_lost))
    if manifest is not None and manifest.status == "failed":
        add("critical", say("notice.failed"))
    if manifest is not None and manifest.status == "recording":
        add("warning", say("notice.unfinished"))
    if manifest is not None:
        for code, losses in (
            ("notice.dropped", manifest.num_decisions_dropped),
            ("notice.not_written", manifest.num_rows_not_written),
        ):
            for reason, num in losses.items():
                if num:
                    add("warning", say(code, num=num, reason=reason))
    elif health is not None:
        for reason, num in (health.dropped or {}).items():
            if num:
                add("warning", say("notice.dropped", num=num, reason=reason))
    for each in health.checks if health is not None else ():
        if each.status is CheckStatus.FAILED:
            # Dear watching makes nothing wrong that is shown.
            tone: Tone = "info" if each.name == "overhead" else "critical"
            add(tone, say("notice.check_failed", name=each.name, num=each.num_violations, of=each.num_checked,
                          unit=each.unit, example=each.example))  # fmt: skip
    texts = dict.fromkeys((*material.problems, *(health.problems if health is not None else ())))
    for problem in texts:
        add("warning", say("notice.problem", problem=problem))
    if manifest is not None and manifest.sampling_rate < 1:
        add("info", say("notice.sampled", percent=100 * manifest.sampling_rate))
    if manifest is not None and manifest.level == "counts":
        add("info", say("notice.counts"))
    if material.is_empty and material.source != "analysis":
        add("warning", say("notice.empty"))
    if material.rows is not None and material.num_rows_read < material.num_rows:
        add("info", say("notice.first_rows", read=material.num_rows_read, num=material.num_rows))
    if manifest is not None and not any(each.tone in ("critical", "warning") for each in found):
        found.insert(0, Notice(tone="good", text=say("notice.whole")))
    # What is wrong with detectors of others is not of the recording.
    for problem in material.analysis.problems:
        add("warning", say("notice.problem", problem=problem))
    order = {"critical": 0, "warning": 1, "good": 2, "info": 3}
    return sorted(found, key=lambda notice: order[notice.tone])


def facts(material: Material, num_ranks: int) -> list[Fact]:
    """Return the lines of the header, without those of which nothing is known."""
    manifest, metrics = material.manifest, material.analysis.metrics
    values: dict[str, str] = {}
    if manifest is not None:
        model, place = manifest.model, manifest.topology
        values["model"] = model.name
        values["class"] = " · ".join(part for part in (model.class_name, model.model_type) if part)
        values["config"] = model.config_sha256 or "no configuration to identify it by"
        values["versions"] = ", ".join(f"{name} {version}" for name, version in model.versions.items())
        values["session"] = manifest.session_name
        values["recording"] = manifest.recording_id
        values["topology"] = (
            f"rank {place.global_rank} of {place.world_size} (dp {place.data_parallel_rank}, tp "
            f"{place.tensor_parallel_rank}, ep {place.expert_parallel_rank} of {place.expert_parallel_size}, pp "
            f"{place.pipeline_parallel_rank})"
        )
        values["started"] = when(manifest.started_at_unix_ns)
        values["ended"] = when(manifest.ended_at_unix_ns) or "not stopped in order"
        if manifest.ended_at_unix_ns is not None:
            seconds = (manifest.ended_at_unix_ns - manifest.started_at_unix_ns) / 1e9
            values["duration"] = f"{show(seconds)} s"
        values["rows"] = show(manifest.num_rows)
        values["requests"] = ("" if manifest.is_num_requests_exact else "at least ") + show(manifest.num_requests)
        values["sampling"] = f"{show(100 * manifest.sampling_rate)} % of requests"
        if manifest.first_step is not None and manifest.last_step is not None:
            values["steps"] = f"{show(manifest.first_step)} to {show(manifest.last_step)}"
    else:
        values["session"] = material.name
        values["requests"] = f"about {show(material.analysis.num_requests)}"
        if material.source == "session":
            values["rows"] = show(material.num_rows)
    values["level"] = material.level
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, each in metrics.items():
        shapes.setdefault((each.num_experts, each.top_k), []).append(index)
    values["layers"] = "; ".join(
        f"{len(indices)} MoE layers ({layer_range(indices)}) of {experts} experts, top-{k}"
        for (experts, k), indices in shapes.items()
    )
    if material.num_sources > 1:
        values["sources"] = f"{material.num_sources} processes"
    if num_ranks > 1:
        values["ranks"] = f"{num_ranks} expert-parallel ranks"
    values["baseline"] = material.baseline_name
    return [Fact(key=key, value=value) for key, value in values.items() if value]
