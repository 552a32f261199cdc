"""Where a process stands among the ranks of a sharded model, and what follows for counting.

Glossary:
    tensor parallel (tp)    ranks that hold slices of the same layers and see the same batch: their routers agree.
    expert parallel (ep)    ranks that hold different experts. Decisions name experts by their global ids all the same.
    data parallel (dp)      ranks with a batch of their own (DDP, FSDP, HSDP): their decisions add up.
    pipeline parallel (pp)  ranks that hold different layers; each routes the whole batch at its own layers.
    replica                 a rank that routes the same tokens at the same layers as a lower rank, which records them.

With tp_size = ep_size = 2 on 2 ranks, both ranks route every token over all E experts, so rank 1 is a replica of rank
0; rank 0 computes experts 0..E/2-1 and rank 1 the others: that is the placement (`expert_owners`). With fsdp_size =
ep_size = 2 each rank routes its own batch, so both record, and their sums are the model's.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_debugger.errors import InvalidInputError, ModelNotSupportedError
from moe_debugger.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ParallelCoordinates", "detect_coordinates", "expert_owners", "is_pipeline_stage", "layer_numbers"]

# Names of mesh dimensions: transformers ("pp", "dp_replicate", "fsdp", "tp", "ep"), FSDP2 and torchtitan recipes.
_TENSOR_AXES = ("tp", "tensor_parallel")
_EXPERT_AXES = ("ep", "expert_parallel")
_PIPELINE_AXES = ("pp", "pipeline_parallel")
# Outermost first, as ranks are counted.
_DATA_AXES = ("dp_replicate", "dp", "data_parallel", "dp_shard", "fsdp")


@dataclass(frozen=True, slots=True)
class ParallelCoordinates:
    """The place of one rank; all ranks count from 0.

    Attributes:
        data_parallel_rank: index of the batch that this rank routes.
        expert_parallel_rank: index of the share of the experts that this rank computes.
        expert_parallel_size: number of such shares; 1 where every rank computes all experts.
        replica_of_rank: global rank that records the tokens that this rank routes too. None: the tensor-parallel rank 0
            of its group, taken to be `global_rank - tensor_parallel_rank`. Its own global rank: this rank records,
            whatever its tensor_parallel_rank is (with sequence parallelism each of them routes tokens of its own).
        first_layer_index: index of this rank's first MoE layer among those of the whole model. Only a pipeline that
            transformers did not build has to give it.

    Raises:
        InvalidInputError: a rank is negative, or not below its size.
    """

    global_rank: int = 0
    world_size: int = 1
    data_parallel_rank: int = 0
    tensor_parallel_rank: int = 0
    expert_parallel_rank: int = 0
    pipeline_parallel_rank: int = 0
    expert_parallel_size: int = 1
    replica_of_rank: int | None = None
    first_layer_index: int | None = None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise InvalidInputError(f"{each.name} {value!r}: expected an integer, 0 or more")
        for name, size_name in (("global_rank", "world_size"), ("expert_parallel_rank", "expert_parallel_size")):
            rank, size = getattr(self, name), getattr(self, size_name)
            if rank >= size:
                raise InvalidInputError(f"{name} {rank}: expected less than {size_name}, which is {size}")
        if not 0 <= self.recording_rank <= self.global_rank:
            raise InvalidInputError(
                f"global_rank {self.global_rank} would be a replica of rank {self.recording_rank}; the lowest rank of "
                "a group records: check tensor_parallel_rank, or give replica_of_rank"
            )

    @property
    def recording_rank(self) -> int:
        """Global rank whose decisions count for the tokens that this rank routes."""
        return self.global_rank - self.tensor_parallel_rank if self.replica_of_rank is None else self.replica_of_rank

    @property
    def is_replica(self) -> bool:
        """True where another rank records this rank's tokens."""
        return self.recording_rank != self.global_rank

    def to_message(self) -> pb.ParallelCoordinates:
        """Return the coordinates as a manifest holds them."""
        return pb.ParallelCoordinates(
            global_rank=self.global_rank,
            world_size=self.world_size,
            data_parallel_rank=self.data_parallel_rank,
            tensor_parallel_rank=self.tensor_parallel_rank,
            expert_parallel_rank=self.expert_parallel_rank,
            pipeline_parallel_rank=self.pipeline_parallel_rank,
            replica_of_rank=self.recording_rank if self.is_replica else None,
        )

    def __str__(self) -> str:
        if self.world_size == 1:
            return "single process"
        ranks = (
            ("dp", self.data_parallel_rank),
            ("tp", self.tensor_parallel_rank),
            ("ep", self.expert_parallel_rank),
            ("pp", self.pipeline_parallel_rank),
        )
        replica = f", replica of rank {self.recording_rank}" if self.is_replica else ""
        return f"rank {self.global_rank} of {self.world_size} ({' '.join(f'{n} {r}' for n, r in ranks)}){replica}"


@dataclass(frozen=True, slots=True)
class _Axis:
    """One dimension of a device mesh, as this rank sees it."""

    rank: int
    size: int
    group: tuple[int, ...]


def detect_coordinates(model: "nn.Module") -> ParallelCoordinates:
    """Return this process's coordinates, from torch.distributed and the device meshes of `model` and its parameters.

    Nothing is exchanged with other ranks, so it may be called on any subset of them. A rank that no mesh explains (DDP,
    or a plain launch of several processes) is taken to have a batch of its own.
    """
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return ParallelCoordinates()
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    axes = _axes(model)
    tensor = _first(axes, _TENSOR_AXES)
    expert = _first(axes, _EXPERT_AXES)
    pipeline = _first(axes, _PIPELINE_AXES)
    data = [axes[name] for name in _DATA_AXES if name in axes]
    data_rank = 0
    for axis in data:
        data_rank = data_rank * axis.size + axis.rank
    if not data:
        # Ranks count tp fastest, then dp, then pp, in transformers as in Megatron.
        num_batches = max(1, world_size // (tensor.size * pipeline.size))
        data_rank = (rank // tensor.size) % num_batches
    return ParallelCoordinates(
        global_rank=rank,
        world_size=world_size,
        data_parallel_rank=data_rank,
        tensor_parallel_rank=tensor.rank,
        expert_parallel_rank=expert.rank,
        pipeline_parallel_rank=pipeline.rank,
        expert_parallel_size=expert.size,
        replica_of_rank=min(tensor.group, default=rank),
    )


def expert_owners(
    model: "nn.Module", module_name: str, num_experts: int, coordinates: ParallelCoordinates
) -> tuple[int, ...]:
    """Return the expert-parallel rank that computes each expert of one layer, [num_experts]; () where every rank does.

    Experts lie in equal, contiguous shares: expert e belongs to rank ``e // (num_experts / size)``. The size is that of
    the mesh over which the layer's stacked expert weights are sharded by expert, so a layer that is not sharded has no
    owners; where no weight is a DTensor, the size is ``coordinates.expert_parallel_size``.
    """
    size = _expert_shards(model.get_submodule(module_name), num_experts)
    if size is None:
        size = coordinates.expert_parallel_size
    if size <= 1 or num_experts % size:
        return ()
    return tuple(expert // (num_experts // size) for expert in range(num_experts))


def is_pipeline_stage(model: "nn.Module") -> bool:
    """Return whether transformers made `model` one stage of a pipeline."""
    return getattr(model, "_pp_stage", None) is not None


def layer_numbers(
    model: "nn.Module", module_names: "tuple[str, ...]", coordinates: ParallelCoordinates
) -> tuple[int, ...]:
    """Return the index of each of this rank's MoE layers among those of the whole model.

    A stage of transformers' pipeline holds identities in place of the other stages' layers, which do not say what they
    stand for: the whole model is built once more without memory (on the meta device), and its layers are counted.

    Args:
        module_names: of this rank's MoE layers, in order.

    Raises:
        InvalidInputError: the model is a pipeline stage whose place is not known; the text says what to give.
    """
    if coordinates.first_layer_index is not None:
        return tuple(range(coordinates.first_layer_index, coordinates.first_layer_index + len(module_names)))
    if not is_pipeline_stage(model):
        if coordinates.pipeline_parallel_rank > 0:
            raise InvalidInputError(
                f"rank {coordinates.global_rank} is stage {coordinates.pipeline_parallel_rank} of a pipeline that "
                "transformers did not build, and the MoE layers of the stages before it are not known; give "
                "MoEDebugger(model, coordinates=ParallelCoordinates(..., first_layer_index=<MoE layers before>))"
            )
        return tuple(range(len(module_names)))
    known = _layers_of_whole_model(model)
    missing = [name for name in module_names if name not in known]
    if missing:
        raise InvalidInputError(
            f"{missing[0]} is a MoE layer of this pipeline stage, but not of a {type(model).__name__} built from the "
            "same config; give coordinates=ParallelCoordinates(..., first_layer_index=<MoE layers before this stage>)"
        )
    return tuple(known[name] for name in module_names)


def _layers_of_whole_model(model: Any) -> dict[str, int]:
    """Return module name -> index of the MoE layers of the model that this pipeline stage is a part of."""
    import torch

    from moe_debugger.capture.discovery import find_sites

    try:
        # The constructors draw no random numbers on the meta device; should one do so, the caller's stay as they are.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            whole = type(model)(copy.deepcopy(model.config))
        sites = find_sites(whole).sites
    except (RuntimeError, TypeError, ValueError, NotImplementedError, ModelNotSupportedError) as error:
        raise InvalidInputError(
            f"the MoE layers of the whole {type(model).__name__} could not be counted "
            f"({type(error).__name__}: {error}); "
            "give coordinates=ParallelCoordinates(..., first_layer_index=<MoE layers before this pipeline stage>)"
        ) from error
    return {site.info.module_name: site.info.layer_index for site in sites}


def _axes(model: Any) -> dict[str, _Axis]:
    """Return the named mesh dimensions that this rank is in; the larger one where two meshes share a name."""
    axes: dict[str, _Axis] = {}
    for mesh in _meshes(model):
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            axis = _axis(mesh, dim)
            if axis.size > axes.get(name, _Axis(0, 0, ())).size:
                axes[name] = axis
    return axes


def _axis(mesh: Any, dim: int) -> _Axis:
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # another rank's mesh
        return _Axis(0, 1, ())
    index: list[Any] = list(coordinate)
    index[dim] = slice(None)
    return _Axis(coordinate[dim], mesh.size(dim), tuple(mesh.mesh[tuple(index)].tolist()))


def _meshes(model: Any) -> Iterator[Any]:
    from torch.distributed.tensor import DTensor

    seen = set()
    owned = (getattr(model, name, None) for name in ("_device_mesh", "device_mesh"))
    used = (parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    for mesh in (*owned, *used):
        if hasattr(mesh, "mesh_dim_names") and mesh not in seen:
            seen.add(mesh)
            yield mesh


def _expert_shards(block: "nn.Module", num_experts: int) -> int | None:
    """Return over how many ranks the experts are spread; None where no stacked weight is a DTensor."""
    from torch import distributed

    if not distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    size: int | None = None
    for parameter in block.parameters():
        if not isinstance(parameter, DTensor) or parameter.ndim != 3 or parameter.shape[0] != num_experts:
            continue
        names = parameter.device_mesh.mesh_dim_names or ()
        shards = (
            parameter.device_mesh.size(dim)
            for dim, (name, placement) in enumerate(zip(names, parameter.placements, strict=False))
            if name in _EXPERT_AXES and placement.is_shard(0)
        )
        size = max(size or 1, *shards, 1)
    return size


def _first(axes: dict[str, _Axis], names: tuple[str, ...]) -> _Axis:
    return next((axes[name] for name in names if name in axes), _Axis(0, 1, ()))
