"""Shards with latents: built, continued, tagged, and refused where they would not fit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from linearsr.cli import job
from linearsr.config import ModelConfig
from linearsr.distributed.datasets import tag as tagging
from linearsr.distributed.datasets.shards import build
from linearsr.distributed.datasets.shards.build import SCHEMA, build_shards, shard_bytes
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.latents import with_digest
from linearsr.distributed.datasets.tag import TagConfig, tag_dataset
from linearsr.distributed.latents import PAIR, embeddings_of, latents_of
from linearsr.errors import InputError, OptionError, WeightsError
from linearsr.imaging.files import read
from linearsr.latent import load_autoencoder
from linearsr.storage.location import locate
from linearsr.storage.walk import Notes
from linearsr.tags.encoder import tag_encoder
from linearsr.training import latents
from linearsr.training.data import Pair, Photo, as_bytes, make_hr
from linearsr.training.latents import LatentsConfig, unpack
from tests.helpers.latents import DATA, save_models, shard_config, tag_shards, write_shards
from tests.helpers.s3 import Server

MIXED = DATA.model_copy(update={"scales": (1.0, 4.0)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def made(model: ModelConfig) -> LatentsConfig:
    return LatentsConfig.of(model, MIXED, variants=3)


@pytest.fixture(scope="module")
def built(
    cluster: Cluster,
    photos: Path,
    made: LatentsConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "built"
    result = build_shards(shard_config(photos, folder, made))
    assert result.manifest["counts"]["rows"] == 4 and not result.failed
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [row for s in sorted(folder.glob("*.parquet")) for row in pq.read_table(s).to_pylist()]


def _everything(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Building


def test_rows_hold_pairs_of_the_recipe_and_their_latents(
    built: Path, made: LatentsConfig, model: ModelConfig
) -> None:
    """Each latent is that of the pair which the row's HR and the variant's seed give."""
    autoencoder = load_autoencoder(model.latent)
    rows = _rows(built)
    seeds = {row[f"pair_{v}"]["seed"] for row in rows for v in range(3)}
    assert len(rows) == 4 and len(seeds) == 12
    for row in rows:
        hr = Photo(as_bytes(read(row["hr"]).pixels))
        for variant, scale in enumerate(made.scales):
            stored = row[f"pair_{variant}"]
            truth = make_hr(hr, MIXED, np.random.default_rng(stored["seed"]))
            lr = as_bytes(read(stored["lr"]).pixels)
            assert lr.shape[-1] == round(32 / scale) and stored["scale"] == pytest.approx(scale)
            wanted = latents.encode(Pair(truth, lr), autoencoder, "cpu", condition=True)
            for name, exact in zip(("latent", "condition"), wanted, strict=True):
                numbers = unpack(stored[name], "float16", (4, 4, 4))
                assert numbers is not None and exact is not None and numbers.std() > 0
                torch.testing.assert_close(numbers, exact, rtol=2**-10, atol=1e-5)
    assert made.scales[0] == 4 and len(set(made.scales)) > 1


def test_the_schema_says_how_latents_were_made(
    built: Path, made: LatentsConfig, model: ModelConfig
) -> None:
    schema = pq.read_schema(next(built.glob("*.parquet")))
    assert schema.names == [*SCHEMA.names, "pair_0", "pair_1", "pair_2"]
    assert schema.field("pair_0").type == PAIR
    digest = load_autoencoder(model.latent).digest()
    assert latents_of(schema, "x") == made.model_copy(update={"digest": digest})
    assert embeddings_of(schema, "x") is None
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["settings"]["latents"]["digest"] == digest
    assert "diffusers" in manifest["versions"]


def test_a_continued_build_makes_the_same_bytes(
    built: Path, photos: Path, made: LatentsConfig
) -> None:
    before = _everything(built)
    next(built.glob("*.parquet")).unlink()
    build_shards(shard_config(photos, built, made, cpus=1))
    assert _everything(built) == before


def test_other_latents_in_the_same_output_are_refused(
    built: Path, photos: Path, made: LatentsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _everything(built)
    other = made.model_copy(update={"precision": "bfloat16"})
    with pytest.raises(OptionError, match="other settings: latents"):
        build_shards(shard_config(photos, built, other))

    # The same place, but other weights in it since.
    def changed(config: ShardConfig) -> ShardConfig:
        latents = made.model_copy(update={"digest": "of other weights"})
        return config.model_copy(update={"latents": latents})

    monkeypatch.setattr(build, "with_digest", changed)
    with pytest.raises(OptionError, match="of other weights"):
        build_shards(shard_config(photos, built, made))
    assert _everything(built) == before


def test_weights_that_cannot_be_loaded_are_refused_before_the_scan(
    cluster: Cluster, photos: Path, made: LatentsConfig, tmp_path: Path
) -> None:
    latent = made.latent.model_copy(update={"source": str(tmp_path / "nowhere")})
    config = shard_config(photos, tmp_path / "out", made.model_copy(update={"latent": latent}))
    with pytest.raises(WeightsError, match="nowhere"):
        build_shards(config)
    assert not (tmp_path / "out").exists()
    gpu = shard_config(photos, tmp_path / "out", made, gpus=0.1)
    with pytest.raises(OptionError, match=r"a task needs 0\.1 GPU.*lower --cpus or --gpus"):
        with_digest(gpu)


def test_another_nodes_weights_are_noticed(photos: Path, made: LatentsConfig) -> None:
    config = shard_config(photos, "out", made.model_copy(update={"digest": "of another node"}))
    row = {"source": f"{photos.name}/coffee.png", "digest": "", "id": "a", "left": 0, "top": 0}
    data = (photos / "coffee.png").read_bytes()
    row |= {"width": 64, "height": 64, "digest": _digest(data)}
    with pytest.raises(WeightsError, match="weights on this node differ"):
        shard_bytes([row], config)


def _digest(data: bytes) -> str:
    from linearsr.distributed.datasets.shards.scan import digest

    return digest(data)


def test_a_crop_must_hold_a_patch_with_its_margins(photos: Path, made: LatentsConfig) -> None:
    with pytest.raises(OptionError, match=r"latents: .*--crop must be at least 48"):
        shard_config(photos, "out", made, crop=40)
    assert shard_config(photos, "out", made, crop=0, min_size=16).least == 48


# The commands


@pytest.fixture
def _cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs in this process use the cluster of the tests."""
    monkeypatch.setattr("ray.init", functools.partial(ray.init, ignore_reinit_error=True))


@pytest.mark.usefixtures("_cluster")
def test_the_job_stores_the_pairs_of_a_recipe(photos: Path, tmp_path: Path) -> None:
    flags = ["--input", str(photos), "--output", str(tmp_path / "out"), "--cpus", "0.5"]
    flags += ["--crop", "64", "--min-sharpness", "0", "--latents", "tiny_cpu", "--variants", "2"]
    settings = ["--set", "data.patch=32", "--set", "data.margin=8"]
    assert job.run("build-shards", [*flags, *settings, "--precision", "bfloat16"]) == 0
    note = latents_of(pq.read_schema(next((tmp_path / "out").glob("*.parquet"))), "x")
    assert note is not None
    assert (note.latent.kind, note.variants, note.precision) == ("space-to-depth", 2, "bfloat16")
    assert (note.data.patch, note.data.scales) == (32, (1.0, 4.0))


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "data.patch=32"], "--set changes a field of the recipe of --latents"),
        (["--latents", "tiny_cpu"], "--latents: a crop of 64 px is too small for pairs of 96 px"),
        (["--latents", "tiny_cpu", "--variants", "0"], "variants"),
        (["--latents", "tiny_cpu", "--set", "data.size=3"], "data.size"),
    ],
)
def test_wrong_flags_are_named(
    photos: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--input", str(photos), "--output", str(tmp_path / "out"), "--crop", "64"]
    assert job.run("build-shards", [*places, *flags]) == 2
    assert message in capsys.readouterr().err


# Tags


def test_tagging_embeds_the_tags_for_the_model(
    photos: Path, made: LatentsConfig, model: ModelConfig, tmp_path: Path
) -> None:
    write_shards(shard_config(photos, tmp_path, made))
    before = _rows(tmp_path)
    tag_shards(tmp_path)
    encoder = tag_encoder(model)
    assert encoder is not None
    rows = _rows(tmp_path)
    assert [row["tags"] for row in rows] == [["cat"], ["dog", "grass"], [], ["cat"]]
    for row, untagged in zip(rows, before, strict=True):
        embedded, mask = encoder([row["tags"]])
        numbers = unpack(row["tag_embeddings"], "bfloat16", (-1, 16))
        assert numbers is not None and len(numbers) == mask.sum()
        torch.testing.assert_close(numbers, embedded[0][mask[0]], rtol=2**-8, atol=0)
        assert row["pair_2"] == untagged["pair_2"]
    schema = pq.read_schema(next(tmp_path.glob("*.parquet")))
    note = embeddings_of(schema, "x")
    assert note is not None and note.dim == 16 and latents_of(schema, "x") is not None


def test_a_shard_without_embeddings_is_not_yet_tagged(
    photos: Path, made: LatentsConfig, tmp_path: Path
) -> None:
    """It was tagged by a program that knows nothing of embeddings, say."""
    write_shards(shard_config(photos, tmp_path, made))
    config = TagConfig(input=str(tmp_path), output=str(tmp_path))
    file = next(tmp_path.glob("*.parquet"))

    def done() -> bool:
        listed = tagging._list_shards(locate(tmp_path), "lr", Notes())
        (note,) = tagging._read_notes(listed, locate(tmp_path), config.settings)
        return note is not None

    opened = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
    file.write_bytes(tagging.tag_shard(opened, config, lambda _: [])[0])
    assert not done()
    tag_shards(tmp_path)
    assert done()
    # Tagged again without an encoder, it has no embeddings of the tags before.
    opened = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
    file.write_bytes(tagging.tag_shard(opened, config, lambda _: [])[0])
    schema = pq.read_schema(file)
    assert "tag_embeddings" not in schema.names and embeddings_of(schema, "x") is None


def test_the_tagging_job_embeds(built: Path, made: LatentsConfig, tmp_path: Path) -> None:
    config = TagConfig(input=str(built), output=str(tmp_path / "out"), actor_cpus=0.5)
    assert tag_dataset(config).done == 4
    assert all(row["tag_embeddings"] is not None for row in _rows(tmp_path / "out"))
    assert tag_dataset(config).earlier == 4


def test_a_missing_tag_encoder_ends_the_tagging_job(
    cluster: Cluster, photos: Path, made: LatentsConfig, tmp_path: Path
) -> None:
    assert made.tags is not None
    gone = made.tags.model_copy(update={"source": str(tmp_path / "gone")})
    write_shards(shard_config(photos, tmp_path / "in", made.model_copy(update={"tags": gone})))
    tagger = {"tagger": {"threshold": 0.0}}  # some tag for each picture
    places = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "actor_cpus": 0.5}
    with pytest.raises(WeightsError, match="cannot load the tag encoder"):
        tag_dataset(TagConfig.parse(**{**places, **tagger}))


# Notes


def test_damaged_notes_and_missing_columns_are_refused(built: Path) -> None:
    schema = pq.read_schema(next(built.glob("*.parquet")))
    for text in (b"{", b'{"latent": 1}'):
        with pytest.raises(InputError, match=r"x: its note linearsr\.latents is damaged"):
            latents_of(schema.with_metadata({b"linearsr.latents": text}), "x")
    fewer = schema.remove(schema.get_field_index("pair_2"))
    with pytest.raises(InputError, match="promises a column 'pair_2'"):
        latents_of(fewer, "x")


def test_a_build_on_s3_gives_the_same_shards(
    built: Path, photos: Path, made: LatentsConfig, s3: Server
) -> None:
    bucket = s3.bucket()
    locate(photos).copy_to(locate(f"{bucket}/{photos.name}"))
    config = shard_config(photos, f"{bucket}/shards", made, inputs=[f"{bucket}/{photos.name}"])
    build_shards(config)
    for shard in built.glob("*.parquet"):
        assert (locate(f"{bucket}/shards") / shard.name).read() == shard.read_bytes()
