"""The narrow stand-ins have the real layouts and depths, convert from each source, and upscale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from linearsr import cli, weights
from linearsr.imaging.files import read_provenance
from linearsr.latent import load_autoencoder
from linearsr.tags.encoder import tag_encoder
from linearsr.weights.convert import Unseen, from_diffusers, from_files
from linearsr.weights.convert.__main__ import main as convert
from tools import stand_in


def test_stand_ins_are_small_and_the_same_each_time(stand_ins: Path, tmp_path: Path) -> None:
    files = {path.relative_to(stand_ins) for path in stand_ins.rglob("*") if path.is_file()}
    assert sum((stand_ins / file).stat().st_size for file in files) < 50e6
    torch.manual_seed(3)
    stand_in.write(tmp_path / "again")
    for file in files:
        if file.suffix == ".safetensors":
            assert (tmp_path / "again" / file).read_bytes() == (stand_ins / file).read_bytes()
    first, second = (
        from_files(f / "sana.pth", unseen=Unseen(2)) for f in (stand_ins, tmp_path / "again")
    )
    (a,), (b,) = first.experts, second.experts
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_that_is_not_empty_is_refused(
    stand_ins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stand_in.main(["--out", str(stand_ins)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_depths_and_stages_are_those_of_the_real_models(stand_ins: Path) -> None:
    config = from_diffusers(stand_ins / "sana").config
    assert (config.depth, config.latent_channels, config.ffn_ratio) == (20, 32, 2.5)
    assert config.qk_norm
    with safe_open(stand_ins / "gemma" / "model.safetensors", "pt") as file:
        layers = {name.split(".")[2] for name in file.keys() if ".layers." in name}  # noqa: SIM118
    assert len(layers) == 26
    with safe_open(stand_ins / "dc-ae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = list(file.keys())
    # Layers per stage, as in dc-ae-f32c32-sana-1.0; another one changes the scale.
    for side, expected in (
        ("encoder.down", (3, 3, 3, 4, 4, 3)),
        ("decoder.up", (4, 4, 4, 4, 4, 3)),
    ):
        found = [
            len({n.split(".")[3] for n in names if n.startswith(f"{side}_blocks.{stage}.")})
            for stage in range(6)
        ]
        assert tuple(found) == expected


def test_nvlabs_file_converts_without_qk_norm(stand_ins: Path) -> None:
    lines: list[str] = []
    release = from_files(stand_ins / "sana.pth", unseen=Unseen(tag_heads=2), say=lines.append)
    assert not release.config.qk_norm and release.config.depth == 20
    assert "20 blocks, layout of NVlabs: 316 tensors, 316 by name" in lines[0]


def test_release_converts_with_its_stem(stand_ins: Path, converted_bundle: Path) -> None:
    bundle = weights.load(converted_bundle)
    config = bundle.config
    assert config.sampling.boundaries == (0.223, 0.875, 0.939)
    assert (config.denoiser.prediction, config.latent.kind) == ("velocity", "dc-ae")
    assert config.denoiser.stem_channels == stand_in.STEM
    content = torch.load(stand_ins / "release" / "texture.pth", weights_only=True)["model"]
    ours = bundle.experts[2].state_dict()
    assert torch.equal(ours["stem.convs.1.weight"], content["module.lr_stem.2.weight"].float())
    qkv = content["module.backbone.blocks.19.attn.qkv.weight"].float()
    assert torch.equal(ours["blocks.19.attention.qkv.weight"], qkv)
    assert load_autoencoder(config.latent).factor == 32
    encode = tag_encoder(config)
    assert encode is not None
    embedded = encode([("cat", "Fußgänger"), ("grass",)])
    assert embedded.embeddings.shape[-1] == stand_in.TEXT
    assert (
        embedded.embeddings.isfinite().all() and embedded.mask.sum(1)[0] > embedded.mask.sum(1)[1]
    )


@pytest.mark.parametrize("source", ["sana", "sana.pth"])
def test_start_for_training_upscales(stand_ins: Path, tmp_path: Path, source: str) -> None:
    out = tmp_path / "bundle"
    parts = ["--dc-ae", str(stand_ins / "dc-ae"), "--gemma", str(stand_ins / "gemma")]
    arguments = [str(stand_ins / source), "--out", str(out), "--tag-heads", "2", *parts]
    assert convert(arguments) == 0
    assert upscaled(out, tmp_path, "--steps", "1").std() > 0


def upscaled(model: Path, folder: Path, *flags: str) -> np.ndarray:
    picture = folder / "photo.png"
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 50).convert("RGB").save(picture)
    command = ["upscale", str(picture), "-o", str(folder / "big.png"), "--model", str(model)]
    assert cli.main([*command, "--device", "cpu", *flags]) == 0
    return np.asarray(Image.open(folder / "big.png"))


def test_command_upscales_with_a_converted_release_and_its_tags(
    converted_bundle: Path, tmp_path: Path
) -> None:
    plain, tagged = (
        upscaled(converted_bundle, tmp_path, "--steps", "4", "--colour-fix", "none", "--tags", tags)
        for tags in ("", "cat, grass")
    )
    assert plain.shape == (64, 96, 3) and (plain != tagged).any()
    provenance = read_provenance(tmp_path / "big.png")
    assert provenance is not None and "converted" in str(provenance)
