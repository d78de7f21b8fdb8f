"""CLIP and SigLIP give the scores of transformers' own zero-shot pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linearsr.errors import LinearSRError, OptionError, WeightsError
from linearsr.tags import load_tagger
from linearsr.tags.base import TaggerConfig
from linearsr.tags.zero_shot import _as_image
from tests.helpers.pictures import photo
from tests.helpers.tag_models import WORDS


def test_zero_shot_tagger_equals_the_transformers_pipeline(contrastive: Path, words: Path) -> None:
    from transformers import pipeline

    picture = photo("chelsea")[:, :300, 100:400]  # a square has one view, as in the pipeline
    config = TaggerConfig(
        kind="zero-shot", source=str(contrastive), vocabulary=str(words), threshold=0.0
    )
    ours = load_tagger(config)(picture)
    pipe = pipeline("zero-shot-image-classification", model=str(contrastive))
    theirs = pipe(_as_image(picture), candidate_labels=WORDS)
    assert [tag.name for tag in ours] == [answer["label"] for answer in theirs]
    for tag, answer in zip(ours, theirs, strict=True):
        assert tag.score == pytest.approx(answer["score"], abs=1e-5)
    assert len({round(tag.score, 4) for tag in ours}) > 1


@pytest.mark.parametrize("size", [(1, 1), (40, 300), (300, 40), (8000, 10)])
def test_zero_shot_tagger_accepts_any_size(
    contrastive: Path, words: Path, size: tuple[int, int]
) -> None:
    config = TaggerConfig(
        kind="zero-shot", source=str(contrastive), vocabulary=str(words), threshold=0.0, max_tags=3
    )
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    assert len(load_tagger(config)(picture)) == 3


def test_bundled_vocabulary_fits_the_text_length_of_a_model(contrastive: Path) -> None:
    config = TaggerConfig(kind="zero-shot", source=str(contrastive), threshold=0.0, max_tags=100)
    assert len(load_tagger(config)(photo("coffee", 4))) == 100


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [(None, OptionError, "needs a model"), ("/nowhere/clip", WeightsError, "/nowhere/clip")],
)
def test_missing_model_is_refused(
    source: str | None, error: type[LinearSRError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_tagger(TaggerConfig(kind="zero-shot", source=source))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTModel(ViTConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="ViT"):
        load_tagger(TaggerConfig(kind="zero-shot", source=str(tmp_path)))
