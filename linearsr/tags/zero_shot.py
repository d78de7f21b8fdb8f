"""Tags by comparing the picture with words: a CLIP or SigLIP through transformers.

The vocabulary is free; objects.txt beside this file has the default one, everyday objects, scenes
and materials of the kind that RAM knows.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from linearsr.errors import OptionError, WeightsError, one_line, require
from linearsr.tags.base import Tag, TaggerConfig
from linearsr.tags.choice import Choice, read_vocabulary
from linearsr.tags.views import SQUEEZABLE, seen_twice, squares

PROMPT = "This is a photo of {}."
# CLIP's probabilities are shared out over the vocabulary; SigLIP's stand alone and are low.
CLIP_THRESHOLD, SIGLIP_THRESHOLD = 0.2, 0.1
WORDS_AT_ONCE = 64


class ZeroShotTagger:
    """CLIP: softmax over the vocabulary. SigLIP: each word's own probability."""

    def __init__(self, config: TaggerConfig, device: str = "cpu") -> None:
        if config.source is None:
            raise OptionError("the zero-shot tagger needs a model: a CLIP or SigLIP folder or id")
        self.device = device
        self.model, self.processor = _load(config.source, device)
        self.siglip = hasattr(self.model, "logit_bias")
        default = SIGLIP_THRESHOLD if self.siglip else CLIP_THRESHOLD
        words = list(_vocabulary(config))
        self.choose = Choice(words, config, default)
        self.words = self._embed(words)

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> list[Tag]:
        """Tags of a picture (3, H, W) in [0, 1], of any size; best first, none when unsure."""
        # CLIP's processor cuts out the middle square, SigLIP's squeezes the picture into one.
        views = [_as_image(v) for v in squares(picture, SQUEEZABLE if self.siglip else 1.0)]
        inputs = self.processor.image_processor(images=views, return_tensors="pt")
        seen = _unit(self.model.get_image_features(**inputs.to(self.device)))
        logits = seen @ self.words.T * self.model.logit_scale.exp()
        if self.siglip:
            return self.choose(seen_twice((logits + self.model.logit_bias).sigmoid()))
        return self.choose(seen_twice(logits.softmax(-1)))

    @torch.inference_mode()
    def _embed(self, words: list[str]) -> Tensor:
        """Unit vectors (number of words, channels)."""
        parts = (words[i : i + WORDS_AT_ONCE] for i in range(0, len(words), WORDS_AT_ONCE))
        return torch.cat([self._embed_some(part) for part in parts])

    def _embed_some(self, words: list[str]) -> Tensor:
        # SigLIP was trained on padded text and has no mask: shorter text means something else.
        tokens = self.processor.tokenizer(
            [PROMPT.format(word) for word in words],
            padding="max_length" if self.siglip else True,
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        return _unit(self.model.get_text_features(**tokens.to(self.device)))


def _vocabulary(config: TaggerConfig) -> dict[str, float | None]:
    if config.vocabulary is not None:
        return read_vocabulary(config.vocabulary)
    with resources.as_file(resources.files("linearsr.tags").joinpath("objects.txt")) as path:
        return read_vocabulary(path)


def _load(source: str, device: str) -> tuple[Any, Any]:
    require("tags", "transformers")
    from transformers import AutoModel, AutoProcessor

    try:
        model = AutoModel.from_pretrained(source, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{source}: no CLIP or SigLIP to load: {one_line(error)}") from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise WeightsError(f"{source}: a {type(model).__name__}; give a CLIP or a SigLIP")
    return model.float().eval().to(device), processor


def _unit(features: Any) -> Tensor:
    """Features (B, C) on the unit sphere; transformers 5 wraps them."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def _as_image(picture: Tensor) -> Image.Image:
    """What the model's own processor was made for: 8-bit pixels."""
    pixels = (picture.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
