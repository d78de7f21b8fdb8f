"""`python -m linearsr.training`: pretrain one model, fine-tune its experts, bundle them.

    python -m linearsr.training pretrain --photos PHOTOS --out runs/tiny
    python -m linearsr.training expert --index 0 --photos PHOTOS --out runs/tiny   (0, 1, 2, 3)
    python -m linearsr.training bundle --out runs/tiny --folder my-weights

Each stage writes OUT/STAGE.pt as it goes and continues from it when started again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearsr import weights
from linearsr.denoiser import LinearSR
from linearsr.errors import LinearSRError, WeightsError
from linearsr.latent import load_autoencoder
from linearsr.training import loop
from linearsr.training.data import stream
from linearsr.training.recipes import RECIPES, Recipe


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("pretrain", "expert", "bundle"))
    parser.add_argument("--recipe", choices=RECIPES, default="tiny_cpu")
    parser.add_argument("--photos", type=Path, help="folder of training photographs")
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints go")
    parser.add_argument("--index", type=int, default=0, help="which expert, 0 being highest noise")
    parser.add_argument("--steps", type=int, help="instead of the recipe's number")
    parser.add_argument("--folder", type=Path, help="where the bundle goes")
    parser.add_argument(
        "--note", action="append", default=[], metavar="KEY=VALUE", help="provenance"
    )
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]()
    if options.stage != "bundle" and options.photos is None:
        parser.error("--photos is needed to train")
    if not 0 <= options.index < len(recipe.experts):
        parser.error(f"--index must be 0 to {len(recipe.experts) - 1}")
    if any("=" not in note for note in options.note):
        parser.error("--note takes KEY=VALUE")
    try:
        if options.stage == "bundle":
            _bundle(
                recipe, options.out, options.folder or options.out / recipe.model.name, options.note
            )
        else:
            _train(recipe, options)
    except (LinearSRError, OSError) as error:
        print(f"linearsr.training: {error}", file=sys.stderr)
        return 1
    return 0


def _train(recipe: Recipe, options: argparse.Namespace) -> None:
    expert = options.stage == "expert"
    config = recipe.experts[options.index] if expert else recipe.pretrain
    if options.steps:
        config = config.model_copy(update={"steps": options.steps})
    name = f"expert-{options.index}" if expert else "pretrain"
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = LinearSR(recipe.model.denoiser)
    if expert:
        model.load_state_dict(_ema(options.out / "pretrain.pt"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = loop.start(model.to(device).to(memory_format=torch.channels_last), config)
    path = options.out / f"{name}.pt"
    if path.is_file():
        loop.restore(state, path)
    # A resumed stage must not see the same pictures again.
    batches = stream(options.photos, recipe.data, seed=config.seed * 1_000_003 + state.step)
    autoencoder = load_autoencoder(recipe.model.latent, device)
    loop.run(state, autoencoder, batches, config, _reporter(path, config.steps))


def _reporter(path: Path, steps: int) -> Callable[[loop.State, loop.Report], None]:
    began = time.perf_counter()

    def report(state: loop.State, r: loop.Report) -> None:
        if r.step % 250 == 0 or r.step == steps:
            loop.save(state, path)
        print(
            f"{path.stem} {r.step}/{steps}  loss {r.loss:.4f}  at one {r.loss_at_one:.4f}  "
            f"gradient {r.gradient_norm:.2f}  rate {r.learning_rate:.1e}  "
            f"{r.images_per_second:.1f} images/s  {time.perf_counter() - began:.0f} s",
            flush=True,
        )

    return report


def _ema(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; run the earlier stage first")
    return dict(torch.load(path, weights_only=True, map_location="cpu")["ema"])


def _bundle(recipe: Recipe, out: Path, folder: Path, notes: list[str]) -> None:
    count = len(recipe.model.sampling.boundaries) + 1
    experts = [_ema(out / f"expert-{i}.pt") for i in range(count)]
    provenance = dict(note.split("=", 1) for note in notes)
    weights.save(folder, recipe.model, experts, provenance)
    single = recipe.model.model_copy(
        update={"sampling": recipe.model.sampling.model_copy(update={"boundaries": ()})}
    )
    weights.save(
        folder.with_name(f"{folder.name}-single"), single, [_ema(out / "pretrain.pt")], provenance
    )
    print(
        f"wrote {folder} and, for comparison, the one model its experts came from, {folder}-single"
    )


if __name__ == "__main__":
    sys.exit(main())
