"""Tiny random models in the layouts of CLIP, SigLIP and Gemma 2, and the words they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ["cat", "cup", "grass", "sky", "brick wall"]


def _tokenizer(words: Sequence[str], template: str, **options: Any) -> Any:
    """Return a tokenizer of whole words, which needs no download.

    words: its vocabulary, special tokens included. template: a text, "$A", among special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **options
    )


def _prompt_tokenizer(**options: Any) -> Any:
    """Return a tokenizer of the prompts about WORDS, as CLIP and SigLIP read them."""
    words = " ".join(["<pad> <s> </s> <unk> This is a photo of .", *WORDS]).split()
    return _tokenizer(words, "<s> $A </s>", eos_token="</s>", **options)


_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_TEXT = {**_SIZES, "num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 64}
_VISION = {**_SIZES, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


def save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = _prompt_tokenizer(model_max_length=64)
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    model = SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_VISION))
    torch.nn.init.constant_(model.logit_scale, 2.0)
    torch.nn.init.constant_(model.logit_bias, -1.0)
    model.save_pretrained(folder)
    image = SiglipImageProcessor(size={"height": 32, "width": 32})
    names = ["input_ids"]  # no mask, as in SigLIP's own tokenizer
    tokenizer = _prompt_tokenizer(model_max_length=64, model_input_names=names)
    SiglipProcessor(image, tokenizer).save_pretrained(folder)


def save_gemma(folder: Path, channels: int, words: Sequence[str]) -> Path:
    """Save a random Gemma 2 of so many channels, and a tokenizer that knows these words."""
    from transformers import Gemma2Config, Gemma2Model

    vocabulary = ["<pad>", "<bos>", "<unk>", *words]
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=channels,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=1,
    )
    Gemma2Model(config).save_pretrained(folder)
    _tokenizer(vocabulary, "<bos> $A", bos_token="<bos>").save_pretrained(folder)
    return folder
