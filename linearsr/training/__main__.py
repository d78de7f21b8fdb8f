"""`python -m linearsr.training`: the plain loop on one machine without a cluster.

    python -m linearsr.training pretrain --photos PHOTOS --out runs/tiny
    python -m linearsr.training expert --index 0 --photos PHOTOS --out runs/tiny   (0, 1, 2, 3)
    python -m linearsr.training bundle --out runs/tiny --folder my-weights

Each stage writes OUT/STAGE as it goes and continues from it when started again. Knees are found by
the jobs in ray_jobs/; here an expert starts from wherever pretraining stands.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from linearsr import weights
from linearsr.denoiser import LinearSR
from linearsr.errors import LinearSRError
from linearsr.latent import load_autoencoder
from linearsr.tags.encoder import tag_encoder
from linearsr.training import export, loop
from linearsr.training.data import stream
from linearsr.training.engine import TorchEngine
from linearsr.training.recipes import RECIPES, Recipe, override


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("pretrain", "expert", "bundle"))
    parser.add_argument("--recipe", choices=RECIPES, default="tiny_cpu")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="settings"
    )
    parser.add_argument("--photos", type=Path, help="folder of training photographs")
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    parser.add_argument("--index", type=int, default=0, help="which expert, 0 being highest noise")
    parser.add_argument("--folder", type=Path, help="where the bundle goes")
    options = parser.parse_args()
    if options.stage != "bundle" and options.photos is None:
        parser.error("--photos is needed to train")
    try:
        recipe = override(RECIPES[options.recipe](), options.settings)
        if not 0 <= options.index < len(recipe.experts):
            parser.error(f"--index must be 0 to {len(recipe.experts) - 1}")
        if options.stage == "bundle":
            _bundle(recipe, options.out, options.folder or options.out / recipe.model.name)
        else:
            _train(recipe, options)
    except (LinearSRError, OSError) as error:
        print(f"linearsr.training: {error}", file=sys.stderr)
        return 1
    return 0


def _train(recipe: Recipe, options: argparse.Namespace) -> None:
    expert = options.stage == "expert"
    config = recipe.experts[options.index] if expert else recipe.pretrain
    folder = options.out / (f"expert-{options.index}" if expert else "pretrain")
    torch.manual_seed(config.seed)
    model = LinearSR(recipe.model.denoiser)
    if expert:
        model.load_state_dict(export.average(options.out / "pretrain", recipe.model))
    elif recipe.start:
        model.load_state_dict(weights.load(recipe.start).experts[0].state_dict())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = TorchEngine(model, config, device)
    autoencoder = load_autoencoder(recipe.model.latent, device)
    stage = loop.Stage.start(engine, autoencoder, config, tag_encoder(recipe.model, device))
    # The second one: what is left if the program was ended while it replaced the first.
    for saved in (folder, folder.with_name(f"{folder.name}.old")):
        if saved.is_dir():
            stage.load(saved)
            break
    batches = stream(options.photos, recipe.data, config.seed, stage.progress.seen)
    loop.run(stage, batches, _reporter(folder))


def _reporter(folder: Path) -> Callable[[loop.Stage, loop.Report], None]:
    def report(stage: loop.Stage, r: loop.Report) -> None:
        steps = stage.config.steps
        if r.step % stage.config.checkpoint_every == 0 or r.step == steps:
            _save(stage, folder)
        print(
            f"{folder.name} {r.step}/{steps}  loss {r.loss:.4f}  at one {r.loss_at_one:.4f}  "
            f"gradient {r.gradient_norm:.2f}  rate {r.learning_rate:.1e}  "
            f"{r.images_per_second:.1f} images/s",
            flush=True,
        )

    return report


def _save(stage: loop.Stage, folder: Path) -> None:
    """A whole checkpoint, complete before it takes the place of the one before."""
    temporary, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    stage.save(temporary)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)


def _bundle(recipe: Recipe, out: Path, folder: Path) -> None:
    experts = [out / f"expert-{i}" for i in range(len(recipe.experts))]
    provenance = {"stage": "experts", "recipe": recipe.model_dump_json()}
    export.bundle(folder, recipe.model, experts, provenance)
    single = folder.with_name(f"{folder.name}-single")
    export.bundle(single, export.single(recipe.model), [out / "pretrain"], provenance)
    print(f"wrote {folder} and, for comparison, the one model its experts came from, {single}")


if __name__ == "__main__":
    sys.exit(main())
