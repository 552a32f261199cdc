"""What of two recordings can be compared, in words: what differs, what follows, what would make it comparable."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moe_debugger.analysis import LayerShape
from moe_debugger.reporting.content import Model, Text, say, show
from moe_debugger.reporting.material import Material, layer_range

__all__ = ["Point", "blocking", "common_layers", "points"]

# Two mixes of prefill, decode and training are alike below this total variation distance.
_SAME_PHASES = 0.1
_PHASES = ("unknown", "prefill", "decode", "train", "eval")


class Point(Model):
    """One thing that was looked at.

    Attributes:
        blocks: what it makes impossible: "everything", "tests" (and tokens), "tokens", or nothing.
        follows: what follows for the comparison; remedy: what would make it comparable.
    """

    key: str
    status: Literal["same", "differs", "unknown"]
    a: str
    b: str
    follows: Text
    remedy: Text | None = None
    blocks: Literal["everything", "tests", "tokens", ""] = ""


def blocking(found: Sequence[Point], what: str) -> list[Point]:
    """Return the points that make `what` ("everything", "tests" or "tokens") impossible."""
    stronger = {
        "everything": ("everything",),
        "tests": ("everything", "tests"),
        "tokens": ("everything", "tests", "tokens"),
    }
    return [point for point in found if point.blocks in stronger[what]]


def common_layers(a: Material, b: Material) -> list[int]:
    """Return the layers that are the same in both: index, E, k and Z."""
    shapes_a, shapes_b = _shapes(a), _shapes(b)
    return sorted(index for index, shape in shapes_a.items() if shapes_b.get(index) == shape)


def _shapes(material: Material) -> dict[int, LayerShape]:
    if material.state is None:
        return {}
    # Where nothing ran, the layers are still known.
    every = material.is_empty
    return {i: layer.shape for i, layer in material.state.layers.items() if every or layer.counts.any()}


def points(a: Material, b: Material, *, same_model: bool) -> list[Point]:
    """Return everything but the requests and the text, which are known when tokens were matched."""
    found = [_model(a, b, same_model), _layers(a, b), _level(a, b), _sampling(a, b), _topology(a, b), _phases(a, b)]
    found += [_whole(a, b), _versions(a, b), _rows(a, b)]
    return [point for point in found if point is not None]


def _point(
    key: str,
    a: str,
    b: str,
    follows: Text,
    remedy: str = "",
    *,
    status: Literal["same", "differs", "unknown"] | None = None,
    blocks: Literal["everything", "tests", "tokens", ""] = "",
) -> Point:
    is_same = a == b if status is None else status == "same"
    return Point(
        key=key,
        status=status or ("same" if is_same else "differs"),
        a=a,
        b=b,
        follows=say("cmp.same") if is_same else follows,
        remedy=None if is_same or not remedy else say(remedy),
        blocks="" if is_same else blocks,
    )


def _model(a: Material, b: Material, same_model: bool) -> Point:
    of_a, of_b = (each.manifest.model if each.manifest is not None else None for each in (a, b))
    digests = [each.config_sha256 if each is not None else None for each in (of_a, of_b)]
    names = [
        f"{each.class_name or 'unknown'} {digest[:12] if digest else ''}".strip() if each is not None else "unknown"
        for each, digest in zip((of_a, of_b), digests, strict=True)
    ]
    if None in digests:
        return _point("model", names[0], names[1], say("cmp.unknown_model"), status="unknown")
    if digests[0] == digests[1]:
        return _point("model", names[0], names[1], say("cmp.same"), status="same")
    if same_model:
        return _point("model", names[0], names[1], say("cmp.other_model_forced"), status="differs")
    return _point(
        "model", names[0], names[1], say("cmp.other_model"), "do.model", status="differs", blocks="everything"
    )


def _layers(a: Material, b: Material) -> Point:
    def words(material: Material) -> str:
        kinds: dict[tuple[int, int], list[int]] = {}
        for index, shape in _shapes(material).items():
            kinds.setdefault((shape.num_experts, shape.top_k), []).append(index)
        return "; ".join(f"{layer_range(each)}: {e} experts, top-{k}" for (e, k), each in kinds.items()) or "none"

    common = common_layers(a, b)
    if not common:
        return _point(
            "layers", words(a), words(b), say("cmp.no_layers"), "do.layers", status="differs", blocks="everything"
        )
    is_same = _shapes(a) == _shapes(b)
    follows = say("cmp.other_layers", layers=layer_range(common))
    return _point("layers", words(a), words(b), follows, "do.layers", status="same" if is_same else "differs")


def _level(a: Material, b: Material) -> Point:
    if "counts" in (a.level, b.level):
        return _point("level", a.level, b.level, say("cmp.counts"), "do.counts", status="differs", blocks="tests")
    return _point("level", a.level, b.level, say("cmp.same"))


def _rows(a: Material, b: Material) -> Point | None:
    shown = show(a.num_rows_read), show(b.num_rows_read)
    if a.is_empty or b.is_empty:
        which = _which(a.is_empty, b.is_empty)
        return _point("rows", *shown, say("cmp.empty", which=which), "do.empty", status="differs", blocks="tests")
    if "counts" in (a.level, b.level):
        return None
    if a.rows is None or b.rows is None:
        which = _which(a.rows is None, b.rows is None)
        return _point("rows", *shown, say("cmp.unread", which=which), "do.rows", status="differs", blocks="tests")
    if a.num_rows_read == a.num_rows and b.num_rows_read == b.num_rows:
        return None
    args = {"a": a.num_rows_read, "a_all": a.num_rows, "b": b.num_rows_read, "b_all": b.num_rows}
    return _point("rows", *shown, say("cmp.rows", **args), "do.rows", status="differs")


def _which(is_first: bool, is_second: bool) -> str:
    return "both" if is_first and is_second else "the first" if is_first else "the second"


def _sampling(a: Material, b: Material) -> Point | None:
    if a.manifest is None or b.manifest is None:
        return None
    rates = [f"{show(100 * each.manifest.sampling_rate)} %" for each in (a, b) if each.manifest is not None]
    is_whole = a.manifest.sampling_rate == b.manifest.sampling_rate == 1
    return _point(
        "sampling", rates[0], rates[1], say("cmp.sampling"), "do.sampling", status="same" if is_whole else "differs"
    )


def _topology(a: Material, b: Material) -> Point | None:
    if a.manifest is None or b.manifest is None:
        return None
    names = []
    for each in (a, b):
        assert each.manifest is not None
        place = each.manifest.topology
        ranks = f"{each.num_sources} processes" if each.num_sources > 1 else f"rank {place.global_rank}"
        names.append(f"{ranks} of {place.world_size}, ep {place.expert_parallel_size}")
    return _point("topology", names[0], names[1], say("cmp.topology"), "do.topology")


def _phases(a: Material, b: Material) -> Point | None:
    if a.state is None or b.state is None or a.is_empty or b.is_empty:
        return None
    mixes = []
    for each in (a.state, b.state):
        tokens = each.phase_tokens.astype(np.float64)
        mixes.append(tokens / max(tokens.sum(), 1.0))
    distance = float(np.abs(mixes[0] - mixes[1]).sum()) / 2
    names = [
        ", ".join(
            f"{_PHASES[i] if i < len(_PHASES) else i} {100 * share:.0f} %" for i, share in enumerate(mix) if share > 0
        )
        for mix in mixes
    ]
    status: Literal["same", "differs"] = "same" if distance <= _SAME_PHASES else "differs"
    return _point("phases", names[0], names[1], say("cmp.phases"), "do.phases", status=status)


def _whole(a: Material, b: Material) -> Point:
    def state(material: Material) -> str:
        check, manifest = material.verification, material.manifest
        if check is not None and not check.is_whole:
            return f"{show(check.num_rows_lost)} rows damaged"
        if manifest is None:
            return "live"
        lost = sum(manifest.num_rows_not_written.values()) + sum(manifest.num_decisions_dropped.values())
        return f"{show(lost)} lost" if lost else "whole" if manifest.is_finished else "not stopped in order"

    names = state(a), state(b)
    is_whole = all(name in ("whole", "live") for name in names)
    return _point("whole", *names, say("cmp.not_whole"), "do.not_whole", status="same" if is_whole else "differs")


def _versions(a: Material, b: Material) -> Point | None:
    if a.manifest is None or b.manifest is None:
        return None
    of_a, of_b = a.manifest.model.versions, b.manifest.model.versions
    other = [name for name in sorted({*of_a, *of_b}) if of_a.get(name) != of_b.get(name)]
    names = [", ".join(f"{name} {versions.get(name, '–')}" for name in other) or "same" for versions in (of_a, of_b)]
    return _point(
        "versions", names[0], names[1], say("cmp.versions"), "do.versions", status="same" if not other else "differs"
    )
