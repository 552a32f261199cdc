"""The settings of a training that were observed: its series, by name and layer. A cause may name nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError
from moe_debugger.v1 import session_pb2 as pb

__all__ = ["NO_LAYER", "Jump", "ObservedSettings", "Setting"]

Floats = npt.NDArray[np.float64]

NO_LAYER = -1
# Names that trainings use for the series of docs/training.md.
_ALIASES = {"learning_rate": "lr", "aux_loss": "balance_loss", "router_aux_loss_coef": "balance_coef"}
# A setting jumps where it changes by half of the larger of two neighbouring values, or more: schedules do not.
_JUMP_SHARE = 0.5
# Of what moves between jumps, a schedule turns back in no larger part of its changes; noise does in two thirds.
_MAX_TURNS = 0.1
# A change by less than this part of the largest value is rounding.
_ROUNDING = 1e-6
# Values on either side of a jump whose median is its level.
_LEVEL_VALUES = 10
_MIN_BEFORE = 5


@dataclass(frozen=True, slots=True)
class Jump:
    """A sudden change of a setting.

    Attributes:
        step: the first step with the new value.
        before, after: medians of up to 10 values on either side, up to the next jump.
    """

    step: int
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One series.

    Attributes:
        layer_index: -1 for a series of the whole model.
        steps: [n] int64, ascending.
        values: [n, m] float64; m is 1, or the experts of the layer. NaN where there was nothing to read.
    """

    name: str
    layer_index: int
    steps: npt.NDArray[np.int64]
    values: Floats

    def finite(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return steps and values ([n']) of the first column where they are finite."""
        column = self.values[:, 0]
        known = np.isfinite(column)
        return self.steps[known], column[known]

    def part(self, *, since: int | None = None, before: int | None = None) -> Floats:
        """Return the finite values of the first column in steps `since` <= step < `before`."""
        steps, values = self.finite()
        chosen = np.ones(len(steps), np.bool_)
        if since is not None:
            chosen &= steps >= since
        if before is not None:
            chosen &= steps < before
        return values[chosen]

    def jumps(self) -> list[Jump]:
        """Return where the value changed by half of the larger neighbour or more, or from or to zero."""
        steps, values = self.finite()
        places = _jumps(values)
        bounds = [0, *places.tolist(), len(values)]
        return [
            Jump(
                int(steps[at]),
                float(np.median(values[max(bounds[i], at - _LEVEL_VALUES) : at])),
                float(np.median(values[at : min(bounds[i + 2], at + _LEVEL_VALUES)])),
            )
            for i, at in enumerate(places.tolist())
        ]

    def looks_set(self) -> bool:
        """Return whether the values between the jumps stand still or follow a schedule; what is measured is noisy."""
        _, values = self.finite()
        for part in np.split(values, _jumps(values)):
            moves = np.diff(part)
            signs = np.sign(moves[np.abs(moves) > _ROUNDING * np.abs(values).max()])
            if (signs[1:] != signs[:-1]).sum() > _MAX_TURNS * len(signs):
                return False
        return True

    def spikes(self, factor: float) -> list[Jump]:
        """Return where the value exceeds the largest of the 10 values before it (5 at least) `factor` times.

        A warm-up or a schedule grows by less from one value to the next.
        """
        steps, values = self.finite()
        if len(values) <= _MIN_BEFORE:
            return []
        padded = np.r_[np.full(_LEVEL_VALUES, -np.inf), values[:-1]]
        largest = np.lib.stride_tricks.sliding_window_view(padded, _LEVEL_VALUES).max(axis=1)
        is_spike = (largest > 0) & (values >= factor * largest)
        is_spike[:_MIN_BEFORE] = False
        return [
            Jump(int(steps[at]), float(np.median(values[max(0, at - _LEVEL_VALUES) : at])), float(values[at]))
            for at in np.flatnonzero(is_spike).tolist()
        ]


def _jumps(values: Floats) -> npt.NDArray[np.intp]:
    """Return the places of the first values after each jump."""
    size = np.maximum(np.abs(values[1:]), np.abs(values[:-1]))
    return np.flatnonzero((np.abs(np.diff(values)) >= _JUMP_SHARE * size) & (size > 0)) + 1


class ObservedSettings:
    """Series of one training, by name and layer.

    Names are those of docs/training.md; `learning_rate` counts as `lr`, `aux_loss` as `balance_loss` and
    `router_aux_loss_coef` as `balance_coef` where the former are not there. Series of several sources are never
    joined: of each series that of the first source is taken.
    """

    def __init__(self, settings: Iterable[Setting] = ()) -> None:
        self._settings: dict[tuple[str, int], Setting] = {}
        for setting in settings:
            if setting.values.ndim != 2 or len(setting.values) != len(setting.steps):
                raise InvalidInputError(
                    f"setting {setting.name!r}: values have shape {setting.values.shape}, expected "
                    f"({len(setting.steps)}, m), one row for each step"
                )
            self._settings.setdefault((setting.name, setting.layer_index), setting)
        for alias, name in _ALIASES.items():
            for (found, layer), setting in list(self._settings.items()):
                if found == alias and (name, layer) not in self._settings:
                    self._settings[name, layer] = Setting(name, layer, setting.steps, setting.values)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "ObservedSettings":
        """Return the settings in columns of equal length, as `session.series()` gives them.

        Args:
            columns: `step`, `name`, `layer_index`, `expert_id`, `value`.

        Raises:
            InvalidInputError: a column is missing.
        """
        missing = [name for name in ("step", "name", "layer_index", "expert_id", "value") if name not in columns]
        if missing:
            raise InvalidInputError(f"series lack the columns {missing}; give what session.series() returns")
        step = np.asarray(columns["step"]).astype(np.int64)
        names = np.asarray(columns["name"]).astype(np.str_)
        layers = np.asarray(columns["layer_index"]).astype(np.int64)
        experts = np.asarray(columns["expert_id"]).astype(np.int64)
        values = np.asarray(columns["value"]).astype(np.float64)
        settings = []
        for name in np.unique(names).tolist():
            of_name = names == name
            for layer in np.unique(layers[of_name]).tolist():
                rows = of_name & (layers == layer)
                own, index = np.unique(step[rows], return_inverse=True)
                column = np.maximum(experts[rows], 0)
                table = np.full((len(own), int(column.max()) + 1), np.nan)
                # Rows are in the order of recording: of a step that came twice the later stays.
                table[index, column] = values[rows]
                settings.append(Setting(name, layer, own, table))
        return cls(settings)

    @classmethod
    def from_messages(cls, messages: Iterable[pb.Series]) -> "ObservedSettings":
        """Return the settings in a fleet's series; of several sources those of the lowest rank, then the first id."""
        settings = []
        for one in sorted(messages, key=lambda message: (message.global_rank, message.source_id)):
            steps = np.frombuffer(one.step, "<u8").astype(np.int64)
            values = np.frombuffer(one.value, "<f8").reshape(len(steps), max(1, one.num_values))
            layer = one.layer_index if one.HasField("layer_index") else NO_LAYER
            settings.append(Setting(one.name, layer, steps, values))
        return cls(settings)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the series that hold at least one number, sorted; other names of a series among them."""
        return tuple(sorted({name for (name, _), one in self._settings.items() if np.isfinite(one.values).any()}))

    def get(self, name: str, layer_index: int = NO_LAYER) -> Setting | None:
        """Return one series; None where it was not observed, or holds no number."""
        setting = self._settings.get((name, layer_index))
        return setting if setting is not None and np.isfinite(setting.values).any() else None

    def layers(self, name: str) -> dict[int, Setting]:
        """Return a series of all layers."""
        return {layer: one for (own, layer), one in sorted(self._settings.items()) if own == name and layer >= 0}

    def is_observed(self, name: str) -> bool:
        """Return whether the series holds a number, of the model or of any layer."""
        return name in self.names

    def model_settings(self) -> list[Setting]:
        """Return the series of the whole model by name, each once."""
        return [
            one
            for (name, layer), one in sorted(self._settings.items())
            if layer == NO_LAYER and name not in _ALIASES and np.isfinite(one.values).any()
        ]
