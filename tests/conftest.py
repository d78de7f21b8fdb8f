"""Shared by all tests: no hub, fixed seeds, a tiny real model on disk, a real photograph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels run on the CPU. Read where @triton.jit decorates, so it is set before anything imports
# Triton: torch itself does, for some of its modules.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from linearsr import weights
from linearsr.config import DenoiserConfig, LatentConfig, ModelConfig, TagEncoderConfig
from linearsr.denoiser import LinearSR
from linearsr.metrics import lpips, measure
from tests.storage.fixtures import s3, s3_port  # noqa: F401

# Tests with a cluster run in one of two processes, so that two clusters serve all of them.
SECOND_CLUSTER = ("distributed/serve/", "distributed/datasets/test_upscale.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a cluster or a browser, and keep together what shares fixtures.

    With pytest-xdist's `--dist loadgroup` a group runs in one process. The groups are all tests of
    a cluster, and otherwise the tests of one file.
    """
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        group = path
        if path.startswith("distributed/") and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
            group = "second cluster" if path.startswith(SECOND_CLUSTER) else "first cluster"
        if path == "web/test_page.py":
            item.add_marker(pytest.mark.browser)
        item.add_marker(pytest.mark.xdist_group(group))


def real_lpips_trunk() -> Path | None:
    """SqueezeNet's own weights: the file that the environment names, or the one beside the project.

    None where there is neither; tests that need them are skipped then.
    """
    beside = Path(__file__).parents[2] / "shared" / "data" / "iqa" / "squeezenet1_1-features.pth"
    found = [Path(os.environ.get(lpips.TRUNK_VARIABLE) or beside), beside]
    return next((path for path in found if path.is_file()), None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_metrics() -> Iterator[None]:
    """No metric that was made before this test, nor one of its own after it."""
    measure._metric.cache_clear()
    yield
    measure._metric.cache_clear()


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """Like linearsr-tiny, but small enough for a test to train and run many times."""
    return ModelConfig(
        name="small",
        denoiser=DenoiserConfig(
            latent_channels=48,
            depth=2,
            width=32,
            head_dim=16,
            stem_channels=(8, 8, 8),
            condition_latent=True,
            prediction="preconditioned",
        ),
        latent=LatentConfig(kind="space-to-depth", factor=4, scale=0.12),
    )


def random_experts(config: ModelConfig, count: int) -> list[LinearSR]:
    """Denoisers that start with no layer at zero, so that every weight matters; all different."""
    torch.manual_seed(1)
    models = [LinearSR(config.denoiser) for _ in range(count)]
    for model in models:
        torch.nn.init.normal_(model.out.weight, std=0.05)
        torch.nn.init.normal_(model.out.bias, std=0.05)
        for attention in model._tag_attentions():
            torch.nn.init.normal_(attention.out.weight, std=0.5)
    return models


@pytest.fixture(scope="session")
def small_bundle(small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four random experts."""
    folder = tmp_path_factory.mktemp("weights") / "small"
    experts = [m.state_dict() for m in random_experts(small_config, 4)]
    weights.save(folder, small_config, experts, {"licence": "test"}, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def scaling_bundle(small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experts, for every scale from 1 to 4."""
    folder = tmp_path_factory.mktemp("weights") / "scaling"
    config = small_config.model_copy(update={"name": "scaling", "smallest_scale": 1.0})
    experts = [m.state_dict() for m in random_experts(config, 4)]
    weights.save(folder, config, experts, {"licence": "test"}, dtype=torch.float32)
    return folder


def save_gemma(folder: Path, channels: int, words: Sequence[str]) -> Path:
    """Save a random Gemma 2 of so many channels, and a tokenizer that knows these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(vocabulary),
        hidden_size=channels,
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
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tagged_config(
    small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> ModelConfig:
    """The same, guided by tags."""
    denoiser = small_config.denoiser.model_copy(update={"tag_dim": 16, "tag_heads": 2})
    words = ["cat", "dog", "grass", "woman", "space", "suit", ","]
    gemma = save_gemma(tmp_path_factory.mktemp("gemma"), 16, words)
    tags = TagEncoderConfig(kind="gemma", source=str(gemma))
    return small_config.model_copy(update={"name": "tagged", "denoiser": denoiser, "tags": tags})


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A real photograph, 64 x 48, that no model of ours was trained on."""
    return Image.fromarray(np.asarray(skimage.data.astronaut())).resize((64, 48), Image.BICUBIC)


@pytest.fixture(scope="session")
def lpips_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SqueezeNet's shapes with random weights: a distance, if not that of people."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("lpips") / "squeezenet.pth"
    torch.save(squeezenet1_1().features.state_dict(), path)
    return path
