"""Checkpoints of other programs as models to compare: small real ones, and refused files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from spandrel.architectures.SPAN import SPAN
from torch import nn

from linearsr.cli import main
from linearsr.errors import WeightsError
from linearsr.evaluation import checkpoint
from linearsr.evaluation.checkpoint import Checkpoint, is_checkpoint
from linearsr.evaluation.config import BICUBIC, TRUTH, Score, Settings
from linearsr.evaluation.drawing import GAP
from linearsr.evaluation.judge import DETAIL, Example
from linearsr.evaluation.report import COLUMNS, Report, contact, rank
from linearsr.imaging.resample import resize


def _compact(scale: int, channels: int = 3) -> Compact:
    torch.manual_seed(2)
    return Compact(
        num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale
    ).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models in the published forms: bare tensors, or a dictionary around them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_file(_compact(4).state_dict(), folder / "four.safetensors")
    torch.save({"params_ema": _compact(2).state_dict()}, folder / "two.pth")
    torch.manual_seed(3)
    span = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=4)
    save_file(span.state_dict(), folder / "span.safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photo = Image.fromarray(np.asarray(skimage.data.astronaut()))
    photo.resize((96, 72), Image.Resampling.BICUBIC).save(folder / "astronaut.png")
    return folder


def test_checkpoint_gives_the_networks_picture(files: Path) -> None:
    lr = torch.rand(3, 20, 17)
    with torch.no_grad():
        expected = _compact(4)(lr[None])[0].clamp(0, 1)
    picture = Checkpoint.load(files / "four.safetensors", "cpu").upscale(lr, 4)
    assert picture.shape == (3, 80, 68) and torch.allclose(picture, expected, atol=1e-5)


def test_checkpoint_of_another_scale_is_resized_by_bicubic(files: Path) -> None:
    lr = torch.rand(3, 20, 17)
    with torch.no_grad():
        own = _compact(2)(lr[None]).clamp(0, 1)
    picture = Checkpoint.load(files / "two.pth", "cpu").upscale(lr, 4)
    assert torch.allclose(picture, resize(own, 80, 68)[0].clamp(0, 1), atol=1e-5)
    assert picture.min() >= 0 and picture.max() <= 1


def test_tiles_give_the_picture_without_tiles(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lr = Checkpoint.load(files / "four.safetensors", "cpu"), torch.rand(3, 40, 70)
    whole, sizes = model.upscale(lr, 4), []
    monkeypatch.setattr(checkpoint, "TILE", 32)
    monkeypatch.setattr(checkpoint, "OVERLAP", 16)
    run = model.descriptor._call_fn
    monkeypatch.setattr(
        model.descriptor, "_call_fn", lambda net, x: sizes.append(x.shape) or run(net, x)
    )
    tiled = model.upscale(lr, 4)
    assert len(sizes) > 3 and max(shape[-1] for shape in sizes) <= 32
    # The network's reach is 4 pixels; there, blending gives the neighbouring tile more weight.
    assert (tiled - whole).abs().mean() < 1e-3
    assert torch.allclose(tiled[:, :40, :40], whole[:, :40, :40], atol=1e-5)


def test_file_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_compact(4), "model.pth")
    with pytest.raises(WeightsError, match=r"model\.pth: holds more than tensors.*safetensors"):
        Checkpoint.load("model.pth", "cpu")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("other.pth", nn.Linear(2, 2).state_dict(), "spandrel does not know this architecture"),
        ("grey.pth", _compact(4, 1).state_dict(), "takes 1 channels and returns 1"),
        ("list.pt", [1], "holds no state dict"),
        ("broken.pth", b"abc", "cannot be read"),
        ("empty.ckpt", b"", "cannot be read"),
        ("broken.safetensors", b"abc", "cannot be read"),
        ("absent.pth", None, "no such file"),
    ],
)
def test_unusable_file_is_named_with_the_reason(
    name: str, content: object, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=f"{name}: .*{reason}"):
        Checkpoint.load(path, "cpu")


def test_is_checkpoint_rejects_folders_and_bundled_names(tmp_path: Path) -> None:
    (tmp_path / "run.pt").mkdir()
    assert not is_checkpoint(str(tmp_path / "run.pt")) and not is_checkpoint("linearsr-tiny")
    assert is_checkpoint("s3://models/x4.PTH")


def test_evaluate_compares_models_of_both_kinds(
    files: Path, photos: Path, small_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    models = [f"small={small_bundle}", str(files / "span.safetensors"), f"x2={files / 'two.pth'}"]
    words = f"evaluate --hr {photos} --steps 1 2 --metrics psnr --device cpu -o {output}"
    assert main([*words.split(), "--models", *models]) == 0
    rows = pq.read_table(output / "metrics.parquet").to_pylist()
    names = [BICUBIC, "small, 1 step", "small, 2 steps", "span", "x2"]
    assert [row["method"] for row in rows] == names
    report = (output / "report.md").read_text()
    assert (
        "span: SPAN through spandrel, x4, " in report and "M parameters, float32 on cpu" in report
    )


def test_evaluate_refuses_two_models_of_one_name(
    files: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "two.pth"
    other.write_bytes((files / "two.pth").read_bytes())
    words = f"evaluate --hr {photos} --models {files / 'two.pth'} {other} -o {tmp_path / 'out'}"
    assert main(words.split()) == 2
    message = capsys.readouterr().err
    assert "--models two: two models or results have this name; rename one, as NAME=" in message


@pytest.mark.parametrize(("contestants", "columns", "lines"), [(2, 4, 1), (4, 6, 1), (8, 5, 2)])
def test_contact_sheet_shows_methods_pixel_by_pixel(
    contestants: int, columns: int, lines: int
) -> None:
    names = [BICUBIC, *(f"model {i}" for i in range(contestants)), TRUTH]
    pixels = np.random.default_rng(0).integers(0, 255, (DETAIL // 8, DETAIL // 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((DETAIL, DETAIL), Image.Resampling.NEAREST)
    scores = [Score("a", name, "psnr", 20.0 + i) for i, name in enumerate(names[:-1])]
    report = Report("t", Settings(metrics=("psnr",)), scores)
    ranking = rank(report)
    assert ranking is not None and columns <= COLUMNS
    example = Example("a", [(name, image) for name in names])
    sheet = Image.open(io.BytesIO(contact(report, ranking, [example], 1)))
    assert sheet.width == columns * (DETAIL + GAP) + GAP
    assert lines * DETAIL < sheet.height < lines * DETAIL + 100
    last = sheet.crop(
        (
            sheet.width - GAP - DETAIL,
            sheet.height - GAP - DETAIL,
            sheet.width - GAP,
            sheet.height - GAP,
        )
    )
    assert np.abs(np.asarray(last, int) - np.asarray(image, int)).mean() < 8, "HR, not enlarged"
