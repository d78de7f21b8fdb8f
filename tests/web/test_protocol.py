"""The HTTP API follows HTTP: cut forms, HEAD, quality values of Accept, spellings of formats."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.helpers.forms import BOUNDARY, END, FORM, detail, part


def form(png: bytes, **fields: str) -> bytes:
    """Return a form of a picture and these fields."""
    values = [part(name, value.encode()) for name, value in fields.items()]
    return b"".join([part("image", png, "x.png"), *values]) + END


@pytest.mark.parametrize("cut", [4, 5, 7, 9, 20, 200])
def test_cut_form_is_refused_and_not_upscaled_without_its_last_field(
    client: TestClient, png: bytes, cut: int
) -> None:
    body = form(png, steps="1", seed="5")
    answer = client.post("/v1/upscale", content=body[:-cut], headers=FORM)
    assert "last boundary" in detail(answer, 400)


def test_whole_form_is_accepted_with_and_without_its_last_line_break(
    client: TestClient, png: bytes
) -> None:
    body = form(png, steps="1", seed="5")
    for content in (body, body[:-2], body + b"an epilogue"):
        answer = client.post("/v1/upscale", content=content, headers=FORM)
        assert (answer.status_code, answer.headers["X-LinearSR-Seed"]) == (200, "5")


def test_boundary_inside_the_picture_does_not_end_the_form(client: TestClient, png: bytes) -> None:
    body = part("image", png + f"--{BOUNDARY}--".encode(), "x.png")
    answer = client.post("/v1/upscale", content=body, headers=FORM)
    assert "last boundary" in detail(answer, 400)


@pytest.mark.parametrize(
    "path", ["/healthz", "/", "/v1/models", "/page/script.js", "/openapi.json", "/v1/nothing"]
)
def test_head_answers_as_get_without_a_body(client: TestClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert head.status_code == get.status_code
    assert head.content == b"" and get.content != b""
    varying = ("date", "last-modified")
    kept = [{k: v for k, v in a.headers.items() if k not in varying} for a in (get, head)]
    assert kept[0] == kept[1]


def test_head_of_an_upload_is_refused_like_get(client: TestClient) -> None:
    assert client.head("/v1/upscale").status_code == 405


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("image/png, text/event-stream;q=0.5", True),
        ("text/event-stream; charset=utf-8", True),
        ("text/event-stream;q=0", False),
        ("image/*, text/event-stream; q=0.000", False),
        ("*/*", False),
        ("text/event-streams", False),
    ],
)
def test_accept_chooses_the_stream_unless_its_quality_is_zero(
    client: TestClient, png: bytes, accept: str, streams: bool
) -> None:
    headers = {**FORM, "Accept": accept}
    answer = client.post("/v1/upscale", content=form(png, steps="1"), headers=headers)
    kind = "text/event-stream" if streams else "image/png"
    assert answer.headers["Content-Type"].partition(";")[0] == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("jpeg", "jpeg"), ("JPEG", "jpeg"), ("PNG", "png"), (".webp", "webp"), ("TIFF", "tiff")],
)
def test_format_is_known_by_its_usual_spellings(
    client: TestClient, png: bytes, name: str, kind: str
) -> None:
    body = form(png, steps="1", format=name)
    answer = client.post("/v1/upscale", content=body, headers=FORM)
    assert answer.headers["Content-Type"] == f"image/{kind}"


def test_unknown_format_is_refused_with_the_known_ones(client: TestClient, png: bytes) -> None:
    body = form(png, steps="1", format="bmp")
    answer = client.post("/v1/upscale", content=body, headers=FORM)
    assert "'png', 'jpg', 'webp' or 'tif'" in detail(answer, 422)
