"""Picture files of every format and mode are read and written; damaged ones are refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips  # type: ignore[import-untyped]
import skimage
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import IFDRational

from linearsr.errors import InputError, OptionError, OutputError
from linearsr.imaging import files
from linearsr.imaging.files import Picture

# pytest shows PIL's warnings about broken tags, which the package hides.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
FORMATS = ("png", "jpeg", "webp", "tiff")
SUFFIX = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}
PROVENANCE = {
    "software": "linearsr 0.1.0",
    "model": "linearsr-tiny",
    "scale": "4",
    "steps": "4",
    "seed": "0",
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A photograph with a red mug, neither square nor of an even size."""
    return Image.open(PHOTOGRAPHS / "coffee.png").convert("RGB").crop((60, 40, 183, 121))


@pytest.fixture(scope="module")
def grey_photo() -> Image.Image:
    return Image.open(PHOTOGRAPHS / "camera.png").convert("L").crop((180, 60, 291, 150))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    if format == "AVIF":
        return saved_as_avif(image, **options)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def saved_as_avif(image: Image.Image, exif: bytes = b"") -> bytes:
    # Not every supported PIL writes AVIF.
    lazy = pyvips.Image.new_from_array(np.asarray(image)).copy(interpretation="srgb")
    if exif:
        lazy.set_type(pyvips.GValue.blob_type, "exif-data", exif)
    return bytes(lazy.heifsave_buffer(compression="av1", Q=90, effort=0))


def as_8_bits(picture: Picture) -> np.ndarray:
    return (picture.pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def as_16_bits(plane: torch.Tensor) -> np.ndarray:
    return (plane.double() * 65535).round().to(torch.int64).numpy()


def ramp(bits: int = 16, *, grey: bool = False, alpha: bool = False) -> Picture:
    """Return every value of a 16-bit sample, in another order in each channel."""
    values = torch.arange(65536, dtype=torch.float64).reshape(1, 256, 256) / 65535
    turned = torch.cat([values, values.transpose(1, 2), values.flip(1)]).float()
    pixels = values.float().repeat(3, 1, 1) if grey else turned
    return Picture(pixels, turned[2:3].clone() if alpha else None, bits, grey, None, None, "png")


def camera_exif(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[Base.Make], exif[Base.Model] = "Canon", "EOS 5D"
    exif[Base.ImageDescription] = "A mug"
    exif[Base.Orientation] = orientation
    exif[Base.XResolution], exif[Base.YResolution], exif[Base.ResolutionUnit] = 300.0, 300.0, 2
    exif[IFD.Exif] = {Base.ExposureTime: IFDRational(1, 200)}
    exif[IFD.GPSInfo] = {1: "N"}
    return exif.tobytes()


def exif_of(data: bytes) -> Image.Exif:
    return Image.open(io.BytesIO(data)).getexif()


# Files of other programs


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_lossless_colour_pixels_are_exact(photo: Image.Image, format: str) -> None:
    data = saved(photo, format)
    picture = files.read(data)
    assert picture.format == format.lower()
    assert (picture.bits, picture.grey, picture.alpha) == (8, False, None)
    assert picture.pixels.dtype == torch.float32
    assert picture.pixels.is_contiguous()
    np.testing.assert_array_equal(as_8_bits(picture), np.asarray(photo))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_pixels_are_those_of_pil(photo: Image.Image, format: str) -> None:
    data = saved(photo, format, quality=90)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(as_8_bits(files.read(data)).astype(int) - theirs).mean() < 1


def test_a_file_is_read_by_path_whatever_its_name_says(photo: Image.Image, tmp_path: Path) -> None:
    for name in ("mug.jpg", "mug[page=3].png", "mug.svg", "mug"):
        path = tmp_path / name
        path.write_bytes(saved(photo, "PNG"))
        assert files.read(path).format == files.read(str(path)).format == "png"


def test_gif_and_avif_give_their_first_frame(photo: Image.Image) -> None:
    small = photo.quantize(64)
    black = Image.new("P", small.size)
    picture = files.read(saved(small, "GIF", save_all=True, append_images=[black]))
    assert (picture.format, picture.pixels.shape) == ("gif", (3, 81, 123))
    np.testing.assert_array_equal(as_8_bits(picture), np.asarray(small.convert("RGB")))
    picture = files.read(saved(photo, "AVIF"))
    assert picture.format == "avif"
    general = saved(photo, "AVIF").replace(b"ftypavif", b"ftypmif1", 1)
    assert files.read(general).format == "avif"
    with pytest.raises(InputError, match="HEIC"):
        files.read(general.replace(b"avif", b"heic"))
    assert np.abs(as_8_bits(picture).astype(int) - np.asarray(photo)).mean() < 4


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_modes_of_png_and_tiff_are_read(
    photo: Image.Image, grey_photo: Image.Image, mode: str, format: str
) -> None:
    if mode == "I;16":
        wide = np.asarray(grey_photo).astype(np.uint16) * 257 + 3
        image = Image.fromarray(wide)
    elif mode in ("1", "L", "LA"):
        image = grey_photo.convert(mode)
    else:
        image = photo.convert(mode)
    if mode in ("LA", "RGBA"):
        mask = Image.linear_gradient("L").resize(image.size)
        image.putalpha(mask)
    picture = files.read(saved(image, format))
    assert picture.grey == (mode in ("1", "L", "LA", "I;16"))
    assert picture.bits == (16 if mode == "I;16" else 8)
    assert picture.pixels.shape == (3, image.height, image.width)
    if mode == "I;16":
        np.testing.assert_array_equal(as_16_bits(picture.pixels[1]), wide)
        return
    np.testing.assert_array_equal(as_8_bits(picture), np.asarray(image.convert("RGB")))
    if mode in ("LA", "RGBA"):
        assert picture.alpha is not None
        alpha = (picture.alpha[0] * 255).round().to(torch.uint8).numpy()
        np.testing.assert_array_equal(alpha, np.asarray(mask))
    else:
        assert picture.alpha is None


def test_palette_and_grey_with_a_transparent_colour_have_alpha(photo: Image.Image) -> None:
    image = photo.quantize(16)
    picture = files.read(saved(image, "PNG", transparency=3))
    assert picture.alpha is not None
    clear = np.asarray(image) == 3
    assert clear.any()
    np.testing.assert_array_equal(picture.alpha[0].numpy(), np.where(clear, 0, 1))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_srgb_and_loses_its_profile(photo: Image.Image, format: str) -> None:
    # A profile of the wrong kind must be neither used nor written beside the sRGB pixels.
    picture = files.read(saved(photo.convert("CMYK"), format, icc_profile=SRGB))
    assert picture.icc is None
    assert not picture.grey
    # Inks are duller than light, so the match is rough; inverted inks would be far off.
    assert np.abs(as_8_bits(picture).astype(int) - np.asarray(photo)).mean() < 40
    mug = (slice(30, 40), slice(80, 90))
    assert np.corrcoef(as_8_bits(picture)[mug].ravel(), np.asarray(photo)[mug].ravel())[0, 1] > 0.9


def test_tiff_gives_its_first_page_and_their_number(
    photo: Image.Image, grey_photo: Image.Image
) -> None:
    data = saved(photo, "TIFF", save_all=True, append_images=[grey_photo])
    picture = files.read(data)
    assert picture.pages == 2
    np.testing.assert_array_equal(as_8_bits(picture), np.asarray(photo))


def test_other_samples_are_refused_by_name(grey_photo: Image.Image) -> None:
    with pytest.raises(InputError, match=r"scan\.tif: holds float samples; convert"):
        files.read(saved(grey_photo.convert("F"), "TIFF"), name="scan.tif")
    with pytest.raises(InputError, match="holds int samples"):
        files.read(saved(grey_photo.convert("I"), "TIFF"))
    bands = pyvips.Image.black(8, 8, bands=7).tiffsave_buffer()
    with pytest.raises(InputError, match="convert it to RGB"):
        files.read(bytes(bands))


@pytest.mark.parametrize("orientation", [1, 6])
def test_tiff_that_only_pil_reads_is_measured_upright(photo: Image.Image, orientation: int) -> None:
    data = saved(photo, "TIFF", compression="zstd", tiffinfo={Base.Orientation: orientation})
    _, height, width = files.read(data).pixels.shape
    assert (height, width) == ((123, 81) if orientation == 6 else (81, 123))
    assert files.measure(data) == ("tiff", [(width, height)])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset(
    photo: Image.Image, format: str, orientation: int
) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(photo, format, exif=camera_exif(orientation), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    picture = files.read(data)
    # JPEG decoders may differ by rounding.
    tolerance = 3 if format == "JPEG" else 0
    difference = as_8_bits(picture).astype(int) - np.asarray(upright)
    assert np.abs(difference).max() <= tolerance
    again = files.read(files.encode(picture, "png"))
    assert torch.equal(again.pixels, picture.pixels)
    assert picture.exif is not None
    exif = Image.Exif()
    exif.load(picture.exif)
    assert exif.get(Base.Orientation, 1) == 1
    assert exif[Base.Model] == "EOS 5D"


@pytest.mark.parametrize("data", [b"garbage", b"Exif\0\0II*\0garbage", b"MM\0*" + b"\xff" * 60])
def test_broken_exif_and_profile_are_dropped(photo: Image.Image, data: bytes) -> None:
    for format in ("PNG", "JPEG", "WEBP"):
        picture = files.read(saved(photo, format, exif=data, icc_profile=b"broken" * 40))
        assert picture.icc is None
        assert picture.pixels.shape == (3, 81, 123)
        for target in FORMATS:
            assert files.read(files.encode(picture, target, provenance=PROVENANCE))


def png_chunk(kind: bytes, body: bytes, *, crc_error: int = 0) -> bytes:
    crc = zlib.crc32(kind + body) ^ crc_error
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


@pytest.mark.parametrize("kind", [b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"gAMA", b"pHYs"])
@pytest.mark.parametrize("crc_error", [0, 1])
def test_broken_png_metadata_does_not_cost_the_pixels(
    photo: Image.Image, kind: bytes, crc_error: int
) -> None:
    data = saved(photo, "PNG")
    broken = data[:33] + png_chunk(kind, b"x\0\0junk", crc_error=crc_error) + data[33:]
    np.testing.assert_array_equal(as_8_bits(files.read(broken)), np.asarray(photo))


def test_exif_that_points_everything_at_one_large_block_is_read_in_no_time() -> None:
    size, tags = 4_000_000, 5000
    directory = struct.pack("<H", tags) + b"".join(
        struct.pack("<HHII", 0x8000 + tag, 7, size - 100, 8) for tag in range(tags)
    )
    block = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(size, b"\0")
    data = saved(Image.new("RGB", (4, 4)), "PNG")
    start = time.monotonic()
    picture = files.read(data[:33] + png_chunk(b"eXIf", block) + data[33:])
    assert picture.pixels.shape == (3, 4, 4)
    assert time.monotonic() - start < 5


# Refusals


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", body), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"big\.png: 100000x100000 .*--max-pixels"):
        files.read(bomb(), name="big.png")
    assert time.monotonic() - start < 1


def test_the_pixel_limit_is_set_by_the_caller(photo: Image.Image, tmp_path: Path) -> None:
    data = saved(photo, "WEBP")
    with pytest.raises(InputError, match="--max-pixels"):
        files.read(data, max_pixels=123 * 81 - 1)
    assert files.read(data, max_pixels=123 * 81).pixels.shape == (3, 81, 123)
    huge = tmp_path / "huge.png"
    huge.touch()
    os.truncate(huge, 2**40)
    with pytest.raises(InputError, match=r"bytes are more than a picture of.*--max-pixels"):
        files.read(huge)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF", "vips TIFF"])
def test_a_truncated_file_fails_wherever_it_was_cut(photo: Image.Image, format: str) -> None:
    if format == "vips TIFF":
        data = files.encode(files.from_pil(photo), "tiff", provenance=PROVENANCE)
    elif format == "TIFF":
        data = saved(photo, "TIFF", compression="tiff_lzw")
    else:
        data = saved(photo, format)
    # The last bytes of these only say that nothing follows: every pixel is there without them.
    needed = len(data) - {"PNG": 16, "GIF": 2, "JPEG": 2, "vips TIFF": 4}.get(format, 0)
    assert files.read(data).pixels.shape == (3, 81, 123)
    for length in sorted({*range(0, needed, max(1, needed // 40)), needed - 1}):
        with pytest.raises(InputError):
            files.read(data[:length])


def test_an_error_message_with_bytes_of_the_file_becomes_an_input_error(photo: Image.Image) -> None:
    # Rename a property and call all of them essential: the decoder says which one it misses.
    data = bytearray(saved(photo, "AVIF").replace(b"pixi", b"pi\x90i"))
    associations = data.index(b"ipma") + 15
    for place in range(associations, associations + data[associations - 1]):
        data[place] |= 0x80
    for _ in range(2):
        with pytest.raises(InputError, match="no readable reason"):
            files.read(bytes(data))
    with pytest.raises(InputError, match="premature end"):
        files.read(saved(photo, "JPEG")[:2000])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not a picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not a picture"),
        (b"%PDF-1.7", "not a picture"),
        (b"P5 2 2 255 abcd", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated"),
        (b"\xff\xd8\xff\xe0", "damaged or truncated"),
        (b"RIFF\0\0\0\0WEBP", "damaged or truncated"),
        (b"II*\0\x08\0\0\0\0\0", "damaged or truncated"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        files.read(data, name="thing.png")
    assert str(error.value).startswith("thing.png: ")
    assert "\n" not in str(error.value)


def test_a_png_of_no_size_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IEND", b"")
    with pytest.raises(InputError):
        files.read(data)


def test_paths_that_are_no_readable_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (
        tmp_path,
        tmp_path / "missing.png",
        tmp_path / "file" / "below.png",
        tmp_path / "pipe.png",
        tmp_path / ("x" * 300 + ".png"),
        tmp_path / "null\0byte.png",
    ):
        with pytest.raises(InputError) as error:
            files.read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def examples() -> list[bytes]:
    photo = Image.open(PHOTOGRAPHS / "coffee.png").convert("RGB").crop((60, 40, 108, 72))
    exif, grey = camera_exif(6), photo.convert("L")
    alpha = photo.copy()
    alpha.putalpha(grey)
    return [
        saved(photo, "PNG", exif=exif, icc_profile=SRGB),
        saved(photo.quantize(16), "PNG", transparency=3),
        saved(photo, "JPEG", exif=exif, icc_profile=SRGB),
        saved(photo, "JPEG", progressive=True),
        saved(photo.convert("CMYK"), "JPEG"),
        saved(alpha, "WEBP", exif=exif, icc_profile=SRGB),
        saved(photo, "WEBP", lossless=True),
        saved(photo, "TIFF", exif=exif, icc_profile=SRGB),
        saved(grey, "TIFF", compression="tiff_lzw"),
        files.encode(ramp(alpha=True), "tiff", provenance=PROVENANCE),
        saved(photo, "GIF"),
        saved(photo, "AVIF", exif=exif),
    ]


EXAMPLES = examples()
EDIT = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "overwrite"]),
    # Headers and directories sit at the ends, so both ends are hit more often.
    st.one_of(st.integers(0, 400), st.integers(-400, -1), st.integers(0, 2**16)),
    st.binary(min_size=1, max_size=6),
)


def mangled(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, value in edits:
        if not data:
            break
        at = place % len(data)
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (value[0] or 1)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value[0] + 1 :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        else:
            data = data[:at] + value + data[at + len(value) :]
    return data


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(0, len(EXAMPLES) - 1), st.lists(EDIT, min_size=1, max_size=6))
@example(0, [("cut", 0, b"\xff")])
def test_mangled_bytes_give_a_picture_or_an_input_error(
    which: int, edits: list[tuple[str, int, bytes]]
) -> None:
    try:
        picture = files.read(mangled(EXAMPLES[which], edits), max_pixels=1_000_000)
    except InputError:
        return
    height, width = picture.pixels.shape[1:]
    assert picture.pixels.shape == (3, height, width)
    assert height * width > 0
    planes = [picture.pixels] + ([] if picture.alpha is None else [picture.alpha])
    for plane in planes:
        assert plane.shape[1:] == (height, width)
        assert plane.isfinite().all()
        assert plane.min() >= 0
        assert plane.max() <= 1
    # Whatever metadata survived can be written again.
    small = dataclasses.replace(picture, pixels=torch.zeros(3, 2, 2), alpha=None)
    assert files.encode(small, "jpeg", provenance=PROVENANCE)
    assert files.encode(small, "tiff", provenance=PROVENANCE)


# Round trips


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_every_16_bit_value_survives(format: str, grey: bool, alpha: bool) -> None:
    before = ramp(grey=grey, alpha=alpha)
    after = files.read(files.encode(before, format))
    assert (after.bits, after.grey, after.format) == (16, grey, format)
    np.testing.assert_array_equal(as_16_bits(after.pixels), as_16_bits(before.pixels))
    assert (after.alpha is None) == (before.alpha is None)
    if before.alpha is not None and after.alpha is not None:
        np.testing.assert_array_equal(as_16_bits(after.alpha), as_16_bits(before.alpha))
    assert len(np.unique(as_16_bits(after.pixels))) == 65536


@pytest.mark.parametrize(("format", "bits"), [("png", 8), ("tiff", 8), ("webp", 8), ("webp", 16)])
def test_every_8_bit_value_survives_and_16_bits_are_rounded_to_nearest(
    format: str, bits: int
) -> None:
    picture = ramp(bits, alpha=True)
    after = files.read(files.encode(picture, format, quality=100))
    assert after.bits == 8
    np.testing.assert_array_equal(as_8_bits(after), as_8_bits(picture))
    assert after.alpha is not None


def test_values_outside_the_range_are_clamped() -> None:
    pixels = torch.tensor([-0.5, 0.0, 1.0, 7.0]).reshape(1, 1, 4).repeat(3, 1, 1)
    picture = Picture(pixels)
    assert files.read(files.encode(picture, "png")).pixels[0, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grey", [False, True])
def test_a_photograph_survives_every_format(
    photo: Image.Image, grey_photo: Image.Image, format: str, grey: bool
) -> None:
    before = files.from_pil(grey_photo if grey else photo)
    after = files.read(files.encode(before, format))
    assert after.grey == (grey and format != "webp")
    assert after.format == format
    error = (after.pixels - before.pixels).abs()
    if format in ("png", "tiff"):
        assert error.max() == 0
    assert error.mean() < 0.012


def test_a_lower_quality_makes_a_smaller_file(photo: Image.Image) -> None:
    picture = files.from_pil(photo)
    for format in ("jpeg", "webp"):
        sizes = [len(files.encode(picture, format, quality=quality)) for quality in (30, 95, 100)]
        assert sizes == sorted(set(sizes))


def test_alpha_is_laid_over_white_in_jpeg() -> None:
    alpha = torch.zeros(1, 16, 48)
    alpha[:, :, 16:32], alpha[:, :, 32:] = 0.5, 1
    for grey in (False, True):
        picture = Picture(torch.zeros(3, 16, 48), alpha, 8, grey, None, None, "png")
        after = files.read(files.encode(picture, "jpeg", quality=100))
        assert (after.alpha, after.grey) == (None, grey)
        row = after.pixels[0, 8]
        assert [round(float(row[column]), 1) for column in (4, 24, 44)] == [1.0, 0.5, 0.0]


def test_transparent_pixels_keep_their_colour_where_nothing_is_lost() -> None:
    picture = ramp(8, alpha=True)
    clear = dataclasses.replace(picture, alpha=torch.zeros(1, 256, 256))
    for format in ("png", "tiff", "webp"):
        after = files.read(files.encode(clear, format, quality=100))
        np.testing.assert_array_equal(as_8_bits(after), as_8_bits(picture))


@pytest.mark.parametrize("format", FORMATS)
def test_profile_is_kept_byte_for_byte(photo: Image.Image, format: str) -> None:
    before = files.read(saved(photo, "PNG", icc_profile=SRGB))
    np.testing.assert_array_equal(as_8_bits(before), np.asarray(photo))
    assert before.icc == SRGB
    data = files.encode(before, format, provenance=PROVENANCE)
    assert files.read(data).icc == SRGB
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == SRGB


def test_a_profile_of_another_kind_of_colour_is_left_out(
    photo: Image.Image, grey_photo: Image.Image
) -> None:
    assert files.read(saved(photo, "PNG", icc_profile=GREY_PROFILE)).icc is None
    assert files.read(saved(grey_photo, "TIFF", icc_profile=SRGB)).icc is None
    grey = files.read(saved(grey_photo, "TIFF", icc_profile=GREY_PROFILE))
    assert grey.icc == GREY_PROFILE
    assert files.read(files.encode(grey, "tiff")).icc == GREY_PROFILE
    # WebP stores colour.
    assert files.read(files.encode(grey, "webp")).icc is None


@pytest.mark.parametrize("provenance", [None, PROVENANCE])
@pytest.mark.parametrize("source", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("format", FORMATS)
def test_camera_data_is_kept_from_any_format_to_any(
    photo: Image.Image, source: str, format: str, provenance: dict[str, str] | None
) -> None:
    picture = files.read(saved(photo, source, exif=camera_exif()))
    data = files.encode(picture, format, provenance=provenance)
    exif = exif_of(data)
    assert (exif[Base.Make], exif[Base.Model]) == ("Canon", "EOS 5D")
    assert exif[Base.ImageDescription] == "A mug"
    assert round(float(exif[Base.XResolution])) == 300
    assert exif.get_ifd(IFD.Exif)[Base.ExposureTime] == pytest.approx(1 / 200)
    assert exif.get_ifd(IFD.GPSInfo)[1] == "N"
    again = files.read(data).exif
    assert again is not None
    assert b"EOS 5D" in again
    assert files.read_provenance(data) == provenance


def test_the_layout_of_a_tiff_file_is_not_taken_for_camera_data(photo: Image.Image) -> None:
    data = saved(photo, "TIFF", exif=camera_exif(), icc_profile=SRGB)
    for picture in (files.read(data), files.from_pil(Image.open(io.BytesIO(data)))):
        assert picture.exif is not None
        exif = Image.Exif()
        exif.load(picture.exif)
        assert exif[Base.Model] == "EOS 5D"
        assert exif.keys().isdisjoint({Base.ImageWidth, Base.StripOffsets, Base.InterColorProfile})


# Provenance


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [8, 16])
def test_provenance_is_readable_after_writing(tmp_path: Path, format: str, bits: int) -> None:
    picture = dataclasses.replace(ramp(bits), pixels=ramp().pixels[:, :40, :30])
    path = tmp_path / f"result{SUFFIX[format]}"
    files.write(picture, path, provenance=PROVENANCE)
    assert files.read_provenance(path) == PROVENANCE
    assert files.read_provenance(path.read_bytes()) == PROVENANCE
    exif = exif_of(path.read_bytes())
    assert exif[Base.Software] == "linearsr 0.1.0"
    files.write(picture, path)
    assert files.read_provenance(path) is None


def test_provenance_is_in_png_text_too() -> None:
    data = files.encode(ramp(8), "png", provenance=PROVENANCE)
    text = Image.open(io.BytesIO(data)).info
    assert text["Software"] == "linearsr 0.1.0"
    assert json.loads(text["Comment"])["linearsr"] == PROVENANCE


@pytest.mark.parametrize(
    ("code", "body", "text"),
    [
        (b"ASCII\0\0\0", b"on holiday", "on holiday"),
        (b"UNICODE\0", "Kaffee für zwei".encode("utf-16-be"), "Kaffee für zwei"),
        (bytes(8), b"  \0\0", ""),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_provenance_keeps_the_text_of_the_user(
    photo: Image.Image, format: str, code: bytes, body: bytes, text: str
) -> None:
    exif = Image.Exif()
    exif[Base.ImageDescription], exif[Base.Software] = "My mug", "Gimp"
    exif[IFD.Exif] = {Base.UserComment: code + body}
    picture = files.read(saved(photo, "PNG", exif=exif.tobytes()))
    data = files.encode(picture, format, provenance={"software": "old"})
    # A second run over the result replaces the record of the first.
    data = files.encode(files.read(data), format, provenance=PROVENANCE)
    assert files.read_provenance(data) == PROVENANCE
    written = exif_of(data)
    assert written[Base.ImageDescription] == "My mug"
    assert written[Base.Software] == "linearsr 0.1.0"
    raw = written.get_ifd(IFD.Exif)[Base.UserComment]
    assert raw[:8] == (code if body.strip(b" \0") else b"ASCII\0\0\0")
    # Unicode has the order of bytes of the directory, which a TIFF file decides.
    utf16 = "utf-16-le" if format == "tiff" else "utf-16-be"
    comment = raw[8:].decode(utf16 if code == b"UNICODE\0" else "utf-8")
    assert comment.splitlines()[:-1] == ([text] if text else [])


def test_provenance_of_a_foreign_file_is_none(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[IFD.Exif] = {Base.UserComment: b'ASCII\0\0\0{"linearsr": 5}'}
    for data in (b"", b"junk", saved(photo, "PNG"), saved(photo, "JPEG", exif=exif.tobytes())):
        assert files.read_provenance(data) is None
    assert files.read_provenance(tmp_path) is None
    assert files.read_provenance(tmp_path / "missing.png") is None


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
def test_the_print_resolution_is_that_of_exif_or_72_dots_per_inch(
    photo: Image.Image, format: str
) -> None:
    for exif, expected in ((camera_exif(), 300), (None, 72)):
        picture = dataclasses.replace(files.from_pil(photo), exif=exif, dpi=None)
        dots = Image.open(io.BytesIO(files.encode(picture, format))).info["dpi"]
        assert [round(float(value)) for value in dots] == [expected, expected]


def test_an_absurd_print_resolution_is_replaced(
    photo: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    for resolution in (0, 2**31):
        exif = Image.Exif()
        exif[Base.XResolution] = resolution
        picture = dataclasses.replace(files.from_pil(photo), exif=exif.tobytes())
        for format in FORMATS:
            files.encode(picture, format)
    assert capfd.readouterr().err == ""


def test_metadata_too_large_for_the_format_is_dropped(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[Base.ImageDescription] = "x" * 100_000
    picture = dataclasses.replace(
        files.from_pil(photo), exif=exif.tobytes(), icc=SRGB[:40] + bytes(20_000_000)
    )
    for format in FORMATS:
        assert files.read(files.encode(picture, format)).pixels.shape == (3, 81, 123)


# Writing


def test_write_replaces_and_leaves_nothing_else(photo: Image.Image, tmp_path: Path) -> None:
    picture = files.from_pil(photo)
    for name in ("a.png", "a.JPG", "a.jpeg", "a.webp", "a.tif", "a.tiff"):
        (tmp_path / name).write_text("old")
        files.write(picture, tmp_path / name)
        assert files.read(tmp_path / name).format == files.WRITE_SUFFIXES[Path(name.lower()).suffix]
    assert len(list(tmp_path.iterdir())) == 6
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("name", ["a", "a.bmp", ".png", "a.png.part"])
def test_unknown_suffixes_are_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.png \.jpg \.jpeg \.webp \.tif \.tiff"):
        files.write(ramp(8), tmp_path / name)


def test_places_that_cannot_be_written_are_refused(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inside").touch()
    picture = files.from_pil(photo)
    for path in (
        tmp_path / "missing" / "a.png",
        tmp_path / "file" / "a.png",
        tmp_path / "folder.png",
        tmp_path / "null\0byte.png",
    ):
        with pytest.raises(OutputError) as error:
            files.write(picture, path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "result.png"
    target.write_text("old")
    script = """
import resource, sys, torch
from linearsr.errors import OutputError
from linearsr.imaging.files import Picture, write
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(0))
try:
    write(Picture(noise), sys.argv[1])
except OutputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{target}: cannot be written (File too large)")
    assert done.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.png"]
    assert target.read_text() == "old"


def test_the_new_file_takes_the_place_of_the_old_one(photo: Image.Image, tmp_path: Path) -> None:
    # A second name of the old file shows that it was replaced and not overwritten.
    (tmp_path / "a.png").write_text("old")
    os.link(tmp_path / "a.png", tmp_path / "kept")
    files.write(files.from_pil(photo), tmp_path / "a.png")
    assert (tmp_path / "kept").read_text() == "old"


def test_an_interruption_leaves_no_file(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(files.from_pil(photo), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_sizes_a_format_cannot_hold_are_refused() -> None:
    for format, limit in (("webp", 16383), ("jpeg", 65500)):
        line = Picture(torch.zeros(3, 1, limit))
        assert files.read(files.encode(line, format)).pixels.shape == (3, 1, limit)
        tall = dataclasses.replace(line, pixels=torch.zeros(3, limit + 1, 1))
        with pytest.raises(OutputError, match=f"{limit} pixels a side; write PNG or TIFF"):
            files.encode(tall, format)


def test_bad_options_and_pixels_are_refused(tmp_path: Path) -> None:
    picture = ramp(8)
    with pytest.raises(OptionError, match="png, jpeg, webp, tiff"):
        files.encode(picture, "bmp")
    for quality in (0, 101):
        with pytest.raises(OptionError, match="1 to 100"):
            files.encode(picture, "jpeg", quality=quality)
    for value in (float("nan"), float("inf")):
        broken = dataclasses.replace(picture, pixels=torch.full((3, 4, 4), value))
        with pytest.raises(OutputError, match=r"a\.png: .*not finite"):
            files.write(broken, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# PIL


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pil_images_of_every_mode_are_read(photo: Image.Image, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    else:
        image = photo.convert("L").convert("LA") if mode == "LA" else photo.convert(mode)
    picture = files.from_pil(image)
    assert picture.grey == (mode in ("1", "L", "LA", "I;16"))
    assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))
    back = files.to_pil(picture)
    if mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        assert back.mode == mode
        np.testing.assert_array_equal(np.asarray(back), np.asarray(image))
    elif mode != "CMYK":
        np.testing.assert_array_equal(
            np.asarray(back.convert("RGB")), np.asarray(image.convert("RGB"))
        )


def test_pil_16_bit_grey_is_read_and_other_modes_are_refused() -> None:
    values = np.arange(300, dtype=np.uint16).reshape(10, 30) * 200
    image = Image.frombytes("I;16B", (30, 10), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(as_16_bits(files.from_pil(image).pixels[0]), values)
    for mode in ("I", "F"):
        with pytest.raises(InputError, match=f"mode {mode} "):
            files.from_pil(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_opened_pil_image_is_read_like_its_file(
    photo: Image.Image, format: str, orientation: int
) -> None:
    data = saved(photo, format, exif=camera_exif(orientation), icc_profile=SRGB)
    ours, theirs = files.read(data), files.from_pil(Image.open(io.BytesIO(data)))
    assert (ours.format, ours.icc, ours.bits) == (theirs.format, theirs.icc, theirs.bits)
    assert (ours.pixels - theirs.pixels).abs().mean() < 0.005
    image = files.to_pil(theirs)
    assert image.info["icc_profile"] == SRGB
    assert image.getexif()[Base.Model] == "EOS 5D"
    assert image.getexif().get(Base.Orientation, 1) == 1
    assert b"EOS 5D" in files.encode(theirs, "tiff")


def test_a_truncated_pil_image_is_an_input_error(photo: Image.Image) -> None:
    data = saved(photo, "JPEG")
    with pytest.raises(InputError, match="the PIL image"):
        files.from_pil(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_a_pil_image_with_a_broken_profile_and_exif_is_read(photo: Image.Image) -> None:
    for mode in ("RGB", "CMYK"):
        image = photo.convert(mode)
        image.info.update(icc_profile=b"broken" * 50, exif=b"Exif\0\0broken")
        picture = files.from_pil(image)
        assert (picture.icc, picture.exif) == (None, None)
