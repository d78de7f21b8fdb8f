"""Tags as embeddings for the denoiser's cross-attention.

Knows nothing of where tags come from. An encoder is cheap to create: it loads its model when it
encodes its first tag.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from linearsr.config import ModelConfig
from linearsr.errors import WeightsError, one_line, require

Tags = Sequence[str]

# Sana's limit on the tokens of a text.
MAX_TOKENS = 300
# The lengths of fastText's character n-grams.
NGRAM_LENGTHS = (3, 4, 5)


class EncodedTags(NamedTuple):
    """Embedded tags of several pictures, padded to one number T of at least 1.

    embeddings: (B, T, tag_dim) float. mask: (B, T) bool, True where an embedding is real.
    """

    embeddings: Tensor
    mask: Tensor


class TagEncoder(Protocol):
    """A function from the tags of several pictures to the input of `LinearSR.condition`."""

    def __call__(self, tags: Sequence[Tags]) -> EncodedTags:
        """Return embeddings on the encoder's device; a picture without tags is all padding.

        Raises WeightsError if the model cannot be loaded.
        """
        ...


def tag_encoder(config: ModelConfig, device: str | torch.device = "cpu") -> TagEncoder | None:
    """Return the encoder that a model was trained with, or None if it takes no tags."""
    if config.tags is None:
        return None
    dim = config.denoiser.tag_dim
    assert dim is not None
    if config.tags.kind == "hashed":
        return HashedEncoder(dim, device)
    assert config.tags.source is not None
    return GemmaEncoder(config.tags.source, dim, device)


class HashedEncoder:
    """An encoder with one vector per tag, made from its letters.

    This is fastText (arXiv 1607.04606) with fixed vectors, so it needs no download. Similar
    spellings get similar vectors; words of similar meaning do not. Channels have a variance near
    one, as the layers after them expect.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        self.dim, self.device = dim, device

    def __call__(self, tags: Sequence[Tags]) -> EncodedTags:
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


class GemmaEncoder:
    """The last hidden states of a Gemma 2 over "cat, grass": Sana's encoder (arXiv 2410.10629).

    Texts are padded to the longest of the batch, not to Sana's 300 tokens: padding is masked out.
    """

    def __init__(self, source: str, dim: int, device: str | torch.device = "cpu") -> None:
        self.source, self.dim, self.device = source, dim, device

    @torch.no_grad()
    def __call__(self, tags: Sequence[Tags]) -> EncodedTags:
        """Return one embedding per token."""
        texts = [", ".join(filter(None, map(_plain, row))) for row in tags]
        if not any(texts):  # Without tags the model is not needed.
            empty = torch.zeros(len(texts), 1, self.dim, device=self.device)
            return EncodedTags(
                empty, torch.zeros(len(texts), 1, dtype=torch.bool, device=self.device)
            )
        tokenizer, model = self._loaded
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden = model(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
        tagged = torch.tensor([bool(text) for text in texts], device=self.device)
        return EncodedTags(hidden, tokens.attention_mask.bool() & tagged[:, None])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The tokenizer, and the model in the precision that it was saved in."""
        require("sana", "transformers")
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source, padding_side="right")
            model = AutoModel.from_pretrained(self.source, dtype="auto", use_safetensors=True)
        except (OSError, ValueError) as error:
            raise WeightsError(_advice(self.source, error)) from error
        if model.config.hidden_size != self.dim:
            raise WeightsError(
                f"tag encoder {self.source!r} has {model.config.hidden_size} channels, but the "
                f"model was trained on {self.dim}; choose the encoder that it was trained with"
            )
        return tokenizer, model.to(self.device).requires_grad_(False).eval()


def _advice(source: str, error: Exception) -> str:
    if os.path.isdir(source):
        return f"{source}: not a folder of a transformers model and tokenizer: {one_line(error)}"
    return (
        f"cannot load the tag encoder {source!r}: there is no such folder, and it is not on the "
        f"hub or the hub cannot be reached; run `hf download {source}` where it can, or leave out "
        f"--tags ({one_line(error)})"
    )
