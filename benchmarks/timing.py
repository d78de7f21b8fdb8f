"""Seconds and bytes of a call. What is compared runs in turn: a busy machine slows all alike."""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from linearsr.config import ModelConfig
from linearsr.errors import LinearSRError

Run = Callable[[], object]
# A call that takes longer than this is not repeated as often.
LONG = 10.0


@dataclass(frozen=True)
class Asked:
    """What to measure. `limit`: seconds that one call may take, by what the last size took."""

    models: tuple[ModelConfig, ...]
    sides: tuple[int, ...]
    rounds: int
    limit: float
    compiled_up_to: int
    real_esrgan: Path | None = None


class Expected:
    """Whether a way is worth starting at a size, from what it took at the last one."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.last: dict[str, tuple[int, float]] = {}

    def within(self, name: str, side: int, power: int = 1) -> bool:
        """`power`: of the number of pixels, that the time grows with."""
        if name not in self.last:
            return True
        before, seconds = self.last[name]
        return seconds * (side / before) ** (2 * power) <= self.limit

    def saw(self, name: str, side: int, seconds: float) -> None:
        """What it took."""
        self.last[name] = side, seconds


class Timed(NamedTuple):
    """seconds: the median. memory: bytes at the peak, above what there was before the call."""

    seconds: float
    memory: int
    failure: str | None = None


def seconds_of(run: Run, device: torch.device) -> float:
    """One call, until its work is done."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def in_turn(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, Timed]:
    """Each once to warm up, once to see its memory, then all in turn `rounds` times.

    What takes longer than LONG has only the first two. What runs out of memory is told as such.
    """
    seen: dict[str, Timed] = {}
    for name, run in runs.items():
        try:
            run()
            with peak_memory(device) as peak:
                taken = seconds_of(run, device)
            seen[name] = Timed(taken, peak[0])
        except (torch.OutOfMemoryError, MemoryError, LinearSRError) as error:
            seen[name] = Timed(math.inf, 0, f"failed: {type(error).__name__}")
        print(f"  {name}: {seen[name]}", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name, t in seen.items() if t.seconds < LONG}
    for _ in range(rounds):
        for name in times:
            times[name].append(seconds_of(runs[name], device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {n: t._replace(seconds=medians.get(n, t.seconds)) for n, t in seen.items()}


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Fills the list with the bytes that the block took at most, beyond what was held before it."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        _wait(device)
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    _give_back_freed()
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


def _give_back_freed() -> None:
    """What glibc keeps for later would hide what a call takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
