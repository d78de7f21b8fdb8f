"""The HTTP API as a client sees it: pixels equal to the command's, progress, limits, refusals."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import re
import select
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.ExifTags import Base
from starlette.datastructures import UploadFile
from starlette.testclient import TestClient

from linearsr import Upscaler, cli, weights
from linearsr.config import FileOptions, ModelConfig, Options
from linearsr.errors import InputError, OptionError, OutputError, TooLarge, WeightsError
from linearsr.imaging.files import Picture, encode, read, read_provenance
from linearsr.pipeline.memory import OutOfMemory
from linearsr.web.api import create_app, digest
from linearsr.web.service import (
    Events,
    Full,
    Limits,
    NotReady,
    Progress,
    Result,
    UpscaleRequest,
)
from linearsr.web.upload import FORM_OVERHEAD, MAX_FIELD_BYTES, Upload
from tests.helpers.experts import random_experts
from tests.helpers.forms import BOUNDARY, END, FORM, detail, part, png_of, saved
from tests.helpers.local_service import PATIENCE, Local, served

EVENTS = {"Accept": "text/event-stream"}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def upload(
    client: TestClient | httpx2.Client,
    image: bytes,
    name: str = "photo.png",
    headers: dict[str, str] | None = None,
    **fields: object,
) -> Any:
    """Return the response to one picture, upscaled in one step by default."""
    data = {key: str(value) for key, value in {"steps": 1, **fields}.items()}
    return client.post("/v1/upscale", files={"image": (name, image)}, data=data, headers=headers)


def events(text: str) -> list[tuple[str, Any]]:
    """Return the names and data of server-sent events."""
    matches = re.findall(r"^event: (\w+)\r\ndata: (.*)\r\n\r\n", text, re.MULTILINE)
    return [(name, json.loads(data)) for name, data in matches]


# Pixels


def sixteen_bits(image: Image.Image) -> bytes:
    """Return a picture with more levels than 8 bits hold, and alpha."""
    pixels = torch.linspace(0, 1, 3 * 9 * 12).reshape(3, 9, 12)
    alpha = torch.linspace(1, 0, 9 * 12).reshape(1, 9, 12)
    return encode(Picture(pixels, alpha, 16, False, None, None, "png"), "png")


def described(image: Image.Image, format: str) -> bytes:
    """Return a picture stored on its side, with a colour profile and the name of a camera."""
    exif = Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = 6, "Camera"
    return saved(image, format, exif=exif.tobytes(), icc_profile=SRGB)


@pytest.mark.parametrize(
    ("source", "picture", "options"),
    [
        ("png", lambda i: saved(i, "png"), {}),
        ("png", lambda i: saved(i, "png"), {"steps": 4, "seed": 7, "scale": 2, "tile": 16}),
        ("png", lambda i: saved(i, "png"), {"width": 31, "colour_fix": "adain", "tile": "off"}),
        ("png", lambda i: saved(i.convert("LA"), "png"), {"width": 20, "height": 30}),
        ("png", lambda i: saved(i.convert("P"), "png"), {"format": "webp", "quality": 100}),
        ("png", sixteen_bits, {}),
        ("png", sixteen_bits, {"format": "tif", "colour_fix": "none"}),
        ("png", lambda i: saved(i, "png"), {"steps": 4, "solver": "adams"}),
        ("png", sixteen_bits, {"format": "jpg", "quality": 40}),
        ("jpg", lambda i: described(i, "jpeg"), {"steps": 2}),
        ("webp", lambda i: described(i, "webp"), {}),
        ("tif", lambda i: described(i, "tiff"), {}),
        ("avif", lambda i: saved(i, "avif"), {"format": "png"}),
        ("gif", lambda i: saved(i, "gif"), {"format": "png"}),
    ],
)
def test_response_has_the_bytes_of_the_command(
    client: TestClient,
    small_bundle: Path,
    tmp_path: Path,
    image: Image.Image,
    source: str,
    picture: Callable[[Image.Image], bytes],
    options: dict[str, Any],
) -> None:
    """The files are equal: pixels, depth, alpha, profile, EXIF and provenance."""
    options = {"steps": 1, **options}
    source_file, result = (
        tmp_path / f"in.{source}",
        tmp_path / f"out.{options.get('format', source)}",
    )
    source_file.write_bytes(picture(image))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = ["upscale", str(source_file), "-o", str(result), "--model", str(small_bundle)]
    assert cli.main([*command, "--device=cpu", *flags]) == 0
    answer = upload(client, source_file.read_bytes(), source_file.name, **options)
    assert answer.status_code == 200, answer.text
    assert answer.content == result.read_bytes()
    assert result.suffix[1:] in answer.headers["Content-Disposition"]


def test_response_has_the_bytes_of_the_command_at_any_scale_and_detail(
    scaling_bundle: Path, png: bytes, tmp_path: Path
) -> None:
    client = TestClient(create_app(Local(Upscaler.load(scaling_bundle, "cpu")), Limits()))
    source_file, result = tmp_path / "in.png", tmp_path / "out.png"
    source_file.write_bytes(png)
    command = ["upscale", str(source_file), "-o", str(result), "--model", str(scaling_bundle)]
    for options in ({"scale": 1}, {"scale": 1.5, "detail": 0.4, "tile": 16}, {"width": 31}):
        flags = [f"--{name}={value}" for name, value in options.items()]
        assert cli.main([*command, "--device=cpu", "--steps=4", *flags]) == 0
        answer = upload(client, png, steps=4, **options)
        assert answer.status_code == 200, answer.text
        assert answer.content == result.read_bytes()
        scale = answer.headers["X-LinearSR-Scale"]
        assert scale == f"{options.get('scale', 31 / 12):.4g}"


def test_response_keeps_alpha_profile_and_metadata(client: TestClient, image: Image.Image) -> None:
    deep = read(upload(client, sixteen_bits(image)).content)
    assert deep.bits == 16 and deep.alpha is not None and deep.pixels.shape == (3, 36, 48)
    answer = upload(client, described(image, "jpeg"), "photo.jpg", scale=2, seed=5)
    assert answer.headers["Content-Type"] == "image/jpeg"
    picture = read(answer.content)
    # The picture is stored on its side: upright, 12 x 9 is 9 x 12.
    assert picture.pixels.shape == (3, 24, 18)
    assert picture.icc == SRGB and picture.exif is not None and b"Camera" in picture.exif
    provenance = read_provenance(answer.content)
    assert provenance is not None
    assert (provenance["model"], provenance["seed"], provenance["scale"]) == ("small", "5", "2")


def test_format_that_cannot_be_written_becomes_png(client: TestClient, image: Image.Image) -> None:
    for format in ("gif", "avif"):
        answer = upload(client, saved(image, format), f"photo.{format}")
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Content-Disposition"].endswith("photo-48x36.png")


def test_response_headers_describe_the_result(client: TestClient, png: bytes) -> None:
    answer = upload(client, png, steps=20, seed=3)
    headers = {name: answer.headers[f"X-LinearSR-{name}"] for name in ("Model", "Seed", "Steps")}
    assert headers == {"Model": "small", "Seed": "3", "Steps": "20"}
    # The scale of the network, whatever size the result was shrunk to.
    assert upload(client, png, scale=2).headers["X-LinearSR-Scale"] == "4"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    parts = re.findall(r"([\w-]+);dur=([\d.]+)", answer.headers["Server-Timing"])
    experts = ["structure", "refinement", "texture", "polish"]
    assert [name for name, _ in parts] == ["prepare", "queue", *experts, "decode", "encode"]
    assert all(float(ms) >= 0 for _, ms in parts)


def test_concurrent_requests_get_their_own_pictures(small: Upscaler, png: bytes) -> None:
    with served(Local(small, slots=6)) as url, httpx2.Client(base_url=url) as client:
        alone = [upload(client, png, steps=4, seed=seed).content for seed in range(6)]
        together: dict[int, bytes] = {}

        def ask(seed: int) -> None:
            together[seed] = upload(client, png, steps=4, seed=seed).content

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert [together[seed] for seed in range(6)] == alone and len(set(alone)) == 6


# Progress


def test_stream_sends_progress_then_the_result(client: TestClient, png: bytes) -> None:
    plain = upload(client, png, "a cat.png", steps=20)
    answer = upload(client, png, "a cat.png", EVENTS, steps=20)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *progress, (name, result) = events(answer.text)
    assert [(e["expert"], e["step"], e["steps"], e["percent"]) for _, e in progress] == [
        ("structure", 0, 20, 0),
        ("structure", 4, 20, 20),
        ("refinement", 4, 20, 20),
        ("refinement", 6, 20, 30),
        ("texture", 6, 20, 30),
        ("texture", 19, 20, 95),
        ("polish", 19, 20, 95),
        ("polish", 20, 20, 100),
    ]
    assert {kind for kind, _ in progress} == {"progress"} and name == "result"
    assert base64.b64decode(result.pop("image")) == plain.content
    assert list(result.pop("timing"))[:3] == ["prepare", "queue", "structure"]
    assert result == {
        "notes": [],
        "format": "png",
        "media_type": "image/png",
        "filename": "a cat-48x36.png",
        "width": 48,
        "height": 36,
        "model": "small",
        "seed": 0,
        "steps": 20,
        "scale": 4.0,
    }


def test_stream_refused_at_once_has_the_status_of_the_refusal(
    client: TestClient, png: bytes
) -> None:
    assert "damaged" in detail(upload(client, png[:-20], headers=EVENTS), 400)
    detail(upload(client, b"no picture", headers=EVENTS), 415)
    detail(upload(client, png, headers=EVENTS, steps=0), 422)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 5}, "scale: must be at most 4, not '5'$"),
        ({"scale": 0.9}, "scale: must be at least 1, not '0.9'$"),
        ({"scale": "four"}, "scale: must be a number, not 'four'$"),
        ({"scale": "NaN"}, "scale: must be "),
        ({"detail": 1.5}, "detail: must be at most 1"),
        ({"detail": "inf"}, "detail: must be "),
        ({"steps": 0}, "steps: must be at least 1, not '0'$"),
        ({"steps": 51}, "steps: must be at most 50"),
        ({"steps": "NaN"}, "steps: must be a whole number"),
        ({"steps": "1e400"}, "steps: must be a whole number"),
        ({"steps": "9" * 5000}, "steps: must be "),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"seed": 2**63}, "seed: must be below 9223372036854775808"),
        ({"width": 0}, "width: must be at least 1"),
        ({"height": 65536}, "height: must be at most 65535"),
        ({"tile": 15}, "tile: must be 'auto' or 'off', or at least 16, not '15'$"),
        ({"tile": "big"}, "tile: must be 'auto' or 'off', or a whole number, not 'big'$"),
        ({"tile": "٣٢"}, "tile: must be 'auto' or 'off', or a whole number"),
        ({"tile": 65536}, "tile: .*65535"),
        ({"tile": "16.5"}, "tile: must be 'auto' or 'off', or a whole number"),
        ({"colour_fix": "magic"}, "colour_fix: must be 'wavelet', 'adain' or 'none', not 'magic'$"),
        ({"solver": "magic"}, "solver: must be 'euler', 'dpm' or 'adams', not 'magic'$"),
        ({"format": "gif"}, "format: must be 'png', 'jpg', 'webp' or 'tif', not 'gif'$"),
        ({"quality": 101}, "quality: must be at most 100"),
        ({"tags": "x" * 1001}, "tags: must have at most 1000 characters$"),
        ({"tags": "cat"}, "tags: small was trained without tags; leave them out"),
        ({"tags": "auto"}, "tags: small was trained without"),
        ({"unknown": 1}, "unknown: is not known; leave it out$"),
        ({"color_fix": "none"}, "color_fix: is not known; did you mean colour_fix"),
        ({"cls": 1}, "cls: "),
        ({"data": 1}, "data: "),
        ({"max_pixels": 10**9}, "max_pixels: "),
        ({"options[steps]": 1}, r"options\[steps\]: "),
        ({"steps": 0, "scale": 9}, "scale.*; steps.*"),
    ],
)
def test_error_names_the_bad_field(
    client: TestClient, service: Local, png: bytes, fields: dict[str, Any], message: str
) -> None:
    answer = detail(upload(client, png, **fields), 422)
    assert re.match(message, answer, re.DOTALL), answer
    assert len(answer) <= 300 and not service.requests


def test_empty_field_counts_as_absent(client: TestClient, png: bytes) -> None:
    names = ("scale", "width", "height", "tags", "tile", "format", "quality", "seed")
    empty = upload(client, png, **dict.fromkeys(names, ""))
    assert empty.content == upload(client, png).content


def test_form_has_the_fields_of_the_command(small_config: ModelConfig) -> None:
    fields = {*Options.model_fields, *FileOptions.model_fields} - {"max_pixels"}
    assert set(Upload.model_fields) == fields | {"image"}
    parsed = Upload(image=UploadFile(io.BytesIO())).parsed(small_config, max_pixels=5)
    assert parsed == (Options(), FileOptions(max_pixels=5))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (END, 422, "image: .*required"),
        (part("image", b"", "empty.png") + END, 415, "empty"),
        (part("image", b"some text") + END, 422, "image: send the picture as a file"),
        (part("image", b"some text", "text.png") + END, 415, "give PNG, JPEG"),
        (part("image", b"<svg/>", "x.svg") + END, 415, "give PNG, JPEG"),
        (part("Image", b"", "x.png") + END, 422, "image: .*required; Image: "),
        (part("steps", b"1") * 2 + END, 422, "steps: sent more than once"),
        (part("image", b"", "a.png") * 2 + END, 400, "Too many files"),
        (b"".join(part(f"f{i}", b"") for i in range(1000)) + END, 400, "Too many fields"),
        (part("tags", b"x" * (MAX_FIELD_BYTES + 1)) + END, 400, "Part exceeded"),
        (part("steps", b"1", "steps.txt") + END, 422, "steps: "),
        (b"", 400, "last boundary"),
        (b"no form at all", 400, "multipart"),
        (END[:-4], 400, "last boundary"),
        (part("image", b"cut off", "x.png")[:-4], 400, "last boundary"),
        (f"--{BOUNDARY}\r\nno header\r\n\r\n".encode() + END, 400, "multipart"),
        (f"--{BOUNDARY}\r\n\r\nnameless\r\n".encode() + END, 400, "Content-Disposition"),
        (f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\n\r\n".encode() + END, 400, "name"),
        (f"--{BOUNDARY}\r\nX: {'x' * 60_000}".encode(), 400, "multipart"),
    ],
)
def test_malformed_form_is_refused(
    client: TestClient, body: bytes, status: int, message: str
) -> None:
    answer = detail(client.post("/v1/upscale", content=body, headers=FORM), status)
    assert re.match(f"(?is).*{message}", answer), answer


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/json",
        "application/x-www-form-urlencoded",
        "image/png",
        "multipart/mixed; boundary=a-boundary",
        "text/plain, multipart/form-data",
        "\xff",
    ],
)
def test_body_of_another_type_is_refused(client: TestClient, png: bytes, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind.encode("latin-1")}
    answer = client.post("/v1/upscale", content=png, headers=headers)
    assert "multipart/form-data" in detail(answer, 415)


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "rot13", "utf-7", "x" * 99])
@pytest.mark.parametrize("times", [1, 2])
def test_form_in_an_odd_character_set_is_refused_or_decoded(
    client: TestClient, png: bytes, charset: str, times: int
) -> None:
    """Some are no text encodings, some fail in their own way, and some yield lone surrogates."""
    body = part("image", png, "+2AA-.png") + part("+2AA-", b"+2AA-") * times + END
    headers = {"Content-Type": f"{FORM['Content-Type']}; charset={charset}"}
    answer = client.post("/v1/upscale", content=body, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    detail(answer, answer.status_code)


def test_damaged_picture_is_refused(client: TestClient, png: bytes) -> None:
    assert "damaged" in detail(upload(client, png[:-20]), 400)
    assert "damaged" in detail(upload(client, png[:16]), 400)


def test_unknown_path_and_method_are_problems(client: TestClient) -> None:
    detail(client.get("/v1/nothing"), 404)
    detail(client.get("/page/../../service.py"), 404)
    answer = client.get("/v1/upscale")
    detail(answer, 405)
    assert answer.headers["Allow"] == "POST"


# Limits


def limited(service: Local, **limits: Any) -> TestClient:
    return TestClient(create_app(service, Limits(**limits)), raise_server_exceptions=False)


def test_request_over_a_limit_is_refused(service: Local, png: bytes) -> None:
    client = limited(service, bytes=len(png), pixels=12 * 9, output_pixels=48 * 36, steps=4)
    assert upload(client, png, steps=4).status_code == 200
    more = png + b"\0"
    assert f"limit of {len(png)}" in detail(upload(client, more), 413)
    assert "steps: 5 is more than the limit of 4" in detail(upload(client, png, steps=5), 422)
    before = service.requests
    client = limited(service, pixels=12 * 9 - 1)
    message = "the picture has 12x9 pixels, more than the limit of 107; crop it or make it smaller"
    assert detail(upload(client, png), 413) == message
    client = limited(service, output_pixels=48 * 36 - 1)
    message = detail(upload(client, png), 413)
    assert message == "the result has 48x36 pixels, more than the limit of 1727; use scale 3"
    assert upload(client, png, scale=3).status_code == 200
    # The model takes four steps by default.
    client = limited(service, steps=3)
    assert "steps: 4 is more than the limit of 3" in detail(upload(client, png, steps=""), 422)
    assert service.requests == before + 1


@pytest.mark.parametrize(("tile", "status"), [("off", 422), (18, 422), (17, 200), ("auto", 200)])
def test_tile_over_the_limit_is_refused(service: Local, tile: int | str, status: int) -> None:
    client = limited(service, tile=17)
    answer = upload(client, saved(Image.new("RGB", (3, 18)), "png"), tile=tile)
    assert answer.status_code == status
    if status == 422:
        assert detail(answer, 422) == "tile: 18 is more than the limit of 17; use auto"
    # A tile is never larger than the picture.
    small = saved(Image.new("RGB", (17, 17)), "png")
    assert upload(client, small, tile=tile).status_code == 200


@pytest.mark.parametrize(
    "size", [{"width": 65535}, {"height": 65535}, {"width": 65535, "height": 65535}]
)
def test_huge_result_of_a_tiny_picture_is_refused_before_any_work(
    client: TestClient, service: Local, size: dict[str, int]
) -> None:
    dot = saved(Image.new("RGB", (1, 1)), "png")
    assert "65535x65535" in detail(upload(client, dot, **size), 413)
    assert not service.requests


def test_size_limit_counts_the_picture_upright(service: Local, image: Image.Image) -> None:
    """Upright, 12 x 9 is 9 x 12: a width of 90 makes 120 rows, not 68."""
    client = limited(service, output_pixels=90 * 100)
    sideways = described(image, "jpeg")
    assert "90x120" in detail(upload(client, sideways, width=90), 413)


def test_result_too_large_for_its_format_is_refused_before_any_work(
    client: TestClient, service: Local
) -> None:
    long = saved(Image.new("RGB", (5000, 1)), "webp")
    message = detail(upload(client, long, "long.webp"), 422)
    assert message.startswith("format: 20000x4 is too large for webp")
    assert not service.requests


def test_decompression_bomb_is_refused_by_its_header(client: TestClient, service: Local) -> None:
    """60,000 x 60,000 empty pixels fit into two megabytes."""
    bomb = png_of(60_000, 60_000, zlib.compress(bytes(60_000 * (60_000 // 8 + 1)), 1))
    assert len(bomb) < Limits().bytes
    assert "60000x60000" in detail(upload(client, bomb), 413)
    assert not service.requests


# The connection


@contextlib.contextmanager
def raw(url: str, *lines: str) -> Iterator[socket.socket]:
    """Yield a connection on which the head of an upload has been sent."""
    _, _, address = url.rpartition("/")
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        head = ["POST /v1/upscale HTTP/1.1", f"Host: {host}", *lines, "", ""]
        connection.sendall("\r\n".join(head).encode())
        yield connection


def status_of(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


KIND = f"Content-Type: {FORM['Content-Type']}"


def test_large_content_length_is_refused_before_the_body(small: Upscaler) -> None:
    with served(Local(small), Limits(bytes=1000)) as url:
        for claimed in (1001 + FORM_OVERHEAD, 10**18):
            with raw(url, KIND, f"Content-Length: {claimed}") as connection:
                assert status_of(connection) == 413


def test_endless_upload_is_cut_at_the_limit(small: Upscaler, png: bytes) -> None:
    """The upload is chunked, so that it has no Content-Length."""
    service = Local(small)
    with served(service, Limits(bytes=100_000)) as url:
        with raw(url, KIND, "Transfer-Encoding: chunked") as connection:
            start = part("image", b"", "x.png")[:-2]
            connection.sendall(b"%x\r\n%s\r\n" % (len(start), start))
            chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
            # The buffers between the two ends fill up before the answer comes.
            for _ in range(2000):
                _, ready, _ = select.select([], [connection], [], PATIENCE)
                if select.select([connection], [], [], 0)[0]:
                    break
                assert ready
                connection.sendall(chunk)
            assert status_of(connection) == 413
        assert not service.requests
        # One upload is a byte too large, and one fits.
        with httpx2.Client(base_url=url) as client:
            for size, status in ((100_001, 413), (100_000, 415)):
                body = part("image", bytes(size), "x.png") + END
                answer = client.post("/v1/upscale", content=iter([body]), headers=FORM)
                detail(answer, status)


def test_small_content_length_cuts_the_upload(small: Upscaler, png: bytes) -> None:
    with served(Local(small)) as url, raw(url, KIND, "Content-Length: 60") as connection:
        connection.sendall(part("image", png, "x.png") + END)
        assert status_of(connection) in (400, 422)


def test_stalled_upload_ends_at_the_deadline(small: Upscaler) -> None:
    service = Local(small)
    limits = Limits(seconds=0.1)
    with served(service, limits) as url, raw(url, KIND, "Content-Length: 1000") as connection:
        connection.sendall(part("steps", b"1"))
        assert status_of(connection) == 504
    assert not service.requests


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_disconnect_frees_the_slot(small: Upscaler, png: bytes, accept: str) -> None:
    service = Local(small, slots=1)
    body = part("image", png, "x.png") + part("steps", b"20") + END
    with served(service) as url:
        with service.held():
            head = (KIND, f"Accept: {accept}", f"Content-Length: {len(body)}")
            with raw(url, *head) as connection:
                connection.sendall(body)
                service.wait_for(free=0)
            service.wait_for(free=1)
        with httpx2.Client(base_url=url) as client:
            assert upload(client, png, steps=20).status_code == 200
    # The second request runs four experts, and the first at most the one that was running.
    assert service.segments <= 5


def test_disconnect_during_an_upload_starts_no_request(small: Upscaler, png: bytes) -> None:
    service = Local(small)
    with served(service) as url:
        for _ in range(3):
            with raw(url, KIND, "Content-Length: 1000") as connection:
                connection.sendall(part("steps", b"1"))
        with httpx2.Client(base_url=url) as client:
            assert upload(client, png).status_code == 200
    assert service.requests == 1


# Slots


def test_busy_server_says_when_to_retry(small: Upscaler, png: bytes) -> None:
    service = Local(small, slots=1)
    with served(service) as url, httpx2.Client(base_url=url, timeout=PATIENCE) as client:
        form: Any = {"files": {"image": ("x.png", png)}, "headers": EVENTS}
        with contextlib.ExitStack() as held:
            held.enter_context(service.held())
            with client.stream("POST", "/v1/upscale", **form) as first:
                lines = first.iter_lines()
                assert next(lines) == "event: progress"
                for headers in ({}, EVENTS):
                    answer = upload(client, png, headers=headers)
                    assert "try again in 2 s" in detail(answer, 429)
                    assert answer.headers["Retry-After"] == "2"
                # Requests without work are answered meanwhile.
                assert client.get("/healthz").status_code == 200
                assert client.get("/v1/models").status_code == 200
                held.close()
                assert "event: result" in list(lines)
        assert upload(client, png).status_code == 200


def test_health_follows_the_service(client: TestClient, service: Local) -> None:
    assert client.get("/healthz").json() == {"status": "ready"}
    service.works = False
    assert "try again soon" in detail(client.get("/healthz"), 503)


def test_models_lists_model_and_limits(service: Local) -> None:
    before = int(time.time())
    client = TestClient(create_app(service, Limits()))
    answer = client.get("/v1/models").json()
    created = answer["data"][0]["created"]
    assert before <= created <= time.time()
    assert answer == {
        "object": "list",
        "data": [
            {
                "id": "small",
                "object": "model",
                "created": created,
                "owned_by": "linearsr",
                "name": "small",
                "scale": 4,
                "smallest_scale": 4.0,
                "experts": ["structure", "refinement", "texture", "polish"],
                "steps": 4,
                "plans": [],
                "tags": False,
            }
        ],
        "limits": Limits().model_dump(),
        "token": False,
    }


# The token


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Bearer gehëim!", 401),
        ("Basic gehëim", 401),
        ("gehëim", 401),
        ("Bearer gehëim", 200),
        ("bearer gehëim", 200),
    ],
)
def test_upload_needs_the_right_token(
    service: Local, png: bytes, header: str | None, status: int
) -> None:
    app = create_app(service, Limits(), digest("gehëim"))
    client = TestClient(app, raise_server_exceptions=False)
    headers: Any = {} if header is None else {"Authorization": header.encode()}
    answer = upload(client, png, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert "bearer token" in detail(answer, 401)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert service.requests == (status == 200)


def test_everything_but_uploads_needs_no_token(service: Local) -> None:
    client = TestClient(create_app(service, Limits(), digest("secret")))
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/v1/models"):
        assert client.get(path).status_code == 200, path
    assert client.get("/v1/models").json()["token"] is True


def test_upload_without_the_token_is_not_read(small: Upscaler) -> None:
    """The answer comes before a byte of the body has been sent."""
    with served(Local(small), token="secret") as url:
        for kind in (KIND, "Content-Type: text/plain"):
            with raw(url, kind, "Content-Length: 1000") as connection:
                assert status_of(connection) == 401


# File names


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("café ☕.png", "café ☕"),
        ("it's.a;b,c=d.png", "it's.a;b,c=d"),
        (r"say \"hi\".png", 'say "hi"'),
        ("../../etc/passwd.png", "passwd"),
        (r"C:\photos\cat.jpg", "cat"),
        (r"..\..\cat", "cat"),
        ("a%0d%0aSet-Cookie: b=c.png", "a%0d%0aSet-Cookie: b=c"),
        ("a\x00b\x1b[2J\x7f.png", "ab[2J"),
        ("a\tb\u2028c.png", "abc"),
        ("gnp\u202e.exe", "gnp.exe"),
        ("Mt. Everest", "Mt. Everest"),
        ("v1.2.jpe", "v1.2"),
        ("x" * 3000 + ".png", "x" * 100),
        ("", "picture"),
        (".", "picture"),
        ("/", "picture"),
        ("\u200b.png", "picture"),
        (".png", ".png"),
    ],
)
def test_odd_file_name_is_cleaned(client: TestClient, png: bytes, name: str, stem: str) -> None:
    body = part("image", png, name) + part("steps", b"1") + END
    answer = client.post("/v1/upscale", content=body, headers=FORM)
    assert answer.status_code == 200, answer.text
    disposition = answer.headers["Content-Disposition"]
    match = re.fullmatch(r"inline; filename\*=UTF-8''([\w%.~-]+)", disposition, re.ASCII)
    assert match and unquote(match[1]) == f"{stem}-48x36.png"
    assert "Set-Cookie" not in answer.headers
    streamed = client.post("/v1/upscale", content=body, headers={**FORM, **EVENTS})
    assert events(streamed.text)[-1][1]["filename"] == f"{stem}-48x36.png"


# Errors of the service


class Scripted:
    """A service that yields the events of a test."""

    def __init__(self, upscaler: Upscaler, script: Callable[[], Events]) -> None:
        self.config = upscaler.config
        self.script = script
        self.begun, self.closed = threading.Event(), threading.Event()

    def models(self) -> list[ModelConfig]:
        return [self.config]

    async def memory(self) -> int:
        return 2**40

    async def ready(self) -> None:
        raise RuntimeError("/secret/path")

    async def upscale(self, request: UpscaleRequest) -> Events:
        self.begun.set()
        try:
            async with contextlib.aclosing(self.script()) as script:
                async for event in script:
                    yield event
        finally:
            self.closed.set()


PROGRESS = Progress("structure", 0, 4)


def result() -> Result:
    return Result(b"...", "png", 48, 36, "modèle 模型", 0, 4, 4.0, {"queue": 1.0})


def raising(error: Exception, *before: Progress) -> Callable[[], Events]:
    async def script() -> Events:
        for event in before:
            yield event
        raise error

    return script


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Full(3), 429),
        (NotReady("wait a little"), 503),
        (OutOfMemory("give a smaller tile"), 503),
        (TooLarge("much too large"), 413),
        (InputError("broken"), 400),
        (OptionError("seed: not that one"), 422),
    ],
)
def test_service_error_becomes_a_problem(
    small: Upscaler, png: bytes, error: Exception, status: int
) -> None:
    client = TestClient(create_app(Scripted(small, raising(error)), Limits()))
    for headers in ({}, EVENTS):
        assert detail(upload(client, png, headers=headers), status) == str(error)
    client = TestClient(create_app(Scripted(small, raising(error, PROGRESS)), Limits()))
    (first, _), (name, problem) = events(upload(client, png, headers=EVENTS).text)
    assert (first, name) == ("progress", "error")
    assert (problem["status"], problem["detail"]) == (status, str(error))
    assert detail(upload(client, png), status) == str(error)


SECRETS = [
    RuntimeError("/secret/path"),
    TimeoutError("/secret/path"),
    OSError(28, "No space left on device", "/secret/path"),
    KeyError("/secret/path"),
    WeightsError("/secret/path lacks a tensor"),
    OutputError("/secret/path cannot be written"),
    UnicodeDecodeError("utf-8", b"/secret/path", 0, 1, "secret"),
]


@pytest.mark.parametrize("error", SECRETS, ids=lambda error: type(error).__name__)
def test_unexpected_error_is_logged_but_not_shown(
    small: Upscaler, png: bytes, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    app = create_app(Scripted(small, raising(error)), Limits())
    client = TestClient(app, raise_server_exceptions=False)
    for headers in ({}, EVENTS):
        answer = upload(client, png, headers=headers)
        assert detail(answer, 500) == "the server failed; see its log"
        assert "secret" not in answer.text + str(answer.headers)
    app = create_app(Scripted(small, raising(error, PROGRESS)), Limits())
    text = upload(TestClient(app), png, headers=EVENTS).text
    assert events(text)[-1][1]["status"] == 500 and "secret" not in text
    logged = [r for r in caplog.records if r.name == "linearsr.web.problems"]
    assert len(logged) == 3 and all(r.exc_info and r.exc_info[1] is error for r in logged)
    assert {r.levelno for r in logged} == {logging.ERROR}


def test_unexpected_error_of_health_is_not_shown(small: Upscaler) -> None:
    app = create_app(Scripted(small, raising(ValueError())), Limits())
    answer = TestClient(app, raise_server_exceptions=False).get("/healthz")
    assert "secret" not in detail(answer, 500)


def test_service_without_a_result_is_an_error(small: Upscaler, png: bytes) -> None:
    for before in ((), (PROGRESS,)):

        async def script(before: tuple[Progress, ...] = before) -> Events:
            for event in before:
                yield event

        app = create_app(Scripted(small, script), Limits())
        client = TestClient(app, raise_server_exceptions=False)
        detail(upload(client, png), 500)
        streamed = upload(client, png, headers=EVENTS)
        if before:
            assert events(streamed.text)[-1][1]["status"] == 500
        else:
            detail(streamed, 500)


async def endless() -> Events:
    yield PROGRESS
    await asyncio.Event().wait()


async def silent() -> Events:
    await asyncio.Event().wait()
    yield PROGRESS


def test_request_is_cancelled_at_the_deadline(small: Upscaler, png: bytes) -> None:
    for script in (endless, silent):
        service = Scripted(small, script)
        client = TestClient(create_app(service, Limits(seconds=0.2)))
        assert "took too long" in detail(upload(client, png), 504)
        assert service.closed.is_set()
    detail(upload(client, png, headers=EVENTS), 504)
    service = Scripted(small, endless)
    client = TestClient(create_app(service, Limits(seconds=1)))
    (first, _), (name, problem) = events(upload(client, png, headers=EVENTS).text)
    assert (first, name, problem["status"]) == ("progress", "error", 504)
    assert service.closed.is_set()


@pytest.mark.parametrize("script", [endless, silent])
@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_closed_connection_cancels_the_request(
    small: Upscaler, png: bytes, script: Callable[[], Events], accept: str
) -> None:
    service = Scripted(small, script)
    body = part("image", png, "x.png") + END
    with served(service) as url:
        head = (KIND, f"Accept: {accept}", f"Content-Length: {len(body)}")
        with raw(url, *head) as connection:
            connection.sendall(body)
            assert service.begun.wait(PATIENCE)
            assert not service.closed.is_set()
        assert service.closed.wait(PATIENCE)


class Client:
    """An ASGI client without a server in between, so that a test decides the order of events."""

    def __init__(self, service: Scripted, png: bytes, accept: str) -> None:
        self.app = create_app(service, Limits())
        self.body = part("image", png, "x.png") + END
        self.accept = accept
        self.gone = asyncio.Event()
        self.sent: list[Any] = []

    async def upload(self) -> None:
        head = [(b"content-type", FORM["Content-Type"].encode()), (b"accept", self.accept.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/upscale", "headers": head}
        await self.app({**scope, "query_string": b""}, self.receive, self.send)

    async def receive(self) -> Any:
        if self.body:
            body, self.body = self.body, b""
            return {"type": "http.request", "body": body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_slow_reader_holds_no_slot(small: Upscaler, png: bytes, accept: str) -> None:
    """The request has finished before its result is sent, even if sending never ends."""

    async def script() -> Events:
        yield result()
        await asyncio.Event().wait()

    async def converse() -> None:
        service = Scripted(small, script)
        client, full = Client(service, png, accept), asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body"):
                full.set()
                await asyncio.Event().wait()

        client.send = send  # type: ignore[method-assign]
        uploading = asyncio.create_task(client.upload())
        await asyncio.wait_for(full.wait(), PATIENCE)
        assert service.closed.is_set()
        uploading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await uploading

    asyncio.run(converse())


@pytest.mark.parametrize("script", [endless, silent])
@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_disconnect_is_not_logged_as_an_error(
    small: Upscaler, png: bytes, script: Callable[[], Events], accept: str
) -> None:
    """The request is cancelled at once too, and not by the garbage collector."""

    async def converse() -> None:
        service = Scripted(small, script)
        client = Client(service, png, accept)
        client.gone.set()
        await asyncio.wait_for(client.upload(), PATIENCE)
        assert service.closed.is_set()
        streams = script is endless and accept == "text/event-stream"
        assert client.sent[0]["status"] == (200 if streams else 499)

    asyncio.run(converse())


def test_stream_that_cannot_begin_cancels_the_request(small: Upscaler, png: bytes) -> None:
    async def converse() -> None:
        service = Scripted(small, endless)
        client = Client(service, png, "text/event-stream")

        async def send(message: Any) -> None:
            raise OSError("gone")

        client.send = send  # type: ignore[method-assign]
        with pytest.raises(OSError, match="gone"):
            await client.upload()
        assert service.closed.is_set()

    asyncio.run(converse())


def test_model_name_in_any_script_fits_a_header(small: Upscaler, png: bytes) -> None:
    async def script() -> Events:
        yield result()

    answer = upload(TestClient(create_app(Scripted(small, script), Limits())), png)
    assert unquote(answer.headers["X-LinearSR-Model"]) == "modèle 模型"


def test_tags_reach_the_model(tagged_config: ModelConfig, tmp_path: Path, png: bytes) -> None:
    experts = [model.state_dict() for model in random_experts(tagged_config, 4)]
    weights.save(tmp_path / "tagged", tagged_config, experts, {}, dtype=torch.float32)
    tagged = Upscaler.load(tmp_path / "tagged", "cpu")
    client = TestClient(create_app(Local(tagged), Limits()))
    cat, dog, none = (upload(client, png, tags=tags) for tags in ("cat, grass", "dog", ""))
    assert len({answer.content for answer in (cat, dog, none)}) == 3
    provenance = read_provenance(cat.content)
    assert provenance is not None and provenance["tags"] == "cat, grass"
    odd = upload(client, png, tags="猫\0,\u202e\x1b[2J")
    assert odd.status_code == 200 and np.isfinite(read(odd.content).pixels.numpy()).all()
    assert client.get("/v1/models").json()["data"][0]["tags"] is True


def test_page_and_its_files_are_served(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
