"""Make the latents of a shard's rows, in the tasks that build shards."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from linearsr.config import LatentConfig
from linearsr.distributed.datasets.shards.config import ShardConfig
from linearsr.distributed.datasets.shards.scan import use_one_thread
from linearsr.distributed.latents import pair_column
from linearsr.distributed.queue import CRASHED, map_tasks
from linearsr.errors import WeightsError
from linearsr.imaging.files import Picture, encode
from linearsr.latent import Autoencoder, load_autoencoder
from linearsr.training import latents as stored
from linearsr.training.data import Photo, make_pair
from linearsr.training.latents import LatentsConfig, pack


def with_digest(config: ShardConfig) -> ShardConfig:
    """Return the configuration with the digest of the encoder's weights, as a task loads them.

    So weights that cannot be loaded are refused before the pictures are scanned. Raises what
    `load_autoencoder` raises, and OptionError if no node can run a task.
    """
    if config.latents is None:
        return config
    ((_, digest),) = map_tasks([config], _digest, config.cpus, config.max_cpus, config.gpus)
    if digest is None:
        raise WeightsError(f"{config.latents.latent.source}: {CRASHED}: it loads these weights")
    return config.model_copy(
        update={"latents": config.latents.model_copy(update={"digest": digest})}
    )


def _digest(config: ShardConfig) -> str:
    assert config.latents is not None
    use_one_thread()
    return _encoder(config.latents.latent, _device(config))[1]


def _device(config: ShardConfig) -> str:
    return "cuda" if config.gpus else "cpu"


@lru_cache(maxsize=1)
def _encoder(config: LatentConfig, device: str) -> tuple[Autoencoder, str]:
    """Load the autoencoder, once in each process, and compute its digest."""
    autoencoder = load_autoencoder(config, device)
    return autoencoder, autoencoder.digest()


def variants(id: str, hr: Tensor, config: ShardConfig) -> dict[str, dict[str, Any]]:
    """Return the columns of a row's variants. hr: (3, H, W) uint8, the crop of the row.

    Raises WeightsError if this node's weights differ from those that the job began with, or if a
    latent is not finite.
    """
    latents = config.latents
    if latents is None:
        return {}
    autoencoder, digest = _encoder(latents.latent, _device(config))
    if digest != latents.digest:
        raise WeightsError(
            f"{latents.latent.source}: the weights on this node differ from those on the node that "
            "began; give all nodes the same ones, and start again in another --output"
        )
    return {
        pair_column(number): _variant(f"{id}/{number}", hr, scale, config, latents, autoencoder)
        for number, scale in enumerate(latents.scales)
    }


def _variant(
    name: str,
    hr: Tensor,
    scale: float,
    config: ShardConfig,
    latents: LatentsConfig,
    autoencoder: Autoencoder,
) -> dict[str, Any]:
    seed = config.seed_of(name)
    pair = make_pair(lambda _: Photo(hr), latents.data, scale, np.random.default_rng(seed))
    clean, condition = stored.encode(
        pair, autoencoder, _device(config), condition=latents.condition
    )
    return {
        "seed": seed,
        "scale": scale,
        "lr": encode(Picture(pair.lr.float() / 255), "png"),
        "latent": pack(clean, latents.precision),
        "condition": None if condition is None else pack(condition, latents.precision),
    }
