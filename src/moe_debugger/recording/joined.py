"""Several recordings read as one: the ranks of a sharded model, or all sources of a fleet's session.

Glossary:
    member   a recording of one process.
    domain   members whose steps are aligned: equal steps are the same step. All members of the step domain `global` are
             one domain, every other member is one of its own: two replicas' steps have nothing to do with each other.

In the joined rows the steps of a domain are moved past those of the domain before it, so that equal steps are the same
step. A forward belongs to one member: the joined `forward_index` is
``base + member's own * members of the domain + place of the member in it``, which no two members share.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_debugger._counted import layer_shape
from moe_debugger._decisions import Decisions
from moe_debugger._layers import Layers
from moe_debugger._row_blocks import RowBlock, RowSource
from moe_debugger.capture import LayerInfo
from moe_debugger.capture_health import CaptureHealth
from moe_debugger.errors import InvalidInputError, RecordingError
from moe_debugger.recording.joined_manifest import joined_manifest
from moe_debugger.recording.manifest import GroupManifest, PartEntry, read_manifest
from moe_debugger.recording.probabilities import ProbabilitySums
from moe_debugger.recording.reader import Recording, Verification
from moe_debugger.training.series import SeriesTable
from moe_debugger.wire.codec import CountsColumns

__all__ = ["JoinedDecisions", "JoinedRecording", "join_recordings", "open_group"]

StepDomain = Literal["global", "source"]


@dataclass(frozen=True, slots=True)
class _Domain:
    """Where the steps and forwards of some members begin among all."""

    members: tuple[int, ...]
    first_step: int
    first_forward: int


class JoinedDecisions(Decisions):
    """Rows of several processes; `rank` and `source_id` say of which.

    Attributes:
        source_ids: of the members; source_index: [n] uint32 into them.
    """

    source_ids: tuple[str, ...] = ()
    source_index: npt.NDArray[np.uint32]

    @property
    def source_id(self) -> npt.NDArray[np.object_]:
        """[n] id of each row's source: references to the few texts of `source_ids`."""
        return np.array(self.source_ids or ("",), dtype=object)[self.source_index]

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield "source_id"

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.source_id if name == "source_id" else super().__getitem__(name)


class JoinedRecording(Recording):
    """Several recordings as one; made by `open_recording` and `join_recordings`.

    Its manifest is made of those of the members: numbers are sums, `is_num_requests_exact` is false, since two members
    may have seen the same request, and what differs between members is the first one's.

    Attributes:
        members: the recordings, in the order of their folders or of their ranks.
        replicas: recordings that were left out, because their process routed the same tokens as a member.
    """

    def __init__(
        self,
        path: Path,
        members: Sequence[Recording],
        *,
        group: GroupManifest | None = None,
        folders: Sequence[str] = (),
        problems: Mapping[str, str] | None = None,
        step_domain: StepDomain | None = None,
        replicas: Sequence[Recording] = (),
    ) -> None:
        self.path = path
        self.replicas = tuple(replicas)
        self.members = tuple(members)
        self.group = group
        self._own_problems = dict(problems or {})
        self._names = tuple(folders) or tuple(str(each.path) for each in members)
        self._layers = _joined_layers(self.members)
        lost = [each._lost_layers for each in self.members if each._lost_layers is not None]
        self._lost_layers = lost[0] if lost else None
        self._domains = _domains(self.members, step_domain)
        self._domain_of = {index: domain for domain in self._domains for index in domain.members}
        self.manifest = joined_manifest(
            [each.manifest for each in self.members],
            group,
            folders,
            [self._domain_of[index].first_step for index in range(len(self.members))],
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found not to be whole until now, of all members."""
        of_members = (
            f"{name}: {text}" for name, each in zip(self._names, self.members, strict=True) for text in each.problems
        )
        return (*self._own_problems.values(), *of_members)

    @property
    def num_rows_lost(self) -> int:
        """Rows, or sums, of the parts that were found not to be whole until now, of all members."""
        return sum(member.num_rows_lost for member in self.members)

    @property
    def is_whole(self) -> bool:
        """True where every member is."""
        is_ended = self.group is None or self.group.status == "finished"
        lost = {} if self.group is None else self.group.num_rows_not_written
        return is_ended and not self._own_problems and not lost and all(each.is_whole for each in self.members)

    def expert_owners(self) -> dict[int, tuple[int, ...]]:
        """Return the expert-parallel rank of each expert by layer index, of all members."""
        owners: dict[int, tuple[int, ...]] = {}
        for member in self.members:
            owners |= member.expert_owners()
        return owners

    def decisions(self, *, max_rows: int | None = None) -> JoinedDecisions:
        """Return all rows, domain after domain and within one by step; see `Recording.decisions`."""
        rows = super().decisions(max_rows=max_rows)
        assert isinstance(rows, JoinedDecisions)
        return rows

    def iter_counts(self) -> Iterator[CountsColumns]:
        """Yield the sums of the members of level "counts", member after member, with joined steps."""
        for index, member in enumerate(self.members):
            offset = self._domain_of[index].first_step
            for columns in member.iter_counts():
                yield replace(columns, first_step=columns.first_step + offset, last_step=columns.last_step + offset)

    def series(self, source_id: str | None = None) -> SeriesTable:
        """Return the training series of one member: values are never summed or averaged over processes.

        Args:
            source_id: of which; default: the member of the lowest rank that has any.

        Raises:
            InvalidInputError: there is no such source.
            RecordingError: a part is damaged.
        """
        if source_id is not None:
            for member in self.members:
                if member.manifest.source_id == source_id:
                    return member.series()
            known = ", ".join(each.manifest.source_id or "(none)" for each in self.members)
            raise InvalidInputError(f"source_id {source_id[:64]!r} is not in this recording; it has {known}")
        for member in sorted(self.members, key=lambda each: each.manifest.topology.global_rank):
            table = member.series()
            if len(table):
                return table
        return SeriesTable([])

    def capture_health(self) -> CaptureHealth | None:
        """Return the health of all members together; None where one of them was not stopped in order."""
        health = self.manifest.capture_health
        return None if health is None else health.to_capture_health()

    def verify(self) -> Verification:
        """Read every part of every member wholly, and return what is not as it was written."""
        found = [each.verify() for each in self.members]
        of_members = (
            f"{name}: {text}" for name, each in zip(self._names, found, strict=True) for text in each.problems
        )
        return Verification(
            num_parts=sum(each.num_parts for each in found),
            num_rows=sum(each.num_rows for each in found),
            num_rows_lost=sum(each.num_rows_lost for each in found),
            problems=(*self._own_problems.values(), *of_members),
        )

    def __repr__(self) -> str:
        return f"<JoinedRecording {str(self.path)!r} of {len(self.members)} sources of {self._summary()}>"

    def _decisions(self, rows: RowSource | Sequence[RowBlock]) -> JoinedDecisions:
        decisions = JoinedDecisions(rows, self._layers)
        members = self._member_of(decisions.forward_index)
        ranks = np.array([each.manifest.topology.global_rank for each in self.members] or [0], np.uint32)
        decisions.rank = ranks[members]
        decisions.source_ids = tuple(each.manifest.source_id for each in self.members)
        decisions.source_index = members
        return decisions

    def _member_of(self, forward_index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        """Return the member of each joined forward."""
        firsts = np.array([domain.first_forward for domain in self._domains], np.uint64)
        places = np.searchsorted(firsts, forward_index, side="right") - 1
        result = np.zeros(len(forward_index), np.uint32)
        for place, domain in enumerate(self._domains):
            rows = places == place
            own = (forward_index[rows] - np.uint64(domain.first_forward)) % np.uint64(len(domain.members))
            result[rows] = np.array(domain.members, np.uint32)[own.astype(np.intp)]
        return result

    def whole_parts(self, kind: str) -> list[PartEntry]:
        """Return the parts of a table that can be read, of all members."""
        return [entry for member in self.members for entry in member.whole_parts(kind)]

    def _probabilities(self) -> Iterator[ProbabilitySums]:
        for member in self.members:
            yield from member._probabilities()

    def _blocks(self) -> Iterator[RowBlock]:
        for domain in self._domains:
            if len(domain.members) == 1:
                (index,) = domain.members
                yield from (self._moved(index, block) for block in self.members[index]._blocks())
            else:
                steps = heapq.merge(*(self._steps(index) for index in domain.members), key=lambda one: one[:2])
                yield from (block for _, _, block in steps)

    def _steps(self, index: int) -> Iterator[tuple[int, int, RowBlock]]:
        """Yield the rows of a member in runs of one step."""
        for block in self.members[index]._blocks():
            step = block.token_column("step")
            edges = [0, *(np.flatnonzero(step[1:] != step[:-1]) + 1).tolist(), len(block)]
            moved = self._moved(index, block)
            for start, stop in pairwise(edges):
                yield int(step[start]), index, moved.slice(start, stop)

    def _moved(self, index: int, block: RowBlock) -> RowBlock:
        """Return a member's rows with joined steps and forwards."""
        domain = self._domain_of[index]
        stride, place = np.uint64(len(domain.members)), np.uint64(domain.members.index(index))
        tokens = {
            **block.tokens,
            "step": block.tokens["step"] + np.uint64(domain.first_step),
            "forward_index": block.tokens["forward_index"] * stride + place + np.uint64(domain.first_forward),
        }
        return RowBlock(block.request_ids, tokens, block.rows, block.row_token)

    def _captures(self) -> Iterator[tuple[int, list[RowBlock], str]]:
        def of_member(index: int) -> Iterator[tuple[int, int, list[RowBlock]]]:
            for captured_at, blocks, _ in self.members[index]._captures():
                yield captured_at, index, [self._moved(index, block) for block in blocks]

        merged = heapq.merge(*(of_member(index) for index in range(len(self.members))), key=lambda one: one[:2])
        return ((time, blocks, self.members[index].manifest.source_id) for time, index, blocks in merged)


def open_group(folder: Path, group: GroupManifest, *, skips_damaged: bool) -> JoinedRecording:
    """Open a recording of several sources that a fleet made.

    Raises:
        RecordingError: a member is missing or damaged, and `skips_damaged` is false.
    """
    members: list[Recording] = []
    folders: list[str] = []
    problems: dict[str, str] = {}
    for name in group.members:
        try:
            if (folder / "sources").is_symlink() or (folder / name).is_symlink():
                raise RecordingError(f"{name} is a link to elsewhere", part=name)
            manifest = read_manifest(folder / name)
            if manifest.group_id != group.recording_id:
                raise RecordingError(f"{name} is foreign: it is no member of {group.recording_id}", part=name)
            members.append(Recording(folder / name, manifest, skips_damaged=skips_damaged))
        except RecordingError as error:
            if not skips_damaged:
                raise
            problems[name] = str(error)
        else:
            folders.append(name)
    try:
        return JoinedRecording(folder, members, group=group, folders=folders, problems=problems)
    except InvalidInputError as error:
        raise RecordingError(str(error), part="sources") from error


def join_recordings(recordings: Sequence[Recording], *, step_domain: StepDomain | None = None) -> JoinedRecording:
    """Return recordings of several processes of one session, such as the ranks of a sharded model, as one.

    Ranks that routed the same tokens (tensor parallelism) count once: the others are in `JoinedRecording.replicas`.

    Args:
        recordings: opened; their order is that of `JoinedRecording.members`, sorted by rank.
        step_domain: "global" where equal steps of all of them are the same step, "source" where they are not; default:
            what each manifest says, and "source" where it does not (format version 1.0).

    Raises:
        InvalidInputError: there are none, one is given twice, or they are of different models.
    """
    plain = [
        member for each in recordings for member in (each.members if isinstance(each, JoinedRecording) else [each])
    ]
    if not plain:
        raise InvalidInputError("there is no recording to join; give the folders of at least one")
    ids = Counter(each.manifest.recording_id for each in plain)
    for each in plain:
        if ids[each.manifest.recording_id] > 1:
            raise InvalidInputError(f"{each.path} is given twice (recording {each.manifest.recording_id})")
    plain.sort(key=lambda each: each.manifest.topology.global_rank)
    members, replicas = _without_replicas(plain)
    return JoinedRecording(plain[0].path.parent, members, step_domain=step_domain, replicas=replicas)


def _without_replicas(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Recording]]:
    """Return the recordings whose tokens count, and those that hold the same tokens again.

    Ranks of a tensor-parallel group route the same tokens; one of them stands for all.
    """
    ranks = {each.manifest.topology.global_rank for each in recordings}
    members: list[Recording] = []
    replicas: list[Recording] = []
    counted: set[int] = set()
    for each in recordings:
        topology = each.manifest.topology
        is_replica = topology.world_size > 1 and topology.recording_rank != topology.global_rank
        if is_replica and (topology.recording_rank in ranks or topology.recording_rank in counted):
            replicas.append(each)
            continue
        if is_replica:
            counted.add(topology.recording_rank)
        members.append(each)
    return members, replicas


def _joined_layers(members: Sequence[Recording]) -> Layers:
    layers: dict[int, LayerInfo] = {}
    for member in members:
        for info in member._layers:
            known = layers.setdefault(info.layer_index, info)
            if layer_shape(known) != layer_shape(info):
                raise InvalidInputError(
                    f"{member.path}: layer {info.layer_index} has {layer_shape(info)}, in another "
                    f"recording it has {layer_shape(known)}: recordings of different models cannot be "
                    "joined"
                )
    return Layers(layers[index] for index in sorted(layers))


def _domains(members: Sequence[Recording], step_domain: StepDomain | None) -> list[_Domain]:
    is_global = [(step_domain or each.manifest.step_domain) == "global" for each in members]
    together = tuple(index for index, one in enumerate(is_global) if one)
    groups = [together] if together else []
    groups += [(index,) for index, one in enumerate(is_global) if not one]
    domains = []
    first_step = first_forward = 0
    for group in groups:
        domains.append(_Domain(group, first_step, first_forward))
        parts = [entry for index in group for entry in members[index].manifest.parts]
        first_step += 1 + max((entry.last_step or 0 for entry in parts), default=0)
        first_forward += (1 + max((entry.last_forward_index or 0 for entry in parts), default=0)) * len(group)
    if max(first_step, first_forward) >= 2**63:
        raise InvalidInputError(
            "the manifests name steps or forwards that no run has, so the recordings cannot be joined"
        )
    return domains
