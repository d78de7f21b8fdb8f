"""Tiny random models in the layouts of CLIP, SigLIP, RAM, DAPE and Gemma 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


# Channels of RAM's tagging head, of what it attends to, and of the backbone.
RAM_WIDTH, RAM_MEMORY, RAM_PATCHES = 16, 12, 16
# Swin's parts in transformers -> their names at Microsoft, which RAM's checkpoints use.
THEIRS = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    "encoder.layers": "layers",
    "attention.o_proj": "attn.proj",
    "attention.relative_position_bias.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
}


def ram_swin() -> Any:
    """Return transformers' Swin with the weights of the checkpoint's backbone."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    model = SwinModel(SwinConfig(image_size=32, patch_size=4, **sizes), add_pooling_layer=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _microsoft(swin: Any) -> dict[str, Tensor]:
    """Return the backbone's tensors under their names in a RAM checkpoint."""
    theirs = dict(swin.state_dict())
    for name in [n for n in theirs if ".q_proj." in n]:
        parts = [theirs.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        theirs[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    for old, new in THEIRS.items():
        theirs = {k.replace(old, new): v for k, v in theirs.items()}
    return {f"visual_encoder.{k}": v for k, v in theirs.items()}


def _head(tags: int) -> dict[str, Tensor]:
    shapes = {
        "image_proj": (RAM_MEMORY, RAM_PATCHES),
        "wordvec_proj": (RAM_WIDTH, RAM_MEMORY),
        "fc": (1, RAM_WIDTH),
    }
    for i in range(2):
        layer = f"tagging_head.encoder.layer.{i}."
        look = {"query": RAM_WIDTH, "key": RAM_MEMORY, "value": RAM_MEMORY}
        shapes |= {f"{layer}crossattention.self.{k}": (RAM_WIDTH, v) for k, v in look.items()}
        shapes[f"{layer}crossattention.output.dense"] = (RAM_WIDTH, RAM_WIDTH)
        shapes[f"{layer}crossattention.output.LayerNorm"] = (RAM_WIDTH,)
        shapes[f"{layer}intermediate.dense"] = (32, RAM_WIDTH)
        shapes[f"{layer}output.dense"] = (RAM_WIDTH, 32)
        shapes[f"{layer}output.LayerNorm"] = (RAM_WIDTH,)
    layers = {f"{k}.weight": torch.randn(shape) for k, shape in shapes.items()}
    layers |= {f"{k}.bias": torch.randn(shape[:1]) for k, shape in shapes.items()}
    return {**layers, "label_embed": torch.randn(tags, RAM_MEMORY)}


def ram_tensors(tags: int) -> dict[str, Tensor]:
    """Return the random tensors of a tiny RAM of so many tags, under the names of a checkpoint."""
    checkpoint = {**_microsoft(ram_swin()), **_head(tags)}
    # A released file also holds buffers and the part that writes captions.
    checkpoint["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    checkpoint["text_decoder.bert.embeddings.word_embeddings.weight"] = torch.zeros(3, 3)
    return checkpoint


def save_ram(folder: Path, names: Sequence[str], tensors: dict[str, Tensor]) -> Path:
    """Save a RAM checkpoint and the list of its tags, and return the checkpoint's path."""
    torch.save({"model": tensors}, folder / "ram.pth")
    (folder / "ram_tag_list.txt").write_text("\n".join(names))
    return folder / "ram.pth"


def dape_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random LoRA weights of DAPE's layout (SeeSR): rank 8, and also for captions."""
    generator = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, int, int]] = {}  # rows of A, columns of A, rows of B
    for name, tensor in tensors.items():
        if name.endswith("attn.qkv.weight"):  # query and value, but not key
            shapes[name] = (16, tensor.shape[1], tensor.shape[0] // 3 * 2)
        elif name.endswith(("self.query.weight", "self.key.weight")):
            shapes[name] = (8, tensor.shape[1], tensor.shape[0])
    shapes["text_decoder.bert.encoder.layer.0.attention.self.query.weight"] = (8, 12, 12)
    update = {}
    for name, (rows, inner, outer) in shapes.items():
        module = name.removesuffix(".weight")
        update[f"{module}.lora_A"] = torch.randn(rows, inner, generator=generator)
        update[f"{module}.lora_B"] = torch.randn(outer, 8, generator=generator)
    return update
