"""The examples of examples/ run and write the results that they describe."""

from __future__ import annotations

import json
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from linearsr import Upscaler
from linearsr.evaluation.drawing import GAP, LABEL
from tests.helpers.local_service import Local, served

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the script; return its global names."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def photo(photograph: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photograph.save(path)
    return path


def test_upscale_example_draws_versions_side_by_side(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "compare.png"
    width = _run("upscale.py", photo, result, monkeypatch=monkeypatch)["PANEL"]
    sheet = Image.open(result)
    # Below the labels, four columns show versions of the same picture.
    lefts = [GAP + i * (width + GAP) for i in range(4)]
    columns = [sheet.crop((left, LABEL, left + width, sheet.height)) for left in lefts]
    for left, right in pairwise(columns):
        difference = ImageChops.difference(left, right)
        assert difference.getbbox() is not None
        assert sum(difference.convert("L").histogram()[100:]) < 0.05 * width * sheet.height


def test_client_example_prints_progress_and_saves_the_result(
    photo: Path,
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upscaler = Upscaler.load(small_bundle, "cpu")
    result = tmp_path / "large.png"
    with served(Local(upscaler)) as url:
        _run("client.py", photo, result, url, monkeypatch=monkeypatch)
        (tmp_path / "text.png").write_text(json.dumps("no picture"))
        with pytest.raises(SystemExit, match=r"^415: "):
            _run("client.py", tmp_path / "text.png", result, url, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  0%  ") and lines[-2].startswith("100%  ")
    assert lines[-1] == f"{result}: 256x192"
    expected = upscaler(Image.open(photo), steps=4)
    assert ImageChops.difference(Image.open(result).convert("RGB"), expected).getbbox() is None
