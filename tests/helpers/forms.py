"""Uploads and answers of the HTTP API: pictures, multipart forms, problems."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

BOUNDARY = "a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
END = f"--{BOUNDARY}--\r\n".encode()


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
    problem = response.json()
    assert problem.keys() == {"type", "title", "status", "detail"}
    assert problem["type"] == "about:blank" and problem["status"] == status
    assert problem["title"] and problem["detail"]
    return str(problem["detail"])
