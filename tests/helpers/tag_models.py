"""Tiny random models in the layouts of CLIP, SigLIP and Gemma 2, and the words they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ["cat", "cup", "grass", "sky", "brick wall"]


def _tokenizer(**more: Any) -> Any:
    """Return a tokenizer of whole words, which needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = " ".join(["<pad> <s> </s> <unk> This is a photo of .", *WORDS]).split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(text))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **more
    )


_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_TEXT = {**_SIZES, "num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 64}
_VISION = {**_SIZES, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


def save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = _tokenizer(model_max_length=64)
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    model = SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_VISION))
    torch.nn.init.constant_(model.logit_scale, 2.0)
    torch.nn.init.constant_(model.logit_bias, -1.0)
    model.save_pretrained(folder)
    image = SiglipImageProcessor(size={"height": 32, "width": 32})
    names = ["input_ids"]  # no mask, as in SigLIP's own tokenizer
    tokenizer = _tokenizer(model_max_length=64, model_input_names=names)
    SiglipProcessor(image, tokenizer).save_pretrained(folder)


def save_gemma(folder: Path, channels: int, words: Sequence[str]) -> Path:
    """Save a random Gemma 2 of so many channels, and a tokenizer that knows these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
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
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
