"""Whether a node's GPUs can be trained on: the driver sees all of them, and NCCL adds up over them.

    python -m linearsr.distributed.health --gpus 4

A node runs it before it joins the cluster, and does not join when it exits with 1: the reason is in
its log, not in the middle of a training run. It looks at one node; whether nodes reach each other
shows when training starts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from linearsr.distributed.logs import last_line
from linearsr.errors import LinearSRError, one_line

# Of each rank, in float32: enough for NCCL to take the path that gradients take.
NUMBERS = 1 << 22
# How ranks are started: CUDA cannot be used in a fork of a process that has used it.
START = "spawn"
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def check_driver(gpus: int, query: tuple[str, ...] = QUERY) -> list[str]:
    """A line for each GPU. Raises LinearSRError when the driver shows another number, or none."""
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError as error:
        raise LinearSRError(
            f"{query[0]} is not here: this is no GPU node, or its container was started without "
            "NVIDIA's runtime"
        ) from error
    except subprocess.SubprocessError as error:
        said = getattr(error, "stdout", "") or getattr(error, "stderr", "") or ""
        raise LinearSRError(f"the driver does not answer: {one_line(error)} {said}") from error
    found = told.strip().splitlines()
    if len(found) != gpus:
        raise LinearSRError(f"the driver shows {len(found)} of {gpus} GPUs: {found}")
    return found


def check_torch(gpus: int) -> None:
    """Raises LinearSRError when torch cannot use as many GPUs: often, the driver is too old."""
    if torch.version.cuda is None:
        raise LinearSRError(f"torch {torch.__version__} was built without CUDA")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        raise LinearSRError(
            f"torch {torch.__version__} wants a driver of CUDA {torch.version.cuda}: "
            f"{one_line(error)}"
        ) from error
    if torch.cuda.device_count() != gpus:
        raise LinearSRError(f"torch sees {torch.cuda.device_count()} of {gpus} GPUs")


def check_sum(ranks: int, backend: str = "nccl", seconds: float = 120.0) -> None:
    """Add up over all ranks, a process each, on GPUs with nccl and in memory with gloo.

    Raises LinearSRError for a rank that fails, for a wrong sum, and when it takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (ranks, backend, f"file://{folder}/meet", seconds)
        group = start_processes(_add, work, nprocs=ranks, join=False, start_method=START)
        try:
            _wait(group, backend, seconds)
        finally:
            for process in group.processes:
                process.kill()
                process.join()


def _wait(group: ProcessContext, backend: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    try:
        while not group.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise LinearSRError(f"{backend} has not added up within {seconds:g} s")
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise LinearSRError(
            f"{backend} does not work between this node's ranks: {last_line(error)}"
        ) from error


def _add(rank: int, ranks: int, backend: str, meet: str, seconds: float) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=meet,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    numbers = torch.full((NUMBERS,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    right = ranks * (ranks + 1) / 2
    wrong = int((numbers != right).sum())
    dist.destroy_process_group()
    if wrong:
        raise RuntimeError(f"{wrong} of {NUMBERS} sums are not {right:g}")


def main(arguments: list[str] | None = None) -> int:
    """Check, tell what there is; 1 with one line for what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, required=True, help="how many this node must have")
    gpus = parser.parse_args(arguments).gpus
    try:
        found = check_driver(gpus)
        check_torch(gpus)
        started = time.monotonic()
        check_sum(gpus)
    except LinearSRError as error:
        print(f"{os.uname().nodename} must not join: {error}", file=sys.stderr)
        return 1
    print("\n".join(found))
    print(f"NCCL {torch.cuda.nccl.version()}: summed in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
