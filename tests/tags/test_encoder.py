"""Tag encoders: shapes and masks, a tiny Gemma 2, errors with advice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Model

from linearsr.config import ModelConfig, TagEncoderConfig
from linearsr.errors import WeightsError
from linearsr.tags.encoder import GemmaEncoder, tag_encoder
from tests.helpers.tag_models import save_gemma

WORDS = ["cat", "grass", "tower", ","]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Gemma 2 of 24 channels and a tokenizer of seven words."""
    return save_gemma(tmp_path_factory.mktemp("gemma"), 24, WORDS)


def test_gemma_gives_its_last_hidden_state_over_the_joined_tags(gemma: Path) -> None:
    embeddings, mask = GemmaEncoder(str(gemma), 24)([("cat", "grass")])
    with torch.no_grad():  # <bos> cat , grass
        hidden = Gemma2Model.from_pretrained(gemma)(torch.tensor([[1, 3, 6, 4]]))
    torch.testing.assert_close(embeddings, hidden.last_hidden_state)
    assert mask.all() and not embeddings.is_inference()


def test_gemma_pads_to_the_longest_and_padding_changes_nothing(gemma: Path) -> None:
    encode = GemmaEncoder(str(gemma), 24)
    together, mask = encode([("cat",), (), ("cat", "grass", "tower")])
    assert mask.sum(dim=1).tolist() == [2, 0, 6] and together.shape == (3, 6, 24)
    alone = encode([("cat",)]).embeddings
    torch.testing.assert_close(together[:1, :2], alone, atol=1e-5, rtol=1e-4)


def test_gemma_loads_no_model_without_tags(tmp_path: Path) -> None:
    embeddings, mask = GemmaEncoder(str(tmp_path / "nowhere"), 8)([(), ("",)])
    assert embeddings.shape == (2, 1, 8) and not mask.any()


def test_an_unusable_encoder_says_what_to_do(gemma: Path, tmp_path: Path) -> None:
    for source, advice in (("nobody/nothing", "hf download nobody/nothing"), (tmp_path, "folder")):
        with pytest.raises(WeightsError, match=advice):
            GemmaEncoder(str(source), 24)([("cat",)])
    with pytest.raises(WeightsError, match="24 channels, but the model was trained on 2304"):
        GemmaEncoder(str(gemma), 2304)([("cat",)])


def test_tag_encoder_is_chosen_by_the_config(
    small_config: ModelConfig, tagged_config: ModelConfig
) -> None:
    assert tag_encoder(small_config) is None
    encode = tag_encoder(ModelConfig.model_validate_json(tagged_config.model_dump_json()))
    assert encode is not None and encode([("cat",)]).embeddings.shape == (1, 2, 16)


@pytest.mark.parametrize("fields", [{"kind": "gemma"}, {"kind": "clip", "source": "x"}])
def test_impossible_encoder_configs_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"source|kind"):
        TagEncoderConfig.model_validate(fields)


def test_tags_without_cross_attention_are_refused(small_config: ModelConfig) -> None:
    fields = {**small_config.model_dump(), "tags": {"kind": "gemma", "source": "x"}}
    with pytest.raises(ValueError, match="tag_dim"):
        ModelConfig.model_validate(fields)
