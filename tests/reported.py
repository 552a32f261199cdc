"""Small recordings of routes that a test writes down, and the same as what a report looks at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger import Decisions, LayerInfo
from moe_debugger.analysis import Thresholds, finish, fold_decisions
from moe_debugger.capture_health import CaptureHealth, CheckStatus, HealthCheck
from moe_debugger.recording.manifest import Health, Manifest, ModelIdentity, Topology
from moe_debugger.recording.writer import Ending, Limits, RecordingWriter, make_folder
from moe_debugger.reporting.material import Material, row_sizes
from moe_debugger.wire.codec import LayerColumns, RoutingColumns
from moe_debugger.wire.ids import new_id

__all__ = ["Ids", "forwards", "healthy", "infos", "material", "name", "record", "sampled"]

Ids = npt.NDArray[np.int32]
DIGEST = "a" * 64


def name(number: int) -> str:
    """Return a request id that is the same in every recording."""
    return f"{number:026d}"


def infos(*shapes: tuple[int, int]) -> list[LayerInfo]:
    """Return layers of (num_experts, top_k)."""
    return [LayerInfo(i, i, f"model.layers.{i}.mlp", "decoder", e, k) for i, (e, k) in enumerate(shapes)]


def healthy() -> CaptureHealth:
    """Return the health of a capture without a fault."""
    return CaptureHealth(num_produced=1, checks=(HealthCheck("conservation", CheckStatus.OK, 10),))


def sampled(seed: int, num: int, shape: tuple[int, int], *, preference: Any = 0.0, strength: float = 0.0) -> Ids:
    """Return choices of one request that prefers some experts: [num, k], from Gumbel noise on a fixed preference."""
    rng = np.random.default_rng(seed)
    scores = np.asarray(preference) + rng.normal(0, strength, shape[0]) + rng.gumbel(size=(num, shape[0]))
    return np.argsort(-scores, axis=1)[:, : shape[1]].astype(np.int32)


def forwards(
    choices: Sequence[Sequence[Ids]],
    experts: Sequence[int],
    *,
    first_request: int = 0,
    first_step: int = 0,
    phase: int = 1,
    has_tokens: bool = True,
    requests: Sequence[str] | None = None,
    **columns: Any,
) -> list[RoutingColumns]:
    """Return one forward for each request; `choices` are [request][layer] of [tokens, k].

    Args:
        columns: more columns of every layer, made from the ids: ``margin=lambda ids: ...``.
    """
    result = []
    for number, layers in enumerate(choices):
        tokens = len(layers[0])
        request = requests[number] if requests is not None else name(first_request + number)
        token_id = (np.arange(tokens) * 7 + number) % 97
        made = [LayerColumns(i, experts[i], np.asarray(ids, np.int32)) for i, ids in enumerate(layers)]
        for layer in made:
            for column, make in columns.items():
                setattr(layer, column, make(layer.expert_ids))
        result.append(
            RoutingColumns(
                step=np.full(tokens, first_step + number, np.uint64),
                forward_index=np.full(tokens, first_step + number, np.uint64),
                request_ids=[request],
                request_index=np.zeros(tokens, np.uint32),
                position=np.arange(tokens, dtype=np.uint32),
                phase=np.full(tokens, phase, np.uint8),
                is_padding=np.zeros(tokens, np.bool_),
                token_id=token_id.astype(np.uint32) if has_tokens else None,
                layers=made,
            )
        )
    return result


def record(
    path: Path,
    batches: Sequence[RoutingColumns],
    layers: Sequence[LayerInfo],
    *,
    ends: bool = True,
    health: CaptureHealth | None = None,
    dropped: dict[str, int] | None = None,
    topology: Topology | None = None,
    model: ModelIdentity | None = None,
    **changes: Any,
) -> Path:
    """Write a recording by the writer itself, and return its folder."""
    manifest = Manifest(
        **{
            "recording_id": new_id(),
            "started_at_unix_ns": 1_700_000_000_000_000_000,
            "session_name": path.name,
            "level": "routes+tokens",
            "sampling_rate": 1.0,
            "model": model or ModelIdentity(name="models/tiny", class_name="Tiny", config_sha256=DIGEST),
            "topology": topology or Topology(),
            **changes,
        }
    )
    writer = RecordingWriter(make_folder(path), manifest, Limits(), lambda: list(layers), {})
    for batch in batches:
        writer.add([batch])
    if ends:
        writer.finish(Ending(Health.of(health or healthy()), None, dropped or {}))
    else:
        writer.end_part()
    return path


def material(batches: Sequence[RoutingColumns], layers: Sequence[LayerInfo], **changes: Any) -> Material:
    """Return what a report looks at, without a recording."""
    rows = Decisions(list(batches), layers)
    known = {info.layer_index: info for info in layers}
    state = fold_decisions(rows, **row_sizes(known))
    values: dict[str, Any] = {
        "source": "recording",
        "name": "rows",
        "analysis": finish(state, thresholds=changes.pop("thresholds", None)),
        "thresholds": Thresholds(),
        "state": state,
        "layers": known,
        "rows": rows,
        "num_rows": len(rows),
        "level": "routes+tokens",
        **changes,
    }
    return Material(**values)
