"""Training from shards with latents: order, shares of ranks, damaged rows, refusals, whole runs."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from linearsr.config import ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.distributed.train import shards as reading
from linearsr.distributed.train.config import StageConfig
from linearsr.distributed.train.data import Share, batches, notes_about, open_source
from linearsr.distributed.train.esgf import check_stages
from linearsr.distributed.train.shards import Shards, StoredShards, Wanted
from linearsr.distributed.train.trainer import check, train
from linearsr.errors import InputError, LinearSRError, OptionError
from linearsr.latent import load_autoencoder
from linearsr.storage.location import locate
from linearsr.tags.encoder import tag_encoder
from linearsr.training import loop
from linearsr.training.data import Batch, DataConfig
from linearsr.training.latents import LatentsConfig, StoredPair, collate_stored
from linearsr.training.recipes import Recipe, override, tiny_cpu
from tests.helpers.latents import DATA, save_models, shard_config, tag_shards, write_shards
from tests.helpers.runs import STEPS, checkpoints, reported, stage_of
from tests.helpers.s3 import Server

SURE = DATA.model_copy(update={"tag_dropout": 0.0, "scales": (2.0, 4.0), "at_largest": 0.5})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def made(model: ModelConfig) -> LatentsConfig:
    return LatentsConfig.of(model, SURE, variants=4)


@pytest.fixture(scope="module")
def shards(photos: Path, made: LatentsConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tagged shards with three and one rows."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(shard_config(photos, folder, made, rows_per_shard=3))
    tag_shards(folder)
    return folder


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """The shards in a folder of their own, for tests that damage them."""
    return shutil.copytree(shards, tmp_path / "copy")


def _open(
    folder: Path | str, model: ModelConfig, data: DataConfig = SURE, *, pixels: bool = False
) -> StoredShards:
    source = open_source(str(folder), data, 0, Wanted(model, pixels))
    assert isinstance(source, StoredShards)
    return source


def _same(one: StoredPair, other: StoredPair) -> bool:
    tensors = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)


# Pairs


def test_a_pair_depends_on_its_number_only(shards: Path, model: ModelConfig) -> None:
    first, again, other = (_open(shards, model) for _ in range(3))
    other.seed = 1
    numbers = range(40)
    assert all(_same(first.pair(n), again.pair(n)) for n in reversed(numbers))
    assert not all(_same(first.pair(n), other.pair(n)) for n in numbers)


def test_an_epoch_has_each_row_once_and_batches_take_turns_with_variants(
    shards: Path, model: ModelConfig, made: LatentsConfig
) -> None:
    """A batch of four has one variant, so one scale; four batches have all of them."""
    source, seen = _open(shards, model), Counter[tuple[int, int]]()
    rows = [row for f in sorted(shards.glob("*.parquet")) for row in pq.read_table(f).to_pylist()]
    known = {row[f"pair_{v}"]["latent"]: (r, v) for r, row in enumerate(rows) for v in range(4)}
    for epoch in range(8):
        found = []
        for number in range(4 * epoch, 4 * epoch + 4):
            pair = source.pair(number)
            latent = pair.clean.half().numpy().tobytes()
            found.append(known[latent])
            assert pair.lr.shape[-1] == round(32 / made.scales[found[-1][1]])
            assert pair.tags == tuple(rows[found[-1][0]]["tags"])
            assert pair.embedded is not None and bool(len(pair.embedded)) == bool(pair.tags)
        assert {row for row, _ in found} == {0, 1, 2, 3} and len({v for _, v in found}) == 1
        seen.update(found)
    assert len(set(made.scales)) == 3 and set(seen.values()) == {2} and len(seen) == 16


def test_pixels_are_those_that_the_latents_are_of(shards: Path, model: ModelConfig) -> None:
    autoencoder = load_autoencoder(model.latent)
    source, without = _open(shards, model, pixels=True), _open(shards, model)
    for number in range(8):
        pair = source.pair(number)
        assert pair.hr is not None and without.pair(number).hr is None
        picture = pair.hr.float()[None] / 127.5 - 1
        with torch.no_grad():
            latent = autoencoder.encode(picture, picture)[0]
        torch.testing.assert_close(pair.clean, latent, rtol=2**-10, atol=1e-5)


def test_tags_are_dropped_as_often_as_asked(shards: Path, model: ModelConfig) -> None:
    half = _open(shards, model, SURE.model_copy(update={"tag_dropout": 0.5}))
    sure = _open(shards, model)
    kept = 0
    for number in range(120):
        pair, whole = half.pair(number), sure.pair(number)
        assert torch.equal(pair.clean, whole.clean) and pair.tags in ((), whole.tags)
        assert pair.embedded is not None and bool(len(pair.embedded)) == bool(pair.tags)
        kept += bool(pair.tags)
    tagged = sum(bool(sure.pair(number).tags) for number in range(120))
    assert 0.35 * tagged < kept < 0.65 * tagged


def test_shards_without_embeddings_leave_tags_to_the_encoder(
    photos: Path, made: LatentsConfig, model: ModelConfig, tmp_path: Path
) -> None:
    write_shards(shard_config(photos, tmp_path, made))
    pair = _open(tmp_path, model).pair(0)
    assert pair.tags == () and pair.embedded is None


def test_shards_on_s3_give_the_same_pairs(shards: Path, model: ModelConfig, s3: Server) -> None:
    bucket = s3.bucket()
    locate(shards).copy_to(locate(f"{bucket}/shards"))
    here, there = _open(shards, model), _open(f"{bucket}/shards", model)
    assert all(_same(here.pair(n), there.pair(n)) for n in range(8))


# Damage


def _changed(file: Path, change: Any) -> None:
    """Write a shard again with its rows changed; its notes stay."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        change(number, row)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    reading._columns.cache_clear()  # which takes files for unchangeable


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("latent", b"short"),
        ("latent", b"\xff" * 128),
        ("condition", None),
        ("lr", b"no picture"),
        (None, None),
    ],
    ids=["length", "nan", "no condition", "picture", "no pair"],
)
def test_damaged_rows_are_passed_over(
    copy: Path, model: ModelConfig, part: str | None, value: bytes | None
) -> None:
    def damage(number: int, row: dict[str, Any]) -> None:
        for variant in range(4):
            if number == 0 and part is None:
                row[f"pair_{variant}"] = None
            elif number == 0:
                row[f"pair_{variant}"][part] = value

    whole = {_open(copy, model).pair(n).clean.half().numpy().tobytes() for n in range(32)}
    first = sorted(copy.glob("*.parquet"))[0]
    lost = {pq.read_table(first).to_pylist()[0][f"pair_{v}"]["latent"] for v in range(4)}
    _changed(first, damage)
    source = _open(copy, model)
    left = {source.pair(n).clean.half().numpy().tobytes() for n in range(32)}
    assert len(whole) == 16 and left == whole - lost


def _latents(source: StoredShards) -> int:
    """Return how many different latents eight epochs have."""
    return len({source.pair(number).clean.sum().item() for number in range(32)})


def test_damaged_embeddings_and_pictures_are_passed_over(copy: Path, model: ModelConfig) -> None:
    first = sorted(copy.glob("*.parquet"))[0]
    _changed(first, lambda n, row: row.update(tag_embeddings=b"" if n else b"odd"))
    assert _latents(_open(copy, model)) == 12
    _changed(first, lambda n, row: row.update(tag_embeddings=b"", hr=row["hr"] if n else b"odd"))
    assert _latents(_open(copy, model)) == 16
    assert _latents(_open(copy, model, pixels=True)) == 12


def test_shards_without_a_usable_row_end_the_run(copy: Path, model: ModelConfig) -> None:
    for file in copy.glob("*.parquet"):
        _changed(file, lambda _, row: row.update({f"pair_{v}": None for v in range(4)}))
    with pytest.raises(InputError, match=r"none of 4 rows .* has a usable latent"):
        _open(copy, model).pair(0)


# Refusals


def test_latents_of_another_recipe_are_refused(shards: Path, model: ModelConfig) -> None:
    other = SURE.model_copy(update={"patch": 64, "degradations": {"clean": 1.0}})
    with pytest.raises(OptionError, match=r"patch 32, not 64; degradations .*latents=false"):
        open_source(str(shards), other, 0, Wanted(model, False))
    latent = model.latent.model_copy(update={"scale": 0.9})
    scaled = model.model_copy(update={"latent": latent})
    with pytest.raises(OptionError, match=r"scale 0\.4, not 0\.9"):
        open_source(str(shards), SURE, 0, Wanted(scaled, False))


def test_pairs_can_be_cut_from_hr_instead(shards: Path, model: ModelConfig) -> None:
    other = SURE.model_copy(update={"patch": 16, "latents": False})
    source = open_source(str(shards), other, 0, Wanted(model, False))
    assert isinstance(source, Shards) and source.pair(0).hr.shape == (3, 16, 16)
    assert notes_about(str(shards), other) is None


def test_shards_of_two_builds_are_refused(
    copy: Path, photos: Path, made: LatentsConfig, model: ModelConfig, tmp_path: Path
) -> None:
    once_more = made.model_copy(update={"variants": 2})
    write_shards(shard_config(photos, tmp_path / "other", once_more))
    shutil.copy(tmp_path / "other" / "shard-00000.parquet", copy / "z.parquet")
    with pytest.raises(InputError, match=r"z\.parquet: its latents were made otherwise"):
        _open(copy, model)
    write_shards(shard_config(photos, tmp_path / "other", None))
    shutil.copy(tmp_path / "other" / "shard-00000.parquet", copy / "z.parquet")
    with pytest.raises(InputError, match=r"z\.parquet: its latents were made otherwise"):
        _open(copy, model)


def test_shards_of_which_some_are_not_tagged_are_refused(
    copy: Path, photos: Path, made: LatentsConfig, model: ModelConfig, tmp_path: Path
) -> None:
    write_shards(shard_config(photos, tmp_path / "other", made, rows_per_shard=3))
    shutil.copy(tmp_path / "other" / "shard-00001.parquet", copy)
    with pytest.raises(InputError, match="let tag-dataset finish"):
        _open(copy, model)


def test_other_weights_are_named(shards: Path, model: ModelConfig, tmp_path: Path) -> None:
    notes = notes_about(str(shards), SURE)
    assert notes is not None
    digest = load_autoencoder(model.latent).digest()
    notes.check_weights(model, digest)
    with pytest.raises(OptionError, match=r"digest \w{16}\), but the model's autoencoder is .*abc"):
        notes.check_weights(model, "abc")
    assert model.tags is not None
    elsewhere = model.tags.model_copy(update={"source": "someone/gemma"})
    other = model.model_copy(update={"tags": elsewhere})
    with pytest.raises(OptionError, match="the model's tag encoder is 'someone/gemma'"):
        notes.check_weights(other, digest)
    # A copy of the same weights is the same encoder.
    moved = shutil.copytree(model.tags.source, tmp_path / "gemma")
    tags = model.tags.model_copy(update={"source": str(moved)})
    notes.check_weights(model.model_copy(update={"tags": tags}), digest)


# On a cluster


@ray.remote(num_cpus=0.25)
def _streams(
    folder: str, wanted: Wanted, parts: dict[str, tuple[int, int, Share]]
) -> dict[str, list[Batch]]:
    return {name: list(batches(folder, SURE, 0, *part, wanted)) for name, part in parts.items()}


def test_ranks_and_restarts_see_the_same_batches(
    cluster: Cluster, shards: Path, model: ModelConfig
) -> None:
    share = Share(0, 1, 0.25)
    parts = {
        "one": (0, 10, share),
        "left": (0, 10, Share(0, 2, 0.25)),
        "right": (0, 10, Share(1, 2, 0.25)),
        "later": (6 * SURE.batch, 4, share),
    }
    streams = ray.get(_streams.remote(str(shards), Wanted(model, True), parts))
    source = _open(shards, model, pixels=True)
    for nth, (whole, left, right) in enumerate(
        zip(streams["one"], streams["left"], streams["right"], strict=True)
    ):
        pairs = [source.pair(n) for n in range(4 * nth, 4 * nth + 4)]
        assert torch.equal(whole.hr[2], pairs[2].hr.float() / 127.5 - 1)  # type: ignore[union-attr]
        assert torch.equal(whole.lr[3], pairs[3].lr.float() / 127.5 - 1)
        assert whole.tags == left.tags + right.tags == tuple(pair.tags for pair in pairs)
        ours = whole.stored
        assert ours is not None and ours.condition is not None and ours.tags is not None
        assert torch.equal(ours.clean, torch.stack([pair.clean for pair in pairs]))
        assert torch.equal(ours.condition[1], pairs[1].condition)  # type: ignore[arg-type]
        for i, pair in enumerate(pairs):
            assert torch.equal(ours.tags.embeddings[i][ours.tags.mask[i]], pair.embedded)  # type: ignore[arg-type]
        halves = [half.stored.clean for half in (left, right)]  # type: ignore[union-attr]
        assert torch.equal(ours.clean, torch.cat(halves))
        assert torch.equal(whole.numbers, torch.cat([left.numbers, right.numbers]))
    for ours_, theirs in itertools.zip_longest(streams["later"], streams["one"][6:]):
        assert torch.equal(ours_.stored.clean, theirs.stored.clean)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def recipe(model: ModelConfig) -> Recipe:
    recipe = override(
        tiny_cpu(),
        [
            *STEPS,
            *("validation.pictures=1", "validation.size=64", 'validation.metrics=["psnr@1"]'),
            *('validation.knee={"psnr@1": true}', "validation.tags=false", "pretrain.steps=6"),
        ],
    )
    # The recipe's own experts and their ranges stay.
    sampling = tiny_cpu().model.sampling
    return recipe.model_copy(
        update={"model": model.model_copy(update={"sampling": sampling}), "data": SURE}
    )


def _stage(recipe: Recipe, shards: Path, photos: Path, runs: Path) -> StageConfig:
    stage = stage_of(recipe, shards, runs, "run")
    cluster = stage.cluster.model_copy(update={"validation": str(photos)})
    return stage.model_copy(update={"cluster": cluster})


def test_a_run_trains_from_latents_as_from_pictures(
    cluster: Cluster, recipe: Recipe, shards: Path, photos: Path, tmp_path: Path
) -> None:
    """The first step has the loss that the same pairs have as pictures and names of tags."""
    stage = _stage(recipe, shards, photos, tmp_path)
    run = Path(train(stage).run.path)
    assert [m["step"] for m in reported(run)] == [6]
    history = loop.read_progress(checkpoints(run)[-1]).history
    model, train_config = recipe.model, stage.train
    torch.manual_seed(train_config.seed)
    denoiser = LinearSR(model.denoiser)
    source = _open(shards, model, pixels=True)
    batch = collate_stored([source.pair(n) for n in range(4)], range(4))._replace(stored=None)
    assert train_config.seed == 0 and any(batch.tags)
    encoders = load_autoencoder(model.latent), tag_encoder(model)
    with torch.no_grad():
        losses, _ = loop.flow_loss(denoiser, encoders[0], batch, train_config, encoders[1])
    assert len(history) == 6
    assert history[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-3)


def test_a_run_on_latents_of_other_weights_ends_before_its_first_step(
    cluster: Cluster, recipe: Recipe, shards: Path, photos: Path, tmp_path: Path
) -> None:
    """Their shape is the same, so they are known only once a worker has loaded them."""
    source = tmp_path / "dc-ae"
    autoencoder = load_autoencoder(recipe.model.latent)
    with torch.no_grad():
        for parameter in autoencoder.model.parameters():  # type: ignore[attr-defined]
            parameter.mul_(1.1)
    autoencoder.model.save_pretrained(source)  # type: ignore[attr-defined]
    latent = recipe.model.latent.model_copy(update={"source": str(source)})
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"latent": latent})})
    stage = _stage(other, shards, photos, tmp_path)
    with pytest.raises(LinearSRError, match="the shards have latents of"):
        train(stage)
    assert not reported(stage.run.path)


def test_latents_of_another_recipe_are_refused_before_any_worker_starts(
    cluster: Cluster, recipe: Recipe, shards: Path, tmp_path: Path
) -> None:
    data = recipe.data.model_copy(update={"degradations": {"web": 1.0}})
    other = recipe.model_copy(update={"data": data})
    with pytest.raises(OptionError, match="degradations"):
        check(stage_of(other, shards, tmp_path, "refused"))
    assert not (tmp_path / "refused").exists()


def test_the_data_of_a_later_stage_are_checked_before_the_first(
    recipe: Recipe, shards: Path
) -> None:
    other = recipe.data.model_copy(update={"degradations": {"web": 1.0}})
    later = recipe.model_copy(update={"perceptual_data": other})
    check_stages(["experts"], later, data=str(shards))
    with pytest.raises(OptionError, match=r"perceptual: .*degradations"):
        check_stages(["experts", "perceptual"], later, data=str(shards))
