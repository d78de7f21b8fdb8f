"""Colours that tags alone describe: a viewer of the result shows those of the file."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import pyvips  # type: ignore[import-untyped]
from PIL import Image, ImageCms, features

from linearsr.errors import InputError
from linearsr.imaging import files
from linearsr.imaging.files import Picture

FORMATS = ("png", "jpeg", "webp", "tiff")
SRGB = ImageCms.createProfile("sRGB")
P3_XY = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
# From linear Display P3 and linear Adobe RGB to linear sRGB, as in CSS Color 4.
P3_TO_SRGB = np.array(
    [
        [1.2249401762, -0.2249401762, 0.0],
        [-0.0420569547, 1.0420569547, 0.0],
        [-0.0196375546, -0.0786360456, 1.0982736002],
    ]
)
ADOBE_TO_SRGB = np.array(
    [
        [1.3983557440, -0.3983557440, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, -0.0429289893, 1.0429289893],
    ]
)


def ramps() -> np.ndarray:
    """Colours that every space here can show, smooth enough for JPEG."""
    y, x = np.mgrid[0:32, 0:48] / [[[32]], [[48]]]
    return np.stack([0.45 + 0.35 * x, 0.5 + 0.2 * y, 0.6 - 0.3 * x * y], -1)


def as_image(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, *chunks: tuple[bytes, bytes], icc: bytes | None = None) -> bytes:
    data = saved(as_image(values), "PNG", **({"icc_profile": icc} if icc else {}))
    return data[:33] + b"".join(chunk(*c) for c in chunks) + data[33:]


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chrm(points: tuple[float, ...] = P3_XY) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(p * 100_000) for p in points))


def cicp(*numbers: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes(numbers)


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def shown(data: bytes) -> np.ndarray:
    """Return the pixels that a viewer of ICC profiles alone shows on an sRGB screen."""
    image = Image.open(io.BytesIO(data))
    icc = image.info.get("icc_profile")
    if icc:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.buildTransform(profile, SRGB, image.mode, "RGB")
        image = transform.apply(image)
    return np.asarray(image.convert("RGB")) / 255


def check(data: bytes, expected: np.ndarray, *, within: float = 2.0) -> None:
    """Check what is shown of the results in all formats; lossy ones are as near on average."""
    picture = files.read(data)
    for format in FORMATS:
        difference = np.abs(shown(files.encode(picture, format, quality=100)) - expected) * 255
        lossy = format == "jpeg"
        assert (difference.mean() if lossy else difference.max()) <= within, format


def test_gamma_of_png_is_carried() -> None:
    check(png(ramps(), gama(1.0)), srgb_curve(ramps()))
    check(png(ramps(), gama(1 / 1.8)), srgb_curve(ramps() ** 1.8))


def test_primaries_of_png_are_carried() -> None:
    linear = (ramps() ** 2.2) @ P3_TO_SRGB.T
    check(png(ramps(), gama(1 / 2.2), chrm()), srgb_curve(linear))
    linear = srgb_linear(ramps()) @ P3_TO_SRGB.T
    check(png(ramps(), chrm()), srgb_curve(linear))


def test_cicp_of_png_is_carried_and_counts_most() -> None:
    expected = srgb_curve(srgb_linear(ramps()) @ P3_TO_SRGB.T)
    check(png(ramps(), cicp(12, 13, 0, 1)), expected)
    adobe = adobe_icc()
    check(png(ramps(), cicp(12, 13, 0, 1), gama(1.0), icc=adobe), expected)
    # Linear light, and the range of video.
    check(png(ramps(), cicp(1, 8, 0, 1)), srgb_curve(ramps()))
    narrow = (ramps() * 219 + 16) / 255
    check(png(narrow, cicp(1, 13, 0, 0)), ramps())


def adobe_icc() -> bytes:
    from linearsr.imaging.colour_tags import adobe_profile

    profile = adobe_profile(grey=False)
    assert profile
    return profile


def test_profile_of_png_counts_more_than_gamma() -> None:
    linear = (ramps() ** (563 / 256)) @ ADOBE_TO_SRGB.T
    check(png(ramps(), gama(1.0), icc=adobe_icc()), srgb_curve(linear))


def test_srgb_of_png_counts_more_than_gamma() -> None:
    data = png(ramps(), (b"sRGB", b"\0"), gama(1.0), chrm())
    assert files.read(data).icc is None


@pytest.mark.parametrize(
    "chunks",
    [
        (),
        ((b"sRGB", b"\0"),),
        (gama(0.45455),),
        (gama(0.45455), chrm((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))),
        (cicp(1, 13, 0, 1),),
        (cicp(2, 2, 0, 1),),
        (gama(0.0),),
        (gama(1.0), (b"cHRM", bytes(32))),
    ],
)
def test_srgb_in_other_words_needs_no_profile(chunks: tuple[tuple[bytes, bytes], ...]) -> None:
    picture = files.read(png(ramps(), *chunks))
    assert picture.icc is None
    np.testing.assert_array_equal(as_bytes(picture), np.asarray(as_image(ramps())))


def as_bytes(picture: Picture) -> np.ndarray:
    array: np.ndarray = (picture.pixels * 255).round().byte().permute(1, 2, 0).numpy()
    return array


def test_grey_png_with_gamma_is_carried() -> None:
    grey = ramps()[..., 0]
    expected = np.repeat(srgb_curve(grey)[..., None], 3, -1)
    check(png(grey, gama(1.0)), expected)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name(transfer: int, name: str) -> None:
    with pytest.raises(InputError, match=rf"an HDR picture \({name}\)"):
        files.read(png(ramps(), cicp(9, transfer, 0, 1)))
    with pytest.raises(InputError, match=name):
        files.read(avif(ramps(), 9, transfer))


def avif(values: np.ndarray, primaries: int, transfer: int) -> bytes:
    """AVIF without loss whose nclx has these code points."""
    lazy = pyvips.Image.new_from_array(np.asarray(as_image(values))).copy(interpretation="srgb")
    data = bytes(lazy.heifsave_buffer(compression="av1", lossless=True, effort=0))
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def test_code_points_of_avif_are_carried() -> None:
    assert files.read(avif(ramps(), 1, 13)).icc is None
    check(avif(ramps(), 12, 13), srgb_curve(srgb_linear(ramps()) @ P3_TO_SRGB.T))
    check(avif(ramps(), 1, 8), srgb_curve(ramps()))


@pytest.mark.skipif(not features.check("avif"), reason="this PIL has no AVIF")
def test_premultiplied_avif_is_divided_by_its_alpha() -> None:
    image = as_image(ramps())
    alpha = Image.linear_gradient("L").resize(image.size).point(lambda value: 80 + value // 2)
    image.putalpha(alpha)
    straight, multiplied = (
        files.read(saved(image, "AVIF", quality=100, subsampling="4:4:4", **options))
        for options in ({}, {"alpha_premultiplied": True})
    )
    difference = (straight.pixels - multiplied.pixels).abs() * 255
    assert difference.max() < 8
    assert difference.mean() < 1.5


def grey_profile(gamma: float) -> bytes:
    """A grey profile of version 2 with one exponent."""
    curve = b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)
    white = b"XYZ " + struct.pack(">I3i", 0, *(round(n * 65536) for n in (0.9642, 1.0, 0.8249)))
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 14)
    header = struct.pack(">II", 192, 0) + b"\2\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp"
    illuminant = struct.pack(">3i", *(round(n * 65536) for n in (0.9642, 1.0, 0.8249)))
    return (header + bytes(28) + illuminant).ljust(128, b"\0") + table + white + curve + bytes(2)


@pytest.mark.parametrize("with_alpha", [False, True])
def test_grey_picture_with_a_profile_is_converted_for_webp(with_alpha: bool) -> None:
    grey = ramps()[..., 0]
    image = as_image(grey)
    if with_alpha:
        image.putalpha(Image.new("L", image.size, 200))
    picture = files.read(saved(image, "PNG", icc_profile=grey_profile(1.8)))
    assert picture.icc
    data = files.encode(picture, "webp", quality=100)
    expected = np.repeat(srgb_curve(grey**1.8)[..., None], 3, -1)
    assert np.abs(shown(data) - expected).max() * 255 <= 2
    alpha = files.read(data).alpha
    assert (alpha is not None) == with_alpha


def dcf_exif(space: int, index: bytes | None = b"R03\0") -> bytes:
    """EXIF of a camera set to Adobe RGB: an option file of DCF."""
    block = b"MM\0*" + struct.pack(">I", 8)
    block += struct.pack(">HHHIII", 1, 0x8769, 4, 1, 26, 0)
    pointer = 26 + 2 + 24 + 4
    count = 2 if index else 1
    block += struct.pack(">HHHIHH", count, 0xA001, 3, 1, space, 0)
    if index:
        block += struct.pack(">HHIII", 0xA005, 4, 1, pointer, 0)
        block += struct.pack(">HHHI4sI", 1, 1, 2, 4, index, 0)
    else:
        block += bytes(4)
    return b"Exif\0\0" + block


@pytest.mark.parametrize("exif", [dcf_exif(65535), dcf_exif(2, None)])
def test_adobe_rgb_of_a_camera_is_carried(exif: bytes) -> None:
    linear = (ramps() ** (563 / 256)) @ ADOBE_TO_SRGB.T
    data = saved(as_image(ramps()), "JPEG", quality=100, subsampling=0, exif=exif)
    check(data, srgb_curve(linear), within=6.0)  # the JPEG itself is 3 off
    if b"R03" in exif:
        assert b"R03\0" in files.encode(files.read(data), "jpeg")


def test_other_cameras_are_not_taken_for_adobe_rgb() -> None:
    for exif in (dcf_exif(1), dcf_exif(65535, b"R98\0"), dcf_exif(1, None), dcf_exif(65535, None)):
        assert files.read(saved(as_image(ramps()), "JPEG", exif=exif)).icc is None


def test_pictures_in_pil_are_read_like_their_files() -> None:
    for chunks in ((gama(1.0),), (gama(1 / 2.2), chrm()), ((b"sRGB", b"\0"), gama(1.0))):
        data = png(ramps(), *chunks)
        assert files.from_pil(Image.open(io.BytesIO(data))).icc == files.read(data).icc
