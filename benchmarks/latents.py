"""Time training with latents from shards against encoding at each step, side by side in one run.

    python -m benchmarks.latents
    python -m benchmarks.latents --recipe sana_1_6b --divide 16 --patch 256

The model and its DC-AE are those of a recipe with all their blocks, but with their channels divided
by one number, and without tags. Shards are built from photographs of scikit-image. Both sides then
train the same model from them, in turn: one cuts pairs from HR and encodes them, the other takes
stored pairs. Before anything is timed, the losses of both ways on the same pairs must agree. Prints
a Markdown table: a training step with its batch at hand, the making of the batch, which a data
actor does beside a worker, and both.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import skimage.data
import torch
from PIL import Image

from benchmarks.machine import Machine
from benchmarks.timing import in_turn
from linearsr.cli.flags import Parser
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.distributed.datasets.shards.build import shard_bytes, shard_name
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.plan import plan
from linearsr.distributed.datasets.shards.scan import SCAN, fetcher, list_sources, scan_picture
from linearsr.distributed.train.data import Source, open_source
from linearsr.distributed.train.shards import Wanted
from linearsr.latent.autoencoder import load_autoencoder, sana_dc_ae
from linearsr.pipeline.device import best_dtype, pick_device
from linearsr.training import loop
from linearsr.training.config import TrainConfig
from linearsr.training.data import Batch, DataConfig, Pair, collate
from linearsr.training.engine import TorchEngine
from linearsr.training.latents import LatentsConfig, StoredPair, collate_stored
from linearsr.training.recipes import RECIPES

NAMES = ("astronaut", "coffee", "chelsea", "rocket")
# Largest difference of the two losses, as a share of the loss.
ALLOWED = 1e-3


def main() -> int:
    """Build, compare, time, print."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=("sana_0_6b", "sana_1_6b"), default="sana_0_6b")
    parser.add_argument("--divide", type=int, default=8, help="divisor of all channels")
    parser.add_argument("--patch", type=int, default=512, help="side of a pair in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    recipe, device = RECIPES[options.recipe](), pick_device(options.device)
    changes = {"patch": options.patch, "batch": options.batch}
    data = recipe.data.model_copy(update=changes)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = narrow(recipe.model, options.divide, folder / "dc-ae")
        write_shards(folder, model, data)
        train = TrainConfig(steps=10**6, bfloat16=False, report_every=1, checkpoint_every=1)
        difference = compare(folder, model, data, train)
        print(f"largest relative difference of the losses: {difference:.1g}")
        if not difference <= ALLOWED:  # NaN too
            print("refusing to time it: the losses differ", file=sys.stderr)
            return 1
        machine = Machine.here(device, best_dtype(device)).describe()
        print(table(measure(folder, model, data, train, device, options.rounds)))
        print(f"\n{machine['machine']}, float32; {machine['versions']}; {machine['date']}")
    return 0


def narrow(config: ModelConfig, divisor: int, folder: Path) -> ModelConfig:
    """Return the model with fewer channels and without tags; write its DC-AE into the folder."""
    channels = config.denoiser.latent_channels
    ae = sana_dc_ae(divisor, latent_channels=channels, attention_head_dim=32 // divisor)
    ae.save_pretrained(folder)
    denoiser = config.denoiser.model_copy(
        update={
            "width": config.denoiser.width // divisor,
            "head_dim": config.denoiser.head_dim // divisor,
            "stem_channels": tuple(n // divisor for n in config.denoiser.stem_channels),
            "tag_dim": None,
        }
    )
    latent = config.latent.model_copy(update={"source": str(folder)})
    return config.model_copy(update={"denoiser": denoiser, "latent": latent, "tags": None})


def write_shards(folder: Path, model: ModelConfig, data: DataConfig) -> None:
    """Build shards with latents of photographs that are enlarged to hold a patch."""
    (folder / "photos").mkdir()
    for name in NAMES:
        photo = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        factor = max(1.0, 1.5 * data.needs / min(photo.size))
        size = [round(side * factor) for side in photo.size]
        photo.resize((size[0], size[1])).save(folder / "photos" / f"{name}.png")
    latents = LatentsConfig.of(model, data, digest=load_autoencoder(model.latent).digest())
    config = ShardConfig.parse(
        inputs=[str(folder / "photos")],
        output=str(folder / "shards"),
        crop=-(-data.needs // 4) * 4,
        min_sharpness=0,
        crops_per_picture=2,
        latents=latents,
    )
    # As the job does, but in this process: Ray would take the cores of the measurement.
    fetch, sources = fetcher(config), list_sources(config)
    rows = [scan_picture(n, source, fetch, config) for n, source in enumerate(sources)]
    (folder / "shards").mkdir()
    for number, shard in enumerate(plan(pa.Table.from_pylist(rows, SCAN), config)):
        (folder / "shards" / shard_name(number)).write_bytes(shard_bytes(shard.to_pylist(), config))


def batch(source: Source, first: int, size: int) -> Batch:
    """Return a batch of the pairs from number `first` on."""
    numbers = range(first, first + size)
    pairs = [source.pair(number) for number in numbers]
    stored = [pair for pair in pairs if isinstance(pair, StoredPair)]
    if stored:
        return collate_stored(stored, numbers)
    return collate([pair for pair in pairs if isinstance(pair, Pair)], numbers)


def compare(folder: Path, model: ModelConfig, data: DataConfig, train: TrainConfig) -> float:
    """Return the largest relative difference of the loss of a pair between the two ways."""
    source = open_source(str(folder / "shards"), data, 0, Wanted(model, pixels=True))
    denoiser, autoencoder = LinearSR(model.denoiser), load_autoencoder(model.latent)
    torch.nn.init.normal_(denoiser.out.weight, std=0.02)  # it begins as zero, which hides errors
    stored = batch(source, 0, data.batch)
    with torch.no_grad():
        given, _ = loop.flow_loss(denoiser, autoencoder, stored, train)
        exact, _ = loop.flow_loss(denoiser, autoencoder, stored._replace(stored=None), train)
    return float(((given - exact).abs() / exact).max())


def measure(
    folder: Path,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    device: torch.device,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Return seconds by what is timed, then by the way."""
    place, autoencoder = str(folder / "shards"), load_autoencoder(model.latent, device)
    sources = {
        "encoded at each step": open_source(place, data, 0),
        "from shards": open_source(place, data, 0, Wanted(model, pixels=False)),
    }
    steps: dict[str, Callable[[], object]] = {}
    makers: dict[str, Callable[[], object]] = {}
    for name, source in sources.items():
        torch.manual_seed(0)
        engine = TorchEngine(LinearSR(model.denoiser), train, device)
        state = loop.TrainState.start(engine, autoencoder, train)
        ready = batch(source, 0, data.batch)
        steps[name] = lambda state=state, ready=ready: loop.run(  # type: ignore[misc]
            state, iter([ready]), lambda *_: True
        )
        # Another batch each time: what was read once is kept.
        numbers = iter(range(data.batch, 10**9, data.batch))
        makers[name] = lambda source=source, numbers=numbers: batch(  # type: ignore[misc]
            source, next(numbers), data.batch
        )
    timed = {
        "a step": in_turn(steps, device, rounds),
        "making its batch": in_turn(makers, device, rounds),
    }
    return {what: {name: t.seconds for name, t in ways.items()} for what, ways in timed.items()}


def table(seconds: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of seconds and their ratio."""
    names = list(seconds["a step"])
    both = {name: sum(ways[name] for ways in seconds.values()) for name in names}
    lines = [f"| seconds | {' | '.join(names)} | ratio |", "| --- " * 4 + "|"]
    for what, ways in {**seconds, "both": both}.items():
        slow, fast = (ways[name] for name in names)
        lines.append(f"| {what} | {slow:.3g} | {fast:.3g} | {slow / fast:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
