"""The machine: its name, driver and clocks, and the two rates that bound everything else."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import torch

from benchmarks.gpu.stage import Row, Settings
from benchmarks.machine import matmul_rate, processor
from benchmarks.timing import in_turn

QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def rows(settings: Settings) -> Iterator[Row]:
    """Yield what is known of the machine, then what is measured."""
    device = settings.device
    yield {"what": "name", "value": processor(device)}
    yield {"what": "torch", "value": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield {"what": "memory, GiB", "value": round(properties.total_memory / 2**30, 1)}
        yield {"what": "multiprocessors", "value": properties.multi_processor_count}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for key, value in zip(QUERY.split(","), found.splitlines()[0].split(","), strict=False):
            yield {"what": key, "value": value.strip()}
    yield {"what": "copies, GB/s read and written", "value": _copies(settings)}
    side = 512 if settings.toy else 8192
    rate = matmul_rate(side, device, settings.dtype)
    name = f"product of {side}² matrices, {settings.dtype}, TFLOP/s"
    yield {"what": name.replace("torch.", ""), "value": rate / 1e12}


def _copies(settings: Settings) -> float:
    """Return GB/s, each byte counted when it is read and when it is written."""
    size = 2**24 if settings.toy else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=settings.device).fill_(1)
    target = torch.empty_like(source)
    timed = in_turn({"copy": lambda: target.copy_(source)}, settings.device, rounds=10)["copy"]
    return 2 * size / timed.seconds / 1e9
