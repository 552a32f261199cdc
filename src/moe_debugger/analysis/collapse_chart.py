"""A one-sided CUSUM for falls of effective experts, whose noise is learnt from the series itself.

Glossary:
    x_t       natural logarithm of a layer's effective experts in step t, so a fall of 10 % is -0.105 at any level.
    baseline  level m, autocorrelation phi and innovation scale s, learnt from a window of B points (100 steps).
    z_t       ((x_t - m) - phi (x_{t-1} - m)) / s, the surprise of step t once what carries over is taken away.
    S_t       max(0, S_{t-1} - z_t - k): the chart (Page 1954), which grows while steps fall more than k below what
              was expected. The last step at which it was 0 is the estimate of the change (Page's own).

What 100 steps can tell is little, and the chart is built around that:

* phi is corrected for its small-sample bias (Kendall 1954: -(1 + 3 phi)/n; -(2 + 4 phi)/n where a trend is removed) and
  then raised by 3.5 standard errors. Too small a phi would leave autocorrelation in z and multiply false alarms; too
  large a one costs little, because a collapse is a slide, not a step, and a slide stays visible in differences.
* The noise is learnt without the window's linear trend: the first window still holds some of the initial learning.
* The baseline follows a healthy training: every quarter of a window it is learnt anew from the last B points but for
  the newest `lag`. The level rises where the window lies above it beyond doubt, and sinks by at most 1 % in 100 steps.
* An alarm needs S > h and a fall that matters: the mean of two points at least 15 % below the level.
* A layer whose router is still settling gives the chart a level that is too low and a phi that is too high, so a fast
  fall has a rule of its own, which rests on its size: the mean of two points lies 30 % and six standard deviations
  below the mean of the 25 points before the newest six. The deviation is the larger one of those 25 points and of
  80, each without its trend.

Every decision at point i depends on points 0..i alone. So a longer prefix of the same series never moves an alarm, and
looking again and again costs no error rate.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moe_debugger.errors import InvalidInputError

__all__ = ["Alarm", "ChartResult", "ChartSettings", "Noise", "learn_noise", "page_threshold", "run_chart"]

_Floats = npt.NDArray[np.float64]
_MAX_PHI = 0.98
# Scale of the innovations below which a series counts as constant: 0.1 % of the effective experts.
_MIN_SCALE = 1e-3
_MIN_WINDOW_POINTS = 25
# h = 5.7 + ln(C / 4), for 4 series or more: measured where an alarm is likeliest, at phi = 0.9
# (docs/early-warning.md). False alarms grow rarer exponentially in h, so h grows with the logarithm of their number.
_THRESHOLD_FOR_FOUR = 5.7
_THRESHOLD_SLOPE = 1.0
# A window of fewer points than this knows less: that is paid for with a higher threshold.
_FULL_WINDOW = 100
_FEWER_POINTS = 0.6
# Where even the raised phi is below this, little can carry over, and less of a fall is needed to be sure.
_CALM_PHI = 0.85
_CALM = 1.5
# A fast fall: against the mean of so many points, after which come so many others and the newest one; its deviation is
# that of these or of more points, whichever is larger.
_FAST_POINTS = 25
_FAST_LAG = 5
_FAST_NOISE_POINTS = 80


def page_threshold(num_series: int, phi: _Floats, num_points: int = 100) -> _Floats:
    """Return the thresholds, [C], at which a page of so many series warns falsely once in 100,000 steps at most.

    Args:
        phi: [C], the raised autocorrelations.
        num_points: points of the window from which the baseline was learnt.
    """
    fewer = _FEWER_POINTS if num_points < _FULL_WINDOW else 0.0
    high = _THRESHOLD_FOR_FOUR + _THRESHOLD_SLOPE * math.log(max(num_series, 4) / 4) + fewer
    return np.where(phi < _CALM_PHI, high - _CALM, high)


@dataclass(frozen=True, slots=True)
class ChartSettings:
    """What the chart is tuned to. The defaults are those whose run length is stated; see docs/early-warning.md.

    Attributes:
        warm_up_steps: steps at the start that are not looked at.
        baseline_steps: steps of a window from which the baseline is learnt (25 points at least).
        reference: k, in innovation scales.
        threshold: h; None = by the number of series, the points of a window and phi (`page_threshold`), so that the
            page's run length is the stated one.
        min_fall: part of the baseline's effective experts that must be lost; 0 = the statistic alone decides.
        phi_errors: standard errors by which phi is raised.
        max_sinking: part by which the level may sink in `baseline_steps`.
        min_rise, rise_errors: the level rises where a window's mean is above it by both.
        lag: newest points that a new baseline leaves out: a fall must not teach its own noise.
        fast_fall, fast_deviations: a fall of at least this part, and of so many standard deviations, against the
            points just before it is an alarm by itself.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    warm_up_steps: int = 50
    baseline_steps: int = 100
    reference: float = 1.0
    threshold: float | None = None
    min_fall: float = 0.15
    phi_errors: float = 3.5
    max_sinking: float = 0.01
    min_rise: float = 0.02
    rise_errors: float = 4.0
    lag: int = 10
    fast_fall: float = 0.3
    fast_deviations: float = 6.0

    def __post_init__(self) -> None:
        if self.warm_up_steps < 0 or self.baseline_steps < 1 or self.lag < 0:
            raise InvalidInputError(
                f"warm_up_steps {self.warm_up_steps}, baseline_steps {self.baseline_steps}, lag {self.lag}: expected "
                "0 or more, 1 or more, 0 or more"
            )
        if not ((self.threshold is None or self.threshold > 0) and self.reference >= 0 and 0 <= self.min_fall < 1):
            raise InvalidInputError(
                f"threshold {self.threshold}, reference {self.reference}, min_fall {self.min_fall}: expected more than "
                "0, 0 or more, and 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class Noise:
    """What a window says about each of C series: `level`, `phi` (raised) and `scale`, [C] float64 each."""

    level: _Floats
    phi: _Floats
    scale: _Floats


@dataclass(frozen=True, slots=True)
class Alarm:
    """One alarm of one series; all positions are indices of points.

    Attributes:
        series: which of the C series.
        index: the point at which it was raised.
        since: the first point after the chart was last at 0.
        statistic, threshold: S and h at the alarm; of a fast fall, its size in standard deviations and what it must
            pass.
        level: the baseline's level, in units of x, of a fast fall that of the points before it; `phi` and `scale` as
            in `Noise`.
        value: mean of the two newest points at the alarm.
        is_fast: whether it is a fast fall that the chart had not found.
        recovered: the point at which the series was back, None while it is not.
    """

    series: int
    index: int
    since: int
    statistic: float
    threshold: float
    level: float
    phi: float
    scale: float
    value: float
    is_fast: bool = False
    recovered: int | None = None


@dataclass(slots=True)
class ChartResult:
    """Where the chart stands after the last point.

    Attributes:
        is_learning: whether a baseline is being learnt, so that nothing is judged.
        statistic: [C] float64, S now.
        noise: the newest baseline, None before the first.
        threshold: [C], h now; NaN before the first baseline.
        alarms: all of them, oldest first.
    """

    is_learning: bool
    statistic: _Floats
    noise: Noise | None
    threshold: _Floats
    alarms: list[Alarm] = field(default_factory=list)

    def open_alarm(self, series: int) -> Alarm | None:
        """Return the alarm that `series` has not recovered from."""
        latest = next((alarm for alarm in reversed(self.alarms) if alarm.series == series), None)
        return None if latest is None or latest.recovered is not None else latest


def learn_noise(window: _Floats, is_pair: npt.NDArray[np.bool_], *, phi_errors: float) -> Noise:
    """Return level, autocorrelation and innovation scale of each series in a window.

    Args:
        window: [B, C].
        is_pair: [B - 1], whether point i + 1 follows point i without a gap; the others say nothing about phi.
        phi_errors: standard errors by which phi is raised.
    """
    num = len(window)
    level: _Floats = window.mean(axis=0)
    rest = _without_trend(window)
    num_pairs = max(int(is_pair.sum()), 1)
    now, before = rest[1:][is_pair], rest[:-1][is_pair]
    # Without gaps this is the lag-1 autocorrelation with the usual divisor: sum x_i x_{i-1} / sum x_i^2.
    power = np.maximum(np.square(rest).sum(axis=0) * (num_pairs + 1) / num, np.finfo(np.float64).tiny)
    phi = (now * before).sum(axis=0) / power
    phi = np.clip(phi + (2 + 4 * phi) / num_pairs, 0.0, _MAX_PHI)
    phi = np.minimum(phi + phi_errors * np.sqrt((1 - phi**2) / num_pairs), _MAX_PHI)
    # Level, slope and phi were fitted: three degrees of freedom.
    scale = np.sqrt(np.square(now - phi * before).sum(axis=0) / max(num_pairs - 3, 1))
    return Noise(level, phi, np.maximum(scale, _MIN_SCALE))


def _without_trend(window: _Floats) -> _Floats:
    """Return a window [B, C] less the straight line through each series."""
    time = np.arange(len(window), dtype=np.float64) - (len(window) - 1) / 2
    rest: _Floats = window - window.mean(axis=0) - time[:, None] * (time @ window / float(time @ time))
    return rest


def _deviation(window: _Floats) -> _Floats:
    """Return the standard deviation of each series of a window about its line, [C]."""
    deviation: _Floats = np.sqrt(np.square(_without_trend(window)).sum(axis=0) / (len(window) - 2))
    return deviation


def _spacing(steps: _Floats) -> float:
    """Return the usual distance of points, 1 at least."""
    return max(float(np.median(np.diff(steps))), 1.0) if len(steps) > 1 else 1.0


def run_chart(
    values: _Floats, steps: _Floats, tokens: _Floats, settings: ChartSettings, *, num_series: int | None = None
) -> ChartResult:
    """Run the chart over C series that share their steps.

    Args:
        values: [n, C] float64, x.
        steps: [n] float64, ascending; the first step of each point. Missing points are gaps.
        tokens: [n] float64, what each point was counted over. Points with less than half of the baseline's are not
            judged: small samples make entropy look low. After a whole window of them the baseline is learnt anew.
        settings: see `ChartSettings`.
        num_series: series on the whole page, where these are only some of them.
    """
    chart = _Chart(values, steps, tokens, settings, num_series or values.shape[1])
    chart.run()
    return chart.result


class _Chart:
    """The chart's walk over the points."""

    def __init__(
        self, values: _Floats, steps: _Floats, tokens: _Floats, settings: ChartSettings, num_series: int
    ) -> None:
        count = values.shape[1]
        self._num_series = num_series
        self._threshold = np.full(count, np.nan)
        self._values, self._steps, self._tokens, self._settings = values, steps, tokens, settings
        self._statistic = np.zeros(count)
        self._since = np.zeros(count, np.int64)
        self._is_open = np.zeros(count, np.bool_)
        # A fall that is over must not teach its noise: learning goes on with points from here on.
        self._learns_from = np.zeros(count, np.int64)
        self._previous = np.zeros(count)
        self.result = ChartResult(True, self._statistic, None, self._threshold)

    def run(self) -> None:
        """Walk over all points."""
        if len(self._steps):
            # The walk goes on with later points where the size of a step changed for good.
            start: int | None = int(np.searchsorted(self._steps, self._steps[0] + self._settings.warm_up_steps))
            while start is not None:
                start = self._learn_and_watch(start)
        self.result.statistic = self._statistic

    def _window_points(self, start: int) -> int:
        """Return B, by the distance of the points behind `start` that a first window may hold."""
        spacing = _spacing(self._steps[start : start + _MIN_WINDOW_POINTS])
        return max(_MIN_WINDOW_POINTS, math.ceil(self._settings.baseline_steps / spacing))

    def _learn_and_watch(self, start: int) -> int | None:
        self.result.is_learning = True
        points = self._window_points(start)
        if start + points > len(self._steps):
            return None
        usual = float(np.median(self._tokens[start : start + points]))
        kept = [i for i in range(start, start + points) if self._tokens[i] * 2 >= usual]
        follower = start + points
        while len(kept) < points and follower < len(self._steps):
            if self._tokens[follower] * 2 >= usual:
                kept.append(follower)
            follower += 1
        if len(kept) < points:
            return None
        noise = self._learn(np.array(kept))
        self._set_threshold(noise, points)
        self.result.noise = noise
        self.result.is_learning = False
        self._previous = self._values[kept[-1]] - noise.level
        self._statistic[:] = 0.0
        self._since[:] = follower
        return self._watch(follower, kept, usual)

    def _learn(self, indices: npt.NDArray[np.int64]) -> Noise:
        # Points may come to lie further apart: without a pair of neighbours nothing would be known of the noise.
        self._spacing = _spacing(self._steps[indices])
        is_pair = np.rint(np.diff(self._steps[indices]) / self._spacing) <= 1
        return learn_noise(self._values[indices], is_pair, phi_errors=self._settings.phi_errors)

    def _set_threshold(self, noise: Noise, points: int) -> None:
        given = self._settings.threshold
        page = page_threshold(self._num_series, noise.phi, points)
        self._threshold = self.result.threshold = page if given is None else np.full_like(page, given)

    def _watch(self, first: int, kept: list[int], usual: float) -> int | None:
        """Judge the points from `first` on; return where to learn anew, None at the end."""
        points, num_watched, last, small = len(kept), 0, kept[-1], 0
        update = max(points // 4, 1)
        for i in range(first, len(self._steps)):
            if self._tokens[i] * 2 < usual:
                small += 1
                if small >= _MIN_WINDOW_POINTS and small >= self._window_points(i - small + 1):
                    return i - small + 1
                continue
            small = 0
            between = np.rint(np.diff(self._steps[last : i + 1]) / self._spacing)
            newest = (self._values[kept[-1]] + self._values[i]) / 2
            self._judge(i, newest, int(np.maximum(between, 1).sum()), usual)
            self._judge_fast(i, kept, newest)
            kept.append(i)
            last = i
            self._recover(i, kept[-update:])
            num_watched += 1
            if num_watched % update == 0:
                window = np.array(kept[len(kept) - points - self._settings.lag : len(kept) - self._settings.lag])
                if len(window) == points:
                    self._follow(window, update)
                    # It never sinks: a batch that shrinks bit by bit is one that shrank.
                    usual = max(usual, float(np.median(self._tokens[window])))
        return None

    def _judge(self, i: int, newest: _Floats, distance: int, usual: float) -> None:
        noise, settings = self.result.noise, self._settings
        assert noise is not None
        deviation = self._values[i] - noise.level
        # Over a gap less carries over, and the innovations of the missing points add up.
        carried = noise.phi**distance
        growth = np.sqrt((1 - carried**2) / (1 - noise.phi**2)) if distance > 1 else 1.0
        sample = math.sqrt(max(1.0, usual / self._tokens[i]))
        surprise = (deviation - carried * self._previous) / (noise.scale * growth * sample)
        # Less k it is below h: no single point can raise the alarm.
        self._statistic += np.minimum(-surprise, self._threshold) - settings.reference
        is_zero = self._statistic <= 0
        self._statistic[is_zero] = 0.0
        self._since[is_zero] = i + 1
        self._previous = deviation
        has_fallen = newest - noise.level <= math.log1p(-settings.min_fall)
        for series in np.flatnonzero((self._statistic > self._threshold) & has_fallen & ~self._is_open).tolist():
            since, threshold = int(self._since[series]), float(self._threshold[series])
            self._warn(series, i, since, float(self._statistic[series]), threshold, noise.level, newest)

    def _judge_fast(self, i: int, kept: list[int], newest: _Floats) -> None:
        """Raise the alarm where a series lies far below the points just before, whatever its baseline."""
        settings = self._settings
        known = kept[-_FAST_NOISE_POINTS - _FAST_LAG : -_FAST_LAG]
        if len(known) < _FAST_NOISE_POINTS:
            return
        before = self._values[known[-_FAST_POINTS:]]
        level = before.mean(axis=0)
        is_deep = (newest - level <= math.log1p(-settings.fast_fall)) & ~self._is_open
        if not is_deep.any():
            return
        deviation = np.maximum(_deviation(before), _deviation(self._values[known]))
        size = (level - newest) / np.maximum(deviation, _MIN_SCALE)
        for series in np.flatnonzero(is_deep & (size > settings.fast_deviations)).tolist():
            usual = level[series] - 2 * deviation[series]
            since = 1 + next((at for at in reversed(kept) if self._values[at, series] >= usual), known[-1])
            threshold = settings.fast_deviations
            self._warn(series, i, min(since, i), float(size[series]), threshold, level, newest, is_fast=True)

    def _warn(
        self,
        series: int,
        i: int,
        since: int,
        statistic: float,
        threshold: float,
        level: _Floats,
        newest: _Floats,
        *,
        is_fast: bool = False,
    ) -> None:
        noise = self.result.noise
        assert noise is not None
        self._is_open[series] = True
        self.result.alarms.append(
            Alarm(
                series=series,
                index=i,
                since=since,
                statistic=statistic,
                threshold=threshold,
                level=float(level[series]),
                phi=float(noise.phi[series]),
                scale=float(noise.scale[series]),
                value=float(newest[series]),
                is_fast=is_fast,
            )
        )

    def _recover(self, i: int, recent: list[int]) -> None:
        """Close alarms whose series lost less than half of `min_fall` over a quarter of a window."""
        if not self._is_open.any():
            return
        value, least = self._values[recent].mean(axis=0), math.log1p(-self._settings.min_fall / 2)
        for position, alarm in enumerate(self.result.alarms):
            is_back = value[alarm.series] - alarm.level > least
            if alarm.recovered is None and is_back and i - alarm.index >= len(recent):
                self.result.alarms[position] = replace(alarm, recovered=i)
                self._is_open[alarm.series] = False
                self._statistic[alarm.series] = 0.0
                self._since[alarm.series] = i + 1
                self._learns_from[alarm.series] = i + 1

    def _follow(self, window: npt.NDArray[np.int64], num_points: int) -> None:
        """Learn the baseline anew, but not for series that look as if they were falling."""
        old, settings = self.result.noise, self._settings
        assert old is not None
        new = self._learn(window)
        is_calm = ~self._is_open & (self._statistic <= self._threshold / 2) & (self._learns_from <= window[0])
        # Standard error of the difference of two window means of an AR(1) series.
        error = np.sqrt(2 / len(window)) * new.scale / (1 - new.phi)
        rises = new.level - old.level > np.maximum(math.log1p(settings.min_rise), settings.rise_errors * error)
        lowest = old.level - settings.max_sinking * num_points * self._spacing / settings.baseline_steps
        level = np.where(rises, new.level, np.clip(new.level, lowest, old.level))
        level = np.where(is_calm, level, old.level)
        self._previous = self._previous + old.level - level
        self.result.noise = Noise(level, np.where(is_calm, new.phi, old.phi), np.where(is_calm, new.scale, old.scale))
        self._set_threshold(self.result.noise, len(window))
