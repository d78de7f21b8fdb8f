"""Plan a training before it runs: the memory of a rank by part, the hours, and what cannot fit.

    linearsr job plan --recipe sana_1_6b --gpus 8 --gpu-memory 80

Counts every stage of the recipe from shapes and the layout of ZeRO-1. It starts nothing and needs
no GPU. GB are 10^9 bytes, and a tenth of a GPU's memory is left to CUDA, NCCL and the allocator.
Hours follow from counted operations and --tflops, which is an assumption; communication is left
out. Exit codes: 0 everything fits, 2 something does not, or wrong usage.

More: docs/guides/sizing.md, docs/guides/training.md.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from linearsr.cli.jobs import shared
from linearsr.cli.report import say
from linearsr.errors import OptionError

if TYPE_CHECKING:
    from linearsr.training.plan import Need

# TFLOP/s that a GPU sustains, an assumption: a tenth of an H100's peak in bfloat16.
SUSTAINED = 100.0
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer and masters",
    "ema": "EMA",
    "buffers": "reduction buffer",
    "autoencoder": "autoencoder",
    "tag_encoder": "tag encoder",
    "frozen": "frozen experts",
    "judges": "LPIPS, discriminator",
    "working": "activations and pictures",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the recipe, and of the GPUs and their speed."""
    shared.add_recipe_flags(parser)
    parser.add_argument(
        "--gpus", type=int, default=8, help="number of GPUs of a run, with one worker on each"
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory of a GPU, in 10^9 bytes",
    )
    parser.add_argument(
        "--latents",
        action="store_true",
        help="plan for shards with latents and tag embeddings (docs/guides/datasets.md)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=SUSTAINED,
        help="TFLOP/s that each GPU sustains over a whole run; an assumption, not a measurement",
    )


def run(options: argparse.Namespace) -> None:
    """Print the plan. Raises OptionError, after the plan, for runs that cannot fit."""
    from linearsr.training import plan

    for flag in ("gpus", "gpu_memory", "tflops"):
        if not 0 < getattr(options, flag) < float("inf"):
            raise OptionError(f"--{flag.replace('_', '-')}: must be above 0")
    recipe, gpus = shared.recipe(options), options.gpus
    say("Counting all stages. The largest models take a minute.", error=True)
    found = plan.needs(recipe, gpus, latents=options.latents)
    validation = plan.validation_bytes(recipe) / 1e9
    print(
        f"{recipe.model.name} by recipe {options.recipe}, GB of a rank with --gpus {gpus}:\n\n"
        f"{_table(found, options)}\n\n"
        f"Hours are those of --gpus {gpus} at --tflops {options.tflops:g}, with the runs of a "
        "column one after the other.\n"
        "Validation shares no GPU with a rank: on one of its own (--validation-gpus 1) it takes "
        f"{validation:.3g} GB.",
        flush=True,
    )
    plan.check(found, gpus, options.gpu_memory)


def _table(found: list[Need], options: argparse.Namespace) -> str:
    """Return a table with a column for each group of runs of one stage that need the same."""
    from linearsr.training import plan

    hour = options.tflops * 1e12 * 3600
    rows = {name: [name] for name in ("", *PARTS.values(), "in all", "hours", "to validate, hours")}
    for need in found:
        rows[""].append(need.name)
        for part, name in PARTS.items():
            rows[name].append(f"{getattr(need.memory, part) / 1e9:.2f}")
        rows["in all"].append(f"{need.memory.total / 1e9:.2f}")
        trained = sum(map(plan.training_flops, need.runs)) / options.gpus
        judged = sum(map(plan.validation_flops, need.runs))
        rows["hours"].append(f"{trained / hour:.3g}")
        rows["to validate, hours"].append(f"{judged / hour:.3g}")
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows.values()
    )
