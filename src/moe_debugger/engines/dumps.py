"""Reads the files of SGLang's expert distribution recorder (``/dump_expert_distribution_record``).

Its modes write different things, told apart by their keys:

    stat, stat_approx   ``logical_count`` [buffered passes, layers, logical experts], summed over all ranks by SGLang.
    per_pass            ``records``: per forward pass and rank ``global_physical_count`` [layers, physical replicas],
                        and ``last_physical_to_logical_map`` [layers, physical replicas].
    per_token           as per_pass, with the experts of each token. The files have no request ids, so tokens that
                        belong together cannot be told, and only the counts are taken.

Files are read as tensors and plain values alone (``weights_only``): nothing in them is executed.

    distribution = read_expert_distribution("expert_distribution_recorder_1790000000.0.pt")
    print(distribution.analyze(top_k=8))
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis import Analysis, LayerShape, RoutingState, Thresholds, finish
from moe_debugger.capture import LayerInfo
from moe_debugger.engines.arrays import engine_layers
from moe_debugger.errors import DependencyMissingError, InvalidInputError
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import CountsColumns, LayerCountColumns

if TYPE_CHECKING:
    from moe_debugger.source import Source

__all__ = ["ExpertDistribution", "read_expert_distribution"]

Ranks = Literal["check", "sum", "first"]
_PATTERN = "expert_distribution_recorder_*.pt"
_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertDistribution:
    """Counts of a recording, per forward pass.

    Attributes:
        mode: "stat", "per_pass" or "per_token".
        counts: [passes, MoE layers, logical experts] int64, assignments.
        model_layer_indices: of each MoE layer, its index among all layers of the model: layers without a single count
            are dense ones, or were not recorded, and are left out.
        num_model_layers: all layers that the file has a place for.
        forward_pass_ids: of each pass; for "stat", which has none, 0, 1, 2...
        problems: what is suspicious.
    """

    mode: str
    counts: _I64
    model_layer_indices: tuple[int, ...]
    num_model_layers: int
    forward_pass_ids: tuple[int, ...]
    problems: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """Logical experts of a layer."""
        return int(self.counts.shape[2])

    def layers(self, top_k: int) -> tuple[LayerInfo, ...]:
        """Return the MoE layers of the recording; the file says nothing about k."""
        return engine_layers(
            len(self.model_layer_indices), self.num_experts, top_k, model_layer_indices=self.model_layer_indices
        )

    def counts_columns(self, top_k: int) -> Iterator[CountsColumns]:
        """Yield the sums of each pass; the phase is not known.

        A layer's tokens are its assignments over k, rounded up: what does not divide is shown by `top_k_problems`.

        Raises:
            InvalidInputError: `top_k` is not in 1..E.
        """
        self.layers(top_k)
        for step, counts in enumerate(self.counts):
            layers = [
                LayerCountColumns(
                    layer_index=place,
                    num_experts=self.num_experts,
                    num_identity_experts=0,
                    num_tokens=-(-int(row.sum()) // top_k),
                    num_padding=0,
                    expert_counts=row.astype(np.uint64),
                )
                for place, row in enumerate(counts)
            ]
            yield CountsColumns(step, step, pb.PHASE_UNSPECIFIED, 0, layers)

    def top_k_problems(self, top_k: int) -> tuple[str, ...]:
        """Return where the counts cannot be those of top-k routing with this k over the same tokens."""
        totals = self.counts.sum(axis=2)
        problems = []
        if (totals % top_k).any():
            step, layer = (int(axis[0]) for axis in np.nonzero(totals % top_k))
            problems.append(
                f"pass {self.forward_pass_ids[step]}, layer {self.model_layer_indices[layer]}: {totals[step, layer]} "
                f"assignments are no multiple of k = {top_k}: another k, dropped tokens, or approximate counts"
            )
        if (totals != totals[:, :1]).any():
            step = int(np.flatnonzero((totals != totals[:, :1]).any(axis=1))[0])
            problems.append(
                f"pass {self.forward_pass_ids[step]}: layers have {int(totals[step].min())} to "
                f"{int(totals[step].max())} assignments, but each token passes every layer"
            )
        return tuple(problems)

    def state(self, top_k: int) -> RoutingState:
        """Return the counts as a state of the analysis; they belong to no request, so it gives no intervals."""
        state = RoutingState.empty(LayerShape(x.layer_index, x.num_experts, x.top_k) for x in self.layers(top_k))
        for sums in self.counts_columns(top_k):
            state.fold_counts(sums)
        return state

    def analyze(self, top_k: int, *, thresholds: Thresholds | None = None) -> Analysis:
        """Return metrics and findings of the recording."""
        return finish(self.state(top_k), thresholds=thresholds)

    def publish(self, source: "Source") -> int:
        """Push all passes into a source whose layers are this recording's; return how many were taken.

        Raises:
            InvalidInputError: the source has other layers, or more than one top-k.
        """
        sizes = {(info.num_experts, info.top_k) for info in source.layers()}
        if len(source.layers()) != len(self.model_layer_indices) or len(sizes) != 1:
            raise InvalidInputError(
                f"the recording has {len(self.model_layer_indices)} MoE layers with {self.num_experts} experts, the "
                f"source {len(source.layers())} layers of sizes {sorted(sizes)}; open it with "
                "layers=distribution.layers(top_k)"
            )
        return sum(source.publish_counts(sums) for sums in self.counts_columns(source.top_k))


def read_expert_distribution(paths: str | Path | Sequence[str | Path], *, ranks: Ranks = "check") -> ExpertDistribution:
    """Read a recording: one file, the files of all ranks, or a folder of ``expert_distribution_recorder_*.pt``.

    Args:
        ranks: per_pass and per_token files hold one rank each. "sum" adds them (ranks saw different tokens: data or
            attention parallelism), "first" takes one (ranks saw the same tokens: tensor parallelism), "check" adds
            them and refuses ranks that have equal counts in all passes, since both could be meant.

    Raises:
        InvalidInputError: a file is no such recording, files do not belong together, or counts are not valid.
        DependencyMissingError: torch is not installed.
    """
    files = _files(paths)
    contents = [_load(file) for file in files]
    kinds = {_kind(content, file) for content, file in zip(contents, files, strict=True)}
    if len(kinds) > 1:
        raise InvalidInputError(f"{files[0].parent}: files of modes {' and '.join(sorted(kinds))}; read one recording")
    if ranks not in ("check", "sum", "first"):
        raise InvalidInputError(f"ranks {ranks!r}: expected check, sum or first")
    mode = kinds.pop()
    if mode == "stat":
        per_file = [_checked_counts(x["logical_count"], 3, file) for x, file in zip(contents, files, strict=True)]
        if len({counts.shape[1:] for counts in per_file}) > 1:
            raise InvalidInputError(f"{files[0].parent}: files have {[x.shape[1:] for x in per_file]} layers x experts")
        counts = np.concatenate(per_file)
        # A ring buffer has places that no pass has filled yet.
        counts = counts[counts.any(axis=(1, 2))]
        pass_ids = tuple(range(len(counts)))
    else:
        counts, pass_ids = _sum_records(contents, files, ranks)
    is_moe = counts.any(axis=(0, 2))
    if not is_moe.any():
        raise InvalidInputError(f"{files[0]}: all counts are 0; was anything generated between start and dump?")
    num_layers = counts.shape[1]
    indices = tuple(int(index) for index in np.flatnonzero(is_moe))
    problems: tuple[str, ...] = ()
    if len(indices) < num_layers:
        without = sorted(set(range(num_layers)) - set(indices))
        problems = (f"layers {without[:8]} have no counts: dense layers, or not recorded",)
    return ExpertDistribution(mode, counts[:, is_moe], indices, num_layers, pass_ids, problems)


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    files: list[Path] = []
    for path in given:
        found = sorted(path.glob(_PATTERN)) if path.is_dir() else [path]
        if not found:
            raise InvalidInputError(f"{path} has no {_PATTERN}; SGLang writes there what was dumped")
        files += found
    if not files:
        raise InvalidInputError("no file is given; pass the path of a dump, or of the folder that SGLang writes to")
    return files


def _load(file: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise DependencyMissingError(
            "reading SGLang's dumps needs torch, which is not installed; run: pip install 'moe-debugger[collector]'"
        ) from error
    if not file.is_file():
        raise InvalidInputError(f"{file} is no file")
    try:
        with warnings.catch_warnings():
            # torch wonders aloud about files that were not written by torch.save; what they hold is judged below.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidInputError(
            f"{file} cannot be read as tensors and plain values ({first_line[:200]}); expected a file that SGLang's "
            "expert distribution recorder wrote. Anything else in it is refused, since loading could execute it"
        ) from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{file} holds a {type(content).__name__}, expected a dump of the recorder")
    return content


def _kind(content: Mapping[str, Any], file: Path) -> str:
    if "logical_count" in content:
        return "stat"
    records = content.get("records")
    if isinstance(records, list) and "last_physical_to_logical_map" in content:
        if not records:
            raise InvalidInputError(f"{file} has no records; was anything generated between start and dump?")
        if not all(isinstance(record, dict) and "global_physical_count" in record for record in records):
            raise InvalidInputError(f"{file}: a record has no global_physical_count; is it of another version?")
        return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"
    raise InvalidInputError(
        f"{file} has the keys {sorted(map(str, content))[:8]}; expected logical_count (mode stat), or records and "
        "last_physical_to_logical_map (modes per_pass and per_token)"
    )


def _numpy(value: Any) -> npt.NDArray[Any]:
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def _checked_counts(value: Any, num_axes: int, file: Path) -> _I64:
    array = _numpy(value)
    if array.ndim != num_axes or array.dtype.kind not in "iu" or not all(array.shape):
        raise InvalidInputError(
            f"{file}: counts have shape {array.shape} and dtype {array.dtype}; expected integers with {num_axes} axes, "
            "none of them empty"
        )
    if int(array.min()) < 0:
        raise InvalidInputError(f"{file}: a count is {int(array.min())}; a counter of SGLang overflowed")
    return array.astype(np.int64)


def _sum_records(
    contents: Sequence[Mapping[str, Any]], files: Sequence[Path], ranks: Ranks
) -> tuple[_I64, tuple[int, ...]]:
    """Return logical counts [passes, layers, experts] of all ranks, and the passes' ids."""
    by_pass: dict[int, dict[int, _I64]] = {}
    seen: set[tuple[int, int, str]] = set()
    shape: tuple[int, ...] | None = None
    for content, file in zip(contents, files, strict=True):
        mapping = _checked_counts(content["last_physical_to_logical_map"], 2, file)
        num_experts = int(mapping.max()) + 1
        for record in content["records"]:
            number, rank = int(record.get("forward_pass_id", -1)), int(record.get("rank", 0))
            key = (number, rank, str(record.get("gatherer_key", "")))
            if key in seen:
                raise InvalidInputError(
                    f"{file}: pass {number} of rank {rank} is there twice; read the files of one recording, each once"
                )
            seen.add(key)
            physical = _checked_counts(record["global_physical_count"], 2, file)
            if physical.shape != mapping.shape:
                raise InvalidInputError(
                    f"{file}: pass {number} counts {physical.shape} layers x replicas, but the map of replicas has "
                    f"{mapping.shape}"
                )
            logical = np.zeros((len(mapping), num_experts), np.int64)
            np.add.at(logical, (np.arange(len(mapping))[:, None], mapping), physical)
            if shape not in (None, logical.shape):
                raise InvalidInputError(f"{file}: {logical.shape} layers x experts, other files have {shape}")
            shape = logical.shape
            of_rank = by_pass.setdefault(number, {})
            of_rank[rank] = of_rank.get(rank, 0) + logical
    numbers = sorted(by_pass)
    all_ranks = sorted({rank for of_rank in by_pass.values() for rank in of_rank})
    if ranks == "check" and len(all_ranks) > 1:
        first = [list(of_rank.values()) for of_rank in by_pass.values()]
        if all(len(x) == len(all_ranks) and all(np.array_equal(x[0], other) for other in x[1:]) for x in first):
            raise InvalidInputError(
                f"ranks {all_ranks[:8]} have equal counts in all {len(numbers)} passes: with tensor parallelism alone "
                'they saw the same tokens, and adding them would count each token again; say ranks="first" to count '
                'them once, or ranks="sum" where their tokens differ'
            )
    if ranks == "first":
        chosen = all_ranks[0]
        return np.stack([by_pass[number][chosen] for number in numbers if chosen in by_pass[number]]), tuple(
            number for number in numbers if chosen in by_pass[number]
        )
    return np.stack([np.sum(list(by_pass[number].values()), axis=0) for number in numbers]), tuple(numbers)
