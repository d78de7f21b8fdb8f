"""Judge one picture at a time: make every method's result and measure every metric of it.

Knows nothing of folders, tables or Ray: it receives an item and a way to read its pictures.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from linearsr.config import Options
from linearsr.errors import InputError, LinearSRError, WeightsError, reason
from linearsr.evaluation.checkpoint import Checkpoint, is_checkpoint
from linearsr.evaluation.config import (
    BICUBIC,
    NOTE,
    TRUTH,
    Item,
    Score,
    Settings,
    Source,
    result_label,
)
from linearsr.evaluation.drawing import details
from linearsr.imaging.degradation import CAMERA, MILD, PRESETS, Degradation, degrade
from linearsr.imaging.files import Picture, read, to_pil
from linearsr.imaging.resample import resize
from linearsr.metrics.measure import has_reference, measure
from linearsr.pipeline.notes import notes_of
from linearsr.pipeline.upscaler import Upscaler

# Side in pixels of the detail of a picture that the contact sheet shows, pixel by pixel.
DETAIL = 320
# Every picture gets all three: Gaussian blur, noise of 2 to 8 levels, JPEG 60 to 90.
_EVERYTHING = CAMERA.rounds[0].model_copy(
    update={
        "blur_sigma": (0.5, 2.0),
        "gaussian_probability": 1.0,
        "gaussian_sigma": (2.0, 8.0),
        "jpeg_quality": (60.0, 90.0),
    }
)
DEGRADATIONS: dict[str, Degradation] = {
    **{str(name): preset for name, preset in PRESETS.items()},
    "mixed": MILD,
    "degraded": Degradation(rounds=(_EVERYTHING,)),
}
Method = Callable[[], Tensor]


class Example(NamedTuple):
    """One detail of a picture by every method, for the contact sheet."""

    id: str
    details: list[tuple[str, Image.Image]]


def seeded_lr(hr: Tensor, name: str, scale: int, config: Degradation) -> Tensor:
    """Make LR (3, h, w) from HR (3, H, W), seeded by the picture's name alone."""
    return degrade(hr, scale, config, np.random.default_rng(zlib.crc32(name.encode())))


def upscaled(upscaler: Upscaler, lr: Tensor, options: Options) -> Tensor:
    """Return the model's picture (3, H, W) in [0, 1] of LR (3, h, w) in [0, 1]."""
    return upscaler.upscale(Picture(lr), options).pixels


def load_model(model: str, device: str = "auto") -> Upscaler | Checkpoint:
    """Load a bundled model, a folder of weights, or another program's checkpoint.

    Raises WeightsError, OptionError or MissingExtra.
    """
    return (Checkpoint if is_checkpoint(model) else Upscaler).load(model, device)


class Judge:
    """Loads models, and compares them picture by picture."""

    def __init__(
        self,
        settings: Settings,
        read_source: Callable[[Source], bytes],
        load: Callable[[str], Upscaler | Checkpoint],
    ) -> None:
        self.settings, self.read_source = settings, read_source
        # The notes of the files that the current picture is made from, in order.
        self.notes: dict[str, None] = {}
        self.models = {name: load(model) for name, model in settings.models.items()}

    def scores(self, item: Item) -> list[Score]:
        """Return every metric of every method, or a failure in its place; never raises."""
        scores: list[Score] = []
        self.notes = {}
        try:
            hr, methods = self._methods(item)
        except Exception as error:  # torch and codecs raise errors of many kinds
            return [Score(item.id, "", "", None, reason(error))]
        for name, make in methods.items():
            try:
                scores += list(self._measured(item, name, make(), hr))
            except Exception as error:
                scores.append(Score(item.id, name, "", None, reason(error)))
        scores += [Score(item.id, "", NOTE, None, note) for note in self.notes]
        return list(dict.fromkeys(scores))

    def _measured(
        self, item: Item, method: str, picture: Tensor, hr: Tensor | None
    ) -> Iterator[Score]:
        truth = None if hr is None else hr[None]
        for metric in self.settings.metrics:
            if has_reference(metric) and (truth is None or method == TRUTH):
                continue
            try:
                value = measure(metric, picture[None], truth, self.settings.scale)
                finite = bool(np.isfinite(value))
                error = "" if finite else f"{metric}: {value}"
                yield Score(item.id, method, metric, value if finite else None, error)
            except WeightsError as error:  # the metric cannot be loaded here, for any method
                yield Score(item.id, "", "", None, str(error))
            except LinearSRError as error:
                yield Score(item.id, method, metric, None, str(error))

    def example(self, item: Item) -> Example:
        """Return the detail with most contrast, as made by every method.

        It is chosen in the true picture or, without one, in the last result.
        """
        hr, methods = self._methods(item)
        pictures: dict[str, Tensor] = {}
        for name, make in methods.items():
            with contextlib.suppress(Exception):  # the scores report it
                pictures[name] = make().clamp(0, 1)
        shown = hr if hr is not None else list(pictures.values())[-1]
        top, left = details(shown, DETAIL, 1)[0]
        if hr is not None:  # at the right, after the results that should look like it
            pictures[TRUTH] = pictures.pop(TRUTH)
        parts = {
            name: picture[:, top : top + DETAIL, left : left + DETAIL]
            for name, picture in pictures.items()
        }
        return Example(item.id, [(name, to_pil(Picture(part))) for name, part in parts.items()])

    def _methods(self, item: Item) -> tuple[Tensor | None, dict[str, Method]]:
        """The truth, and a function for each method's picture; all pictures have one size."""
        hr, lr = self._pair(item)
        methods: dict[str, Method] = {}
        if hr is not None:
            methods[TRUTH] = partial(_same, hr)
        if lr is not None:
            height, width = (n * self.settings.scale for n in lr.shape[1:])
            methods[BICUBIC] = partial(_bicubic, lr, height, width)
            methods |= self._models(lr)
        for name, source in item.results.items():
            methods[name] = partial(self._result, source, hr)
        return hr, methods

    def _models(self, lr: Tensor) -> Iterator[tuple[str, Method]]:
        scale, seed = self.settings.scale, self.settings.seed
        variants = dict.fromkeys(product(self.settings.solvers or (None,), self.settings.steps))
        for name, model in self.models.items():
            if isinstance(model, Checkpoint):  # it has neither steps nor noise
                yield name, partial(model.upscale, lr, scale)
                continue
            for solver, steps in variants:
                options = Options(scale=scale, steps=steps, solver=solver, seed=seed)
                yield result_label(name, steps, solver), partial(upscaled, model, lr, options)

    def _pair(self, item: Item) -> tuple[Tensor | None, Tensor | None]:
        """HR cut to whole LR pixels, and LR. Raises InputError if their sizes do not match."""
        scale = self.settings.scale
        hr = self._pixels(item.hr, item.id) if item.hr else None
        lr = self._pixels(item.lr, f"LR of {item.id}") if item.lr else None
        if hr is None:
            return None, lr
        height, width = (n // scale for n in hr.shape[1:])
        if lr is not None and lr.shape[1:] != (height, width):
            raise InputError(
                f"LR is {lr.shape[2]}x{lr.shape[1]}, but for HR of {hr.shape[2]}x{hr.shape[1]} and "
                f"--scale {scale} it must be {width}x{height}"
            )
        if not height or not width:
            raise InputError(
                f"HR of {hr.shape[2]}x{hr.shape[1]} pixels is too small for --scale {scale}"
            )
        hr = hr[:, : height * scale, : width * scale]
        if lr is None and self.settings.degradation:
            name = PurePosixPath(item.id).name
            lr = seeded_lr(hr, name, scale, DEGRADATIONS[self.settings.degradation])
        return hr, lr

    def _pixels(self, source: Source, name: str) -> Tensor:
        picture = read(self.read_source(source), name=name)
        self.notes |= dict.fromkeys(f"{name}: {note}" for note in notes_of(picture))
        return picture.pixels

    def _result(self, source: Source, hr: Tensor | None) -> Tensor:
        """Another program's picture, cut to the size of HR.

        Raises InputError unless it is as large as HR was before or after the cut.
        """
        pixels = self._pixels(source, source.file)
        if hr is None:
            return pixels
        height, width = hr.shape[1:]
        surplus = (pixels.shape[1] - height, pixels.shape[2] - width)
        if not all(0 <= more < self.settings.scale for more in surplus):
            raise InputError(
                f"{source.file} is {pixels.shape[2]}x{pixels.shape[1]}, but the true picture "
                f"is {width}x{height}; compare results of the same scale"
            )
        return pixels[:, :height, :width]

    def describe(self) -> dict[str, str]:
        """Return each model's description for the report: shape, precision, device, provenance."""
        return {name: _described(model) for name, model in self.models.items()}


def _same(picture: Tensor) -> Tensor:
    return picture


@torch.inference_mode()
def _bicubic(lr: Tensor, height: int, width: int) -> Tensor:
    return resize(lr[None], height, width)[0]


def _described(model: Upscaler | Checkpoint) -> str:
    if isinstance(model, Checkpoint):
        return model.describe()
    config, weight = model.config, model.experts[0].embed.weight
    kind = str(weight.dtype).removeprefix("torch.")
    count = len(model.experts)
    size = sum(tensor.numel() for tensor in model.experts[0].parameters()) / 1e6
    experts = f"{count} expert{'s' if count > 1 else ''} of {size:.2f} M parameters"
    shape = f"{config.name}, x{config.scale}, {experts}"
    record = "; ".join(f"{key}: {text}" for key, text in model.provenance.items())
    return f"{shape}, {kind} on {weight.device.type}. {record}".strip()
