"""The examples do what they say."""

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
    """Runs the script; returns what it defines."""
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
    made = tmp_path / "compare.png"
    width = _run("upscale.py", photo, made, monkeypatch=monkeypatch)["PANEL"]
    sheet = Image.open(made)
    # Below the labels, of four columns: neighbours show the same, differently.
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
    made = tmp_path / "large.png"
    with served(Local(upscaler)) as url:
        _run("client.py", photo, made, url, monkeypatch=monkeypatch)
        (tmp_path / "text.png").write_text(json.dumps("no picture"))
        with pytest.raises(SystemExit, match=r"^415: "):
            _run("client.py", tmp_path / "text.png", made, url, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  0%  ") and lines[-2].startswith("100%  ")
    assert lines[-1] == f"{made}: 256x192"
    expected = upscaler(Image.open(photo), steps=4)
    assert ImageChops.difference(Image.open(made).convert("RGB"), expected).getbbox() is None
