"""Tags as embeddings for the denoiser's cross-attention.

Knows nothing of where tags come from. An encoder is cheap to create: it loads its model when it
encodes its first tag.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from linearsr.config import ModelConfig
from linearsr.errors import WeightsError, one_line, require
from linearsr.hub import resolve

Tags = Sequence[str]

# Sana's limit on the tokens of a text.
MAX_TOKENS = 300


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
    return GemmaEncoder(config.tags.source, dim, device)


def pad(rows: Sequence[Tensor]) -> EncodedTags:
    """Join embeddings (T_i, tag_dim) of several pictures; T_i is 0 for one without tags."""
    longest = max(1, *map(len, rows))
    embeddings = torch.zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        embeddings[i, : len(row)], mask[i, : len(row)] = row, True
    return EncodedTags(embeddings, mask)


class GemmaEncoder:
    """The last hidden states of a Gemma 2 over "cat, grass": Sana's encoder (arXiv 2410.10629).

    Texts are padded to the longest of the batch, not to Sana's 300 tokens: padding is masked out.
    """

    def __init__(self, source: str, dim: int, device: str | torch.device = "cpu") -> None:
        self.source, self.dim, self.device = source, dim, device

    @torch.no_grad()
    def __call__(self, tags: Sequence[Tags]) -> EncodedTags:
        """Return one embedding per token."""
        plain = ([" ".join(tag.lower().split()) for tag in row] for row in tags)
        texts = [", ".join(filter(None, row)) for row in plain]
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

        id, revision = resolve(self.source)
        # A bundle may name any model, and a model may ask to run code of its own.
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(id, padding_side="right", **options)
            model = AutoModel.from_pretrained(id, dtype="auto", use_safetensors=True, **options)
        except (OSError, ValueError) as error:
            raise WeightsError(_advice(self.source, id, error)) from error
        if model.config.hidden_size != self.dim:
            raise WeightsError(
                f"tag encoder {self.source!r} has {model.config.hidden_size} channels, but the "
                f"model was trained on {self.dim}; choose the encoder that it was trained with"
            )
        return tokenizer, model.to(self.device).requires_grad_(False).eval()


def _advice(source: str, folder: str, error: Exception) -> str:
    if os.path.isdir(folder):
        return f"{source}: not a folder of a transformers model and tokenizer: {one_line(error)}"
    return (
        f"cannot load the tag encoder {source!r}: there is no such folder, and it is not on the "
        f"hub or the hub cannot be reached; run `hf download {source}` where it can, or leave out "
        f"--tags ({one_line(error)})"
    )
