"""`python -m tools.train_bundled` on a CPU, with a small model: stages, files, errors."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR, blocks
from linearsr.imaging.resample import resize
from linearsr.kernels import relu_linear_attention
from linearsr.pipeline.upscaler import Upscaler
from tests.helpers.experts import random_experts
from tests.helpers.pictures import picture
from tools.train_bundled import __main__ as program

STAGES = ("pretrain", "structure", "refinement", "texture", "polish")
Call = Callable[..., int]


def _save(path: Path, pixels: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1] to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)


@pytest.fixture
def call(
    small_config: ModelConfig, lpips_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Run the program in this process, with a smaller model and few tiny photographs."""
    monkeypatch.setattr(program, "MODEL", small_config)
    monkeypatch.setattr(program, "CHANNELS", (8, 8, 8, 8, 8))
    for seed in range(2):
        _save(tmp_path / "photos" / f"{seed}.jpg", picture(200, 300, seed))
    for name, width in (("a", 64), ("b", 96)):
        hr = picture(64, width)
        lr = resize(hr[None], 16, width // 4)[0]
        for part, pixels in (("hr", hr), ("clean", lr), ("degraded", lr)):
            _save(tmp_path / "val" / part / f"{name}.png", pixels)
    fixed = [f"--trunk={lpips_trunk}", f"--out={tmp_path / 'out'}", "--seed=1", "--say-every=0.2"]
    fixed += [f"--photos={tmp_path / 'photos'}", "--patch=32", "--batch=2", "--shrinks=1"]

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["train_bundled", *fixed, *arguments])
        return program.main()

    return run


def test_all_stages_leave_their_files_and_a_bundle_and_can_be_continued(
    call: Call,
    small_config: ModelConfig,
    photograph: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, folder = tmp_path / "out", tmp_path / "bundle"
    stages = [f"{name}=1" for name in STAGES]
    judged = f"--val={tmp_path / 'val'}"
    assert call("--stages", *stages, judged, "--judge-every=0.5", f"--bundle={folder}") == 0
    output = capsys.readouterr().out
    first = {}
    for name in STAGES:
        first[name] = torch.load(out / f"{name}.pt", weights_only=True)
        LinearSR(small_config.denoiser).load_state_dict(first[name])
        assert f"{name}: done after " in output and f"{name}: 1 s, from" in output
    assert "ms a step" in output and "texture: 1 s, from pretrain" in output
    assert output.count("two steps, the second at") == 4
    assert (out / "discriminator.pt").exists()
    history = json.loads((out / "history.json").read_text())
    plans = [(row["stage"], tuple(row["times"])) for row in history]
    assert {("pretrain", (1.0,)), ("texture", (1.0, 0.3)), ("polish", (1.0, 0.5, 0.2))} < {*plans}
    for row in history:
        assert 5 < row["clean psnr"] < 60 and 0 <= row["degraded lpips"] < 2

    upscaler = Upscaler.load(folder, "cpu")
    assert upscaler(photograph, steps=4).size == (256, 192)
    order = ("structure", "refinement", "texture", "polish")
    for name, expert in zip(order, upscaler.experts, strict=True):
        average = first[name]["out.weight"].bfloat16().float()
        torch.testing.assert_close(expert.out.weight.float(), average)
    assert upscaler.provenance["stages"] == " ".join(stages)

    assert call("--stages", "pretrain=0.5", "texture=0.5") == 0
    output = capsys.readouterr().out
    assert "pretrain: 0.5 s, from pretrain" in output and "texture: 0.5 s, from texture" in output
    for name in STAGES:
        now = torch.load(out / f"{name}.pt", weights_only=True)
        same = all(torch.equal(now[key], first[name][key]) for key in now)
        assert same == (name not in ("pretrain", "texture"))
    assert json.loads((out / "history.json").read_text()) == history


def test_pretraining_lowers_the_loss(
    call: Call,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each call of the clock adds 1/250 s, so a busy machine takes as many steps as an idle one.
    looks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(looks) / 250, time=time.time)
    monkeypatch.setattr(program, "time", clock)
    # Each line covers few steps, so the first ones show the network before it has learnt.
    flags = ("--rate=3e-3", "--batch=16", "--say-every=0.05", "--seed=2")
    assert call("--stages", "pretrain=6", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if "loss " in line]
    assert len(losses) > 5 and sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_accelerated_attention_equals_that_of_the_blocks_and_is_used_only_in_training() -> None:
    q, k, v = torch.randn(3, 2, 50, 4, 16)
    torch.testing.assert_close(
        program.attention(q, k, v), relu_linear_attention(q, k, v), rtol=1e-4, atol=1e-5
    )
    none = program.attention(-q.abs(), k, v)
    assert not none.any(), "a query without positive values gives zero"
    with program.light_attention():
        assert vars(blocks)["relu_linear_attention"] is program.attention
    assert vars(blocks)["relu_linear_attention"] is relu_linear_attention


def test_sampling_equals_that_of_the_upscaler(small_config: ModelConfig) -> None:
    """One step ends at the network's guess; two steps end at the second guess."""
    first, second = random_experts(small_config, 2)
    bicubic = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = program.noise_for(bicubic, torch.Generator().manual_seed(0))
    one, t = torch.ones(2), torch.full((2,), 0.4)
    with torch.no_grad():
        guess = program.guess(first, noise, one, bicubic)
        torch.testing.assert_close(program.walk([first], [1.0], bicubic), guess)
        between = torch.lerp(guess, noise, 0.4)
        expected = program.guess(second, between, t, bicubic)
        picture = program.walk([first, second], [1.0, 0.4], bicubic)
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "structure=1"], "pretrain.pt: not there yet"),
        (["--stages", "polish=1"], "texture.pt: not there yet"),
        (["--bundle=there"], "structure.pt: not there yet"),
        (["--photos", "nowhere", "--stages", "pretrain=1"], "--photos: no *.jpg or"),
        (["--val=nowhere"], "--val: no hr/*.png in nowhere"),
        (["--trunk=nowhere"], "nowhere"),
    ],
)
def test_impossible_options_are_refused_with_the_reason(
    call: Call, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 1
    assert words in capsys.readouterr().err


def test_weights_of_another_network_are_refused(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "out" / "pretrain.pt")
    assert call("--stages", "pretrain=1") == 1
    assert "pretrain.pt: of another network" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "pretrain=0", "pretrain=x", "pretraining=3"])
def test_an_unknown_stage_is_refused(call: Call, stage: str) -> None:
    with pytest.raises(SystemExit):
        call("--stages", stage)
