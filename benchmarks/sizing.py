"""Print the tables of docs/guides/sizing.md: `python -m benchmarks.sizing`.

They are counted by `linearsr.training.count` and `linearsr.training.plan`, as `linearsr job plan`
does. The rate that a GPU sustains is an assumption, and has its own column; measured rates come
from benchmarks/results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from benchmarks.markdown import markdown
from linearsr.config import MODELS
from linearsr.training import plan
from linearsr.training.count import autoencoder, denoiser, picture_flops, size
from linearsr.training.recipes import RECIPES

# TFLOP/s that a GPU sustains over a whole run: assumed, not measured.
SUSTAINED = (50, 100, 200, 400)
RANKS = (1, 2, 4, 8)
SIDE = 1024


def results() -> str:
    """A picture of 1024 x 1024, as upscaling and serving make it."""
    rows = []
    for config in MODELS.values():
        (step, once), (encode, decode) = denoiser(config, SIDE), autoencoder(config.latent, SIDE)
        total = picture_flops(config, SIDE)
        hourly = [_number(3600 * rate * 1e12 / total) for rate in SUSTAINED]
        shown = (step, once, encode, decode)
        cells = [f"{flops / 1e12:.3g}" for flops in shown]
        steps = str(config.sampling.steps)
        rows.append([f"`{config.name}`", *cells, steps, f"{total / 1e12:.3g}", *hourly])
    head = ["TFLOP", "a step", "once an expert", "encode", "decode", "steps", "in all"]
    return markdown([*head, *(f"pictures/h at {rate} TFLOP/s" for rate in SUSTAINED)], rows)


def training() -> str:
    """Each recipe, stage by stage, but that of weights that nobody uses."""
    rows = []
    for name, make in RECIPES.items():
        if name == "smoke":
            continue
        for kind, group in groupby(plan.runs(make()), lambda run: run.kind):
            runs = list(group)
            pairs = sum(run.train.steps * run.data.batch for run in runs)
            trained = sum(map(plan.training_flops, runs))
            judged = sum(map(plan.validation_flops, runs))
            hours = [_number((trained + judged) / rate / 3.6e15) for rate in SUSTAINED]
            cells = f"{pairs:,}", _number(trained / 1e15), _number(judged / 1e15)
            rows.append([f"`{name}`", plan.STAGES[kind], *cells, *hours])
    head = ["recipe", "stage", "pairs", "PFLOP to train", "to validate"]
    return markdown([*head, *(f"GPU-hours at {rate} TFLOP/s" for rate in SUSTAINED)], rows)


def memory() -> str:
    """Bytes of a training rank and of a checkpoint, by the layout of ZeRO-1 in bfloat16."""
    rows = []
    for name, make in RECIPES.items():
        recipe = make()
        if recipe.pretrain.bfloat16 is not True:  # those for a CPU leave it to the processor
            continue
        count, learned = size(recipe.model)
        ranks = [f"{count * (4 + 16 / n) / 1e9:.3g}" for n in RANKS]
        beside = 2 * learned + plan.tag_encoder_bytes(recipe.model)
        pair = plan.Pass.of(next(plan.runs(recipe)), 1)
        passes = pair._replace(checkpointing=False), pair._replace(checkpointing=True)
        working = [f"{plan.working(each) / 1e9:.3g}" for each in passes]
        cells = f"{count / 1e9:.3g}", *ranks, f"{beside / 1e9:.3g}", *working
        rows.append([f"`{name}`", *cells, f"{count * 18 / 1e9:.3g}"])
    head = ["GB", "parameters, billions", *(f"{n} rank{'s' * (n > 1)}" for n in RANKS)]
    more = ["DC-AE and Gemma", "a pair", "a pair, checkpointed", "a checkpoint"]
    return markdown([*head, *more], rows)


def weights() -> str:
    """Memory of upscaling and serving on a GPU, in bfloat16."""
    rows = []
    for config in MODELS.values():
        one, learned = size(config)
        experts = len(config.sampling.boundaries) + 1
        cells = (one, experts * one, learned)
        rows.append([f"`{config.name}`", *(f"{2 * count / 1e9:.2g}" for count in cells)])
    return markdown(["GB", "one expert", "all experts", "autoencoder"], rows)


def measured() -> str:
    """Rates that machines sustained in a forward of linearsr-tiny as it is shipped."""
    rows = []
    for file in sorted((Path(__file__).parent / "results").glob("*/forward.json")):
        forward = json.loads(file.read_text())
        for row in forward["rows"]:
            if "as shipped" in row["what"] and row["seconds"]:
                flops = denoiser(MODELS["linearsr-tiny"], row["side"])[0]
                cells = f"{row['seconds']:.3g} s", f"{flops / row['seconds'] / 1e12:.3g}"
                machine = forward["machine"]
                rows.append([machine["machine"], machine["precision"], f"{row['side']}²", *cells])
    return markdown(["machine", "precision", "result", "a step", "TFLOP/s"], rows)


Table = Callable[[], str]
TABLES: tuple[Table, ...] = (results, training, memory, weights, measured)


def _number(value: float) -> str:
    """Two digits: the counts are no more exact than that."""
    if value and value < 0.001:
        return "under 0.001"
    return f"{value:.2g}" if value < 10 else f"{int(float(f'{value:.2g}')):,}"


def main() -> None:
    """Print every table."""
    for make in TABLES:
        print(f"{make.__doc__}\n\n{make()}\n")


if __name__ == "__main__":
    main()
