"""Fixtures that all tests share: tiny models on disk, a photograph, an S3 server."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels run on the CPU. @triton.jit reads this, so it is set before anything imports
# Triton: torch itself does, for some of its modules.
os.environ["TRITON_INTERPRET"] = "1"
# Ray and its processes read these when Ray is imported, so they are set before anything imports it:
# clients need no token, Train reports quickly, and a slow machine has time to start workers.
# Workers have the priority of the tests: at Ray's own, 15 steps lower, a test that sends many
# requests would leave the workers of the other cluster without a core.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
# One process less in each run: no node of these clusters is taken away with a warning.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"

# Copies of weights from S3 are those of this run.
CACHE = tempfile.TemporaryDirectory(prefix="lsr-cache-", ignore_cleanup_errors=True)
os.environ["LINEARSR_CACHE"] = CACHE.name
# A command that a shell starts in the background ignores SIGINT, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

# Failures of the assertions in helpers show their values, as those in tests do.
pytest.register_assert_rewrite("tests.helpers")

import numpy as np
import skimage.data
import torch
from PIL import Image

from linearsr import weights
from linearsr.config import DenoiserConfig, LatentConfig, ModelConfig, TagEncoderConfig
from linearsr.metrics import measure
from linearsr.weights.convert.__main__ import main as convert
from tests.helpers.experts import random_experts
from tests.helpers.s3 import Server
from tests.helpers.tag_models import save_gemma
from tools import s3_server, stand_in

# Tests with a cluster run in one of two processes, so that two clusters serve all of them.
FIRST_CLUSTER = "distributed/train/"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a cluster or a browser, and group tests that share fixtures.

    With pytest-xdist's `--dist loadgroup` a group runs in one process. The groups are all tests of
    a cluster, and otherwise the tests of one file.
    """
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        group = path
        if path.startswith("distributed/") and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
            group = "first cluster" if path.startswith(FIRST_CLUSTER) else "second cluster"
        if path == "web/test_page.py":
            item.add_marker(pytest.mark.browser)
            if "[firefox" in item.name and not item.get_closest_marker("every_browser"):
                item.add_marker(pytest.mark.thorough)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse versions of pytest with which pytest-xdist ignores groups (pytest-xdist #1386).

    Both processes would then start the clusters and endpoints of all tests.
    """
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            group = item.get_closest_marker("xdist_group")
            if group and not item.nodeid.endswith(f"@{group.args[0]}"):
                raise pytest.UsageError(
                    "pytest-xdist ignores the groups of tests with this version of pytest; install "
                    "the versions of constraints.txt"
                )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_metrics() -> Iterator[None]:
    """Forget the metrics that were loaded before this test, and those of the test after it."""
    measure._metric.cache_clear()
    yield
    measure._metric.cache_clear()


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """A model like linearsr-tiny, but small enough for a test to train and run many times."""
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


@pytest.fixture(scope="session")
def tagged_config(
    small_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> ModelConfig:
    """The small config with cross-attention to tags."""
    denoiser = small_config.denoiser.model_copy(update={"tag_dim": 16, "tag_heads": 2})
    words = ["cat", "dog", "grass", "woman", "space", "suit", ","]
    gemma = save_gemma(tmp_path_factory.mktemp("gemma"), 16, words)
    tags = TagEncoderConfig(kind="gemma", source=str(gemma))
    return small_config.model_copy(update={"name": "tagged", "denoiser": denoiser, "tags": tags})


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with narrow stand-ins for Sana, a release, DC-AE and Gemma: `tools.stand_in`."""
    folder = tmp_path_factory.mktemp("stand-ins") / "all"
    stand_in.write(folder)
    return folder


@pytest.fixture(scope="session")
def converted_bundle(stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts with velocity prediction, DC-AE and tags, from a LinearSR-like release."""
    folder = tmp_path_factory.mktemp("converted") / "bundle"
    source = [str(stand_ins / "release"), "--out", str(folder), "--name", "converted"]
    parts = ["--dc-ae", str(stand_ins / "dc-ae"), "--gemma", str(stand_ins / "gemma")]
    unseen = ["--tag-heads", str(stand_in.TAG_HEADS), "--stem-strides", *map(str, stand_in.STRIDES)]
    assert convert([*source, *parts, *unseen]) == 0
    return folder


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A real photograph, 64 x 48, that no model of ours was trained on."""
    return Image.fromarray(np.asarray(skimage.data.astronaut())).resize((64, 48), Image.BICUBIC)


@pytest.fixture(scope="session")
def lpips_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SqueezeNet's shapes with random weights, enough for a distance between pictures."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("lpips") / "squeezenet.pth"
    torch.save(squeezenet1_1().features.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of `s3`, known to this process and all that it starts; nothing listens there yet.

    Ray's workers have the variables that their cluster was started with. So the cluster needs
    the address, and only the tests that use S3 pay for the server.
    """
    port = s3_server.free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment(port).items():
            patch.setenv(name, value)
        for name in ("ENDPOINT_URL_S3", "SESSION_TOKEN", "PROFILE", "MAX_ATTEMPTS", "RETRY_MODE"):
            patch.delenv(f"AWS_{name}", raising=False)
        yield port


@pytest.fixture(scope="session")
def s3(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server; see `Server`. Its pages are small, so that tests need fewer files."""
    with s3_server.running(tmp_path_factory.mktemp("swift"), s3_port, page=100):
        yield Server(s3_port)
