"""Time dataset upscaling against a plain loop, and measure its memory for more and more files.

    python -m benchmarks.dataset throughput --pictures 400 --size 64
    python -m benchmarks.dataset memory --pictures 200 2000 --size 16

Both sides have one actor and one thread, and their results are compared byte for byte before
anything is timed. Rates are taken between the first and the last result, without the start of Ray.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import psutil
import ray
import skimage.data
import torch
from PIL import Image

from linearsr.cli.flags import Parser
from linearsr.config import Options
from linearsr.distributed.datasets.upscale import UpscaleConfig, upscale_dataset
from linearsr.imaging.files import read, write
from linearsr.pipeline.upscaler import Upscaler

NAMES = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry")


def main() -> int:
    """Measure and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("--pictures", type=int, nargs="+", default=[400])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray.init("local", log_to_driver=False, logging_level="WARNING", include_dashboard=False)
    for count in options.pictures:
        with tempfile.TemporaryDirectory() as folder:
            _crops(Path(folder, "in"), count, options.size)
            work = _throughput if options.what == "throughput" else _memory
            print(
                f"{count} pictures of {options.size}x{options.size}:", work(folder, options.steps)
            )
    return 0


def _crops(folder: Path, count: int, size: int) -> None:
    folder.mkdir()
    photos = [Image.fromarray(np.asarray(getattr(skimage.data, name)())) for name in NAMES]
    rng = np.random.default_rng(0)
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = (int(rng.integers(n - size)) for n in photo.size)
        photo.crop((left, top, left + size, top + size)).save(folder / f"{number:05}.png")


def _config(folder: str, steps: int) -> UpscaleConfig:
    return UpscaleConfig(
        input=f"{folder}/in", output=f"{folder}/out", device="cpu", options=Options(steps=steps)
    )


def _throughput(folder: str, steps: int) -> str:
    loop, whole_loop = _loop(Path(folder), steps)
    began = time.perf_counter()
    upscale_dataset(_config(folder, steps))
    whole_job = time.perf_counter() - began
    out, alone = Path(folder, "out"), Path(folder, "alone")
    for file in alone.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), f"{file.name} differs"
    job = _rate(out)
    return (
        f"loop {loop:.1f} images/s ({whole_loop:.1f} s in all), job {job:.1f} images/s "
        f"({whole_job:.1f} s in all): ratio {job / loop:.2f}"
    )


def _loop(folder: Path, steps: int) -> tuple[float, float]:
    """Upscale the same files in this process."""
    began = time.perf_counter()
    (folder / "alone").mkdir()
    upscaler, options = Upscaler.load(device="cpu"), Options(steps=steps)
    for source in sorted((folder / "in").iterdir()):
        result = upscaler.upscale(read(source), options)
        write(result, folder / "alone" / source.name, provenance=upscaler.describe(options))
    return _rate(folder / "alone"), time.perf_counter() - began


def _rate(folder: Path) -> float:
    times = sorted(file.stat().st_mtime for file in folder.glob("*.png"))
    return (len(times) - 1) / (times[-1] - times[0])


def _memory(folder: str, steps: int) -> str:
    """Sample the peak resident memory of this process and of the actor while the job runs."""
    ended, peak = threading.Event(), {"driver": 0, "actor": 0}
    sampler = threading.Thread(target=_sample, args=(ended, peak))
    sampler.start()
    upscale_dataset(_config(folder, steps))
    ended.set()
    sampler.join()
    return ", ".join(f"{who} {size / 2**20:.0f} MiB" for who, size in peak.items())


def _sample(ended: threading.Event, peak: dict[str, int]) -> None:
    me = psutil.Process()
    while not ended.wait(0.2):
        seen = [("driver", me)]
        seen += [("actor", p) for p in me.children(recursive=True) if _is_worker(p)]
        for who, process in seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak[who] = max(peak[who], process.memory_info().rss)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "DatasetActor" in " ".join(process.cmdline())
    except psutil.Error:
        return False


if __name__ == "__main__":
    sys.exit(main())
