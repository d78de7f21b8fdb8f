"""A thousand malformed uploads: each is refused or upscaled, and none leaves anything behind."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import random
import re
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import psutil
import pytest
from PIL import Image

from linearsr import Upscaler
from linearsr.web.service import Limits
from tests.helpers.forms import BOUNDARY, END, FORM, detail, part, png_of, saved
from tests.helpers.local_service import PATIENCE, Local, served

# pytest shows PIL's warnings about broken tags, which the package hides.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

UPLOADS = 1000
PADDING = bytes(100_000)
# Small, so that memory that grows with pictures (torch keeps a plan of each new shape) does not
# hide memory that grows with uploads.
LIMITS = Limits(bytes=200_000, pixels=2_000, output_pixels=40_000)
MANGLED = ("png", "deep png", "jpeg", "webp", "tiff", "avif", "gif")
FIELDS = (
    *("image", "scale", "width", "height", "steps", "solver", "seed", "tags", "tile", "colour_fix"),
    *("format", "quality", "cls", "self", "data", "model_fields", "__class__", "max_pixels"),
    *("", " ", "steps ", "STEPS", "steps[]", "steps[0][a]", "options.steps", "naïve", "\u202e"),
    *("x" * 3000, "%s%n", "{0}", "../..", "\x00"),
)
VALUES = (
    *("", " ", "0", "1", "2", "4", "-1", "-0", "+1", "1.0", "1.5", "1e3", "1e999", "NaN", "inf"),
    *("9" * 30, "9" * 5000, "9223372036854775807", "9223372036854775808", "65535", "65536"),
    *("0x10", "1_0", "٣", "²", "½", "1\x00", "1\n2", "null", "None", "true", "[]", "{}"),
    *(
        "auto",
        "off",
        "png",
        "jpg",
        "gif",
        "PNG",
        "wavelet",
        "cat, grass",
        ",,,",
        "\ud7ff",
        "😀" * 500,
    ),
    *("x" * 8192, "x" * 9000, "'; DROP TABLE", "<script>", "${jndi:x}", "../../etc/passwd", "%00"),
)


def pictures() -> dict[str, bytes]:
    """Real files of every format that is read, 40 x 30 pixels of a fractal."""
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    turned = image.rotate(180)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    deep = Image.frombytes("I;16", (40, 30), random.Random(0).randbytes(2400))
    return {
        "png": saved(image, "png", exif=exif),
        "deep png": saved(deep, "png"),
        "jpeg": saved(image, "jpeg", exif=exif, progressive=True),
        "webp": saved(image, "webp", save_all=True, append_images=[turned]),
        "tiff": saved(image, "tiff", compression="tiff_lzw", save_all=True, append_images=[turned]),
        "avif": saved(image, "avif"),
        "gif": saved(image, "gif", save_all=True, append_images=[turned]),
    }


def others() -> dict[str, bytes]:
    """Return files that are no pictures, or in a format that cannot be read."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.png", bytes(10_000))
    image = Image.new("RGB", (40, 30))
    return {
        "empty": b"",
        "text": b"not a picture, but words " * 100,
        "zip": archive.getvalue(),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999"/>',
        "pdf": saved(image, "pdf"),
        "bmp": saved(image, "bmp"),
        "pickle": b"\x80\x04c__builtin__\neval\n(S'1'\ntR.",
        "signature": b"\x89PNG\r\n\x1a\n",
        "zeros": bytes(50_000),
        "noise": random.Random(0).randbytes(50_000),
    }


# Mangling


def mangled(chance: random.Random, data: bytes) -> bytes:
    """Cut the file, flip bits, or drop, double or overwrite a piece of it."""
    where, length = sorted(chance.sample(range(len(data)), 2)), chance.choice([1, 2, 4, 8])
    first, last = where
    flipped = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    head = chance.randrange(min(len(data), 100))
    return chance.choice(
        [
            data[:last],
            bytes(flipped),
            data[:first] + data[last:],
            data[:last] + data[first:],
            data[:first] + chance.randbytes(last - first) + data[last:],
            data[:head] + b"\xff" * length + data[head + length :],
            data[:head] + bytes(length) + data[head + length :],
        ]
    )


def claiming(chance: random.Random) -> bytes:
    """Return a header that claims more pixels than fit into memory, with or without some data."""
    wide, high = (chance.choice([1, 16383, 40_000, 65535]) for _ in range(2))
    rows = chance.choice([b"", b"x\x9c\x03\x00\x00\x00\x00\x01", chance.randbytes(100)])
    start = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    frame = struct.pack(">BBHBHHB", 255, 0xC0, 17, 8, high, wide, 3) + bytes.fromhex(
        "011100021101031101"
    )
    extended = b"VP8X" + struct.pack("<IB3x", 10, 0)
    extended += (wide - 1).to_bytes(3, "little") + (high - 1).to_bytes(3, "little")
    return chance.choice(
        [
            png_of(wide, high, rows),
            png_of(2**31 - 1, 2**31 - 1, rows),
            start + frame + rows,
            b"RIFF" + struct.pack("<I", 4 + len(extended) + len(rows)) + b"WEBP" + extended + rows,
            b"GIF89a" + struct.pack("<HHBBB", wide, high, 0xF0, 0, 0) + bytes(6) + b"," + rows,
            tiff_of(wide, high, chance.choice([1, 2**32 - 1]), rows),
        ]
    )


def tiff_of(wide: int, high: int, count: int, rows: bytes) -> bytes:
    """Return a TIFF with eight bits, one channel and one strip of `count` bytes."""
    tags = {256: wide, 257: high, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: high, 279: count}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + rows


# Uploads


class Uploads:
    """Yield one kind of upload after another; the same seed yields the same ones."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.pictures, self.others = pictures(), others()
        self.kinds: dict[str, Callable[[], bytes]] = {
            "valid": self.valid,
            "mangled": self.mangled,
            "claim": lambda: self.form(claiming(self.chance)),
            "other": lambda: self.form(self.chance.choice([*self.others.values()])),
            "fields": self.fields,
            "several": self.several,
            "broken form": self.broken,
        }

    def next(self) -> tuple[str, bytes, dict[str, str]]:
        """Return the kind, body and headers of an upload."""
        kind = self.chance.choice([*self.kinds, "mangled", "mangled", "fields"])
        body = self.kinds[kind]()
        accept = self.chance.choice(["*/*", "*/*", "text/event-stream", "\xff;q=x"])
        return kind, body, {**FORM, "Accept": accept}

    def form(self, image: bytes, *more: bytes) -> bytes:
        name = self.chance.choice(["x.png", "", "a/b\\c", "\u202e😀.jpg", "x" * 500])
        # Bytes after the end of a picture are ignored; a leak of them would be seen.
        image = image and image + PADDING
        parts = [part("image", image, name), part("steps", b"1"), *more]
        self.chance.shuffle(parts)
        return b"".join(parts) + END

    def valid(self) -> bytes:
        return self.form(self.chance.choice([*self.pictures.values()]))

    def mangled(self) -> bytes:
        return self.form(mangled(self.chance, self.pictures[self.chance.choice(MANGLED)]))

    def fields(self) -> bytes:
        image = self.chance.choice([*self.pictures.values()])
        odd = [self.field() for _ in range(self.chance.choice([1, 1, 2, 5, 50]))]
        return self.form(image, *odd)

    def field(self) -> bytes:
        name, value = self.chance.choice(FIELDS), self.chance.choice(VALUES).encode()
        return part(name, value, self.chance.choice([None, None, None, "a file.txt"]))

    def several(self) -> bytes:
        names = [self.chance.choice(["image", "image", "image2"]) for _ in range(3)]
        images = self.chance.choices([*self.pictures.values(), *self.others.values()], k=3)
        return b"".join(part(n, i, "x.png") for n, i in zip(names, images, strict=True)) + END

    def broken(self) -> bytes:
        whole = self.form(self.pictures["png"])
        mark = f"--{BOUNDARY}".encode()
        return self.chance.choice(
            [
                mangled(self.chance, whole),
                whole[: self.chance.randrange(len(whole))],
                whole.replace(mark, mark[:-1]),
                whole.replace(b"\r\n", b"\n"),
                whole.replace(b"form-data", b"attachment"),
                whole.replace(b"name=", b"nam="),
                whole.replace(b'"image"', b'"image'),
                mark + b"\r\n" + b"X: y\r\n" * 5000 + whole,
                mark * 1000,
                self.chance.randbytes(1000),
            ]
        )


def status_of(response: Any) -> int:
    """Return the status; for a stream that ended with an error, the status of that."""
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        if response.status_code >= 400:
            detail(response, response.status_code)
        return int(response.status_code)
    name, data = re.findall(r"^event: (\w+)\r\ndata: (.*)\r\n", response.text, re.MULTILINE)[-1]
    return 200 if name == "result" else json.loads(data)["status"]


def settled() -> tuple[int, int]:
    """Return the memory in bytes and the number of open files of this process.

    Memory that is free, but that the allocator has kept, is given back first.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds()


def test_random_uploads_break_nothing_and_leave_nothing(
    small: Upscaler, caplog: pytest.LogCaptureFixture
) -> None:
    service = Local(small)
    sent = 0
    with served(service, LIMITS) as url, httpx2.Client(base_url=url, timeout=PATIENCE) as client:

        def send(uploads: Uploads) -> tuple[str, int]:
            nonlocal sent
            kind, body, headers = uploads.next()
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            status = status_of(client.post("/v1/upscale", content=body, headers=raw))
            assert 200 <= status < 300 or 400 <= status < 500, (kind, status, body[:300])
            sent += len(body)
            return kind, status

        good = Uploads(0).valid()
        before = client.post("/v1/upscale", content=good, headers=FORM)
        # Warm up, until threads, pools and caches have reached their size.
        warm, fuzz = Uploads(1), Uploads(2)
        for _ in range(UPLOADS // 2):
            send(warm)
        memory, files = settled()
        sent = 0
        statuses = Counter(send(fuzz) for _ in range(UPLOADS))
        # The connection of a refused upload is closed a little after the answer.
        for _ in range(1000):
            if settled()[1] <= files:
                break
            client.get("/v1/models")
        memory_after, files_after = settled()
        after = client.post("/v1/upscale", content=good, headers=FORM)
    assert before.status_code == 200 and after.content == before.content
    assert {status for _, status in statuses} == {200, 400, 413, 415, 422}
    assert {kind for kind, _ in statuses} == set(fuzz.kinds)
    assert sum(count for (_, status), count in statuses.items() if status == 200) > 100
    assert service.free == service.slots
    # If bodies, pictures or results leaked, most of the bytes sent would still be here; allocators
    # keep a little (2 MB of 85).
    assert memory_after - memory < sent / 10, (memory, memory_after, sent)
    assert files_after <= files
    assert not [record for record in caplog.records if record.name.startswith("linearsr")]
