"""The endpoint says what it left out of a result."""

from __future__ import annotations

import json
from urllib.parse import unquote

from PIL import Image
from starlette.testclient import TestClient

from tests.web.conftest import saved


def animation(image: Image.Image) -> bytes:
    return saved(image, "gif", save_all=True, append_images=[image.rotate(180)])


def test_header_has_the_notes(client: TestClient, image: Image.Image, png: bytes) -> None:
    for data, note in ((animation(image), "only the first of 2 frames"), (png, None)):
        files = {"image": ("a.gif", data)}
        response = client.post("/v1/upscale", files=files, data={"steps": "1"})
        assert response.status_code == 200
        header = response.headers.get("X-LinearSR-Notes")
        assert (header and unquote(header)) == note


def test_stream_has_the_notes(client: TestClient, image: Image.Image) -> None:
    files = {"image": ("a.gif", animation(image))}
    accept = {"Accept": "text/event-stream"}
    response = client.post("/v1/upscale", files=files, data={"steps": "1"}, headers=accept)
    result = json.loads(response.text.rsplit("data: ", 1)[1])
    assert result["notes"] == ["only the first of 2 frames"]


def test_bmp_is_accepted(client: TestClient, image: Image.Image) -> None:
    response = client.post("/v1/upscale", files={"image": ("a.bmp", saved(image, "bmp"))})
    assert (response.status_code, response.headers["Content-Type"]) == (200, "image/png")
