"""Metadata is found wherever a format allows it, and what cannot be kept is said."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, IptcImagePlugin, features
from PIL.ExifTags import Base

from linearsr.errors import TooLarge
from linearsr.imaging import files
from linearsr.imaging.colour_tags import adobe_profile
from tests.imaging.test_metadata_kept import (
    IPTC,
    PROVENANCE,
    XMP,
    camera_exif,
    chunk,
    opened,
    photo,
    raw_profile,
    result,
    saved,
)

needs_jp2 = pytest.mark.skipif(not features.check("jpg_2000"), reason="this PIL has no JPEG 2000")
ADOBE = adobe_profile(grey=False) or b""
LONG = b"long text " * 10_000


def png(before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG file with chunks before and after its pixels."""
    data = saved(photo(), "PNG")
    return data[:33] + before + data[33:-12] + after + data[-12:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(*segments: bytes) -> bytes:
    data = saved(photo(), "JPEG", dpi=(300, 300))
    return data[:2] + b"".join(segments) + data[2:]


def resource(number: int, data: bytes) -> bytes:
    """A resource of Photoshop."""
    return b"8BIM" + struct.pack(">HHI", number, 0, len(data)) + data + bytes(len(data) % 2)


def tiff(order: str, *tags: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF file of 2 x 1 pixels with further tags: number, type, count and bytes."""
    short, long = struct.Struct(f"{order}H").pack, struct.Struct(f"{order}I").pack
    entries = [
        *((256, 3, 1, short(2)), (257, 3, 1, short(1)), (258, 3, 3, short(8) * 3)),
        *((259, 3, 1, short(1)), (262, 3, 1, short(2)), (273, 4, 1, long(8))),
        *((277, 3, 1, short(3)), (278, 3, 1, short(1)), (279, 4, 1, long(6))),
        *tags,
    ]
    body, values = short(len(entries)), b""
    for tag, kind, count, data in sorted(entries):
        body += struct.pack(f"{order}HHI", tag, kind, count)
        at = 14 + 6 + 12 * len(entries) + len(values)
        body += data.ljust(4, b"\0") if len(data) <= 4 else long(at)
        values += data + bytes(len(data) % 2) if len(data) > 4 else b""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + long(14) + bytes([10, 20, 30, 40, 50, 60]) + body + long(0) + values


# PNG


@pytest.mark.parametrize("kind", ["eXIf after", "zTXt", "tEXt after"])
def test_exif_of_png_is_kept_and_turns_the_picture(kind: str) -> None:
    block = chunk(b"eXIf", camera_exif()[6:]) if "eXIf" in kind else b""
    block = block or raw_profile("exif", camera_exif())
    data = png(after=block) if "after" in kind else png(before=block)
    picture = files.read(data)
    turned = files.read(saved(photo().transpose(Image.Transpose.ROTATE_270), "PNG"))
    assert (picture.pixels == turned.pixels).all()
    assert files.measure(data) == ("png", [(32, 48)])
    tags = opened(files.encode(picture, "jpeg")).getexif()
    assert (tags[Base.Make], tags[Base.Orientation]) == ("Acme", 1)


@pytest.mark.parametrize("kind", [b"iTXt", b"tEXt", b"zTXt"])
def test_xmp_of_png_is_kept_wherever_it_is(kind: bytes) -> None:
    xmp = XMP.replace(b"</x:xmpmeta>", "<!-- Größe --></x:xmpmeta>".encode())
    start = {b"iTXt": b"\0\0\0\0\0", b"tEXt": b"\0", b"zTXt": b"\0\0"}[kind]
    body = zlib.compress(xmp) if kind == b"zTXt" else xmp
    picture = files.read(png(after=chunk(kind, b"XML:com.adobe.xmp" + start + body)))
    assert (picture.xmp, picture.texts) == (xmp, ())


@pytest.mark.parametrize("kind", ["icc", "icm"])
def test_profile_in_texts_of_imagemagick_is_kept(kind: str) -> None:
    assert files.read(png(before=raw_profile(kind, ADOBE))).icc == ADOBE


@pytest.mark.parametrize("across", [1, 11811])
def test_shape_of_a_pixel_is_no_print_resolution(across: int) -> None:
    picture = files.read(png(before=chunk(b"pHYs", struct.pack(">IIB", across, 11811, 0))))
    assert picture.dpi is None
    assert [round(n) for n in opened(files.encode(picture, "png")).info["dpi"]] == [72, 72]
    unit = files.read(png(before=chunk(b"pHYs", struct.pack(">IIB", 11811, 11811, 1))))
    assert unit.dpi == (300.0, 300.0)


def test_texts_that_are_too_long_are_noted() -> None:
    long = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1_200_000)))
    short = chunk(b"tEXt", b"Title\0a lake")
    picture = files.read(png(before=long + short))
    assert picture.texts == (("Title", "a lake"),)
    assert picture.notes == ("texts of more than 1 MB, or 8 MB together, are left out",)
    assert files.read(png(before=short)).notes == ()


@pytest.mark.parametrize("cicp", [(1, 9), (1, 10), (0, 13), (1, 255)])
def test_colour_spaces_that_are_not_known_are_noted(cicp: tuple[int, int]) -> None:
    (note,) = files.read(png(before=chunk(b"cICP", bytes([*cicp, 0, 1])))).notes
    assert f"primaries {cicp[0]}, transfer {cicp[1]}" in note
    assert files.read(png(before=chunk(b"cICP", bytes([1, 13, 0, 1])))).notes == ()


def test_profiles_that_do_not_fit_are_noted() -> None:
    for data in (
        saved(photo("L"), "JPEG", icc_profile=ADOBE),
        saved(photo(), "JPEG", icc_profile=b"no profile" * 50),
    ):
        (note,) = files.read(data).notes
        assert "its colour profile" in note
    assert files.read(saved(photo(), "PNG", icc_profile=ADOBE)).notes == ()


# JPEG


@pytest.mark.parametrize("place", ["cut", "second", "after an empty one", "after another program"])
def test_iptc_of_jpeg_is_found_in_all_segments(place: str) -> None:
    begin, iptc = b"Photoshop 3.0\0", resource(0x404, IPTC)
    if place == "cut":
        whole = resource(0x422, bytes(70_000)) + iptc
        bodies = [begin + whole[:65_000], begin + whole[65_000:]]
    elif place == "second":
        bodies = [begin + resource(0x425, bytes(16)), begin + iptc]
    elif place == "after an empty one":
        bodies = [begin + resource(0x404, b"") + iptc]
    else:
        bodies = [b"Adobe_CM\0\1", begin + iptc]
    data = jpeg(*(segment(0xED, body) for body in bodies))
    assert files.read(data).iptc == IPTC
    fields = IptcImagePlugin.getiptcinfo(opened(result(data, "jpeg")))  # type: ignore[no-untyped-call]
    assert fields[(2, 120)] == b"A lake"


def extended_xmp(*cuts: int, prefix: str = "dc") -> bytes:
    """A JPEG file whose XMP goes on in segments, in the order of their cuts."""
    rest = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        b"<%s:source>%s</%s:source></rdf:Description></rdf:RDF></x:xmpmeta>"
    ) % (prefix.encode(), LONG, prefix.encode())
    name = hashlib.md5(rest).hexdigest().upper().encode()
    note = b' xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="%s"' % name
    first = XMP.replace(b' xmp:Rating="5"', b' xmp:Rating="5"' + note)
    begin = b"http://ns.adobe.com/xmp/extension/\0" + name
    parts = (begin + struct.pack(">II", len(rest), at) + rest[at : at + 60_000] for at in cuts)
    first = b"http://ns.adobe.com/xap/1.0/\0" + first
    return jpeg(segment(0xE1, first), *(segment(0xE1, part) for part in parts))


@pytest.mark.parametrize("cuts", [(0, 60_000), (60_000, 0)])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "tiff"])
def test_xmp_of_several_segments_is_kept_whole(format: str, cuts: tuple[int, ...]) -> None:
    data = extended_xmp(*cuts)
    for _ in range(2):
        picture = files.read(data)
        assert picture.xmp is not None
        assert picture.notes == ()
        assert b'xmp:Rating="5"' in picture.xmp
        assert b"<dc:source>" + LONG in picture.xmp
        assert b"HasExtendedXMP" not in picture.xmp
        data, notes = files.encode_with_notes(picture, format, provenance=PROVENANCE)
        assert notes == ()


def test_xmp_of_which_a_part_is_lost_is_noted() -> None:
    for data in (extended_xmp(0), extended_xmp(), extended_xmp(0, 60_000, prefix="unknown")):
        picture = files.read(data)
        assert picture.xmp is not None
        assert b'xmp:Rating="5"' in picture.xmp
        assert b"HasExtendedXMP" not in picture.xmp
        assert picture.notes == ("a part of its XMP cannot be read and is left out",)


def test_comment_of_jpeg_is_kept() -> None:
    data = jpeg(segment(0xFE, "Größe".encode()))
    again = result(result(data, "jpeg"), "jpeg")
    assert opened(again).info["comment"] == "Größe".encode()
    assert files.read(result(data, "png")).texts[-1] == ("Comment", "Größe")
    assert "Größe".encode("utf-16-be") in result(data, "webp")


def test_jpeg_whose_rest_is_zeros_is_noted() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", quality=95)
    cut = data[: len(data) * 8 // 10]
    (note,) = files.read(cut + bytes(len(data) - len(cut))).notes
    assert note == "the file lacks its end marker; parts of the picture may be damaged"
    assert files.read(data + bytes(100)).notes == ()


@pytest.mark.parametrize("kind", [1, 3, 4, 6, 7, 8, 9])
def test_orientation_of_any_type_is_reset(kind: int) -> None:
    block = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, Base.Orientation, kind, 1, 6, 0)
    picture = files.read(jpeg(segment(0xE1, block)))
    assert picture.pixels.shape[1:] in ((48, 32), (32, 48))
    assert opened(files.encode(picture, "jpeg")).getexif()[Base.Orientation] == 1


# TIFF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["long", "swapped", "undefined", "photoshop"])
def test_iptc_of_tiff_is_found_in_all_its_places(kind: str, order: str) -> None:
    padded = IPTC + bytes(-len(IPTC) % 4)
    turned = b"".join(padded[at : at + 4][::-1] for at in range(0, len(padded), 4))
    photoshop = resource(0x3ED, bytes(16)) + resource(0x404, IPTC)
    tag = {
        "long": (33723, 4, len(padded) // 4, padded),
        "swapped": (33723, 4, len(padded) // 4, turned),
        "undefined": (33723, 7, len(IPTC), IPTC),
        "photoshop": (34377, 7, len(photoshop), photoshop),
    }[kind]
    assert files.read(tiff(order, tag)).iptc == IPTC


def test_print_resolution_without_a_unit_is_none() -> None:
    dots = [(tag, 5, 1, struct.pack("<II", 300, 1)) for tag in (282, 283)]
    for unit, dpi in ((1, None), (2, (300.0, 300.0))):
        picture = files.read(tiff("<", *dots, (296, 3, 1, struct.pack("<H", unit))))
        assert picture.dpi == dpi
        shown = opened(files.encode(picture, "png")).info["dpi"][0]
        assert round(shown) == (300 if dpi else 72)


def shown(picture: files.Picture) -> np.ndarray:
    """The first pixel as a viewer shows it."""
    image = files.to_pil(picture)
    icc = image.info.get("icc_profile")
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc else ImageCms.createProfile("sRGB")
    image = ImageCms.profileToProfile(  # type: ignore[assignment]
        image, source, ImageCms.createProfile("sRGB"), renderingIntent=1
    )
    return np.asarray(image)[0, 0].astype(int)


def linear(value: int) -> float:
    """The sample of sRGB for an amount of light from 0 to 255."""
    light = value / 255
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


def test_colour_tags_of_tiff_are_carried() -> None:
    curve = struct.pack("<256H", *(257 * n for n in range(256)))
    expected = [linear(n) for n in (10, 20, 30)]
    for tables in (1, 3):
        picture = files.read(tiff("<", (301, 3, 256 * tables, curve * tables)))
        assert np.abs(shown(picture) - expected).max() <= 2
        assert picture.notes == ()
    half = struct.pack("<256H", *(n * n for n in range(256)))
    (note,) = files.read(tiff("<", (301, 3, 768, curve * 2 + half))).notes
    assert "transfer functions" in note
    srgb = struct.pack("<12I", *(n for x in (64, 33, 30, 60, 15, 6) for n in (x, 100)))
    p3 = struct.pack("<12I", *(n for x in (680, 320, 265, 690, 150, 60) for n in (x, 1000)))
    assert files.read(tiff("<", (319, 5, 6, srgb))).icc is None
    assert files.read(tiff("<", (319, 5, 6, p3))).icc is not None


# GIF, BMP and JPEG 2000


def gif(*, xmp_first: bool = False) -> bytes:
    """A GIF file with a profile, XMP and a comment."""
    data = saved(photo(), "GIF", comment=b"my own words")
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    blocks = b"".join(
        bytes([len(part)]) + part for part in (ADOBE[:255], ADOBE[255:510], ADOBE[510:])
    )
    icc = b"!\xff\x0bICCRGBG1012" + blocks + b"\0"
    xmp = b"!\xff\x0bXMP DataXMP" + XMP + b"\1" + bytes(range(255, -1, -1)) + b"\0"
    return data[:at] + (xmp + icc if xmp_first else icc + xmp) + data[at:]


def test_metadata_of_gif_is_kept() -> None:
    for xmp_first in (False, True):
        picture = files.read(gif(xmp_first=xmp_first))
        assert (picture.icc, picture.xmp) == (ADOBE, XMP)
        assert picture.texts == (("Comment", "my own words"),)


def bmp(
    space: bytes, *, points: bytes = bytes(36), gamma: float = 0, profile: bytes = b""
) -> bytes:
    """A BMP file with the fifth header."""
    plain = saved(photo(), "BMP")
    pixels = plain[54:]
    header = struct.pack("<I", 124) + plain[18:54] + struct.pack("<4I", 0, 0, 0, 0) + space
    header += points + struct.pack("<3I", *[round(gamma * 65536)] * 3)
    header += struct.pack("<4I", 4, 124 + len(pixels), len(profile), 0)
    start = struct.pack("<2sIII", b"BM", 138 + len(pixels) + len(profile), 0, 138)
    return start + header + pixels + profile


def test_colour_space_of_bmp_is_carried() -> None:
    assert files.read(bmp(b"DEBM", profile=ADOBE)).icc == ADOBE
    assert files.read(bmp(b"BGRs")).icc is None
    assert files.read(bmp(bytes(4))).icc is None
    xyz = (0.64, 0.33, 0.03, 0.3, 0.6, 0.1, 0.15, 0.06, 0.79)
    points = struct.pack("<9i", *(round(n * 2**30) for n in xyz))
    picture = files.read(bmp(bytes(4), points=points, gamma=1))
    first = files.to_pil(replace(picture, icc=None)).getpixel((0, 0))
    assert isinstance(first, tuple)
    assert np.abs(shown(picture) - [linear(int(n)) for n in first]).max() <= 3
    assert files.read(bmp(bytes(4), points=points, gamma=2.2)).icc is None


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


@needs_jp2
def test_metadata_of_jpeg_2000_is_kept() -> None:
    data = saved(photo(), "JPEG2000", irreversible=False)
    colours = data.index(b"colr") - 4
    size = int.from_bytes(data[colours : colours + 4], "big")
    added = box(b"colr", b"\2\0\0" + ADOBE)
    header = data.index(b"jp2h") - 4
    room = int.from_bytes(data[header : header + 4], "big") + len(added) - size
    data = (
        data[:header]
        + struct.pack(">I", room)
        + data[header + 4 : colours]
        + added
        + data[colours + size :]
    )
    names = ("be7acfcb97a942e89c71999491e3afac", "33c7a4d2b81d4723a0baf1a3e097ad38")
    boxes = box(b"uuid", bytes.fromhex(names[0]) + XMP) + box(
        b"uuid", bytes.fromhex(names[1]) + IPTC
    )
    boxes += box(b"uuid", b"JpgTiffExif->JP2" + camera_exif()[6:])
    picture = files.read(data + boxes)
    assert (picture.icc, picture.xmp, picture.iptc) == (ADOBE, XMP, IPTC)
    assert picture.exif is not None and b"Acme" in picture.exif
    assert picture.pixels.shape[1:] == (48, 32)
    assert files.measure(data + boxes) == ("jp2", [(32, 48)])


@pytest.mark.parametrize("format", ["BMP", "JPEG2000"])
def test_bombs_of_other_formats_name_the_flag(format: str, monkeypatch: Any) -> None:
    if format == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this PIL has no JPEG 2000")
    data = saved(photo(), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TooLarge, match=r"1536 pixels are more than the limit of 200; .*--max-pix"):
        files.read(data)


@pytest.mark.skipif(not features.check("avif"), reason="this PIL has no AVIF")
@pytest.mark.parametrize("brand", [b"mif1", b"miaf", b"MA1B", b"MA1A"])
def test_avif_is_known_by_its_compatible_brands(brand: bytes) -> None:
    data = saved(photo(), "AVIF")
    data = data[:8] + brand + data[12:]
    assert files.sniff(data) == "avif"
    assert files.read(data).pixels.shape == (3, 32, 48)
