"""Files with all the metadata there is, mangled: a picture or an error, soon, and of its size."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest
from PIL import Image, features

from linearsr.errors import InputError
from linearsr.imaging import files
from tests.imaging.test_colour_tags import chrm, cicp, dcf_exif, gama
from tests.imaging.test_metadata_kept import (
    XMP,
    camera_exif,
    chunk,
    jpeg_with_iptc,
    photo,
    png_with_texts,
    saved,
)
from tests.imaging.test_metadata_places import ADOBE, bmp, extended_xmp, gif
from tests.imaging.test_pages import THUMBNAIL, tiff

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = 300


def cases() -> list[bytes]:
    """Files of all kinds, 48 x 32 each."""
    image = photo()
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    data = saved(image, "PNG")
    frames = [image, image.rotate(180)]
    full = {"size": (48, 32)}
    found = [
        png_with_texts(),
        data[:33] + chunk(*gama(1.0)) + chunk(*chrm()) + chunk(*cicp(12, 13, 0, 1)) + data[33:],
        saved(alpha, "PNG", dpi=(300, 300)),
        saved(image, "JPEG", exif=camera_exif(), xmp=XMP, dpi=(300, 300)),
        saved(image, "JPEG", exif=dcf_exif(65535), progressive=True),
        jpeg_with_iptc(),
        saved(alpha, "WEBP", exif=camera_exif()[6:], xmp=XMP),
        saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        saved(frames[0], "TIFF", save_all=True, append_images=frames[1:], tiffinfo={700: XMP}),
        saved(image, "TIFF", compression="tiff_lzw"),
        tiff({**THUMBNAIL, "sub": [full]}),
        tiff(THUMBNAIL, full, order=">"),
        files.encode(files.from_pil(alpha), "tiff", provenance={"software": "linearsr"}),
        saved(image, "BMP"),
        saved(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        bmp(b"DEBM", profile=ADOBE),
        extended_xmp(0, 60_000),
        gif(),
    ]
    if features.check("jpg_2000"):
        found.append(saved(image, "JPEG2000"))
    if features.check("avif"):
        found.append(saved(alpha, "AVIF", exif=camera_exif(), xmp=XMP))
    return found


def mangled(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut or repeat bytes, once or a few times."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(400, len(data)))
        size = rng.randint(1, 24)
        kind = rng.choice(["flip", "cut", "repeat", "end"])
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ rng.randint(1, 255)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + size :]
        elif kind == "repeat":
            data = data[: at + size] + data[at : at + size] + data[at + size :]
        else:
            data = data[: max(1, at)]
    return data


def check(data: bytes) -> tuple[int, int] | None:
    """Read a file; return the size of the picture, or None if it was refused."""
    start = time.monotonic()
    try:
        picture = files.read(data, max_pixels=1_000_000)
    except InputError:
        return None
    finally:
        assert time.monotonic() - start < 20
    height, width = picture.pixels.shape[1:]
    for plane in (picture.pixels, *([] if picture.alpha is None else [picture.alpha])):
        assert plane.isfinite().all()
        assert plane.min() >= 0
        assert plane.max() <= 1
    for format in ("jpeg", "tiff", "webp", "png"):
        again = files.read(files.encode(picture, format, provenance={"software": "linearsr"}))
        assert again.pixels.shape == picture.pixels.shape
    return width, height


def test_cases_are_read() -> None:
    for data in cases():
        assert check(data) in ((48, 32), (32, 48))  # upright


def test_mangled_files_give_a_picture_or_an_error() -> None:
    rng = random.Random(19)
    found = cases()
    read = 0
    for number in range(VARIANTS):
        read += check(mangled(found[number % len(found)], rng)) is not None
    assert 0 < read < VARIANTS


# Reads a JPEG with bytes too many. Should Python log what libvips warns of, then it frees other
# such images in the meantime, as its garbage collector may.
FREED_WHILE_LOGGING = """
import io, logging
from PIL import Image
from linearsr.imaging import files
from linearsr.imaging.vips import pyvips

file = io.BytesIO()
Image.new("RGB", (64, 64)).save(file, "JPEG")
data = file.getvalue().replace(b"\\xff\\xdb", b"\\0\\0\\0\\xff\\xdb", 1)
held = [pyvips.Image.jpegload_buffer(data) for _ in range(3)]

class Freeing(logging.Filter):
    def filter(self, record):
        held.clear()

logging.getLogger("pyvips").addFilter(Freeing())
print(*files.read(data).pixels.shape)
"""


def test_warnings_of_damaged_files_never_end_the_process() -> None:
    command = [sys.executable, "-c", FREED_WHILE_LOGGING]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 64 64\n", "")
