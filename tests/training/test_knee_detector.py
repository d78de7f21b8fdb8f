"""The knee detector on curves of the paper's shape, on curves without a knee, and at its edges.

The curves are drawn here, wider than the detector's model: its shapes of rise, its oscillation and
its outliers are not the ones below. `python -m tests.training.test_knee_detector` prints the table
of docs/design/knee.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from kneed import KneeLocator

from linearsr.errors import OptionError
from linearsr.training.knee import KneeDetector, KneeState

SEEDS = 300
EVERY = 8000
STEPS = np.arange(EVERY, 224_001, EVERY)
UNITS = ((10.0, 50.0, True), (-0.3, 0.6, False), (8.0, 22.0, True))  # scale, offset, direction
ONSETS = ("jump", "ramp", "peak")


class Curves(NamedTuple):
    steps: np.ndarray
    values: np.ndarray  # (metrics, n), in the metrics' own units
    knee: float  # in steps; no checkpoint need be there


def rise_to_one(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a concave rise from (0, 0) to (1, 1), then flat; the slope at 1 is 0.03 to 1."""
    a, b, c, d = (rng.uniform(*span) for span in ((1, 5), (0.3, 1), (1, 2.5), (2, 30)))
    shape = (
        lambda v: 1 - np.exp(-a * v),
        lambda v: v**b,
        lambda v: np.tanh(c * v),
        lambda v: np.log1p(d * v),
    )[rng.integers(4)]
    return shape(np.clip(x, 0, 1)) / shape(np.ones(1))


def swing(since: np.ndarray, rng: np.random.Generator, onset: str, half: bool) -> np.ndarray:
    """Return oscillation and drift of the plateau, `since` in thousands of steps after the knee.

    The amplitude grows between two draws from 5-14% of the rise (half of it with `half`). "jump":
    any phase, at once; "ramp": from zero over one period; "peak": the knee is on a crest, of which
    the plateau falls short.
    """
    low, high = np.sort(rng.uniform(0.05, 0.14, 2)) / (2 if half else 1)
    period, phase = rng.uniform(24, 64), rng.uniform(0, 2 * np.pi)
    share = since / since.max()
    amplitude = low + (high - low) * share
    if onset == "ramp":
        amplitude = amplitude * np.minimum(1, since / period)
    if onset == "peak":
        phase /= 2
    wave = amplitude * np.sin(2 * np.pi * since / period + phase)
    return wave - (low * np.sin(phase) if onset == "peak" else 0.0)


def observed(
    rng: np.random.Generator, scores: np.ndarray, outlier: bool, steps: np.ndarray, knee: float
) -> Curves:
    """Return scores (metrics, n) of rise 1 with noise of 1-2% and maybe an outlier, in units."""
    metrics, n = scores.shape
    noisy = scores + rng.uniform(0.01, 0.02, (metrics, 1)) * rng.standard_normal((metrics, n))
    if outlier:
        hit = slice(None) if rng.random() < 0.5 else rng.integers(metrics)
        noisy[hit, rng.integers(n)] += rng.choice([-1, 1]) * rng.uniform(0.2, 0.6)
    scale, offset, _ = np.array(UNITS[:metrics]).T[:, :, None]
    return Curves(steps, offset + scale * noisy, knee)


def paper(
    seed: int,
    metrics: int,
    outlier: bool = False,
    onset: str | None = None,
    half: bool = False,
    steps: np.ndarray = STEPS,
    span: tuple[int, int] = (40, 64),
) -> Curves:
    """Return curves with a knee at 40-64 (`span`) of 224; in half of the seeds all swing alike."""
    rng = np.random.default_rng([seed, metrics, outlier])
    time = steps / steps[-1] * 224
    knee, together, swing_seed = rng.uniform(*span), rng.random() < 0.5, rng.integers(2**31)
    since = np.maximum(time - knee, 0)
    scores = []
    for metric in range(metrics):
        own = np.random.default_rng([swing_seed, 0 if together else metric])
        plateau = swing(since, own, onset or ONSETS[own.integers(3)], half)
        plateau = plateau - rng.uniform(0, 0.15) * since / since.max()
        scores.append(rise_to_one(time / knee, rng) + np.where(since > 0, plateau, 0))
    return observed(rng, np.array(scores), outlier, steps, knee / 224 * steps[-1])


def rising(seed: int, metrics: int, outlier: bool = False) -> Curves:
    """Return curves without a plateau: lines, logarithms, powers, slow exponentials, power laws."""
    rng = np.random.default_rng([seed, metrics, outlier, 7])
    x = STEPS / STEPS[-1]
    scores = []
    for _ in range(metrics):
        log, power, tau, tail, slow = (
            rng.uniform(*span) for span in ((2, 40), (0.2, 1), (0.5, 3), (2, 30), (0.1, 0.6))
        )
        shapes = (x, np.log1p(log * x), x**power, 1 - np.exp(-tau * x), 1 - (1 + tail * x) ** -slow)
        shape = shapes[rng.integers(5)]
        scores.append(shape / shape[-1])
    return observed(rng, np.array(scores), outlier, STEPS, math.inf)


def names(metrics: int) -> dict[str, bool]:
    return {f"m{i}": bool(UNITS[i][2]) for i in range(metrics)}


def states(curves: Curves, **options: float) -> Iterator[KneeState]:
    detector = KneeDetector(names(len(curves.values)), **options)  # type: ignore[arg-type]
    for step, column in zip(curves.steps, curves.values.T, strict=True):
        yield detector.update(int(step), {f"m{i}": float(v) for i, v in enumerate(column)})


def confirmed(curves: Curves, **options: float) -> tuple[int, int] | None:
    """Return the knee's step and the number of updates; a confirmed state never changes (below)."""
    for count, state in enumerate(states(curves, **options), 1):
        if state.status == "confirmed":
            assert state.step is not None
            return state.step, count
    return None


def checkpoint_before(curves: Curves) -> float:
    """Return the true knee, by definition the last checkpoint before the plateau."""
    return float(curves.steps[curves.steps <= curves.knee][-1])


def near(curves: Curves, **options: float) -> bool:
    knee = confirmed(curves, **options)
    true = int(np.searchsorted(curves.steps, checkpoint_before(curves)))
    return knee is not None and abs(int(np.searchsorted(curves.steps, knee[0])) - true) <= 1


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("metrics", [1, 2, 3])
def test_confirms_the_knee_of_the_papers_curves(metrics: int, outlier: bool) -> None:
    hits = sum(near(paper(seed, metrics, outlier)) for seed in range(SEEDS))
    assert hits / SEEDS >= 0.92


def test_does_not_confirm_while_curves_rise() -> None:
    wrong = sum(
        confirmed(rising(seed, 1 + seed % 3, outlier=seed % 2 == 1)) is not None
        for seed in range(SEEDS)
    )
    assert wrong / SEEDS <= 0.01


def test_does_not_confirm_a_knee_in_noise() -> None:
    rng = np.random.default_rng(0)
    noise = [Curves(STEPS, rng.standard_normal((1, len(STEPS))), math.inf) for _ in range(25)]
    assert sum(confirmed(curves) is not None for curves in noise) <= 2


@pytest.mark.parametrize(("n", "span"), [(12, (80, 110)), (18, (56, 90)), (30, (40, 64))])
def test_confirms_the_knee_at_other_scales_of_steps_and_irregular_spacing(
    n: int, span: tuple[int, int]
) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for seed in range(25):
        steps = np.cumsum(rng.integers(70, 131, n))
        hits += near(paper(seed, 2, steps=steps, span=span), patience=4)
    assert hits >= 21


@pytest.mark.parametrize("knee", range(4, 12))
@pytest.mark.parametrize("shape", ["line", "root", "exponential"])
def test_agrees_with_kneed_on_clean_curves(knee: int, shape: str) -> None:
    x = np.minimum(np.arange(1.0, 29), knee)
    y = {"line": x, "root": np.sqrt(x), "exponential": -np.exp(-2 * x / knee)}[shape]
    theirs = KneeLocator(STEPS, y, curve="concave", direction="increasing").knee
    ours = confirmed(Curves(STEPS, y[None], math.nan))
    assert ours is not None and theirs is not None
    assert abs(ours[0] - theirs) <= EVERY


def test_stays_confirmed_with_the_same_step_and_counts_the_updates_since() -> None:
    for seed in range(10):
        history = list(states(paper(seed, 2)))
        first = next(i for i, state in enumerate(history) if state.status == "confirmed")
        assert all(state.status != "confirmed" for state in history[:first])
        for i, state in enumerate(history[first:]):
            assert state == history[first]._replace(since=i)


def test_replay_gives_the_same_states() -> None:
    assert list(states(paper(3, 3))) == list(states(paper(3, 3)))


def test_the_knee_does_not_depend_on_units_and_directions() -> None:
    curves = paper(5, 1)
    up = confirmed(curves)
    detector = KneeDetector({"loss": False})
    for step, value in zip(curves.steps, curves.values[0], strict=True):
        state = detector.update(int(step), {"loss": float(1e-3 * (40 - value))})
    assert up is not None and state.step == up[0]


def test_missing_values_are_skipped() -> None:
    hits = 0
    for seed in range(20):
        curves = paper(seed, 2)
        detector = KneeDetector(names(2))
        for i, (step, column) in enumerate(zip(curves.steps, curves.values.T, strict=True)):
            metrics = {f"m{j}": float(v) for j, v in enumerate(column)}
            if i % 9 == 4:
                metrics = {}
            elif i % 9 == 7:
                metrics["m1"] = [math.nan, math.inf][i % 2]
            elif i % 9 == 1:
                del metrics["m0"]
            state = detector.update(int(step), metrics)
        hits += state.step is not None and abs(state.step - checkpoint_before(curves)) <= 2 * EVERY
    assert hits >= 18


def test_a_constant_metric_does_not_move_the_knee() -> None:
    curves = paper(2, 1)
    detector = KneeDetector({"m0": True, "flat": True})
    for step, value in zip(curves.steps, curves.values[0], strict=True):
        state = detector.update(int(step), {"m0": float(value), "flat": 3.0})
    knee = confirmed(curves)
    assert knee is not None and state.step == knee[0]


def test_all_metrics_constant_is_rising() -> None:
    detector = KneeDetector({"flat": True})
    for step in range(20):
        assert detector.update(step, {"flat": 1.0}).status == "rising"
    assert detector.curve() == []


def test_evidence_is_json_and_the_curve_rises() -> None:
    curves = paper(1, 2)
    detector = KneeDetector(names(2))
    for step, column in zip(curves.steps, curves.values.T, strict=True):
        state = detector.update(int(step), {f"m{i}": float(v) for i, v in enumerate(column)})
    evidence = json.loads(json.dumps(state.evidence, allow_nan=False))
    assert evidence["p_plateau"] >= 0.95 and evidence["plateau"] >= 6
    assert evidence["gain"] >= 4 * evidence["oscillation"]
    curve = detector.curve()
    assert [step for step, _ in curve] == STEPS.tolist()
    assert curve[0][1] < 0.7 < dict(curve)[state.step]


def test_status_goes_from_rising_over_candidate_to_confirmed() -> None:
    statuses = [state.status for state in states(paper(0, 3))]
    assert statuses[0] == "rising" and "candidate" in statuses and statuses[-1] == "confirmed"
    assert KneeDetector({"m": True}).update(0, {"m": 1.0}).step is None


@pytest.mark.parametrize("step", [100, 99, -1])
def test_steps_that_do_not_rise_are_refused_and_leave_no_trace(step: int) -> None:
    detector = KneeDetector({"m": True})
    detector.update(100, {"m": 1.0})
    with pytest.raises(OptionError, match="steps of the checkpoints must rise"):
        detector.update(step, {"m": 2.0})
    assert detector.update(101, {"m": 2.0}).evidence == {"checkpoints": 2.0}


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown metrics \['psnr'\]"):
        KneeDetector({"m": True}).update(1, {"m": 1.0, "psnr": 2.0})


@pytest.mark.parametrize("others", [{"m": 1.0}, {}])
def test_a_metric_that_never_has_a_value_is_reported(others: dict[str, float]) -> None:
    detector = KneeDetector({"m": True, "lost": False}, patience=3)
    for step in range(3):
        detector.update(step, others)
    with pytest.raises(OptionError, match="lost"):
        detector.update(3, others)


@pytest.mark.parametrize(
    "options",
    [{"noise": 0}, {"noise": 0.5}, {"patience": 2}, {"confidence": 0.5}, {"confidence": 1}],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="needs 0 < noise"):
        KneeDetector({"m": True}, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one metric"):
        KneeDetector({})


def table() -> None:
    """Print the measurements of docs/design/knee.md: 300 seeds a row that no test uses."""
    rows = [(onset, m, o, False) for onset in (None, *ONSETS) for m in (1, 2, 3) for o in (0, 1)]
    for onset, metrics, outlier, half in [*rows, *((None, m, 0, True) for m in (1, 2, 3))]:
        hits, strict, delays = 0, 0, []
        for seed in range(10_000, 10_000 + SEEDS):
            curves = paper(seed, metrics, bool(outlier), onset, half)
            knee = confirmed(curves)
            if knee is None:
                continue
            true = checkpoint_before(curves)
            hits += abs(knee[0] - true) <= EVERY
            strict += abs(knee[0] - curves.knee) <= EVERY
            delays.append(knee[1] - true / EVERY)
        quantiles = "/".join(f"{q:.0f}" for q in np.quantile(delays, [0.1, 0.5, 0.9, 1]))
        print(
            f"| {onset or 'mixed'}{' (half)' if half else ''} | {metrics} | {bool(outlier)} "
            f"| {len(delays) / 3:.1f} | {hits / 3:.1f} | {strict / 3:.1f} | {quantiles} |",
            flush=True,
        )
    for metrics in (1, 2, 3):
        for outlier in (False, True):
            seeds = range(10_000, 10_000 + SEEDS)
            wrong = sum(confirmed(rising(seed, metrics, outlier)) is not None for seed in seeds)
            print(f"| rising | {metrics} | {outlier} | {wrong / 3:.1f} |", flush=True)


if __name__ == "__main__":
    table()
