"""Fixtures and helpers for tests of the HTTP API: a tiny model, a picture, forms, problems."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from linearsr import Upscaler
from linearsr.web.api import create_app
from linearsr.web.service import Limits
from tests.web.local import Local

BOUNDARY = "a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
END = f"--{BOUNDARY}--\r\n".encode()


@pytest.fixture(scope="session")
def small(small_bundle: Path) -> Upscaler:
    return Upscaler.load(small_bundle, "cpu")


@pytest.fixture
def service(small: Upscaler) -> Local:
    return Local(small)


@pytest.fixture
def client(service: Local) -> Iterator[TestClient]:
    """Yield a client without a socket; it returns a 500 like any other response."""
    with TestClient(create_app(service, Limits()), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return Image.effect_mandelbrot((12, 9), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="session")
def png(image: Image.Image) -> bytes:
    return saved(image, "png")


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a 1-bit PNG that claims this size; `rows` are its compressed pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    ends = [(len(data), kind + data, zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", length) + data + struct.pack(">I", crc) for length, data, crc in ends
    )


def part(name: str, value: bytes, file_name: str | None = None) -> bytes:
    """Return a part of a form, with nothing escaped; a whole form is `part(...) + END`."""
    file = "" if file_name is None else f'; filename="{file_name}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def detail(response: Any, status: int) -> str:
    """Return the detail of a problem, after checking the rest of it."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    told = response.json()
    assert told.keys() == {"type", "title", "status", "detail"}
    assert told["type"] == "about:blank" and told["status"] == status
    assert told["title"] and told["detail"]
    return str(told["detail"])
