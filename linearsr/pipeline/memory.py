"""How much memory a picture needs, and one error for every way of running out of it."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

from linearsr.config import Options
from linearsr.errors import LinearSRError, TooLarge
from linearsr.imaging.files import Picture
from linearsr.pipeline.sizes import output_size

# Peak memory per pixel of the picture that the network makes. The numbers are upper bounds, taken
# from 2048 pixels a side up with linearsr-tiny when latents still had 32 bits. They were 58 to 66
# bytes in tiles, and without tiles 124 in bfloat16 and 192 in float32.
BYTES_PER_PIXEL = 60
BYTES_PER_PIXEL_UNTILED = 200
# Memory per pixel of the result, in addition.
BYTES_PER_OUTPUT_PIXEL = 20
# Memory per input pixel: two float32 copies of the picture, one in [0, 1] and one in [-1, 1]. This
# matters if the network enlarges little.
BYTES_PER_INPUT_PIXEL = 24
# Memory per pixel that the network makes for the first step's guess, if it is kept: 48 channels of
# two bytes for each 4 x 4 pixels.
BYTES_PER_GUESS_PIXEL = 6

# For each version of control groups: the files with a group's memory limit and its memory use, and
# the entry of memory.stat that counts cached files, which Linux can drop.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

# Messages of allocators, and of CUDA for tensors of more than 2**31 numbers.
_MESSAGES = ("allocate memory", "out of memory", "ALLOC_FAILED", "32-bit index math")


class OutOfMemory(LinearSRError):
    """The device has too little memory, even with the smallest tile or with the chosen one."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemory for every kind of error that allocators raise."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if any(message in str(error) for message in _MESSAGES):
            raise OutOfMemory(str(error)) from error
        raise


def memory_needed(
    height: int, width: int, options: Options, size: tuple[int, int], *, tiled: bool
) -> int:
    """Return about how many bytes of main memory a picture of this height and width needs at most.

    size: height and width of the picture that the network makes, before any resampling.
    """
    output = BYTES_PER_OUTPUT_PIXEL * math.prod(output_size(height, width, options))
    per_pixel = BYTES_PER_PIXEL if tiled else BYTES_PER_PIXEL_UNTILED
    if 0 < options.detail < 1:
        per_pixel += BYTES_PER_GUESS_PIXEL
    return per_pixel * math.prod(size) + output + BYTES_PER_INPUT_PIXEL * height * width


def check_memory(picture: Picture, options: Options, size: tuple[int, int], *, tiled: bool) -> None:
    """Raise TooLarge if main memory cannot hold the result: later, Linux would kill the process.

    size: height and width of the picture that the network makes, before any resampling.
    """
    height, width = picture.pixels.shape[-2:]
    needed = memory_needed(height, width, options, size, tiled=tiled)
    free = free_memory()
    if needed > free:
        raise TooLarge(
            f"a {width}x{height} picture needs about {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; shrink or split it"
        )


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still have: the machine's, or its container's.

    root: the folder that has proc and sys.
    """
    return min([psutil.virtual_memory().available, *_left_to_cgroups(root)])


def _left_to_cgroups(root: Path) -> Iterator[int]:
    """Yield what the memory limit of each control group around this process leaves."""
    for group, (limit, usage, cache) in _cgroups(root):
        with contextlib.suppress(OSError, ValueError):  # there is no limit, or it is "max"
            most = int((group / limit).read_text())
            used = int((group / usage).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
            # Linux frees its copies of files that nobody has used lately before it kills anyone.
            counts = dict(line.split(maxsplit=1) for line in lines)
            yield max(0, most - used + int(counts.get(cache, 0)))


def _cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folder and the names of files of each control group that can limit memory.

    In a container the mounted folder is often its own group, and the path below it does not exist.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            controllers, path = line.split(":", 2)[1:]
            if not controllers or "memory" in controllers.split(","):
                names = _CGROUP_V1 if controllers else _CGROUP_V2
                top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
                parts = PurePosixPath(path).parts[1:]
                for depth in range(len(parts) + 1):
                    yield top.joinpath(*parts[:depth]), names


def give_back_freed_memory() -> None:
    """Return freed memory that glibc keeps to Linux, as after a large picture.

    Blocks of a few MiB lie in heaps that only shrink from their ends. Other allocators are not
    affected.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_freed_memory() -> None:
    """Let this process keep up to 62 MiB of freed memory per heap for the next layer.

    Otherwise page faults take up to 16 % of the time of a small picture. glibc returns the free
    memory at the end of a heap to Linux once there is more of it than twice the largest block freed
    so far, not counting blocks of 32 MiB or more. Freeing one block of 31 MiB sets this limit to
    62 MiB. Other allocators are not affected.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
