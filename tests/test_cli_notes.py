"""The command says what it left out of a result."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from linearsr import cli
from linearsr.imaging.files import read


def test_command_says_what_it_left_out(
    small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (12, 9), (80 * i, 90, 100)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:])
    flags = ["upscale", "--model", small_bundle, "--steps", 1, "--device", "cpu", "-o"]
    inputs = [tmp_path / "a.gif", tmp_path / "b.tif"]
    assert cli.main([str(a) for a in [*flags, tmp_path / "out", *inputs]]) == 0
    assert f"linearsr: {inputs[0]}: only the first of 3 frames" in capsys.readouterr().err
    assert read(tmp_path / "out" / "b.tif").pages == 3
    assert cli.main([str(a) for a in [*flags, tmp_path / "b.png", inputs[1]]]) == 0
    assert f"{inputs[1]}: only the first of 3 pages" in capsys.readouterr().err
