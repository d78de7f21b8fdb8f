"""The jobs of a rehearsal, in order: each reads the results of an earlier one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from tools.rehearsal import pictures
from tools.rehearsal.machine import Target

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


class Step(NamedTuple):
    """A job: its name, script and flags, the place of its results, and how to draw them."""

    name: str
    command: str
    results: str
    draw: Callable[[], Image.Image]


def scenario(target: Target, *, gpu: bool = False) -> list[Step]:
    """Return all steps. The storage has photographs in train/, validation/ and small/."""
    at = target.storage
    shards, run, experts = f"{at}/shards", f"{at}/runs/pretrain", f"{at}/runs/experts"
    weights, on_gpu = f"{experts}/weights", " --gpu" if gpu else ""
    recipe = (
        f"--recipe tiny_cpu --data {shards} --validation {at}/validation --storage {at}/runs"
        f"{on_gpu} {_settings(TINY)}"
    )
    port = urlsplit(target.endpoint).port
    size = "expert_gpus=0.25" if gpu else "expert_cpus=0.5 router_cpus=0.5"
    return [
        Step(
            "build shards",
            f"build_shards.py --input {at}/train --output {shards} --crop 192",
            shards,
            lambda: pictures.pairs(shards),
        ),
        Step(
            "tag",
            f"tag_dataset.py --input {shards} --output {shards}{on_gpu}",
            shards,
            lambda: pictures.tags(shards),
        ),
        Step(
            "pretrain to a knee",
            f"pretrain.py {recipe} {_settings(PRETRAINING)} --name pretrain --workers 2 "
            "--patience 0",
            run,
            lambda: pictures.reports(run),
        ),
        Step(
            "fine-tune four experts from it",
            f"finetune_experts.py {recipe} {_settings(EXPERTS)} --name experts --from {run}",
            weights,
            lambda: pictures.reports(experts),
        ),
        Step(
            "evaluate",
            f"evaluate.py --hr {at}/validation --models linearsr-tiny rehearsed={weights} "
            f"--metrics psnr ssim piqe --output {at}/report{on_gpu}",
            f"{at}/report",
            lambda: pictures.contact(f"{at}/report"),
        ),
        Step(
            "deploy to Serve, query over HTTP",
            f"deploy.py --on-head --port {port} --set model={weights} {size}",
            target.endpoint,
            lambda: pictures.answers(f"{at}/small", target.endpoint),
        ),
        Step(
            "upscale a bucket",
            f"upscale_dataset.py --input {at}/small --output {at}/large --model {weights} "
            f"--actors 2{on_gpu}",
            f"{at}/large",
            lambda: pictures.before_and_after(f"{at}/small", f"{at}/large"),
        ),
    ]


def _settings(fields: Sequence[str]) -> str:
    return shlex.join([part for field in fields for part in ("--set", field)])
