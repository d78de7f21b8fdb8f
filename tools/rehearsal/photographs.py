"""Photographs to rehearse with: the user's own, or those inside the scikit-image wheel."""

from __future__ import annotations

from pathlib import Path

import skimage.data
from PIL import Image

from linearsr.errors import InputError
from linearsr.imaging.files import encode, from_pil, read, to_pil
from linearsr.imaging.listing import find_images
from linearsr.storage.location import locate

# Photographs in the wheel that are neither drawings nor text. Weights that saw them are for
# rehearsals only.
NAMES = (
    *("coffee", "astronaut", "brick", "camera", "chelsea", "gravel", "grass"),
    *("hubble_deep_field", "ihc", "motorcycle_left", "rocket", "retina"),
)
# One of so many is for validation; its small version is upscaled.
EVERY = 3
SMALL = 96


def gather(folder: Path | None, storage: str) -> None:
    """Copy photographs to `storage`: train/, validation/, and small/ to upscale.

    folder: photographs to use; None for those of scikit-image. Raises InputError for too few.
    """
    paths = find_images(folder) if folder else _bundled()
    if len(paths) < 2 * EVERY:
        raise InputError(f"{folder}: {len(paths)} pictures; a rehearsal needs {2 * EVERY} or more")
    for number, path in enumerate(paths):
        name = f"{number:03d}-{path.stem}"
        if number % EVERY:
            _put(f"{storage}/train/{name}{path.suffix}", path.read_bytes())
        else:
            _put(f"{storage}/validation/{name}{path.suffix}", path.read_bytes())
            _put(f"{storage}/small/{name}.png", _small(path))


def _bundled() -> list[Path]:
    folder = Path(skimage.data.__file__).parent
    paths = {path.stem: path for path in folder.iterdir()}
    return [paths[name] for name in NAMES]


def _small(path: Path) -> bytes:
    picture = to_pil(read(path)).convert("RGB")
    picture.thumbnail((SMALL, SMALL), Image.Resampling.BICUBIC)
    return encode(from_pil(picture), "png")


def _put(path: str, data: bytes) -> None:
    if not locate(path).exists():
        locate(path).write(data)
