r"""The knee point of the validation metrics: the checkpoint from which fine-tuning should start.

LinearSR (arXiv 2510.08771, "ESGF") starts each later stage from the last checkpoint before
"plateau and oscillation" of the validation metrics, although the loss still falls, and picks it by
hand. Here it is found during training. The model says that up to checkpoint k a metric y (scaled,
high is good) rises along a concave curve, and that after k it moves about a level that does not
rise:

    y_i = a + b f(u_i) + noise,              i <= k, b > 0, sd about `noise`
    y_i = c - d (u_i - u_k) + oscillation,   i > k,  d >= 0, sd unknown, about 3 x `noise`

with u the time in checkpoints, f one of ten concave shapes, and the two halves meeting at k:
a + b f(u_k) = c, but for their errors. The variances are integrated out, f, single outliers, and
"this metric says nothing" are averaged over, and the metrics' log-likelihoods are added. That gives
P(k) for every k, among them k = now: "still rising". docs/design/knee.md has the derivation,
measurements, failures, and the comparison with simple rules, which find fewer knees. No torch, no
ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linearsr.errors import OptionError

Array = NDArray[np.float64]

# A rise needs three checkpoints: two would fit any curve.
FIRST = 2
# The plateau's level at the knee is the mean of this many checkpoints; later ones have drifted.
LEVEL = 10
# At the knee the rise is at least this share of its mean slope; a flatter one is plateau already.
SLOPE = 0.2
# The same for "still rising": a curve with less slope at its end is on its plateau.
STILL = 0.05
# Prior odds that a given checkpoint is an outlier, and that a metric does not show the knee.
OUTLIER, MUTE = 0.05, 0.02
# The rise must be this many times the mean deviation of the plateau: noise alone has no knee.
CONTRAST = 4.0


class KneeState(NamedTuple):
    """The state after an update.

    `status`: "rising"; "candidate": a plateau has probably begun after `step`; "confirmed": final.
    `step`: the training step of the knee, None while rising. `since`: number of updates since the
    one that confirmed the knee, 0 until then. `evidence`: finite floats, for a JSON, which no
    longer change once the knee is confirmed. They are `checkpoints` used; `p_plateau`, the
    probability of a plateau at least `patience` checkpoints long; `p_near`, that the knee is within
    one checkpoint of the best guess; `plateau`, checkpoints after that guess; `gain` and
    `oscillation`, the rise and the plateau's mean absolute deviation (both in units of the observed
    range, median over the metrics).
    """

    status: Literal["rising", "candidate", "confirmed"]
    step: int | None
    since: int
    evidence: dict[str, float]


class KneeDetector:
    """Finds the knee from one `update` per validated checkpoint; a replay gives the same states.

    `higher_is_better`: the direction of each metric, at least one. `noise` in (0, 0.5): a first
    guess of a metric's jitter during the rise, as a fraction of the rise; the data correct it, so
    an error of a factor of two is harmless. `patience` >= 3: checkpoints of plateau before a
    confirmation. `confidence` in (0.5, 1): the least probability that there is a plateau. While the
    plateau is shorter than twice `patience`, it is also the least `p_near` (see `KneeState`).
    Raises OptionError outside these ranges.
    """

    def __init__(
        self,
        higher_is_better: Mapping[str, bool],
        *,
        noise: float = 0.02,
        patience: int = 6,
        confidence: float = 0.95,
    ) -> None:
        if not higher_is_better:
            raise OptionError("the knee needs at least one metric")
        if not (0 < noise < 0.5 and patience >= 3 and 0.5 < confidence < 1):
            raise OptionError(
                "the knee needs 0 < noise < 0.5, patience >= 3 and 0.5 < confidence < 1, not "
                f"noise={noise}, patience={patience}, confidence={confidence}"
            )
        self._signs = {name: 1.0 if up else -1.0 for name, up in higher_is_better.items()}
        self._noise, self._patience, self._confidence = noise, patience, confidence
        self._last: int | None = None
        self._updates = 0
        self._steps: list[int] = []
        self._rows: list[list[float]] = []
        self._state = KneeState("rising", None, 0, {"checkpoints": 0.0})

    def update(self, step: int, metrics: Mapping[str, float]) -> KneeState:
        """Add the metrics of the checkpoint at `step`, which must rise from call to call.

        A metric that is missing or not finite is skipped this time. Raises OptionError for a step
        that does not rise, an undeclared metric, and a metric without any value after
        `patience` + 1 updates; the first two leave the detector as it was.
        """
        if self._last is not None and step <= self._last:
            raise OptionError(
                f"training steps of the checkpoints must rise, but {step} came after {self._last}"
            )
        if unknown := sorted(set(metrics) - set(self._signs)):
            raise OptionError(f"unknown metrics {unknown}; the knee has {sorted(self._signs)}")
        self._last, self._updates = step, self._updates + 1
        row = [sign * metrics.get(name, math.nan) for name, sign in self._signs.items()]
        row = [value if math.isfinite(value) else math.nan for value in row]
        if not all(math.isnan(value) for value in row):
            self._steps.append(step)
            self._rows.append(row)
        self._check_presence()
        if self._state.status == "confirmed":
            self._state = self._state._replace(since=self._state.since + 1)
        else:
            self._state = self._judge()
        return self._state

    def curve(self) -> list[tuple[int, float]]:
        """Return (step, median of the scaled metrics) so far; empty below three checkpoints."""
        if len(self._rows) <= FIRST:
            return []
        values, weights = self._scaled()
        known = (weights > 0).any(axis=0)
        present = np.where(weights > 0, values, np.nan)[:, known]
        steps = np.array(self._steps)[known]
        return [
            (int(s), float(v)) for s, v in zip(steps, np.nanmedian(present, axis=0), strict=True)
        ]

    def _check_presence(self) -> None:
        if self._updates <= self._patience:
            return
        measured = ~np.isnan(np.array(self._rows).reshape(-1, len(self._signs))).all(axis=0)
        if absent := [name for name, ok in zip(self._signs, measured, strict=True) if not ok]:
            raise OptionError(
                f"none of {self._updates} checkpoints has a value of {', '.join(absent)}; measure "
                "it in validation, or leave it out of the knee's metrics"
            )

    def _scaled(self) -> tuple[Array, Array]:
        """Return values in units of their range and weights, 0 where missing: (metrics, n) each."""
        rows = np.array(self._rows).T
        weights = (~np.isnan(rows)).astype(float)
        kept = weights.sum(axis=1) > FIRST
        values = np.array([_fill(row) for row in rows[kept]]).reshape(-1, rows.shape[1])
        low, width = _range(values)
        moving = width[:, 0] > 0
        return ((values - low)[moving] / width[moving]), weights[kept][moving]

    def _judge(self) -> KneeState:
        n = len(self._steps)
        rising = KneeState("rising", None, 0, {"checkpoints": float(n)})
        if n < FIRST + 1 + self._patience:
            return rising
        values, weights = self._scaled()
        if not len(values):
            return rising
        steps = np.array(self._steps, float)
        time = (steps - steps[0]) / _median(np.diff(steps))
        posterior = knee_posterior(time, values, weights, self._noise)
        best, evidence = self._weigh(posterior, values)
        if posterior[-1] > 0.5 or best == n - 1:
            return rising._replace(evidence=evidence)
        state = KneeState("candidate", self._steps[best], 0, evidence)
        return state._replace(status="confirmed") if self._enough(evidence) else state

    def _weigh(self, posterior: Array, values: Array) -> tuple[int, dict[str, float]]:
        n = len(posterior)
        before, after = np.append(0.0, posterior[:-1]), np.append(posterior[1:], 0.0)
        # A knee "at k" lies between checkpoints k and k + 1: it is near both, and less so to k - 1.
        best = int((before + posterior + after / 2).argmax())
        gain, oscillation = _contrast(values, min(best, n - 2))
        return best, {
            "checkpoints": float(n),
            "p_plateau": float(posterior[: n - self._patience].sum()),
            "p_near": float(before[best] + posterior[best] + after[best]),
            "plateau": float(n - 1 - best),
            "gain": gain,
            "oscillation": oscillation,
        }

    def _enough(self, evidence: dict[str, float]) -> bool:
        long = evidence["plateau"] >= 2 * self._patience
        return (
            evidence["plateau"] >= self._patience
            and evidence["p_plateau"] >= self._confidence
            and (long or evidence["p_near"] >= self._confidence)
            and evidence["gain"] >= CONTRAST * evidence["oscillation"]
        )


def detect(
    history: Iterable[tuple[int, Mapping[str, float]]], higher_is_better: Mapping[str, bool]
) -> KneeState:
    """Return the detector's state after a history of (step, metrics), in the order of training.

    Metrics that `higher_is_better` does not name, or that no checkpoint has, are left out; without
    any other the state is "rising". Raises OptionError for steps that do not rise.
    """
    history = list(history)
    measured = {name for _, metrics in history for name in metrics}
    known = {name: up for name, up in higher_is_better.items() if name in measured}
    state = KneeState("rising", None, 0, {})
    if known:
        detector = KneeDetector(known)
        for step, metrics in history:
            state = detector.update(step, {m: metrics[m] for m in metrics.keys() & known.keys()})
    return state


def knee_posterior(time: Array, values: Array, weights: Array, noise: float) -> Array:
    """Return P(the knee is at or just after checkpoint k), (n,); k = n - 1: "still rising".

    `time` (n,): rising from 0, in checkpoints. `values` (metrics, n): scaled so that a metric's
    range is 1. `weights` (metrics, n): 1 where there is a value, else 0. `noise` > 0 as in
    KneeDetector.
    """
    suspects = _isolation(values).argsort(axis=-1, kind="stable")[:, ::-1]
    # Hypotheses for each metric: no outlier, the most isolated value is one, the next one is.
    hypotheses = np.repeat(weights[None], 3, axis=0)
    for number in (1, 2):
        np.put_along_axis(hypotheses[number], suspects[:, number - 1 : number], 0.0, axis=-1)
    odds = np.log([1.0, OUTLIER, OUTLIER])[:, None, None]
    with_knee = np.logaddexp.reduce(_log_likelihood(time, values, hypotheses, noise) + odds)
    without = _plateau(_line(_sums(weights, time, values)[..., -1:]), noise) + math.log(MUTE)
    log_p = np.logaddexp(with_knee, without)[:, FIRST:].sum(axis=0)
    p = np.exp(log_p - log_p.max())
    return np.concatenate([np.zeros(FIRST), p / p.sum()])


class _Line(NamedTuple):
    """Weighted least squares of y on x: sums about the means."""

    weight: Array
    x: Array
    y: Array
    xx: Array
    xy: Array
    yy: Array


def _sums(weights: Array, x: Array, y: Array) -> Array:
    """Return running sums of w, wx, wy, wxx, wxy, wyy; a range of checkpoints is a difference."""
    sums = np.empty((6, *np.broadcast_shapes(weights.shape, x.shape, y.shape)))
    wx, wy = weights * x, weights * y
    for i, term in enumerate((weights, wx, wy, wx * x, wx * y, wy * y)):
        sums[i] = term
    return sums.cumsum(axis=-1)


def _line(sums: Array) -> _Line:
    w, x, y, xx, xy, yy = sums
    w = np.where(w > 0, w, np.nan)
    return _Line(w, x / w, y / w, xx - x * x / w, xy - x * y / w, yy - y * y / w)


def _log_likelihood(time: Array, values: Array, weights: Array, noise: float) -> Array:
    """Return log p(values | knee at k), (..., metrics, n): rise, plateau, and their meeting."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shapes = _shapes(time)
        rise = _line(_sums(weights[..., None, :], shapes, values[:, None]))
        sums = _sums(weights, time, values)
        after = _line(sums[..., -1:] - sums)
        each = _rise(rise, time, shapes, noise) + _meet(rise, shapes, sums, after, noise)
        averaged = np.logaddexp.reduce(_or(each, -np.inf), axis=-2)
        return averaged - math.log(len(shapes)) + _plateau(after, noise)


def _rise(rise: _Line, time: Array, shapes: Array, noise: float) -> Array:
    """Return log p(y up to k | shape), (..., shapes, n); -inf if it falls, or is flat before k."""
    gained = shapes - shapes[:, :1]
    log_p = _log_student(rise.weight - 2, _left(rise, rise.xy / rise.xx), noise)
    # Level and gain are integrated out too, each a priori about one range wide.
    log_p -= 0.5 * np.log(rise.weight * rise.xx / gained**2)
    least = np.full(len(time), SLOPE)
    least[-1] = STILL
    steep = _step(shapes) >= least * _step(time) * gained / time
    return np.where((rise.xy > 0) & steep, log_p, -np.inf)


def _plateau(after: _Line, noise: float) -> Array:
    """Return log p(y after k), (..., n), from the line through y after k; 0 at the end."""
    log_p = _log_student(after.weight - 1, _left(after, _fall(after)), 3 * noise)
    return _or(log_p - 0.5 * np.log(after.weight), 0.0)


def _meet(rise: _Line, shapes: Array, sums: Array, after: _Line, noise: float) -> Array:
    """Return log N(gap; 0, its variance) between the rise's end and the plateau's level."""
    ends = np.minimum(np.arange(sums.shape[-1]) + LEVEL, sums.shape[-1] - 1)
    level = _line(sums[..., ends] - sums)
    slope = rise.xy / rise.xx
    gap = rise.y + slope * (shapes - rise.x) - level.y[..., None, :]
    at_end = 1 / rise.weight + (shapes - rise.x) ** 2 / rise.xx
    jitter = _variance(rise.weight, _left(rise, slope), noise)
    wander = _variance(after.weight, _left(after, _fall(after)), 3 * noise) / level.weight
    # The knee lies anywhere between two checkpoints: uniform over the last increment.
    between = (slope * _step(shapes)) ** 2 / 12
    variance = jitter * at_end + wander[..., None, :] + between + noise**2
    return _or(-0.5 * gap**2 / variance - 0.5 * np.log(variance), 0.0)


def _or(x: Array, other: float) -> Array:
    return np.where(np.isnan(x), other, x)


def _left(line: _Line, slope: Array) -> Array:
    """Return the squared residuals of the least-squares slope, or of slope zero."""
    return np.maximum(line.yy - slope * line.xy, 0.0)


def _fall(line: _Line) -> Array:
    """Return the plateau's slope: the least-squares one if it falls, else zero."""
    return np.where(line.weight > 1, np.minimum(line.xy, 0.0) / line.xx, 0.0)


def _log_student(count: Array, squares: Array, sd: float) -> Array:
    """Return log p of `count` residuals whose variance has an inverse-chi2(2, sd^2) prior."""
    index = np.maximum(_or(count, 0.0), -1).astype(int) + 1
    log_gamma = _log_gammas(int(index.max()))[index]
    spread = 2 * sd**2
    powers = (1 + count / 2) * np.log1p(squares / spread)
    return log_gamma - count / 2 * math.log(math.pi * spread) - powers


@cache
def _log_gammas(most: int) -> Array:
    """Return log Gamma((i + 1) / 2) for i = 0 .. most."""
    return np.array([math.lgamma((i + 1) / 2) for i in range(most + 1)])


def _variance(count: Array, squares: Array, sd: float) -> Array:
    """Return the expected variance under the prior of `_log_student`."""
    return (squares + 2 * sd**2) / (count + 2)


def _shapes(time: Array) -> Array:
    """Return concave rising curves, (10, n): a line, exponentials, powers, a logarithm."""
    later = time + 1
    exponentials = [1 - np.exp(-time / tau) for tau in (1, 2, 4, 8, 16)]
    powers = [(later**p - 1) / p for p in (0.5, -0.5, -1.0)]
    return np.array([time, *exponentials, *powers, np.log(later)])


def _step(x: Array) -> Array:
    """Return the increment to each checkpoint from the one before."""
    return np.diff(x, axis=-1, prepend=x[..., :1])


def _isolation(y: Array) -> Array:
    """Return how far each value is from all forecasts, (metrics, n): high for outliers.

    The three forecasts are the lines through the two values before, the two after, and one on each
    side. A kink agrees with one of them. The last two values lack successors and get 0.
    """
    edge = np.full((len(y), 2), np.nan)
    padded = np.hstack([edge, y, edge])
    before2, before, after, after2 = (padded[:, i : i + y.shape[1]] for i in (0, 1, 3, 4))
    forecasts = np.stack([2 * before - before2, 2 * after - after2, (before + after) / 2])
    off = y - forecasts
    isolation = np.fmax.reduce(np.stack([np.fmin.reduce(off), np.fmin.reduce(-off), 0 * y]))
    isolation[:, -2:] = 0
    return isolation


def _fill(row: Array) -> Array:
    """Fill missing values from their neighbours: weight 0, but they must not look like outliers."""
    known = ~np.isnan(row)
    return np.interp(np.arange(len(row)), np.flatnonzero(known), row[known])


def _range(values: Array) -> tuple[Array, Array]:
    """Return lowest value and width, (metrics, 1), of the running median of three and the first."""
    middle = np.sort(np.stack([values[:, :-2], values[:, 1:-1], values[:, 2:]]), axis=0)[1]
    calm = np.hstack([values[:, :1], middle])
    return calm.min(axis=1, keepdims=True), np.ptp(calm, axis=1)[:, None]


def _contrast(values: Array, knee: int) -> tuple[float, float]:
    """Return the rise's gain and the plateau's mean deviation, medians over the metrics."""
    plateau = values[:, knee + 1 :]
    level = _median(plateau)
    gain = level - values[:, :2].min(axis=1)
    swing = np.abs(plateau - level[:, None]).mean(axis=1)
    return float(_median(gain)), float(_median(swing))


def _median(x: Array) -> Array:
    """Return the median over the last axis, the upper of two (np.median is slow on few values)."""
    return np.sort(x, axis=-1)[..., x.shape[-1] // 2]
