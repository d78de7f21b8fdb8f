"""Pairs that were degraded and encoded in advance: the same losses, and refusals of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor

from linearsr.config import LatentConfig, ModelConfig
from linearsr.distributed.latents import encoder_fingerprint
from linearsr.errors import OptionError, WeightsError
from linearsr.latent import DCAutoencoder, load_autoencoder
from linearsr.tags.encoder import tag_encoder
from linearsr.training import latents, loop
from linearsr.training.config import PerceptualConfig, TrainConfig
from linearsr.training.data import Batch, DataConfig, Pair, Photo, collate, make_hr, make_pair
from linearsr.training.engine import TorchEngine
from linearsr.training.latents import LatentsConfig, StoredPair, collate_stored, pack, unpack
from linearsr.training.perceptual import Perceptual
from tests.helpers.experts import random_experts
from tests.helpers.latents import save_models

DATA = DataConfig(patch=32, batch=4, margin=8, scales=(1.0, 4.0), degradations={"mild": 1.0})
TAGS = [("cat",), ("dog", "grass"), (), ("cat", "dog")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_models(tmp_path_factory.mktemp("models"))


def _photo() -> Photo:
    return Photo(torch.from_numpy(np.array(skimage.data.astronaut())).permute(2, 0, 1))


def _pairs() -> list[Pair]:
    rngs = (np.random.default_rng(seed) for seed in range(4))
    pairs = [make_pair(lambda _: _photo(), DATA, 2.0, rng) for rng in rngs]
    return [pair._replace(tags=tags) for pair, tags in zip(pairs, TAGS, strict=True)]


def _batches(
    model: ModelConfig, precision: latents.Precision, *, pixels: bool = False
) -> tuple[Batch, Batch]:
    """Return the same pairs twice: as pictures and names, and with all that shards store."""
    pairs, autoencoder, encoder = _pairs(), load_autoencoder(model.latent), tag_encoder(model)
    assert encoder is not None
    stored = []
    for pair in pairs:
        clean, condition = latents.encode(pair, autoencoder, "cpu", condition=True)
        assert condition is not None
        embedded, mask = encoder([pair.tags])
        rows = embedded[0][mask[0]]
        parts = [
            unpack(pack(part, kind), kind, shape)
            for part, kind, shape in (
                (clean, precision, (4, 4, 4)),
                (condition, precision, (4, 4, 4)),
                (rows, "bfloat16", (-1, 16)),
            )
        ]
        stored.append(
            StoredPair(pair.lr, *parts[:2], pair.tags, parts[2], pair.hr if pixels else None)  # type: ignore[arg-type]
        )
    numbers = [4, 5, 6, 7]
    return collate(pairs, numbers), collate_stored(stored, numbers)


def _train(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 1, "bfloat16": False, **changes})


class _Never:
    """An encoder that a batch with stored embeddings must not ask."""

    def __call__(self, tags: object) -> None:
        raise AssertionError("tags were encoded again")


# Losses


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_loss_of_stored_latents_is_that_of_encoding(
    model: ModelConfig, precision: latents.Precision
) -> None:
    plain, stored = _batches(model, precision)
    [expert], autoencoder = random_experts(model, 1), load_autoencoder(model.latent)
    on_the_fly, t = loop.flow_loss(expert, autoencoder, plain, _train(), tag_encoder(model))
    given, same_t = loop.flow_loss(expert, autoencoder, stored, _train(), _Never())  # type: ignore[arg-type]
    assert torch.equal(t, same_t)
    torch.testing.assert_close(given, on_the_fly, rtol=1e-3, atol=0)
    # Each part has its share in the loss, so one that is wrong would show.
    parts = stored.stored
    assert parts is not None and parts.condition is not None and parts.tags is not None
    for wrong in (
        parts._replace(clean=parts.clean.flip(0)),
        parts._replace(condition=parts.condition.flip(0)),
        parts._replace(tags=parts.tags._replace(embeddings=parts.tags.embeddings.flip(1))),
    ):
        other = stored._replace(stored=wrong)
        loss, _ = loop.flow_loss(expert, autoencoder, other, _train(), _Never())  # type: ignore[arg-type]
        assert ((loss - on_the_fly).abs() > 2e-3 * on_the_fly).any()


def test_stored_latents_are_not_encoded_again(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stored = _batches(model, "float16")
    [expert], autoencoder = random_experts(model, 1), load_autoencoder(model.latent)
    encoded: list[int] = []
    whole = DCAutoencoder.encode

    def count(self: DCAutoencoder, picture: Tensor, lr_picture: Tensor) -> Tensor:
        encoded.append(len(picture))
        return whole(self, picture, lr_picture)

    monkeypatch.setattr(DCAutoencoder, "encode", count)
    loop.flow_loss(expert, autoencoder, stored, _train(), _Never())  # type: ignore[arg-type]
    assert encoded == [] and stored.hr.numel() == 0
    loop.flow_loss(expert, autoencoder, plain, _train(), tag_encoder(model))
    assert encoded == [4, 4]


def test_the_distance_of_pictures_is_the_same_beside_stored_latents(model: ModelConfig) -> None:
    train = _train(pixel_weight=0.5, pixel_below=1.0)
    assert train.pixels and not _train().pixels
    plain, stored = _batches(model, "float16", pixels=True)
    [expert], autoencoder = random_experts(model, 1), load_autoencoder(model.latent)
    on_the_fly, _ = loop.flow_loss(expert, autoencoder, plain, train, tag_encoder(model))
    given, _ = loop.flow_loss(expert, autoencoder, stored, train, _Never())  # type: ignore[arg-type]
    torch.testing.assert_close(given, on_the_fly, rtol=1e-3, atol=0)
    flow, _ = loop.flow_loss(expert, autoencoder, stored, _train(), _Never())  # type: ignore[arg-type]
    assert (given > flow).all()


def test_a_perceptual_stage_judges_the_same_pictures(model: ModelConfig) -> None:
    config = PerceptualConfig(steps=1, lpips=0.0, gan=0.0, crop=2, bfloat16=False)
    assert config.pixels
    plain, stored = _batches(model, "float16", pixels=True)
    first, expert = random_experts(model, 2)
    device, autoencoder = torch.device("cpu"), load_autoencoder(model.latent)
    engine = TorchEngine(expert, config, device)
    objective = Perceptual(config, device, first)

    def losses(batch: Batch, encoder: object) -> Tensor:
        state = loop.TrainState.start(engine, autoencoder, config, encoder, objective)  # type: ignore[arg-type]
        return objective.losses(state, batch).total

    given = losses(stored, _Never())
    torch.testing.assert_close(given, losses(plain, tag_encoder(model)), rtol=1e-3, atol=0)


def test_parts_of_a_batch_have_the_losses_of_the_whole(model: ModelConfig) -> None:
    """Gradient accumulation splits what is stored as well."""
    _, stored = _batches(model, "float16")
    [expert], autoencoder = random_experts(model, 1), load_autoencoder(model.latent)

    def losses(batch: Batch) -> Tensor:
        return loop.flow_loss(expert, autoencoder, batch, _train(), _Never())[0]  # type: ignore[arg-type]

    parts = torch.cat([losses(part) for part in stored.split(2)])
    torch.testing.assert_close(parts, losses(stored))


# Pairs


def test_hr_is_made_again_from_the_seed_alone() -> None:
    for seed in range(6):
        pair = make_pair(lambda _: _photo(), DATA, 4.0, np.random.default_rng(seed))
        assert torch.equal(make_hr(_photo(), DATA, np.random.default_rng(seed)), pair.hr)
        assert pair.lr.shape == (3, 8, 8)


@pytest.mark.parametrize(("count", "largest"), [(1, 1), (2, 1), (5, 3), (10, 6)])
def test_variants_have_the_scales_of_training(count: int, largest: int) -> None:
    scales = DATA.scales_of(count)
    assert len(scales) == count and scales.count(4.0) == largest == max(1, round(0.6 * count))
    drawn = {DATA.scale_of(0, 4 * n) for n in range(300)}
    assert set(scales) <= drawn and len(set(scales)) == count - largest + 1
    assert DataConfig().scales_of(3) == [4.0, 4.0, 4.0]


# Bytes


def test_packed_numbers_come_back_rounded_and_damage_is_seen() -> None:
    tensor = torch.randn(4, 3, 3)
    for precision, error in (("float16", 2**-11), ("bfloat16", 2**-8)):
        data = pack(tensor, precision)  # type: ignore[arg-type]
        again = unpack(data, precision, (4, 3, 3))  # type: ignore[arg-type]
        assert again is not None and len(data) == 72
        torch.testing.assert_close(again, tensor, rtol=error, atol=1e-7)
        assert unpack(data[:-2], precision, (4, 3, 3)) is None  # type: ignore[arg-type]
        assert unpack(b"\xff" * 72, precision, (4, 3, 3)) is None  # type: ignore[arg-type]
    none = unpack(pack(torch.zeros(0, 16), "bfloat16"), "bfloat16", (-1, 16))
    assert none is not None and none.shape == (0, 16)
    assert unpack(b"abc", "bfloat16", (-1, 16)) is None


def test_numbers_beyond_a_precision_are_refused() -> None:
    large = torch.tensor([70_000.0])
    with pytest.raises(WeightsError, match="not finite in float16; choose another --precision"):
        pack(large, "float16")
    assert unpack(pack(large, "bfloat16"), "bfloat16", (1,)) == pytest.approx(70_000, rel=2**-8)


# Notes


def test_settings_say_where_they_differ_from_a_recipe(model: ModelConfig) -> None:
    made = LatentsConfig.of(model, DATA, variants=2)
    free = {"batch": 16, "tag_dropout": 0.5, "latents": False}
    assert made.differences(model, DATA.model_copy(update=free)) == []
    data = DATA.model_copy(update={"patch": 64, "degradations": {"seesr": 1.0}})
    assert made.differences(model, data) == [
        "patch 32, not 64",
        "degradations {'mild': 1.0}, not {'seesr': 1.0}",
    ]
    latent = model.latent.model_copy(update={"scale": 0.5, "source": "/elsewhere"})
    other = model.model_copy(update={"latent": latent})
    assert made.differences(other, DATA) == ["scale 0.4, not 0.5"]
    bare = made.model_copy(update={"condition": False})
    assert bare.differences(model, DATA) == ["condition_latent False, not True"]


def test_a_patch_that_is_not_whole_in_cells_is_refused(model: ModelConfig) -> None:
    with pytest.raises(OptionError, match="patch 36 must be a multiple of the latent's factor 8"):
        LatentsConfig.of(model, DATA.model_copy(update={"patch": 36}))


def test_a_digest_is_that_of_the_encoder_in_any_precision(
    model: ModelConfig, tmp_path: Path
) -> None:
    exact = load_autoencoder(model.latent)
    assert isinstance(exact, DCAutoencoder)
    digest = exact.digest()
    assert load_autoencoder(model.latent, dtype=torch.bfloat16).digest() == digest
    with torch.no_grad():
        next(exact.model.decoder.parameters()).add_(1)  # type: ignore[union-attr,operator]
        assert exact.digest() == digest
        next(exact.model.encoder.parameters()).add_(1)  # type: ignore[union-attr,operator]
    assert exact.digest() != digest
    scaled = model.latent.model_copy(update={"scale": 0.5})
    assert load_autoencoder(scaled).digest() != digest
    folds = [LatentConfig(kind="space-to-depth", factor=4, scale=s) for s in (0.1, 0.2)]
    assert len({load_autoencoder(fold).digest() for fold in folds}) == 2


def test_a_copy_of_a_tag_encoder_has_its_fingerprint(model: ModelConfig, tmp_path: Path) -> None:
    assert model.tags is not None
    folder = Path(model.tags.source)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert encoder_fingerprint(str(tmp_path / "a")) == encoder_fingerprint(str(folder))
    assert encoder_fingerprint(str(tmp_path / "b")) != encoder_fingerprint(str(folder))
    assert encoder_fingerprint("google/gemma-2-2b-it") == "google/gemma-2-2b-it"
