"""The machine that the numbers were measured on, and its peak speed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import in_turn

PACKAGES = ("torch", "triton", "diffusers", "spandrel")
_PEAK_SIDE = 4096


class Machine(NamedTuple):
    """name: of the processor. peak: FLOP/s of a large square matrix product, measured here."""

    name: str
    device: torch.device
    dtype: torch.dtype
    threads: int
    memory: int
    peak: float

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Describe this machine and measure its peak, which takes a few seconds."""
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        threads = torch.get_num_threads()
        peak = matmul_rate(_PEAK_SIDE, device, dtype)
        return cls(processor(device), device, dtype, threads, memory, peak)

    @property
    def slug(self) -> str:
        """The machine's name as the name of a folder."""
        threads = f"-{self.threads}-threads" if self.device.type == "cpu" else ""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + threads

    def describe(self) -> dict[str, str]:
        """Hardware, versions and date by their names."""
        where = f"{self.name}, {self.memory / 2**30:.0f} GiB"
        if self.device.type == "cpu":
            where += f", {self.threads} of {os.cpu_count()} threads"
        installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
        versions = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
        return {
            "machine": where,
            "precision": str(self.dtype).removeprefix("torch."),
            "peak": f"{self.peak / 1e12:.2f} TFLOP/s, a product of {_PEAK_SIDE}² matrices",
            "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
            "date": datetime.date.today().isoformat(),
        }


def processor(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU: from a file on Linux, from Python elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    features = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return (names[0] if names else platform.processor() or platform.machine()) + features


def matmul_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two matrices of side x side."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = in_turn({"product": lambda: a @ b}, device, rounds=5)["product"].seconds
    return 2 * side**3 / seconds
