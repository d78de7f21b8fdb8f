"""Fixtures: one local Ray cluster, its job server, photographs, one small training run."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import skimage.data
from PIL import Image
from ray.cluster_utils import Cluster

from linearsr.distributed.train.trainer import Outcome, train
from linearsr.training.recipes import Recipe, override, tiny_cpu
from tests.helpers.cluster import Jobs, start_cluster
from tests.helpers.runs import SMALL, STEPS, stage_of


@pytest.fixture(scope="session")
def cluster(s3_port: int) -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="lsr-")  # a short path, for it holds sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        # As in an activated environment: submitted jobs begin with `python`.
        patch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
        try:
            started = start_cluster()
        except Exception:  # A busy machine may exceed Ray's limit of 30 s once.
            started = start_cluster()
        ray.init(address=started.address, log_to_driver=False, logging_level="WARNING")
        yield started
        ray.shutdown()
        started.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster) -> Jobs:
    return Jobs(f"http://{cluster.webui_url}")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee"):
        picture = Image.fromarray(np.asarray(getattr(skimage.data, name)()))
        picture.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return override(tiny_cpu(), [*SMALL, *STEPS])


@pytest.fixture(scope="session")
def whole(
    cluster: Cluster, recipe: Recipe, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """A run of two workers that nothing has interrupted."""
    return train(stage_of(recipe, photos, tmp_path_factory.mktemp("runs"), "whole"))
