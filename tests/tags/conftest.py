"""Fixtures for tests of the taggers: a file of words, and tiny random CLIP and SigLIP models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tag_models import WORDS, save_clip, save_siglip


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS))
    return path


@pytest.fixture(scope="session", params=["clip", "siglip"])
def contrastive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random CLIP or SigLIP."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    (save_clip if request.param == "clip" else save_siglip)(folder)
    return folder
