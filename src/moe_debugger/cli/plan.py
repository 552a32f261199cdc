"""`moe-debugger plan`: where the experts should stand on their ranks, fitted and judged on a recording."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_debugger.cli._output import echo
from moe_debugger.errors import InvalidInputError

if TYPE_CHECKING:
    from moe_debugger.planning import Placement, PlacementPlan, StepLoads
    from moe_debugger.recording import Recording

__all__ = ["plan"]


class Phase(StrEnum):
    """What the steps were for; those of different phases differ in size by orders of magnitude."""

    PREFILL = "prefill"
    DECODE = "decode"
    TRAIN = "train"


_PHASES = {Phase.PREFILL: 1, Phase.DECODE: 2, Phase.TRAIN: 3}


def plan(
    recording: Annotated[Path, typer.Argument(metavar="REC", help="Folder of a recording.")],
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="Expert-parallel ranks.")],
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes that the ranks are on.")] = 1,
    groups: Annotated[int, typer.Option(min=1, metavar="N", help="Groups of experts, of group-limited routing.")] = 1,
    redundant: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Spare expert slots over all ranks, for copies.")
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="Only forwards of that phase; default: all.")] = None,
    workload: Annotated[
        list[Path] | None, typer.Option(metavar="REC", help="Another workload to judge on; may be given again.")
    ] = None,
    current: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="The placement that runs, as this command writes one.")
    ] = None,
    expert_bytes: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="Weights of one expert of one layer, for what moves.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE.json", help="Write the plan; - = standard output.")
    ] = None,
    placement_file: Annotated[
        Path | None, typer.Option("--placement", metavar="FILE.json", help="Write the recommended placement alone.")
    ] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Plan on what is whole of a damaged recording.")] = False,
) -> None:
    """Say whether another placement of the experts would help, by how much for certain, and what moving them costs.

    Placements are fitted to the first half of the recording's forwards and judged on the other half, and on every
    --workload. See docs/planning.md.

    Examples:

    \b
      moe-debugger plan runs/today --ranks 8 --phase decode
      moe-debugger plan runs/today --ranks 16 --nodes 2 --redundant 16 --workload runs/code --json plan.json
      moe-debugger plan runs/today --ranks 8 --placement new.json
    """
    from moe_debugger.cli.report import write_text
    from moe_debugger.planning import plan_placement
    from moe_debugger.recording import open_recording

    mode: Any = "skip" if damaged else "raise"
    source = open_recording(recording, damaged=mode)
    num_experts, top_k = _sizes(source, recording)
    opened, others = [source], {}
    for path in workload or ():
        other = open_recording(path, damaged=mode)
        opened.append(other)
        if _sizes(other, path) != (num_experts, top_k):
            raise InvalidInputError(
                f"{path} is of another model: its layers have other sizes than those of {recording}"
            )
        others[path.name] = _loads(other, num_experts, phase)
    made = plan_placement(
        _loads(source, num_experts, phase),
        top_k=top_k,
        num_ranks=ranks,
        num_nodes=nodes,
        num_groups=groups,
        num_redundant=redundant,
        current=None if current is None else _placement(current),
        other_workloads=others,
        expert_bytes=expert_bytes,
    )
    for problem in (text for each in opened for text in each.problems):
        echo(problem, err=True)
    if placement_file is not None:
        _write_recommended(made, placement_file)
    if json_file is None:
        typer.echo(str(made))
    elif str(json_file) == "-":
        typer.echo(made.to_json())
    else:
        write_text(json_file, made.to_json() + "\n")
        typer.echo(f"wrote {json_file}", err=True)


def _sizes(source: "Recording", path: Path) -> tuple[int, int]:
    sizes = {(layer.num_experts, layer.top_k) for layer in source.layers()}
    if len(sizes) != 1:
        raise InvalidInputError(
            f"{path} has layers of different sizes (experts, top-k): {sorted(sizes)}; plan those of one size in "
            "Python, with `moe_debugger.planning.plan_placement`"
        )
    return sizes.pop()


def _loads(source: "Recording", num_experts: int, phase: Phase | None) -> "StepLoads":
    from moe_debugger.planning import loads_from_decisions

    rows: Any = source.decisions()
    if not len(rows["layer_index"]):
        raise InvalidInputError(f"{source.manifest.session_name!r} has no rows: {_why_no_rows(source)}")
    loads = loads_from_decisions(rows, num_experts=num_experts, phase=None if phase is None else phase.value)
    if phase is not None and not len(loads.steps):
        present = {each.value for each in Phase if (rows["phase"] == _PHASES[each]).any()}
        raise InvalidInputError(
            f"{source.manifest.session_name!r} has no loads of --phase {phase.value}; it has rows of "
            f"{', '.join(sorted(present)) or 'no known phase'}"
        )
    return loads


def _why_no_rows(source: "Recording") -> str:
    manifest = source.manifest
    if manifest.level == "counts":
        return (
            "it was captured at level 'counts', and a plan needs the loads of single forwards, so record at level "
            "`routes` or above"
        )
    if manifest.num_rows or manifest.num_rows_not_written:
        return "those that it had are lost; record again"
    return "nothing ran while it was recorded; run the model while it is recorded"


def _placement(path: Path) -> "Placement":
    import json

    from moe_debugger.planning import Placement

    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as a placement: {error}") from error
    return Placement.from_dict(values)


def _write_recommended(made: "PlacementPlan", path: Path) -> None:
    import json

    from moe_debugger.cli.report import write_text

    if made.recommended is None:
        typer.echo(f"no placement is recommended, so {path} was not written: change nothing", err=True)
        return
    write_text(path, json.dumps(made.recommended.placement.to_dict()) + "\n")
    typer.echo(f"wrote {path}", err=True)
