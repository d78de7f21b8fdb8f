"""`python -m linearsr.training`: from photographs to a bundle, as its help says."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from linearsr.training.__main__ import main
from linearsr.upscaler import Upscaler

SMALL = (
    "model.denoiser.depth=1",
    "model.denoiser.width=32",
    "model.denoiser.head_dim=16",
    "model.denoiser.stem_channels=[8, 8, 8]",
    "data.patch=32",
    "data.batch=2",
    "data.margin=8",
    # On CPUs without bfloat16 it is slow, and right.
    *(f"{stage}.bfloat16=true" for stage in ("pretrain", *(f"experts.{i}" for i in range(4)))),
    *(f"{stage}.steps=2" for stage in ("pretrain", *(f"experts.{i}" for i in range(4)))),
)


def test_pretraining_experts_and_the_bundle(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "runs"
    photos.mkdir()
    photograph.resize((128, 96)).save(photos / "photo.png")
    settings = [part for setting in SMALL for part in ("--set", setting)]
    stages = [["pretrain"], *(["expert", f"--index={i}"] for i in range(4)), ["bundle"]]
    for stage in stages:
        arguments = [*stage, f"--photos={photos}", f"--out={out}", *settings]
        monkeypatch.setattr("sys.argv", ["training", *arguments])
        assert main() == 0
    upscaler = Upscaler.load(out / "linearsr-tiny", "cpu")
    assert upscaler(photograph, steps=4).size == (256, 192)


def test_an_unknown_setting_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "pretrain",
        f"--photos={tmp_path}",
        f"--out={tmp_path}",
        "--set",
        "pretrain.stepz=1",
    ]
    monkeypatch.setattr("sys.argv", ["training", *arguments])
    assert main() == 1
    assert "stepz" in capsys.readouterr().err
