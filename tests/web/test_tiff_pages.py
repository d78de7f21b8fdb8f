"""The endpoint upscales all pages of a TIFF file if the result is one."""

from __future__ import annotations

import io
import json
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image, ImageSequence
from starlette.testclient import TestClient

from linearsr import Upscaler
from linearsr.config import FileOptions, Options
from linearsr.pipeline.codec import upscale_encoded
from linearsr.web.api import create_app
from linearsr.web.service import Limits
from tests.helpers.forms import saved
from tests.helpers.local_service import Local

PAGES = 3


@pytest.fixture
def scan(image: Image.Image) -> bytes:
    """Three pages of two sizes."""
    return saved(image, "tiff", save_all=True, append_images=[image.rotate(90, expand=True), image])


def pages_of(data: bytes) -> list[np.ndarray]:
    return [np.asarray(page) for page in ImageSequence.Iterator(Image.open(io.BytesIO(data)))]


def test_all_pages_equal_those_of_the_command(
    client: TestClient, small: Upscaler, scan: bytes
) -> None:
    files = {"image": ("scan.tif", scan)}
    response = client.post("/v1/upscale", files=files, data={"steps": "2", "seed": "1"})
    assert (response.status_code, response.headers["Content-Type"]) == (200, "image/tiff")
    assert "X-LinearSR-Notes" not in response.headers
    expected = upscale_encoded(small, scan, Options(steps=2, seed=1), FileOptions())
    pages = pages_of(response.content)
    assert [page.shape for page in pages] == [(36, 48, 3), (48, 36, 3), (36, 48, 3)]
    for page, other in zip(pages, pages_of(expected.data), strict=True):
        assert np.array_equal(page, other)


def test_another_format_gets_the_first_page_and_a_note(client: TestClient, scan: bytes) -> None:
    files = {"image": ("scan.tif", scan)}
    response = client.post("/v1/upscale", files=files, data={"steps": "1", "format": "png"})
    assert response.headers["Content-Type"] == "image/png"
    assert unquote(response.headers["X-LinearSR-Notes"]) == "only the first of 3 pages"


def test_progress_counts_the_steps_of_all_pages(client: TestClient, scan: bytes) -> None:
    files, accept = {"image": ("scan.tif", scan)}, {"Accept": "text/event-stream"}
    response = client.post("/v1/upscale", files=files, data={"steps": "2"}, headers=accept)
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    *progress, _result = [json.loads(line.removeprefix("data: ")) for line in lines]
    steps = [event["step"] for event in progress]
    assert steps == sorted(steps) and steps[-1] == 2 * PAGES
    assert {event["steps"] for event in progress} == {2 * PAGES}


@pytest.mark.parametrize("limit", ["pixels", "output_pixels"])
def test_the_limits_count_all_pages(small: Upscaler, scan: bytes, limit: str) -> None:
    """Two pages are allowed, and three are not."""
    most = 12 * 9 * 2 * (16 if limit == "output_pixels" else 1)
    app = create_app(Local(small), Limits.model_validate({limit: most}))
    with TestClient(app) as client:
        files = {"image": ("scan.tif", scan)}
        response = client.post("/v1/upscale", files=files, data={"steps": "1"})
        assert response.status_code == 413
        assert f"on 3 pages, more than the limit of {most}" in response.json()["detail"]
        as_png = client.post("/v1/upscale", files=files, data={"steps": "1", "format": "png"})
        assert as_png.status_code == 200
