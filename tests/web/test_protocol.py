"""The HTTP API follows HTTP: cut forms, HEAD, quality values of Accept, spellings of formats."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from linearsr.web.api import create_app, digest
from linearsr.web.service import Limits
from tests.helpers.forms import BOUNDARY, END, FORM, detail, part
from tests.helpers.local_service import Local


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


ORIGIN = {"Origin": "https://example.org"}


@pytest.fixture
def open_client(service: Local) -> TestClient:
    """Return a client of an endpoint that pages of one other origin may use."""
    app = create_app(service, Limits(), digest("sesame"), cors_origins=["https://example.org"])
    return TestClient(app)


def test_pages_of_other_origins_are_let_in_only_by_the_setting(
    client: TestClient, open_client: TestClient
) -> None:
    assert "Access-Control-Allow-Origin" not in client.get("/v1/models", headers=ORIGIN).headers
    answer = open_client.get("/v1/models", headers=ORIGIN)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "X-LinearSR-Seed" in answer.headers["Access-Control-Expose-Headers"]
    other = open_client.get("/v1/models", headers={"Origin": "https://example.com"})
    assert "Access-Control-Allow-Origin" not in other.headers


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/upscale"), ("DELETE", "/v1/jobs/x")])
def test_preflight_needs_no_token(open_client: TestClient, method: str, path: str) -> None:
    headers = {
        **ORIGIN,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, prefer",
    }
    answer = open_client.options(path, headers=headers)
    assert answer.status_code == 200
    assert method in answer.headers["Access-Control-Allow-Methods"]


def test_refusal_can_be_read_by_pages_of_other_origins(open_client: TestClient) -> None:
    answer = open_client.post("/v1/upscale", headers=ORIGIN)
    detail(answer, 401)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
