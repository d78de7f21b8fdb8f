"""`python -m linearsr.training`: the plain loop on one machine without a cluster.

    python -m linearsr.training pretrain --photos PHOTOS --out runs/tiny
    python -m linearsr.training expert --index 0 --photos PHOTOS --out runs/tiny   (0, 1, 2, 3)
    python -m linearsr.training finetune --index 0 --photos PHOTOS --out runs/tiny   (likewise)
    python -m linearsr.training perceptual --index 1 --photos PHOTOS --out runs/tiny   (1, 2, 3)
    python -m linearsr.training bundle --out runs/tiny --folder my-weights

Each stage writes OUT/STAGE as it goes; started again, it continues from there with the rest of its
steps and minutes. A bundle needs the four experts and takes each from its last stage. The jobs in
ray_jobs/ find knees; here a stage starts from the last checkpoint of the one before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from linearsr import weights
from linearsr.denoiser import LinearSR
from linearsr.digests import digest_tensors
from linearsr.errors import LinearSRError, OptionError
from linearsr.latent import load_autoencoder
from linearsr.storage import atomic
from linearsr.tags.encoder import tag_encoder
from linearsr.training import export, loop, lora, perceptual
from linearsr.training.config import PerceptualConfig, TrainConfig
from linearsr.training.data import stream
from linearsr.training.engine import TorchEngine
from linearsr.training.recipes import RECIPES, Kind, Recipe, override

# Stages in order, by the names of their folders, and what recipes call them.
KINDS: dict[str, Kind] = {
    "pretrain": "pretrain",
    "expert": "experts",
    "finetune": "finetune",
    "perceptual": "perceptual",
}
STAGES = list(KINDS)


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "stage", choices=(*STAGES, "bundle"), help="stage to train, or bundle to export the experts"
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, default="tiny_cpu", help="recipe (default: tiny_cpu)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="change a field of the recipe, as in pretrain.steps=1000",
    )
    parser.add_argument("--photos", type=Path, help="folder of training photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument(
        "--index", type=int, default=0, help="number of the expert; 0 has the highest noise"
    )
    parser.add_argument(
        "--minutes", type=float, help="time limit of the stage, all starts together"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=torch.get_num_threads(),
        help="processes that make training pairs (default: one per core that torch uses)",
    )
    parser.add_argument("--folder", type=Path, help="folder for the bundle (default: OUT/MODEL)")
    options = parser.parse_args()
    if options.stage != "bundle" and options.photos is None:
        parser.error("--photos is needed to train")
    try:
        recipe = override(RECIPES[options.recipe](), options.settings)
        if options.stage == "bundle":
            _bundle(recipe, options.out, options.folder or options.out / recipe.model.name)
        else:
            _train(recipe, options)
    except (LinearSRError, OSError) as error:
        print(f"linearsr.training: {error}", file=sys.stderr)
        return 1
    return 0


def _train(recipe: Recipe, options: argparse.Namespace) -> None:
    kind, index = KINDS[options.stage], None if options.stage == "pretrain" else options.index
    if index is not None and index not in recipe.trained(kind):
        which = ", ".join(map(str, recipe.trained(kind)))
        raise OptionError(f"--index: {options.stage} trains the experts {which}, not {index}")
    config = recipe.stage(kind, index)
    if options.minutes is not None:
        config = type(config).parse(**{**config.model_dump(), "minutes": options.minutes})
    data = recipe.data_of(kind)
    data.micro_batch(1, config.accumulation)
    folder = options.out / _name(options.stage, index)
    state = _start(recipe, config, options, index)
    # The second one is left if the program ended while it replaced the first.
    for saved in (folder, atomic.old_folder(folder)):
        if saved.is_dir():
            state.load(saved)
            break
    batches = stream(options.photos, data, config.seed, state.progress.seen, options.workers)
    loop.run(state, batches, _reporter(folder))


def _start(
    recipe: Recipe, config: TrainConfig, options: argparse.Namespace, index: int | None
) -> loop.TrainState:
    """Return the state before the first step, with the weights of the stages before."""

    def load(expert: int) -> LinearSR:
        return export.load(_latest(options.out, options.stage, expert), recipe.model, base)

    def adapters(expert: int) -> dict[str, Tensor] | None:
        assert origin is not None
        before = _latest(options.out, options.stage, expert)
        return export.adapters(before, recipe.model, origin)

    base = partial(export.load, options.out / "pretrain", recipe.model)
    torch.manual_seed(config.seed)
    origin: lora.Origin | None = None
    if index is not None and recipe.lora is not None:
        model = base()
        digest = digest_tensors(model.state_dict())
        origin = lora.Origin(recipe.lora, digest, str(options.out / "pretrain"))
        lora.inject(model, recipe.lora, adapters(index))
    elif index is not None:
        model = load(index)
    elif recipe.start:
        model = weights.load(recipe.start, only={0}).experts[0].requires_grad_(True).train()
    else:
        model = LinearSR(recipe.model.denoiser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = TorchEngine(model, config, device)
    objective: loop.Objective | None = None
    if isinstance(config, PerceptualConfig) and index is not None:
        frozen = load if origin is None else lora.sharing(engine.module, origin.config, adapters)
        objective = perceptual.objective(recipe.model, config, index, frozen, engine)
    autoencoder = load_autoencoder(recipe.model.latent, device, engine.dtype)
    encoder = tag_encoder(recipe.model, device)
    return loop.TrainState.start(engine, autoencoder, config, encoder, objective, origin)


def _name(stage: str, index: int | None) -> str:
    return stage if index is None else f"{stage}-{index}"


def _latest(out: Path, stage: str, index: int) -> Path:
    """Return the folder of an expert's last stage before `stage`."""
    if stage == "expert":
        return out / "pretrain"
    before = STAGES[1 : STAGES.index(stage)] if stage in STAGES else STAGES[1:]
    folders = [out / _name(one, index) for one in before]
    return next((folder for folder in reversed(folders) if folder.is_dir()), folders[0])


def _reporter(folder: Path) -> Callable[[loop.TrainState, loop.Report], None]:
    def report(state: loop.TrainState, r: loop.Report) -> None:
        if r.step % state.config.checkpoint_every == 0 or state.finished:
            # It replaces the checkpoint before only when it is complete.
            with atomic.replace_folder(folder) as temporary:
                state.save(temporary)
        minutes = "" if state.config.minutes is None else f" of {state.config.minutes:g}"
        print(
            f"{folder.name} {r.step}/{state.config.steps}  "
            f"{state.progress.minutes:.1f}{minutes} min  loss {r.loss:.4f}  "
            f"at one {r.loss_at_one:.4f}  gradient {r.gradient_norm:.2f}  "
            f"rate {r.learning_rate:.1e}  "
            f"{r.images_per_second:.1f} images/s",
            flush=True,
        )

    return report


def _bundle(recipe: Recipe, out: Path, folder: Path) -> None:
    experts = [_latest(out, "bundle", i) for i in range(len(recipe.experts))]
    stages = json.dumps([expert.name for expert in experts])
    provenance = {"stages": stages, "recipe": recipe.model_dump_json()}
    base = partial(export.load, out / "pretrain", recipe.model)
    export.bundle(folder, recipe.model, experts, provenance, base)
    single = folder.with_name(f"{folder.name}-single")
    export.bundle(single, export.single(recipe.model), [out / "pretrain"], provenance)
    print(f"wrote {folder} and, for comparison, the one model its experts came from, {single}")


if __name__ == "__main__":
    sys.exit(main())
