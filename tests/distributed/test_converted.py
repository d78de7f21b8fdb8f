"""A converted release, with velocity prediction, DC-AE and tags, on the surfaces that use Ray."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.cluster_utils import Cluster

from linearsr.config import Options
from linearsr.distributed.datasets.upscale import UpscaleConfig, upscale_dataset
from linearsr.distributed.serve import ServeConfig, build_app
from linearsr.imaging.files import encode, read
from linearsr.pipeline.upscaler import Upscaler
from tests.helpers.endpoint import Answer, Case, Endpoint, ask, in_session, photograph, pixels_of
from tests.helpers.processes import free_port


@pytest.fixture(scope="module")
def case(converted_bundle: Path) -> Case:
    """A picture with tags, and its pixels from the upscaler that the command calls."""
    picture = photograph(0, 24, 16)
    options = {"steps": 4, "seed": 3, "tags": "cat, grass"}
    result = Upscaler.load(converted_bundle, "cpu").upscale(read(picture), Options.parse(**options))
    return Case(picture, options, pixels_of(encode(result, "png")))


def test_dataset_job_gives_the_pixels_of_the_command(
    cluster: Cluster, converted_bundle: Path, case: Case, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photo.png").write_bytes(case.picture)
    config = UpscaleConfig(
        input=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        model=str(converted_bundle),
        device="cpu",
        options=Options.parse(**case.options),
    )
    summary = upscale_dataset(config)
    assert (summary.done, summary.failed) == (1, 0)
    with Image.open(tmp_path / "out" / "photo.png") as result:
        assert np.array_equal(np.asarray(result).astype(np.int16), case.pixels)


def test_endpoint_gives_the_pixels_of_the_command(
    cluster: Cluster, converted_bundle: Path, case: Case
) -> None:
    port = free_port()
    config = ServeConfig.parse(
        model=str(converted_bundle),
        device="cpu",
        layout="together",
        replicas=1,
        expert_cpus=0.25,
        router_cpus=0.25,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_app(config))
        endpoint = Endpoint(f"http://127.0.0.1:{port}", config)

        async def once(session: aiohttp.ClientSession) -> list[Answer]:
            return [await ask(session, endpoint, case)]

        (answer,) = in_session(once)
    finally:
        serve.shutdown()
    assert answer.status == 200, answer.body
    assert np.array_equal(pixels_of(answer.body), case.pixels)
