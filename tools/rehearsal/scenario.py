"""What is rehearsed, in order: each stage a job that reads what an earlier one has written."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from tools.rehearsal import pictures
from tools.rehearsal.machine import Place

# The tiny recipe, cut down to minutes: a smaller network, which comes to its knee soon, and metrics
# without downloads.
TINY = (
    *("model.denoiser.depth=3", "model.denoiser.width=64", "data.patch=64"),
    *("validation.pictures=2", "validation.size=128"),
)
PRETRAINING = (
    *('validation.metrics=["psnr@1", "ssim@1"]', 'validation.knee={"psnr@1":true,"ssim@1":true}'),
    # A bound: `--patience 0` ends the run where its knee is confirmed, which processors that round
    # differently do at different steps.
    *("pretrain.steps=2400", "pretrain.report_every=15", "pretrain.checkpoint_every=15"),
    *("pretrain.learning_rate=4e-3", "pretrain.warmup=20", "pretrain.decay=0", "pretrain.ema=0.9"),
)
# One step would be the first expert's alone.
EXPERTS = (
    *('validation.metrics=["psnr@4", "ssim@4"]', 'validation.knee={"psnr@4":true,"ssim@4":true}'),
    *(
        f"experts.{expert}.{field}"
        for expert in range(4)
        for field in ("steps=40", "report_every=4", "checkpoint_every=8", "warmup=4")
    ),
)


class Stage(NamedTuple):
    """A job: its name, script and flags, where its results lie, and how to draw them."""

    name: str
    command: str
    results: str
    draw: Callable[[], Image.Image]


def story(place: Place, *, gpu: bool = False) -> list[Stage]:
    """All stages. The storage holds photographs in train/, validation/ and small/."""
    at = place.storage
    shards, run, experts = f"{at}/shards", f"{at}/runs/pretrain", f"{at}/runs/experts"
    weights, on_gpu = f"{experts}/weights", " --gpu" if gpu else ""
    recipe = (
        f"--recipe tiny_cpu --data {shards} --validation {at}/validation --storage {at}/runs"
        f"{on_gpu} {_settings(TINY)}"
    )
    port = urlsplit(place.endpoint).port
    size = "expert_gpus=0.25" if gpu else "expert_cpus=0.5 router_cpus=0.5"
    return [
        Stage(
            "build shards",
            f"build_shards.py --input {at}/train --output {shards} --crop 192",
            shards,
            lambda: pictures.pairs(shards),
        ),
        Stage(
            "tag",
            f"tag_dataset.py --input {shards} --output {shards}{on_gpu}",
            shards,
            lambda: pictures.tags(shards),
        ),
        Stage(
            "pretrain to a knee",
            f"pretrain.py {recipe} {_settings(PRETRAINING)} --name pretrain --workers 2 "
            "--patience 0",
            run,
            lambda: pictures.reports(run),
        ),
        Stage(
            "fine-tune four experts from it",
            f"finetune_experts.py {recipe} {_settings(EXPERTS)} --name experts --from {run}",
            weights,
            lambda: pictures.reports(experts),
        ),
        Stage(
            "evaluate",
            f"evaluate.py --hr {at}/validation --models linearsr-tiny rehearsed={weights} "
            f"--metrics psnr ssim piqe --output {at}/report{on_gpu}",
            f"{at}/report",
            lambda: pictures.contact(f"{at}/report"),
        ),
        Stage(
            "deploy to Serve, query over HTTP",
            f"deploy.py --on-head --port {port} --set model={weights} {size}",
            place.endpoint,
            lambda: pictures.answers(f"{at}/small", place.endpoint),
        ),
        Stage(
            "upscale a bucket",
            f"upscale_dataset.py --input {at}/small --output {at}/large --model {weights} "
            f"--actors 2{on_gpu}",
            f"{at}/large",
            lambda: pictures.before_and_after(f"{at}/small", f"{at}/large"),
        ),
    ]


def _settings(fields: Sequence[str]) -> str:
    return shlex.join([part for field in fields for part in ("--set", field)])
