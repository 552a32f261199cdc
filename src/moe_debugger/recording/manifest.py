"""`manifest.json`: what a recording holds, of which model, how it ended, and the checksums of its parts.

It is replaced as a whole with every part that is finished, so that it never names a part that is not there whole.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from moe_debugger.capture import LayerInfo
from moe_debugger.capture_health import CaptureHealth, CheckStatus, HealthCheck
from moe_debugger.errors import RecordingError, UnsupportedFormatError

__all__ = [
    "FORMAT",
    "FORMAT_MAJOR",
    "FORMAT_MINOR",
    "GROUP_FORMAT",
    "MANIFEST_NAME",
    "MAX_MEMBERS",
    "MAX_PARTS",
    "GroupManifest",
    "Health",
    "LayerEntry",
    "Manifest",
    "ModelIdentity",
    "PartEntry",
    "RowsLayout",
    "SeriesNotes",
    "Topology",
    "check_layers",
    "read_any_manifest",
    "read_manifest",
    "write_manifest",
]

FORMAT = "moe-debugger-recording"
GROUP_FORMAT = "moe-debugger-recording-group"
FORMAT_MAJOR = 1
FORMAT_MINOR = 2
MANIFEST_NAME = "manifest.json"
# Looked at before anything is parsed; so many parts take less.
_MAX_BYTES = 64 * 1024 * 1024
MAX_PARTS = 50_000
MAX_MEMBERS = 4096

# Far above any model's, and what is made of them still fits the memory.
_MAX_TOP_K = 1024
_MAX_LAYER_INDEX = 2**16
_MAX_EXPERTS = 65_535
_MAX_EXPERTS_TOGETHER = 2**20

_Count = Annotated[int, Field(ge=0, lt=2**64)]
_Rank = Annotated[int, Field(ge=0, lt=2**31)]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, StringConstraints(max_length=4096)]
# No other path can be named, so none outside of the folder.
_PartPath = Annotated[
    str,
    StringConstraints(pattern=r"^(rows/part-[0-9]{8}|counts/part-[0-9]{8}|layers-[0-9]{8}|series-[0-9]{8})\.parquet$"),
]
_MemberPath = Annotated[str, StringConstraints(pattern=r"^sources/[0-9a-z]{26}$")]


class _Model(BaseModel):
    # Fields of a newer minor version are passed over.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class RowsLayout(_Model):
    """Which of the optional columns the rows of a part have, and how wide its lists are.

    Attributes:
        top_k: entries of `expert_ids` and the other columns of slots.
        num_logits: entries of `logits`, 0 where there are none.
    """

    top_k: Annotated[int, Field(ge=1, le=_MAX_TOP_K)] = 1
    num_logits: Annotated[int, Field(ge=0, le=_MAX_EXPERTS)] = 0
    has_token_id: bool = False
    has_intended: bool = False


class PartEntry(_Model):
    """One Parquet file.

    Attributes:
        path: relative to the recording's folder.
        kind: which table it is a part of.
        num_rows: rows of the table in it.
        size_bytes, sha256: of the file.
        first_step, last_step, first_forward_index, last_forward_index: of its rows; None where it has no such thing.
        layout: of rows; None of other tables.
    """

    path: _PartPath
    kind: Literal["rows", "counts", "layers", "series"]
    num_rows: _Count
    size_bytes: _Count
    sha256: _Sha256
    first_step: _Count | None = None
    last_step: _Count | None = None
    first_forward_index: _Count | None = None
    last_forward_index: _Count | None = None
    layout: RowsLayout | None = None


class ModelIdentity(_Model):
    """Which model was recorded.

    Attributes:
        config_sha256: of the model's configuration as JSON with sorted keys, without its name and the version of
            transformers; None where the model has no configuration that JSON can hold.
        versions: of the libraries that ran it.
    """

    name: _Text = ""
    model_type: _Text = ""
    class_name: _Text = ""
    config_sha256: _Sha256 | None = None
    versions: dict[_Text, _Text] = Field(default_factory=dict)


class Topology(_Model):
    """Place of the recorded process in a sharded model; all ranks count from 0."""

    global_rank: _Rank = 0
    world_size: _Rank = 1
    data_parallel_rank: _Rank = 0
    tensor_parallel_rank: _Rank = 0
    expert_parallel_rank: _Rank = 0
    expert_parallel_size: _Rank = 1
    pipeline_parallel_rank: _Rank = 0
    recording_rank: _Rank = 0


class LayerEntry(_Model):
    """One MoE layer: the fields of `LayerInfo`, and the expert-parallel rank of each expert where there are several."""

    layer_index: Annotated[int, Field(ge=0, lt=_MAX_LAYER_INDEX)]
    model_layer_index: _Rank
    module_name: _Text
    stack: _Text
    num_experts: Annotated[int, Field(ge=1, le=_MAX_EXPERTS)]
    top_k: Annotated[int, Field(ge=0, le=_MAX_TOP_K)]
    num_shared_experts: _Rank
    num_identity_experts: Annotated[int, Field(ge=0, le=_MAX_EXPERTS)]
    scoring_function: _Text
    weight_meaning: _Text
    unavailable_reason: _Text
    site: Literal["mlp", "attention"]
    block_scale: float
    adapter: _Text
    expert_parallel_ranks: list[_Rank] = Field(default_factory=list, max_length=_MAX_EXPERTS)

    @classmethod
    def of(cls, info: LayerInfo, owners: Sequence[int] = ()) -> Self:
        """Return what the manifest keeps of a layer."""
        values = {name: text[:4096] if isinstance(text, str) else text for name, text in asdict(info).items()}
        return cls.model_validate({**values, "expert_parallel_ranks": list(owners)})

    def to_info(self) -> LayerInfo:
        """Return the layer as `Session.layers` gave it."""
        return LayerInfo(**self.model_dump(exclude={"expert_parallel_ranks"}))


class _Check(_Model):
    name: _Text
    status: CheckStatus
    num_checked: _Count = 0
    num_violations: _Count = 0
    unit: _Text = ""
    example: _Text = ""


class Health(_Model):
    """How far the capture could be trusted when the recording ended, over the whole session."""

    is_healthy: bool
    num_produced: _Count = 0
    dropped: dict[_Text, _Count] = Field(default_factory=dict)
    num_missing_messages: _Count = 0
    problems: list[_Text] = Field(default_factory=list)
    checks: list[_Check] = Field(default_factory=list)

    @classmethod
    def of(cls, health: CaptureHealth) -> Self:
        """Return what the manifest keeps of `health`."""
        values = health.to_dict()
        values["problems"] = [text[:4096] for text in values["problems"]]
        for check in values["checks"]:
            check["example"] = check["example"][:4096]
        return cls.model_validate(values)

    def to_capture_health(self) -> CaptureHealth:
        """Return the health as `Session.capture_health` gave it."""
        return CaptureHealth(
            self.num_produced,
            dict(self.dropped),
            self.num_missing_messages,
            tuple(self.problems),
            tuple(HealthCheck(**check.model_dump()) for check in self.checks),
        )


class SeriesNotes(_Model):
    """What a table of series cannot say in its rows; see `SeriesTable`."""

    notes: dict[_Text, _Count] = Field(default_factory=dict)
    num_not_kept: _Count = 0


class Manifest(_Model):
    """What is known of a recording without reading its rows.

    Attributes:
        format_version: "major.minor"; a newer major cannot be read.
        recording_id: minted when the recording began.
        group_id: the recording of a whole session that this one of a single source is a member of; empty = none.
        source_id: of the process in its fleet; empty where it was in none.
        step_domain: "global" where steps of equal number in other recordings of the session are the same step;
            "source" where they are not; empty where it is not known (written before version 1.1).
        status: "recording" until it is stopped, so also after a crash; "failed" where the disk refused; "finished".
        started_at_unix_ns, ended_at_unix_ns: wall clock; None while it is not finished.
        level: "counts" (no rows, sums instead), "routes", "routes+tokens" or "full".
        sampling_rate: share of the requests that were captured.
        num_rows: rows of the parts, one for each token and MoE layer, padding too; at level "counts" 0.
        num_requests: distinct requests in the parts; at least so many where `is_num_requests_exact` is false.
        num_rows_not_written: rows that were captured and are in no part, by reason.
        num_decisions_dropped: decisions that the capture lost while the recording ran, by reason. They have no rows.
        num_missing_messages: messages of the source that never came, between the first and the last that did; 0 where
            the process recorded itself.
        capture_health: at the end; None while it is not finished.
        problems: what went wrong, in words.
        layers: what the part of layers has, too; none in recordings of before version 1.2.
        parts: every whole file.
    """

    format: Literal["moe-debugger-recording"] = "moe-debugger-recording"
    format_version: _Text = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"
    recording_id: _Text
    group_id: _Text = ""
    source_id: _Text = ""
    step_domain: Literal["", "source", "global"] = ""
    status: Literal["recording", "finished", "failed"] = "recording"
    started_at_unix_ns: _Count
    ended_at_unix_ns: _Count | None = None
    session_name: _Text
    session_id: _Text | None = None
    level: Literal["counts", "routes", "routes+tokens", "full"]
    sampling_rate: float = Field(ge=0, le=1)
    model: ModelIdentity
    topology: Topology
    num_rows: _Count = 0
    num_requests: _Count = 0
    is_num_requests_exact: bool = True
    first_step: _Count | None = None
    last_step: _Count | None = None
    num_rows_not_written: dict[_Text, _Count] = Field(default_factory=dict)
    num_decisions_dropped: dict[_Text, _Count] = Field(default_factory=dict)
    num_missing_messages: _Count = 0
    capture_health: Health | None = None
    series: SeriesNotes | None = None
    problems: list[_Text] = Field(default_factory=list)
    layers: list[LayerEntry] = Field(default_factory=list, max_length=_MAX_LAYER_INDEX)
    parts: list[PartEntry] = Field(default_factory=list, max_length=MAX_PARTS)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len({entry.path for entry in self.parts}) < len(self.parts):
            raise ValueError("a part is named twice")
        if any(not entry.path.startswith(entry.kind) for entry in self.parts):
            raise ValueError("a part is in the folder of another table")
        num_rows = sum(entry.num_rows for entry in self.parts if entry.kind == "rows")
        if num_rows != self.num_rows:
            raise ValueError(f"num_rows is {self.num_rows}, the parts have {num_rows}")
        check_layers([entry.to_info() for entry in self.layers])
        return self

    @property
    def is_finished(self) -> bool:
        """True where the recording was stopped in order."""
        return self.status == "finished"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the file."""
        return self.model_dump(mode="json")


class GroupManifest(_Model):
    """What is known of a recording of several sources, each of which is a recording in a folder below.

    Attributes:
        recording_id: minted when the recording began.
        name: what whoever asked for it called it.
        status: as of `Manifest`.
        end_reason: why it ended, where nobody asked for it.
        members: folders of the sources, in the order in which they came.
        num_rows_not_written: rows that came and belong to no member, by reason; members have their own.
        problems: what went wrong, in words; members have their own.
    """

    format: Literal["moe-debugger-recording-group"] = "moe-debugger-recording-group"
    format_version: _Text = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"
    recording_id: _Text
    name: _Text = ""
    status: Literal["recording", "finished", "failed"] = "recording"
    end_reason: _Text = ""
    started_at_unix_ns: _Count
    ended_at_unix_ns: _Count | None = None
    session_name: _Text
    session_id: _Text | None = None
    members: list[_MemberPath] = Field(default_factory=list, max_length=MAX_MEMBERS)
    num_rows_not_written: dict[_Text, _Count] = Field(default_factory=dict)
    problems: list[_Text] = Field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the file."""
        return self.model_dump(mode="json")


def check_layers(layers: Sequence[LayerInfo]) -> None:
    """Check that layers can be of one model.

    Raises:
        ValueError: two have the same index, or all together have more experts than any model.
    """
    if len({info.layer_index for info in layers}) < len(layers):
        raise ValueError("two layers have the same layer_index")
    numbers = [info.num_experts + info.num_identity_experts for info in layers]
    if max(numbers, default=0) > _MAX_EXPERTS or sum(numbers) > _MAX_EXPERTS_TOGETHER:
        raise ValueError(f"the layers have {sum(numbers)} experts, one of them {max(numbers)}: more than any model")


def _checksum(values: dict[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest | GroupManifest) -> None:
    """Replace the manifest of a folder: after a crash the file is the old or the new one, never a part of one.

    Raises:
        OSError: the disk refuses.
    """
    values = manifest.to_dict()
    text = json.dumps({**values, "sha256": _checksum(values)}, indent=1, allow_nan=False)
    pending = folder / f".{MANIFEST_NAME}"
    with open(os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(pending, folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        RecordingError: there is none, or it is damaged, or no manifest of a recording of one process.
        UnsupportedFormatError: written by a newer major version.
    """
    values = _read(folder, (FORMAT,))
    return _validated(folder, Manifest, values)


def read_any_manifest(folder: Path) -> Manifest | GroupManifest:
    """Return the manifest of a folder, of one process or of several.

    Raises:
        RecordingError: there is none, or it is damaged, or no manifest of a recording.
        UnsupportedFormatError: written by a newer major version.
    """
    values = _read(folder, (FORMAT, GROUP_FORMAT))
    if values["format"] == GROUP_FORMAT:
        return _validated(folder, GroupManifest, values)
    return _validated(folder, Manifest, values)


def _read(folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        # As a part: no link is followed, and nothing is waited for that is no plain file.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RecordingError(f"{path} is no plain file", part=MANIFEST_NAME)
            text = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise RecordingError(
            f"{folder} is no recording: it has no {MANIFEST_NAME}; give the folder that session.record() was given",
            part=MANIFEST_NAME,
        ) from error
    except OSError as error:
        reason = "is a link to elsewhere" if path.is_symlink() else f"cannot be read: {error.strerror or error}"
        raise RecordingError(f"{path} {reason}", part=MANIFEST_NAME) from error
    if len(text) > _MAX_BYTES:
        raise RecordingError(f"{path} has more than {_MAX_BYTES} bytes, no recording's has", part=MANIFEST_NAME)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") not in formats:
        expected = " or ".join(f'"{name}"' for name in formats)
        raise RecordingError(f'{path} is no manifest of a recording: "format" is not {expected}', part=MANIFEST_NAME)
    _check_version(path, values.get("format_version"))
    try:
        is_same = values.get("sha256") == _checksum(values)
    except (ValueError, RecursionError):
        is_same = False
    if not is_same:
        raise _damaged(path, "its content does not have the checksum that it states")
    return values


_M = TypeVar("_M", Manifest, GroupManifest)


def _validated(folder: Path, model: type[_M], values: dict[str, Any]) -> _M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"])
        what = (
            f"{where}={str(first['input'])[:80]!r}: {first['msg']}"
            if where
            else first["msg"].removeprefix("Value error, ")
        )
        raise _damaged(folder / MANIFEST_NAME, what) from error


def _damaged(path: Path, what: str) -> RecordingError:
    return RecordingError(
        f"{path} is damaged: {what}; take it from another copy of the recording. The parts beside it are Parquet files "
        f"that other tools read without it, such as pandas.read_parquet('{path.parent / 'rows'}')",
        part=MANIFEST_NAME,
    )


def _check_version(path: Path, version: object) -> None:
    major, dot, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if not (dot and major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit() and len(major) < 9):
        raise _damaged(path, f"format_version is {str(version)[:40]!r}")
    if int(major) != FORMAT_MAJOR:
        raise UnsupportedFormatError(
            f"{path} has format version {version}, this program reads {FORMAT_MAJOR}.x; upgrade moe-debugger"
        )
