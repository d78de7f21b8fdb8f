"""Seconds and bytes of a call. What is compared runs in turn: a busy machine slows all alike."""

from __future__ import annotations

import contextlib
import ctypes
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


def seconds_of(run: Run, device: torch.device) -> float:
    """One call, until its work is done."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def in_turn(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, Timed]:
    """Each once to warm up and to see its memory, then all in turn `rounds` times.

    What takes longer than LONG is timed twice in all, the call that shows its memory included.
    """
    memory, first = {}, {}
    for name, run in runs.items():
        with peak_memory(device) as peak:
            first[name] = seconds_of(run, device)
        memory[name] = peak[0]
        print(f"  {name}: {first[name]:.3g} s, {peak[0] / 2**20:.0f} MiB", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            if number == 0 or first[name] < LONG:
                times[name].append(seconds_of(run, device))
    return {
        name: Timed(
            min(t[0], first[name]) if first[name] >= LONG else statistics.median(t), memory[name]
        )
        for name, t in times.items()
    }


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
