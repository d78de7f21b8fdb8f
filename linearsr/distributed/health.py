"""Check a node's GPUs before it joins: the driver shows all of them, and NCCL works across them.

    python -m linearsr.distributed.health --gpus 4

A node that exits with 1 does not join the cluster: the reason is in its log, not in the middle of a
training run. This checks one node; whether nodes reach each other shows when training starts.
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
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from linearsr.errors import LinearSRError, one_line

# Numbers per rank, in float32: enough for NCCL to take the path that gradients take.
NUMBERS = 1 << 22
# How ranks are started: CUDA cannot be used in a fork of a process that has used it.
START = "spawn"
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def check_driver(gpus: int, query: tuple[str, ...] = QUERY) -> list[str]:
    """Return a line for each GPU. Raises LinearSRError unless the driver shows `gpus` GPUs."""
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError as error:
        raise LinearSRError(
            f"{query[0]} not found: this is not a GPU node, or its container was started without "
            "NVIDIA's runtime"
        ) from error
    except subprocess.SubprocessError as error:
        output = getattr(error, "stdout", "") or getattr(error, "stderr", "") or ""
        raise LinearSRError(
            f"{query[0]} fails ({one_line(error)}); check NVIDIA's driver: {output}"
        ) from error
    lines = run.stdout.strip().splitlines()
    if len(lines) != gpus:
        raise LinearSRError(
            f"{query[0]} lists {len(lines)} of {gpus} GPUs; check NVIDIA's driver and the "
            f"container's GPUs: {lines}"
        )
    return lines


def check_torch(gpus: int) -> None:
    """Raise LinearSRError if torch cannot use all GPUs; often because the driver is too old."""
    if torch.version.cuda is None:
        raise LinearSRError(f"torch {torch.__version__} was built without CUDA")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        raise LinearSRError(
            f"torch {torch.__version__} needs an NVIDIA driver for CUDA {torch.version.cuda}: "
            f"{one_line(error)}"
        ) from error
    if torch.cuda.device_count() != gpus:
        raise LinearSRError(
            f"torch sees {torch.cuda.device_count()} of {gpus} GPUs; check CUDA_VISIBLE_DEVICES"
        )


def check_all_reduce(ranks: int, backend: str = "nccl", seconds: float = 120.0) -> None:
    """Run an all-reduce over one process per rank: on GPUs with nccl, in memory with gloo.

    Raises LinearSRError if a rank fails, if the sum is wrong, or if it takes more than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, backend, f"file://{folder}/meet", seconds)
        group = start_processes(
            _all_reduce, arguments, nprocs=ranks, join=False, start_method=START
        )
        end = time.monotonic() + seconds
        try:
            while not group.join(timeout=max(0.0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise LinearSRError(f"{backend} all-reduce did not finish within {seconds:g} s")
        except (ProcessRaisedException, ProcessExitedException) as error:
            last_line = str(error).strip().rpartition("\n")[2].strip()  # below the rank's stack
            raise LinearSRError(
                f"{backend} does not work between this node's ranks: {last_line}"
            ) from error
        finally:
            for process in group.processes:
                process.kill()
                process.join()


def _all_reduce(rank: int, ranks: int, backend: str, meet: str, seconds: float) -> None:
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
    expected = ranks * (ranks + 1) / 2
    wrong = int((numbers != expected).sum())
    dist.destroy_process_group()
    if wrong:
        raise RuntimeError(f"all-reduce gave {wrong} wrong sums of {NUMBERS}, not {expected:g}")


def main(arguments: list[str] | None = None) -> int:
    """Check this node and print its GPUs; return 1 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs of this node")
    gpus = parser.parse_args(arguments).gpus
    try:
        lines = check_driver(gpus)
        check_torch(gpus)
        started = time.monotonic()
        check_all_reduce(gpus)
    except LinearSRError as error:
        print(f"{os.uname().nodename} must not join: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    seconds = time.monotonic() - started
    print(f"NCCL {torch.cuda.nccl.version()}: all-reduce took {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
