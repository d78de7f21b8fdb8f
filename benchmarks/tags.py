"""Measure whether the default tagger's tags help the bundled model, at equal training.

    python -m benchmarks.tags --photos PHOTOS --data Set5 BSD100 --steps 120 60 60

Fine-tunes the first experts of linearsr-tiny, as many as there are numbers in --steps, on the same
pairs with the same seeds: without tags; with tag cross-attention and each photograph's own tags;
the same with another photograph's tags, which is the gain of more parameters alone. Judges them at
1 and 4 steps on the validation pictures for which the tagger has tags; tags are always those of the
LR picture. Prints a Markdown table: means without tags, then mean paired differences to them
with 95% bootstrap intervals.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linearsr import Options, Upscaler, weights
from linearsr.cli.flags import Parser
from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.imaging.degradation import CLEAN, degrade
from linearsr.imaging.files import Picture, read
from linearsr.imaging.listing import find_images
from linearsr.imaging.resample import resize
from linearsr.latent import load_autoencoder
from linearsr.metrics.measure import measure
from linearsr.tags import load_tagger
from linearsr.tags.base import Tagger, TaggerConfig
from linearsr.tags.encoder import EncodedTags
from linearsr.training import loop
from linearsr.training.data import Batches, Photo, Photos, Tags, as_bytes, same
from linearsr.training.engine import TorchEngine
from linearsr.training.recipes import tiny_cpu

TAG_DIM, SCALE, SIDE = 64, 4, 256
# The lengths of fastText's character n-grams.
NGRAM_LENGTHS = (3, 4, 5)
METRICS = ("psnr", "ssim", "niqe", "piqe")
COUNTS = (1, 4)


class Case(NamedTuple):
    """A validation picture: the middle (3, H, W) of HR and LR, its tags and another one's."""

    hr: Tensor
    lr: Tensor
    tags: Tags
    others: Tags


class HashedEncoder:
    """An encoder with one vector per tag, made from its letters.

    This is fastText (arXiv 1607.04606) with fixed vectors, so it needs no download. Similar
    spellings get similar vectors; words of similar meaning do not. Channels have a variance near
    one, as the layers after them expect.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        self.dim, self.device = dim, device

    def __call__(self, tags: Sequence[Sequence[str]]) -> EncodedTags:
        """Return one embedding per tag."""
        rows = [[tag for tag in map(_plain, row) if tag] for row in tags]
        embeddings = torch.zeros(len(rows), max([1, *map(len, rows)]), self.dim)
        mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        for i, row in enumerate(rows):
            for j, tag in enumerate(row):
                embeddings[i, j] = torch.from_numpy(_hashed(tag, self.dim))
                mask[i, j] = True
        return EncodedTags(embeddings.to(self.device), mask.to(self.device))


def _plain(tag: str) -> str:
    return " ".join(tag.lower().split())


@lru_cache(maxsize=10_000)
def _hashed(tag: str, dim: int) -> np.ndarray:
    """Return a vector (dim,) float32 of length sqrt(dim)."""
    total = np.sum([_signs(ngram, dim) for ngram in _ngrams(tag)], axis=0, dtype=np.float32)
    # Signs may cancel out, so the length could be zero, though hardly ever.
    return total * (dim**0.5 / max(float(np.linalg.norm(total)), 1e-6))


def _ngrams(tag: str) -> set[str]:
    """Return the words of a tag, with marked ends, and their character n-grams."""
    words = {f"<{word}>" for word in tag.split()}
    return words | {
        word[i : i + n] for word in words for n in NGRAM_LENGTHS for i in range(len(word) - n + 1)
    }


def _signs(ngram: str, dim: int) -> np.ndarray:
    """Return (dim,) of -1 and 1 from a hash, which unlike a generator never changes."""
    digest = hashlib.shake_128(ngram.encode()).digest(-(-dim // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:dim]
    return bits.astype(np.float32) * 2 - 1


def main() -> int:
    """Tag, train, judge, print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="training photographs")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="HR pictures")
    parser.add_argument("--every", type=int, default=1, help="only every n-th picture of the last")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=(120, 60, 60), help="training steps of each expert"
    )
    parser.add_argument(
        "--threshold", type=float, help="threshold of the tagger; by default its own"
    )
    options = parser.parse_args()
    tagger = load_tagger(TaggerConfig(threshold=options.threshold))
    photos = [_tagged(path, tagger) for path in find_images(options.photos)]
    paths = [p for folder in options.data[:-1] for p in find_images(folder)]
    paths += find_images(options.data[-1])[:: options.every]
    cases = _cases([(p, _tagged(p, tagger)) for p in paths])
    print(
        f"{sum(bool(p.tags) for p in photos)} of {len(photos)} training photographs and "
        f"{len(cases)} of {len(paths)} validation pictures have tags.\n",
        flush=True,
    )
    _print(_judged(photos, cases, options.steps))
    return 0


def _tagged(path: Path, tagger: Tagger) -> Photo:
    """Pixels as uint8, and the tags of the picture at a quarter of its size."""
    picture = read(path)
    height, width = (max(1, n // SCALE) for n in picture.pixels.shape[1:])
    small = resize(picture.pixels[None, :3], height, width)[0].clamp(0, 1)
    return Photo(as_bytes(picture.pixels)[:3], tuple(tag.name for tag in tagger(small)))


def _exchanged(tags: Sequence[Tags]) -> list[Tags]:
    """Give each list to another picture, if possible to one with a different list."""
    order = sorted(range(len(tags)), key=lambda i: tags[i])
    shuffled = order[len(order) // 2 :] + order[: len(order) // 2]
    places = dict(zip(order, shuffled, strict=True))
    return [tags[places[i]] for i in range(len(tags))]


def _cases(pictures: list[tuple[Path, Photo]]) -> list[Case]:
    """Cases of the pictures that have tags."""
    tagged = [(path, photo) for path, photo in pictures if photo.tags]
    others = _exchanged([photo.tags for _, photo in tagged])
    return [Case(*_middle(*p), p[1].tags, other) for p, other in zip(tagged, others, strict=True)]


def _middle(path: Path, photo: Photo) -> tuple[Tensor, Tensor]:
    height, width = (min(SIDE, n) // SCALE * SCALE for n in photo.pixels.shape[1:])
    top, left = (photo.pixels.shape[1] - height) // 2, (photo.pixels.shape[2] - width) // 2
    hr = photo.pixels[:, top : top + height, left : left + width].float() / 255
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    return hr, degrade(hr, SCALE, CLEAN, rng)


Values = dict[str, dict[str, list[float]]]


def _judged(photos: list[Photo], cases: list[Case], steps: Sequence[int]) -> Values:
    """Metric values of each picture, by variant."""
    bundled = weights.load("linearsr-tiny")
    denoiser = bundled.config.denoiser.model_copy(update={"tag_dim": TAG_DIM})
    guided = bundled.config.model_copy(update={"denoiser": denoiser})
    tagged = [photo for photo in photos if photo.tags]
    others = iter(_exchanged([photo.tags for photo in tagged]))
    wrong = [photo._replace(tags=next(others)) if photo.tags else photo for photo in photos]
    own = [case.tags for case in cases]
    none = [()] * len(cases)
    plain = _trained(bundled.config, photos, steps)
    values = {"trained without tags": _measured(plain, cases, none)}
    values["before this training"] = _measured(_trained(bundled.config, photos, ()), cases, none)
    right = _trained(guided, photos, steps)
    values["trained on tags, given its tags"] = _measured(right, cases, own)
    values["given another picture's"] = _measured(right, cases, [case.others for case in cases])
    values["given none"] = _measured(right, cases, none)
    control = _trained(guided, wrong, steps)
    values["trained on others' tags, given its own"] = _measured(control, cases, own)
    return values


def _trained(config: ModelConfig, photos: list[Photo], steps: Sequence[int]) -> Upscaler:
    """The bundled model with its first experts fine-tuned, in the precision for inference."""
    states = [expert.state_dict() for expert in weights.load("linearsr-tiny").experts]
    models = []
    for i, state in enumerate(states):
        torch.manual_seed(i)
        model = LinearSR(config.denoiser)
        # The cross-attention is new: it contributes nothing before training.
        model.load_state_dict({**model.state_dict(), **state})
        if i < len(steps):
            model.load_state_dict(_fine_tuned(model, config, photos, i, steps[i]))
        models.append(model.to(torch.bfloat16).requires_grad_(False).eval())
    upscaler = Upscaler(weights.Bundle(config, models, {}))
    upscaler.encoder = _encoder(config)
    return upscaler


def _encoder(config: ModelConfig) -> HashedEncoder | None:
    return None if config.denoiser.tag_dim is None else HashedEncoder(config.denoiser.tag_dim)


def _fine_tuned(
    model: LinearSR, config: ModelConfig, photos: list[Photo], index: int, steps: int
) -> dict[str, Tensor]:
    """Averaged weights after `steps` steps of the recipe's expert `index`."""
    recipe = tiny_cpu()
    train = recipe.experts[index].model_copy(
        update={"steps": steps, "warmup": 10, "ema": 0.95, "report_every": 20}
    )
    engine = TorchEngine(model, train, torch.device("cpu"))
    autoencoder = load_autoencoder(config.latent, "cpu")
    stage = loop.TrainState.start(engine, autoencoder, train, _encoder(config))
    batches = iter(Batches(Photos([partial(same, p) for p in photos], recipe.data, index), 0))
    return loop.run(stage, batches, _print_report).ema.average


def _print_report(_: loop.TrainState, report: loop.Report) -> None:
    print(f"step {report.step}  loss {report.loss:.4f}", file=sys.stderr, flush=True)


@torch.inference_mode()
def _measured(
    upscaler: Upscaler, cases: list[Case], tags: Sequence[Tags]
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {f"{m}@{count}": [] for count in COUNTS for m in METRICS}
    for case, words in zip(cases, tags, strict=True):
        for count in COUNTS:
            lr = Picture(case.lr)
            result = upscaler.upscale(lr, Options(steps=count, tags=words)).pixels
            for metric in METRICS:
                value = measure(metric, result[None], case.hr[None], SCALE)
                values[f"{metric}@{count}"].append(value)
    return values


def _print(values: Values) -> None:
    (name, reference), *variants = values.items()
    print(f"| | {name} | " + " | ".join(name for name, _ in variants) + " |")
    print("|---" * (len(values) + 1) + "|")
    for metric, base in reference.items():
        cells = [_difference(np.subtract(means[metric], base)) for _, means in variants]
        print(f"| {metric} | {np.mean(base):.3f} | {' | '.join(cells)} |")
    print("\n`given its tags` less `given another picture's`, the same weights:\n")
    own, other = (values[key] for key in list(values)[2:4])
    print("\n".join(f"- {m}: {_difference(np.subtract(own[m], other[m]))}" for m in own))


def _difference(differences: np.ndarray) -> str:
    """Mean and its 95% bootstrap interval over pictures."""
    low, high = np.percentile(list(_resampled(differences)), [2.5, 97.5])
    return f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def _resampled(differences: np.ndarray, times: int = 5000) -> Iterator[float]:
    rng = np.random.default_rng(0)
    for _ in range(times):
        yield rng.choice(differences, len(differences)).mean()


if __name__ == "__main__":
    sys.exit(main())
