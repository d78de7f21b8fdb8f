"""Tag encoders: shapes and masks, the hash of spellings, a tiny Gemma 2, errors with advice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from linearsr.config import ModelConfig, TagEncoderConfig
from linearsr.errors import WeightsError
from linearsr.tags.encoder import GemmaEncoder, HashedEncoder, tag_encoder

WORDS = ["<pad>", "<bos>", "<unk>", "cat", "grass", "tower", ","]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Gemma 2 of 24 channels and a tokenizer of seven words."""
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=1,
    )
    Gemma2Model(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


def test_hashed_tags_have_unit_variance_and_mask_what_is_missing() -> None:
    embeddings, mask = HashedEncoder(64)([("golden retriever", "grass"), (), ("sky",)])
    assert embeddings.shape == (3, 2, 64) and embeddings.dtype == torch.float32
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    torch.testing.assert_close(embeddings.square().mean(dim=-1), mask.float())


def test_hashed_embeddings_never_change() -> None:
    """Stored weights were trained on these numbers, so no version may change them."""
    embedding = HashedEncoder(8)([("cat",)]).embeddings[0, 0]
    expected = torch.tensor([0, 0, 0, -1, -1, 0, 0, 1]) * (8 / 3) ** 0.5
    torch.testing.assert_close(embedding, expected)


def test_hashed_tags_are_similar_only_if_spelt_alike() -> None:
    encode = HashedEncoder(256)
    cat, cats, dog, again = encode([("cat", "cats", "dog", " Cat ")]).embeddings[0]
    assert torch.equal(cat, again)
    assert _cosine(cat, cats) > 0.3 > abs(_cosine(cat, dog)) + 0.1


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


def test_encoders_of_no_tags_load_no_model(tmp_path: Path) -> None:
    for encode in (HashedEncoder(8), GemmaEncoder(str(tmp_path / "nowhere"), 8)):
        embeddings, mask = encode([(), ("",)])
        assert embeddings.shape == (2, 1, 8) and not mask.any()


def test_an_unusable_encoder_says_what_to_do(gemma: Path, tmp_path: Path) -> None:
    for source, advice in (("nobody/nothing", "hf download nobody/nothing"), (tmp_path, "folder")):
        with pytest.raises(WeightsError, match=advice):
            GemmaEncoder(str(source), 24)([("cat",)])
    with pytest.raises(WeightsError, match="24 channels, but the model was trained on 2304"):
        GemmaEncoder(str(gemma), 2304)([("cat",)])


def test_tag_encoder_is_chosen_by_the_config(small_config: ModelConfig) -> None:
    assert tag_encoder(small_config) is None
    denoiser = small_config.denoiser.model_copy(update={"tag_dim": 16})
    tagged = small_config.model_copy(
        update={"denoiser": denoiser, "tags": TagEncoderConfig(kind="hashed")}
    )
    encode = tag_encoder(ModelConfig.model_validate_json(tagged.model_dump_json()))
    assert encode is not None and encode([("cat",)]).embeddings.shape == (1, 1, 16)


@pytest.mark.parametrize(
    "fields", [{"kind": "gemma"}, {"kind": "hashed", "source": "x"}, {"kind": "clip"}]
)
def test_impossible_encoder_configs_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"source|kind"):
        TagEncoderConfig.model_validate(fields)


def test_tags_without_cross_attention_are_refused(small_config: ModelConfig) -> None:
    fields = {**small_config.model_dump(), "tags": {"kind": "hashed"}}
    with pytest.raises(ValueError, match="tag_dim"):
        ModelConfig.model_validate(fields)
