"""The manifest of several recordings that are read as one."""

from collections import Counter
from collections.abc import Sequence

from moe_debugger.capture_health import CaptureHealth, merge_checks
from moe_debugger.recording.manifest import GroupManifest, Health, Manifest

__all__ = ["joined_manifest"]


def joined_manifest(
    manifests: Sequence[Manifest], group: GroupManifest | None, folders: Sequence[str], first_steps: Sequence[int]
) -> Manifest:
    """Return what is known of several recordings as if they were one.

    Args:
        manifests: of the members; none only where there is a group.
        group: of the folder that holds them, where one does.
        folders: of the members within it; empty where they lie apart, and then the result names no parts.
        first_steps: by which the steps of each member are moved.
    """
    statuses = {each.status for each in manifests} | ({group.status} if group is not None else set())
    not_written: Counter[str] = Counter({} if group is None else group.num_rows_not_written)
    dropped: Counter[str] = Counter()
    for each in manifests:
        not_written.update(each.num_rows_not_written)
        dropped.update(each.num_decisions_dropped)
    levels = [each.level for each in manifests]
    started = [each.started_at_unix_ns for each in manifests]
    ended = [each.ended_at_unix_ns for each in manifests]
    steps = [
        (each.first_step + offset, (each.last_step or 0) + offset)
        for each, offset in zip(manifests, first_steps, strict=True)
        if each.first_step is not None
    ]
    first = manifests[0] if manifests else _empty_manifest(group)
    parts = [
        entry.model_copy(update={"path": f"{folder}/{entry.path}"})
        for folder, each in zip(folders, manifests, strict=False)
        for entry in each.parts
    ]
    problems = [] if group is None else list(group.problems)
    problems += [text for each in manifests for text in each.problems]
    return first.model_copy(
        update={
            "recording_id": first.recording_id if group is None else group.recording_id,
            "group_id": "",
            "source_id": first.source_id if len(manifests) == 1 else "",
            "status": next((one for one in ("recording", "failed") if one in statuses), "finished"),
            "started_at_unix_ns": min([*started, *([] if group is None else [group.started_at_unix_ns])]),
            "ended_at_unix_ns": None if None in ended else max((one for one in ended if one is not None), default=None),
            # Rows of one member are worth naming where another has only sums.
            "level": next((one for one in ("routes", "routes+tokens", "full") if one in levels), first.level),
            "sampling_rate": min([each.sampling_rate for each in manifests] or [first.sampling_rate]),
            "num_rows": sum(each.num_rows for each in manifests),
            "num_requests": max((each.num_requests for each in manifests), default=0),
            "is_num_requests_exact": len(manifests) == 1 and first.is_num_requests_exact,
            "first_step": min((one for one, _ in steps), default=None),
            "last_step": max((one for _, one in steps), default=None),
            "num_rows_not_written": dict(not_written),
            "num_decisions_dropped": dict(dropped),
            "num_missing_messages": sum(each.num_missing_messages for each in manifests),
            "capture_health": _joined_health(manifests),
            "series": None,
            "problems": problems,
            "layers": sorted(
                {entry.layer_index: entry for each in reversed(manifests) for entry in each.layers}.values(),
                key=lambda entry: entry.layer_index,
            ),
            "parts": parts,
        }
    )


def _empty_manifest(group: GroupManifest | None) -> Manifest:
    """Return the manifest of a session that sent nothing while it was recorded."""
    assert group is not None
    names = ("recording_id", "started_at_unix_ns", "session_name", "session_id")
    values = {name: getattr(group, name) for name in names}
    return Manifest.model_validate({**values, "level": "counts", "sampling_rate": 1.0, "model": {}, "topology": {}})


def _joined_health(manifests: Sequence[Manifest]) -> Health | None:
    found = [each.capture_health for each in manifests]
    kept = [each for each in found if each is not None]
    if not kept or len(kept) < len(found):
        return None
    dropped: Counter[str] = Counter()
    for each in kept:
        dropped.update(each.dropped)
    health = CaptureHealth(
        sum(each.num_produced for each in kept),
        dict(dropped),
        sum(each.num_missing_messages for each in kept),
        tuple(dict.fromkeys(text for each in kept for text in each.problems)),
        merge_checks(check for each in kept for check in each.to_capture_health().checks),
    )
    return Health.of(health)
