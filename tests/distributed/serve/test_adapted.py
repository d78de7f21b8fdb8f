"""An endpoint of experts that share a base: the pixels of the command in both layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import requests
from ray import serve
from ray.cluster_utils import Cluster

from linearsr.config import ModelConfig
from linearsr.distributed.serve import ServeConfig, build_app
from tests.helpers.endpoint import answered_by, pixels_of
from tests.helpers.lora import save_adapted
from tests.helpers.processes import free_port


@pytest.mark.parametrize("layout", ["together", pytest.param("split", marks=pytest.mark.thorough)])
def test_adapters_on_one_base_make_the_pixels_of_the_command(
    cluster: Cluster, small_config: ModelConfig, tmp_path: Path, layout: str
) -> None:
    model = save_adapted(tmp_path / "weights", small_config)
    port = free_port()
    config = ServeConfig.parse(
        model=str(model),
        device="cpu",
        layout=layout,
        replicas=1 if layout == "together" else 4,
        expert_cpus=0.25,
        router_cpus=0.25,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(config))
    try:
        for case in answered_by(model)[:4]:
            answer = requests.post(
                f"http://127.0.0.1:{port}/v1/upscale",
                files={"image": ("a.png", case.picture)},
                data={**case.options, "format": "png"},
                timeout=120,
            )
            assert answer.status_code == 200, answer.text
            assert np.array_equal(pixels_of(answer.content), case.pixels)
    finally:
        serve.shutdown()
