"""Measure seconds and bytes of calls. Compared calls take turns: a busy machine slows all alike."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from linearsr.config import ModelConfig
from linearsr.errors import LinearSRError

Run = Callable[[], object]
# Calls that take longer than this, in seconds, are not repeated.
LONG = 10.0


@dataclass(frozen=True)
class Settings:
    """The runs to measure. limit: seconds that a call may take, judged by the last size."""

    models: tuple[ModelConfig, ...]
    sides: tuple[int, ...]
    rounds: int
    limit: float
    compiled_up_to: int
    real_esrgan: Path | None = None


class Expected:
    """Extrapolates the time of a way from the last size, to decide whether it is started."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.last: dict[str, tuple[int, float]] = {}

    def within(self, name: str, side: int, power: int = 1) -> bool:
        """Return whether the time stays within the limit; it grows as the pixels to the `power`."""
        if name not in self.last:
            return True
        before, seconds = self.last[name]
        return seconds * (side / before) ** (2 * power) <= self.limit

    def record(self, name: str, side: int, seconds: float) -> None:
        """Remember the time at a size."""
        self.last[name] = side, seconds


class Timed(NamedTuple):
    """A measurement. seconds: the median. memory: peak bytes beyond those held before the call."""

    seconds: float
    memory: int
    failure: str | None = None


def seconds_of(run: Run, device: torch.device) -> float:
    """Return the seconds of one call, until the device has finished."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def in_turn(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, Timed]:
    """Time each call once to warm up and once for its memory, then all in turn `rounds` times.

    Calls that take longer than LONG are not repeated. Running out of memory is a `failure`.
    """
    first: dict[str, Timed] = {}
    for name, run in runs.items():
        try:
            run()
            with peak_memory(device) as peak:
                seconds = seconds_of(run, device)
            first[name] = Timed(seconds, peak[0])
        except (torch.OutOfMemoryError, MemoryError, LinearSRError) as error:
            first[name] = Timed(math.inf, 0, f"failed: {type(error).__name__}")
        print(f"  {name}: {first[name]}", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name, t in first.items() if t.seconds < LONG}
    for _ in range(rounds):
        for name in times:
            times[name].append(seconds_of(runs[name], device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {n: t._replace(seconds=medians.get(n, t.seconds)) for n, t in first.items()}


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Fill the list with the peak bytes of the block, beyond those held before it."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        _wait(device)
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    import psutil

    from linearsr.pipeline.memory import give_back_freed_memory

    give_back_freed_memory()
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def log_slope(points: Sequence[tuple[int, float]]) -> float:
    """Return the slope of log seconds over log pixels, by least squares; NaN below two points.

    points: sides of square pictures, and seconds.
    """
    if len(points) < 2:
        return math.nan
    logs = [(2 * math.log(side), math.log(seconds)) for side, seconds in points]
    x, y = torch.tensor(logs, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())
