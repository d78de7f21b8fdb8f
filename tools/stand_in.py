"""Narrow stand-ins for the weights that Sana-1.6B needs, to try the whole way without a download.

    python -m tools.stand_in --out FOLDER

The keys, the depth and the stages are those of the real files; the channels are few and the values
random, from a fixed seed. So everything loads, converts, trains and serves, and no picture is good.

    FOLDER/sana/transformer   diffusers' SanaTransformer2DModel, as SANA1.5_1.6B (with QK-norm)
    FOLDER/sana.pth           NVlabs' own layout, as Sana_1600M (without QK-norm)
    FOLDER/release/*.pth      four experts with an LR stem, as a LinearSR-like release may have them
    FOLDER/dc-ae              diffusers' AutoencoderDC, as dc-ae-f32c32-sana-1.0
    FOLDER/gemma              transformers' Gemma 2 and a tokenizer of bytes, as gemma-2-2b-it
    FOLDER/settings.txt       flags of jobs, with which the recipe sana_1_6b fits them, and is short

Nobody here has seen the files of LinearSR's authors, so the names in `release` are invented.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearsr.diffusion.experts import EXPERTS
from linearsr.errors import LinearSRError, OutputError, require
from linearsr.latent.autoencoder import sana_dc_ae
from linearsr.weights.convert.layout import DIFFUSERS, SANA

DEPTH, LATENT, TEXT = 20, 32, 32
HEADS, HEAD_DIM, TAG_HEADS = 2, 32, 2
WIDTH = HEADS * HEAD_DIM
STEM, STRIDES = (8, 16, 8), (4, 4, 2)
GEMMA_LAYERS = 26
# Changes to the recipe sana_1_6b: the stand-ins' sizes, and stages of two steps on small pictures.
SETTINGS = (
    f"model.denoiser.width={WIDTH}",
    f"model.denoiser.tag_heads={TAG_HEADS}",
    f"model.denoiser.tag_dim={TEXT}",
    "data.patch=128",
    "data.batch=2",
    "validation.pictures=1",
    "validation.size=128",
    'validation.metrics=["psnr@2"]',
    'validation.knee={"psnr@2":true}',
    *(
        f"{stage}.{field}"
        for stage in (
            "pretrain",
            *(f"experts.{number}" for number in range(4)),
            *(f"finetune.{number}" for number in range(4)),
            *(f"perceptual.{number}" for number in range(3)),
        )
        for field in ("steps=2", "warmup=1", "report_every=1", "checkpoint_every=2")
    ),
    *(f"finetune.{number}.accumulation=1" for number in range(4)),
    # LPIPS needs weights that a machine may not have.
    *(f"perceptual.{number}.{field}" for number in range(3) for field in ("crop=2", "lpips=0")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the stand-ins and return the exit code."""
    parser = argparse.ArgumentParser("tools.stand_in", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        write(options.out)
    except LinearSRError as error:
        print(f"tools.stand_in: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.0f} MB")
    return 0


def write(out: Path) -> None:
    """Write all stand-ins to an empty folder. Raises MissingExtra, and OutputError for others."""
    require("sana", "diffusers", "transformers")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out}: is not empty; choose another folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _transformer(qk_norm=True).save_pretrained(out / "sana" / "transformer")
        torch.save({"state_dict": nvlabs(_transformer(qk_norm=False))}, out / "sana.pth")
        _release(out / "release")
        dc_ae = sana_dc_ae(divisor=16, scaling_factor=0.41407)
        dc_ae.save_pretrained(out / "dc-ae")
        _gemma(out / "gemma")
    (out / "settings.txt").write_text("".join(f"--set {field}\n" for field in SETTINGS))


def _transformer(qk_norm: bool, columns: int = LATENT) -> Any:
    """Return diffusers' Sana with random weights; `columns` is what its first layer takes."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=columns,
        out_channels=LATENT,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=DEPTH,
        num_cross_attention_heads=TAG_HEADS,
        cross_attention_head_dim=WIDTH // TAG_HEADS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT,
        mlp_ratio=2.5,
        qk_norm="rms_norm_across_heads" if qk_norm else None,
    )


def nvlabs(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of diffusers' Sana under NVlabs' names, in the order of NVlabs' layers.

    The tensors that only training and guidance use are there too.
    """
    theirs = model.state_dict()
    tensors: dict[str, Tensor] = {
        "pos_embed": torch.zeros(1, 16, WIDTH),
        "y_embedder.y_embedding": torch.randn(300, TEXT),
    }
    for layer, (name,) in SANA.items():
        if "{}" not in layer:
            tensors |= _joined(theirs, DIFFUSERS[layer], name)
    for number in range(DEPTH):
        for layer, (name,) in SANA.items():
            if "{}" in layer:
                parts = [part.format(number) for part in DIFFUSERS[layer]]
                tensors |= _joined(theirs, parts, name.format(number))
    return tensors


def _joined(theirs: dict[str, Tensor], parts: Sequence[str], name: str) -> dict[str, Tensor]:
    """Return a layer or bare parameter that joins diffusers' parts, if those exist."""
    return {
        f"{name}{leaf}": torch.cat([theirs[part + leaf] for part in parts]).bfloat16()
        for leaf in (".weight", ".bias", "")
        if parts[0] + leaf in theirs
    }


def _release(folder: Path) -> None:
    """Write four experts whose first layer joins the noisy latent and an LR stem's features."""
    folder.mkdir()
    for expert in EXPERTS:
        sana = nvlabs(_transformer(qk_norm=True, columns=LATENT + STEM[-1]))
        tensors = {f"module.backbone.{name}": x for name, x in sana.items()}
        for number, (i, o) in enumerate(zip((3, *STEM), STEM, strict=False)):
            for leaf, x in nn.Conv2d(i, o, 3).bfloat16().state_dict().items():
                tensors[f"module.lr_stem.{2 * number}.{leaf}"] = x  # SiLU lies between
        torch.save({"model": tensors, "step": 48_000}, folder / f"{expert}.pth")


def _gemma(folder: Path) -> None:
    """Write a Gemma 2 of all 26 layers, and a tokenizer of single bytes, which knows any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{token.strip('<>')}_token": token for token in special},
    ).save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=GEMMA_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    Gemma2ForCausalLM(config).bfloat16().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
