"""Measure the value of the knee, the experts and their boundaries, at equal training.

    python -m benchmarks.ablation --knee RUNS/pretrain/knee/step-00000650 \\
        --last RUNS/pretrain/checkpoint_... --photos PHOTOS --data BSD100 --steps 100

Fine-tunes, each with the same rates, seeds and data, in one process: four experts from the knee,
four from the last checkpoint, four with uniform boundaries, and one model for as many steps as the
four together. Prints a Markdown table of validation metrics.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.diffusion.experts import ranges
from linearsr.imaging.files import find_images, read
from linearsr.latent import load_autoencoder
from linearsr.training import export, loop
from linearsr.training.config import TimestepConfig, TrainConfig
from linearsr.training.data import stream
from linearsr.training.engine import TorchEngine
from linearsr.training.recipes import ValidationConfig, tiny_cpu
from linearsr.training.validation import validate

UNIFORM = (0.25, 0.5, 0.75)
JUDGED = ValidationConfig(metrics=("psnr@1", "psnr@4", "niqe@4", "piqe@4"), knee={"psnr@1": True})


def main() -> int:
    """Train and judge the variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--knee", type=Path, required=True, help="checkpoint folder of the knee")
    parser.add_argument("--last", type=Path, required=True, help="the run's last checkpoint")
    parser.add_argument("--photos", type=Path, required=True, help="training photographs")
    parser.add_argument("--data", type=Path, required=True, help="validation pictures")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each expert")
    parser.add_argument("--every", type=int, default=4, help="only every n-th validation picture")
    options = parser.parse_args()
    paths = find_images(options.data)[:: options.every]
    pictures = [(p.name, read(p).pixels[:3]) for p in paths]
    model = tiny_cpu().model
    sampling = model.sampling.model_copy(update={"boundaries": UNIFORM})
    uniform = model.model_copy(update={"sampling": sampling})
    print("| | " + " | ".join(JUDGED.metrics) + " |\n" + "|---" * 5 + "|")
    for name, config, start in (
        ("the knee itself", export.single(model), None),
        ("four experts from the knee", model, options.knee),
        ("four experts from the last checkpoint", model, options.last),
        ("four experts from the knee, uniform boundaries", uniform, options.knee),
        ("one model from the knee, as many steps", export.single(model), options.knee),
    ):
        bundle = _trained(config, start, options) if start else _bundle(config, [options.knee])
        metrics, _ = validate(bundle, pictures, JUDGED)
        values = " | ".join(f"{metrics.get(m, float('nan')):.3f}" for m in JUDGED.metrics)
        print(f"| {name} | {values} |", flush=True)
    return 0


def _bundle(config: ModelConfig, checkpoints: list[Path]) -> weights.Bundle:
    states = [export.average(checkpoint, config) for checkpoint in checkpoints]
    return weights.Bundle(config, [_frozen(config, state) for state in states], {})


def _frozen(config: ModelConfig, state: dict[str, Tensor]) -> LinearSR:
    model = LinearSR(config.denoiser)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def _trained(config: ModelConfig, start: Path, options: argparse.Namespace) -> weights.Bundle:
    spans = ranges(config.sampling.boundaries)
    steps = options.steps * (4 // len(spans))
    base = tiny_cpu().experts[0].model_copy(update={"steps": steps})
    at_one = 0.7 if len(spans) > 1 else tiny_cpu().pretrain.timesteps.at_one
    states = []
    for low, high in spans:
        span = TimestepConfig(low=low, high=high, at_one=at_one)
        train = base.model_copy(update={"timesteps": span})
        states.append(_fine_tuned(config, export.average(start, config), train, options.photos))
    return weights.Bundle(config, [_frozen(config, state) for state in states], {})


def _fine_tuned(
    config: ModelConfig, start: dict[str, Tensor], train: TrainConfig, photos: Path
) -> dict[str, Tensor]:
    """Return the averaged weights after `train.steps` steps from `start`."""
    model = LinearSR(config.denoiser)
    model.load_state_dict(start)
    engine = TorchEngine(model, train, torch.device("cpu"))
    stage = loop.Stage.start(engine, load_autoencoder(config.latent, "cpu"), train)
    batches = stream(photos, tiny_cpu().data, train.seed)
    return loop.run(stage, batches, lambda *_: None).ema.average


if __name__ == "__main__":
    sys.exit(main())
