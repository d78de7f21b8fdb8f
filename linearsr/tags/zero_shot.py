"""Tags by comparing the picture with words: a CLIP or SigLIP through transformers.

Any vocabulary will do. The default one is objects.txt beside this file: everyday objects, scenes
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
from linearsr.hub import resolve
from linearsr.tags.base import Tag, TaggerConfig
from linearsr.tags.views import MAX_SQUEEZE, combine_views, square_views
from linearsr.tags.vocabulary import Vocabulary, read_vocabulary

PROMPT = "This is a photo of {}."
# CLIP's probabilities add up to one over the vocabulary; SigLIP's are independent and low.
CLIP_THRESHOLD, SIGLIP_THRESHOLD = 0.2, 0.1
WORDS_AT_ONCE = 64


class ZeroShotTagger:
    """A tagger whose scores are CLIP's softmax over the vocabulary, or SigLIP's probabilities."""

    def __init__(self, config: TaggerConfig, device: str = "cpu") -> None:
        if config.source is None:
            raise OptionError("the zero-shot tagger needs a model: a CLIP or SigLIP folder or id")
        self.device = device
        self.model, self.processor = _load(config.source, device)
        self.siglip = hasattr(self.model, "logit_bias")
        default = SIGLIP_THRESHOLD if self.siglip else CLIP_THRESHOLD
        objects = resources.files("linearsr.tags").joinpath("objects.txt")
        with resources.as_file(objects) as default_path:
            words = list(read_vocabulary(config.vocabulary or default_path))
        self.vocabulary = Vocabulary(words, config, default)
        self.words = self._embed(words)

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> list[Tag]:
        """Return the tags of a picture (3, H, W) in [0, 1] of any size, best first."""
        # CLIP's processor cuts out the middle square, SigLIP's squeezes the picture into one.
        views = [_as_image(v) for v in square_views(picture, MAX_SQUEEZE if self.siglip else 1.0)]
        inputs = self.processor.image_processor(images=views, return_tensors="pt")
        features = _unit(self.model.get_image_features(**inputs.to(self.device)))
        logits = features @ self.words.T * self.model.logit_scale.exp()
        if self.siglip:
            return self.vocabulary.select(combine_views((logits + self.model.logit_bias).sigmoid()))
        return self.vocabulary.select(combine_views(logits.softmax(-1)))

    @torch.inference_mode()
    def _embed(self, words: list[str]) -> Tensor:
        """Return unit vectors (number of words, channels)."""
        vectors = []
        for first in range(0, len(words), WORDS_AT_ONCE):
            # SigLIP was trained on padded text and has no mask: shorter text means something else.
            tokens = self.processor.tokenizer(
                [PROMPT.format(word) for word in words[first : first + WORDS_AT_ONCE]],
                padding="max_length" if self.siglip else True,
                max_length=self.model.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )
            vectors.append(_unit(self.model.get_text_features(**tokens.to(self.device))))
        return torch.cat(vectors)


def _load(source: str, device: str) -> tuple[Any, Any]:
    require("tags", "transformers")
    from transformers import AutoModel, AutoProcessor

    id, revision = resolve(source)
    # A model may ask to run code of its own, which none that this program reads needs.
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        model = AutoModel.from_pretrained(id, use_safetensors=True, **options)
        processor = AutoProcessor.from_pretrained(id, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(
            f"{source}: cannot be loaded as a CLIP or SigLIP: {one_line(error)}"
        ) from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise WeightsError(f"{source}: is a {type(model).__name__}; give a CLIP or a SigLIP")
    return model.float().eval().to(device), processor


def _unit(features: Any) -> Tensor:
    """Return features (B, C) scaled to unit length; transformers 5 wraps them in an object."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def _as_image(picture: Tensor) -> Image.Image:
    """Return 8-bit pixels, which the model's own processor expects."""
    pixels = (picture.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
