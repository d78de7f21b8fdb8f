"""`python -m linearsr.training`: from photographs to a bundle, as its help says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from linearsr.pipeline.upscaler import Upscaler
from linearsr.training import loop
from linearsr.training.__main__ import main
from linearsr.training.ema import load_average

STAGES = (
    "pretrain",
    *(f"{kind}.{i}" for kind in ("experts", "finetune") for i in range(4)),
    *(f"perceptual.{i}" for i in range(3)),
)
SMALL = (
    "model.denoiser.depth=1",
    "model.denoiser.width=32",
    "model.denoiser.head_dim=16",
    "model.denoiser.stem_channels=[8, 8, 8]",
    "data.patch=32",
    "data.batch=2",
    "data.margin=8",
    "perceptual_data.patch=32",
    "perceptual_data.batch=2",
    "perceptual_data.margin=8",
    # bfloat16 is correct on any CPU, but slow on some.
    *(f"{stage}.bfloat16=true" for stage in STAGES),
    *(f"{stage}.steps=2" for stage in STAGES),
    *(f"perceptual.{i}.channels=[8, 8, 8, 8, 8]" for i in range(3)),
)


def test_all_stages_run_in_turn_and_make_the_bundle(
    photograph: Image.Image,
    lpips_trunk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "runs"
    photos.mkdir()
    photograph.resize((128, 96)).save(photos / "photo.png")
    settings = [part for setting in SMALL for part in ("--set", setting)]
    monkeypatch.setenv("LINEARSR_LPIPS_TRUNK", str(lpips_trunk))

    def run(*stage: str) -> int:
        arguments = [*stage, f"--photos={photos}", f"--out={out}", "--workers=1", *settings]
        monkeypatch.setattr("sys.argv", ["training", *arguments])
        return main()

    assert run("expert") == 1, "there is nothing to start from yet"
    assert "runs/pretrain" in capsys.readouterr().err
    assert run("pretrain") == 0
    assert all(run("expert", f"--index={i}") == 0 for i in range(4))
    assert run("finetune", "--index=1") == 0
    assert run("perceptual", "--index=2", "--minutes=9") == 0
    assert run("perceptual", "--index=0") == 1, "the first expert stays true to the picture"
    assert run("bundle") == 0
    upscaler = Upscaler.load(out / "linearsr-tiny", "cpu")
    assert upscaler(photograph, steps=4).size == (256, 192)
    taken = ["expert-0", "finetune-1", "perceptual-2", "expert-3"]
    assert json.loads(upscaler.provenance["stages"]) == taken
    assert loop.read_progress(out / "perceptual-2").step == 2
    for name, expert in zip(taken, upscaler.experts, strict=True):
        average = load_average(out / name)["out.weight"].bfloat16().float()
        torch.testing.assert_close(expert.out.weight.float(), average)


def test_minutes_end_a_stage_and_are_counted_over_all_starts(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph.resize((128, 96)).save(tmp_path / "photo.png")
    out = tmp_path / "runs"
    settings = [part for setting in SMALL for part in ("--set", setting)]
    start = loop.TrainState.start

    def timed(*arguments: Any) -> loop.TrainState:
        """Patch the clock so that it advances by 20 s at each call."""
        stage = start(*arguments)
        stage.clock = map((20.0).__mul__, itertools.count()).__next__
        return stage

    monkeypatch.setattr(loop.TrainState, "start", timed)
    steps = []
    for minutes in (2, 2, 3):
        arguments = [f"--photos={tmp_path}", f"--out={out}", f"--minutes={minutes}", *settings]
        more = ["--workers=0", "--set", "pretrain.steps=90", "--set", "pretrain.bfloat16=false"]
        monkeypatch.setattr("sys.argv", ["training", "pretrain", *arguments, *more])
        assert main() == 0
        steps.append(loop.read_progress(out / "pretrain").step)
    assert steps == [6, 6, 9]


def test_an_unknown_setting_is_an_error_of_one_line(
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
