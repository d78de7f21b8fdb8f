"""Ranks of torch.distributed, as processes of this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The imports of DeepSpeed take longer than all else, so a server makes them once, and each rank is
# a fork of that server.
PRELOAD = ["torch._inductor.compile_fx"]

Job = Callable[..., Any]


def launch(
    folder: Path, job: Job, world: int, *arguments: object, path: str | None = None
) -> list[Any]:
    """Return the results of `job(*arguments)` on `world` fresh ranks, which may compile nothing."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = [
        context.Process(target=_rank, args=(folder, rank, world, path, job, arguments))
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=600)
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    assert not list(folder.glob("built/*"))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def _rank(
    folder: Path, rank: int, world: int, path: str | None, job: Job, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(TORCH_EXTENSIONS_DIR=str(folder / "built"))
    if path is not None:
        os.environ["PATH"] = path
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    result = job(*arguments)
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
