"""A model with DC-AE and tags of tiny real models, and shards with latents for it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from linearsr.config import DenoiserConfig, LatentConfig, ModelConfig, TagEncoderConfig
from linearsr.distributed.datasets.shards import scan
from linearsr.distributed.datasets.shards.build import shard_bytes, shard_name
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.plan import plan
from linearsr.distributed.datasets.tag import TagConfig, _Worker, tag_shard
from linearsr.latent import load_autoencoder
from linearsr.storage.location import locate
from linearsr.tags.base import Tag
from linearsr.training.data import DataConfig
from linearsr.training.latents import LatentsConfig
from tests.helpers.dc_ae import save_dc_ae
from tests.helpers.tag_models import save_gemma

DATA = DataConfig(patch=32, batch=4, margin=8, degradations={"mild": 0.5, "clean": 0.5})
WORDS = ["cat", "dog", "grass", ","]


def save_models(folder: Path) -> ModelConfig:
    """Return a model that takes a condition and tags; its DC-AE of 8x and Gemma are in `folder`."""
    denoiser = DenoiserConfig(
        latent_channels=4,
        depth=2,
        width=32,
        head_dim=16,
        tag_dim=16,
        tag_heads=2,
        stem_channels=(8, 8, 8),
        stem_strides=(2, 2, 2),
        condition_latent=True,
    )
    dc_ae, gemma = save_dc_ae(folder / "dc-ae", factor=8), save_gemma(folder / "gemma", 16, WORDS)
    latent = LatentConfig(kind="dc-ae", factor=8, scale=0.4, source=str(dc_ae))
    tags = TagEncoderConfig(kind="gemma", source=str(gemma))
    return ModelConfig(name="latents", denoiser=denoiser, latent=latent, tags=tags)


def shard_config(
    photos: Path, output: Path | str, latents: LatentsConfig | None, **changes: object
) -> ShardConfig:
    """Return settings for shards of four rows with crops of 64 px."""
    small = {"crop": 64, "min_sharpness": 0, "rows_per_shard": 4, "cpus": 0.5}
    places = {"inputs": [str(photos)], "output": str(output)}
    return ShardConfig.parse(**{**places, **small, "latents": latents, **changes})


def write_shards(config: ShardConfig) -> None:
    """Write shards as the job does, but without a cluster."""
    if config.latents is not None:
        digest = load_autoencoder(config.latents.latent).digest()
        latents = config.latents.model_copy(update={"digest": digest})
        config = config.model_copy(update={"latents": latents})
    fetch = scan.fetcher(config)
    rows = [
        scan.scan_picture(number, source, fetch, config)
        for number, source in enumerate(scan.list_sources(config))
    ]
    shards = plan(pa.Table.from_pylist(rows, scan.SCAN), config)
    for number, shard in enumerate(shards):
        data = shard_bytes(shard.to_pylist(), config)
        (locate(config.output) / shard_name(number)).write(data)


def tag_shards(folder: Path) -> None:
    """Tag shards in place as the job does, but without a cluster; dogs are on grass."""
    config = TagConfig(input=str(folder), output=str(folder))
    worker = _Worker.__new__(_Worker)
    worker.device, worker.encoders = "cpu", {}
    names = iter([["cat"], ["dog", "grass"], []] * 100)
    for file in sorted(folder.glob("*.parquet")):
        shard = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
        encoder = worker._encoder(shard.schema_arrow, file.name)
        tagger = lambda _: [Tag(name, 0.5) for name in next(names)]  # noqa: E731
        file.write_bytes(tag_shard(shard, config, tagger, encoder)[0])
