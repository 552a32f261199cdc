"""Everything that the rules of one explanation may look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.analysis.explanation.history import LayerHistory
from moe_debugger.analysis.explanation.model import Cause, Onset
from moe_debugger.analysis.explanation.onset import Course
from moe_debugger.analysis.explanation.settings import ObservedSettings, Setting
from moe_debugger.analysis.findings import Finding, FindingKind
from moe_debugger.errors import InvalidInputError

__all__ = ["BALANCE_KINDS", "Context", "PlacementOptions", "WorkloadMix", "began", "cause", "number"]

Floats = npt.NDArray[np.float64]

# Kinds for which the balance of the load is the matter.
BALANCE_KINDS = (
    FindingKind.ROUTER_COLLAPSE,
    FindingKind.COLLAPSE_WARNING,
    FindingKind.LOAD_IMBALANCE,
    FindingKind.HOT_EXPERT,
    FindingKind.COLD_EXPERT,
    FindingKind.DEAD_EXPERT,
    FindingKind.CAPACITY_OVERFLOW,
)


def number(value: float) -> str:
    """Return a number for people: three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass(frozen=True, slots=True, eq=False)
class WorkloadMix:
    """What the text of each step was made of.

    Attributes:
        steps: [n] ascending.
        counts: [n, C] tokens of each kind in each step.
        names: of the C kinds.

    Raises:
        InvalidInputError: shapes do not fit.
    """

    steps: npt.NDArray[np.int64]
    counts: Floats
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.counts.shape != (len(self.steps), len(self.names)):
            raise InvalidInputError(
                f"workload mix: counts have shape {self.counts.shape}, expected ({len(self.steps)}, {len(self.names)})"
            )

    @classmethod
    def from_decisions(cls, columns: Mapping[str, Any], *, step_column: str = "step") -> "WorkloadMix | None":
        """Return the mix of rows by `workload`, else by 16 classes of token ids; None without either.

        Tokens are counted at the first layer of the rows.
        """
        label = "workload" if columns.get("workload") is not None else "token_id"
        if columns.get(label) is None or step_column not in columns or not len(columns[step_column]):
            return None
        layer = np.asarray(columns["layer_index"])
        rows = layer == layer.min()
        if columns.get("is_padding") is not None:
            rows &= ~np.asarray(columns["is_padding"]).astype(np.bool_)
        kinds = np.asarray(columns[label])[rows]
        if label == "token_id":
            # A multiplicative hash: neighbouring ids (letters, digits) must not share a class.
            kinds = (kinds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(60)
        steps, step = np.unique(np.asarray(columns[step_column]).astype(np.int64)[rows], return_inverse=True)
        names, kind = np.unique(kinds, return_inverse=True)
        counts = np.bincount(step * len(names) + kind, minlength=len(steps) * len(names)).reshape(len(steps), -1)
        prefix = "" if label == "workload" else "token class "
        return cls(steps, counts.astype(np.float64), tuple(f"{prefix}{name}" for name in names.tolist()))


@dataclass(frozen=True, slots=True, eq=False)
class PlacementOptions:
    """What is known of the ranks that the experts stand on; see `moe_debugger.planning.plan_placement`.

    Attributes:
        num_ranks: expert-parallel ranks.
        owners: rank of each expert by layer; empty = contiguous.
        other_workloads: by name, loads per step of the finding's layer ([s, E]).
    """

    num_ranks: int
    num_nodes: int = 1
    owners: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    other_workloads: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What one explanation may look at.

    Attributes:
        finding: to explain.
        histories: loads over steps by layer.
        course: how the finding came about.
        settings: what was observed of the training.
        is_training: False = inference, where no setting of a training bears on it.
        top_k: of each layer, where known.
        mix: what the text was made of, None = not known.
        rows: columns of `decisions()`, None = not given.
        step_loads: loads of single steps by layer ([s, E]), for planning.
        placement: None = the ranks are not known.
    """

    finding: Finding
    histories: Mapping[int, LayerHistory]
    course: Course
    settings: ObservedSettings
    is_training: bool
    top_k: Mapping[int, int] = field(default_factory=dict)
    mix: WorkloadMix | None = None
    rows: Mapping[str, Any] | None = None
    step_loads: Mapping[int, Floats] = field(default_factory=dict)
    placement: PlacementOptions | None = None
    # Memo of what several rules ask for.
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def onset(self) -> Onset | None:
        """What a cause must come before: the first onset of all layers."""
        return self.course.first

    @property
    def layer_onset(self) -> Onset | None:
        """Onset of the finding's own layer, else the first."""
        return self.course.own or self.course.first

    @property
    def since(self) -> int | None:
        """The step from which on "now" is; None = no onset, so all is now."""
        return None if self.onset is None else self.onset.step

    @property
    def is_about_balance(self) -> bool:
        """Whether the balance of the load is the matter."""
        return self.finding.kind in BALANCE_KINDS

    def num_steps(self, setting: Setting | None = None) -> int:
        """Return the steps over which a change could have come: those of the loads, else of the setting."""
        spans = [history.num_steps for history in self.histories.values()]
        if not spans and setting is not None and len(setting.steps):
            return int(setting.steps[-1] - setting.steps[0]) + 1
        return max(spans, default=0)

    def now(self, setting: Setting) -> Floats:
        """Return the setting's values since the onset; all of them where there is none."""
        return setting.part(since=self.since)

    def before(self, setting: Setting) -> Floats:
        """Return the setting's values before the onset; none where there is no onset."""
        return np.zeros(0) if self.since is None else setting.part(before=self.since)


def began(changed_at: int, onset: Onset | None) -> str:
    """Return how a change that is not after the onset's interval lies to it, for people."""
    return "before it began" if onset is not None and changed_at < onset.first_step else "as it began"


def cause(
    code: str,
    rule: str,
    score: float,
    *,
    evidence: tuple[Any, ...] = (),
    setting: str = "",
    **args: str,
) -> Cause:
    """Return a cause whose weight is not known yet."""
    return Cause(code=code, args=args, score=score, rule=rule, evidence=evidence, setting=setting)
