"""Metadata of files as people have them survives in every format, with the right types."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import pyvips  # type: ignore[import-untyped]
from PIL import Image, IptcImagePlugin, features
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from linearsr.errors import InputError, NoPicture
from linearsr.imaging import exif, files
from linearsr.imaging.colour_tags import adobe_profile
from linearsr.imaging.tiff import Value

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

FORMATS = ("png", "jpeg", "webp", "tiff")
PROVENANCE = {"software": "linearsr 0.1.0", "seed": "0"}
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    b'tiff:Orientation="6" xmp:Rating="5">'
    b"<exif:PixelXDimension>96</exif:PixelXDimension></rdf:Description></rdf:RDF></x:xmpmeta>"
)
IPTC = b"\x1c\x02\x00\x00\x02\x00\x04" + b"\x1c\x02\x78\x00\x06A lake" + b"\x1c\x02\x19\x00\x04boat"


def photo(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8))
    return low.resize((48, 32), Image.Resampling.BICUBIC).convert(mode)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def result(data: bytes, format: str) -> bytes:
    return files.encode(files.read(data), format, provenance=PROVENANCE)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def directory(order: str, at: int, entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """A directory at an offset: tag, type, count and bytes, in the order given."""
    room = at + 6 + 12 * len(entries)
    table, values = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, count, data in entries:
        table += struct.pack(f"{order}HHI", tag, kind, count)
        if len(data) <= 4:
            table += data.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}I", room + len(values))
            values += data + bytes(len(data) % 2)
    return table + bytes(4) + values


def camera_exif(comment: bytes = b"ASCII\0\0\0my own words", order: str = ">") -> bytes:
    """Return a camera's EXIF: tags of many types, Interop, XP tags, and the old size."""
    short = struct.Struct(f"{order}H").pack
    long = struct.Struct(f"{order}I").pack
    interop_at, exif_at, first_at = 200, 300, 8
    title = "Tite\u00fc".encode("utf-16-le") + b"\0\0"
    first = directory(
        order,
        first_at,
        [
            (Base.Make, 2, 5, b"Acme\0"),
            (Base.Orientation, 3, 1, short(6)),
            (IFD.Exif, 4, 1, long(exif_at)),
            (Base.XPTitle, 1, len(title), title),
        ],
    )
    inner = directory(
        order,
        exif_at,
        [
            (Base.ExifVersion, 7, 4, b"0232"),
            (Base.ComponentsConfiguration, 7, 4, b"\1\2\3\0"),
            (Base.MakerNote, 7, 20, b"maker's secret notes"),
            (Base.UserComment, 7, len(comment), comment),
            (Base.ColorSpace, 3, 1, short(1)),
            (Base.ExifImageWidth, 4, 1, long(5000)),
            (Base.ExifImageHeight, 4, 1, long(4000)),
            (IFD.Interop, 4, 1, long(interop_at)),
            (Base.FileSource, 7, 1, b"\3"),
            (Base.CFAPattern, 7, 8, b"\0\2\0\2\0\1\1\2"),
            (Base.LensModel, 2, 5, b"50mm\0"),
        ],
    )
    interop = directory(order, interop_at, [(1, 2, 4, b"R98\0"), (2, 7, 4, b"0100")])
    mark = (b"II*\0" if order == "<" else b"MM\0*") + long(first_at)
    block = (mark + first).ljust(interop_at, b"\0") + interop
    return b"Exif\0\0" + block.ljust(exif_at, b"\0") + inner


def exif_block(data: bytes) -> bytes:
    """The bytes of EXIF as they stand in a file, or the whole of a TIFF file."""
    if data[:2] in (b"II", b"MM"):
        return data
    if data[:4] == b"RIFF":
        at = data.index(b"EXIF")
        return data[at + 8 : at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")]
    if data[:4] == b"\x89PNG":
        at = data.index(b"eXIf")
        return data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")]
    at = data.index(b"Exif\0\0")
    return data[at + 6 : at - 2 + int.from_bytes(data[at - 2 : at], "big")]


def tags_of(block: bytes, at: int | None = None) -> ImageFileDirectory_v2:
    tags = ImageFileDirectory_v2(block[:8])
    stream = io.BytesIO(block)
    stream.seek(tags.next if at is None else at)
    tags.load(stream)
    return tags


# EXIF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", FORMATS)
def test_exif_keeps_types_and_unknown_tags(format: str, order: str) -> None:
    data = result(saved(photo(), "JPEG", exif=camera_exif(order=order)), format)
    block = exif_block(data)
    assert block[:2] in (b"II", b"MM")
    first = tags_of(block)
    assert first[Base.Make] == "Acme"
    assert first.get(Base.Orientation, 1) == 1
    assert first.tagtype[Base.XPTitle] == 1
    assert bytes(first[Base.XPTitle]).decode("utf-16-le") == "Tite\u00fc\0"
    inner = tags_of(block, first[IFD.Exif])
    undefined = {Base.ExifVersion, Base.UserComment, Base.FileSource, Base.CFAPattern}
    assert {inner.tagtype[tag] for tag in (*undefined, Base.MakerNote)} == {7}
    assert inner[Base.ExifVersion] == b"0232"
    assert inner[Base.CFAPattern] == b"\0\2\0\2\0\1\1\2"
    assert inner[Base.LensModel] == "50mm"
    assert inner[Base.MakerNote] == b"maker's secret notes"
    assert b"my own words" in inner[Base.UserComment]
    if format == "tiff":  # where the directory itself has the size
        assert first[IFD.Exif] > 8
        assert Base.ExifImageWidth not in inner
    else:
        assert (inner[Base.ExifImageWidth], inner[Base.ExifImageHeight]) == (32, 48)
        assert tags_of(block, inner[IFD.Interop])[1] == "R98"


def test_maker_note_stays_at_its_offset() -> None:
    before = camera_exif()
    for format in ("png", "jpeg", "webp"):
        after = exif_block(result(saved(photo(), "JPEG", exif=before), format))
        assert after.index(b"maker's") == before.index(b"maker's") - len(b"Exif\0\0")


def test_thumbnail_of_the_old_picture_goes() -> None:
    exif = bytearray(camera_exif())
    thumbnail = saved(photo().resize((8, 6)), "JPEG")
    # The directory after the first one holds the thumbnail.
    entries = [
        (Base.JpegIFOffset, 4, 1, struct.pack(">I", len(exif) - 6 + 30)),
        (Base.JpegIFByteCount, 4, 1, struct.pack(">I", len(thumbnail))),
    ]
    second = directory(">", len(exif) - 6, entries)
    exif[6 + 8 + 2 + 4 * 12 : 6 + 8 + 6 + 4 * 12] = struct.pack(">I", len(exif) - 6)
    data = saved(photo(), "JPEG", exif=bytes(exif + second + thumbnail))
    assert data.count(b"\xff\xd8\xff") == 2
    for format in FORMATS:
        assert thumbnail[20:] not in result(data, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("comment", "codec", "text"),
    [
        (b"UNICODE\0" + "Größe 夕焼け".encode("utf-16-be"), "utf-16-be", "Größe 夕焼け"),
        (b"UNICODE\0" + "Größe 夕焼け".encode("utf-16-le"), "utf-16-le", "Größe 夕焼け"),
        (b"JIS\0\0\0\0\0" + "湖のほとり".encode("iso2022_jp"), "iso2022_jp", "湖のほとり"),
    ],
)
def test_comment_keeps_its_code(format: str, comment: bytes, codec: str, text: str) -> None:
    data = result(saved(photo(), "JPEG", exif=camera_exif(comment)), format)
    data = files.encode(files.read(data), format, provenance=PROVENANCE)
    block = exif_block(data)
    written = tags_of(block, tags_of(block)[IFD.Exif])[Base.UserComment]
    assert written[:8] == comment[:8]
    if format == "tiff" and codec.startswith("utf-16"):
        codec = "utf-16-le"
    lines = written[8:].decode(codec).splitlines()
    assert lines[0] == text
    assert len(lines) == 2
    assert files.read_provenance(data) == PROVENANCE


def test_comment_keeps_its_line_breaks() -> None:
    exif = camera_exif(b"ASCII\0\0\0one\r\ntwo\x0bthree")
    data = saved(photo(), "JPEG", exif=exif)
    for _ in range(2):  # the second result's record replaces the first one's
        data = files.encode(files.read(data), "jpeg", provenance=PROVENANCE)
        block = exif_block(data)
        written = tags_of(block, tags_of(block)[IFD.Exif])[Base.UserComment]
        text, _, record = written[8:].rpartition(b"\n")
        assert text == b"one\r\ntwo\x0bthree" and b"linearsr" in record


def test_webp_exif_has_no_header_of_jpeg() -> None:
    data = result(saved(photo(), "JPEG", exif=camera_exif()), "webp")
    assert exif_block(data)[:4] in (b"II*\0", b"MM\0*")
    assert opened(data).getexif()[Base.Make] == "Acme"
    assert int.from_bytes(data[4:8], "little") == len(data) - 8


# XMP and IPTC


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_xmp_is_kept_without_old_sizes(source: str, format: str) -> None:
    if source == "PNG":
        data = saved(photo(), "PNG")
        data = data[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP) + data[33:]
    elif source == "TIFF":
        data = saved(photo(), "TIFF", tiffinfo={700: XMP})
    else:
        data = saved(photo(), source, xmp=XMP)
    image = opened(result(data, format))
    xmp = image.tag_v2[700] if format == "tiff" else image.info["xmp"]  # type: ignore[attr-defined]
    assert b'xmp:Rating="5"' in bytes(xmp)
    assert b"Orientation" not in bytes(xmp)
    assert b"PixelXDimension" not in bytes(xmp)


def jpeg_with_iptc(records: bytes = IPTC) -> bytes:
    data = saved(photo(), "JPEG")
    other = b"8BIM\x03\xed\3odd" + struct.pack(">I", 3) + b"abc\0"
    resource = other + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records
    body = b"Photoshop 3.0\0" + resource + bytes(len(resource) % 2)
    return data[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_iptc_is_kept(format: str) -> None:
    data = result(jpeg_with_iptc(), format)
    for _ in range(2):
        fields = IptcImagePlugin.getiptcinfo(opened(data))  # type: ignore[no-untyped-call]
        assert fields[(2, 120)] == b"A lake"
        assert fields[(2, 25)] == b"boat"
        data = result(data, format)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_iptc_becomes_xmp_where_there_is_no_iptc(format: str) -> None:
    xmp = opened(result(jpeg_with_iptc(), format)).info["xmp"]
    assert b'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">A lake<' in xmp
    assert b"<dc:subject><rdf:Bag><rdf:li>boat<" in xmp
    # A property that XMP has already is not added again.
    data = jpeg_with_iptc(b"\x1c\x02\x78\x00\x03a<b")
    other = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(other) + 2) + other + data[2:]
    assert opened(result(data, format)).info["xmp"].count(b"dc:description>") == 2


# Print resolution


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
@pytest.mark.parametrize("source", ["PNG", "JPEG", "TIFF", "BMP"])
def test_print_resolution_is_kept(source: str, format: str) -> None:
    data = result(saved(photo(), source, dpi=(300, 300)), format)
    assert [round(float(dots)) for dots in opened(data).info["dpi"]] == [300, 300]
    data = result(saved(photo(), source, dpi=(204, 98)), format)
    assert [round(float(dots)) for dots in opened(data).info["dpi"]] == [204, 98]


def test_print_resolution_of_jfif_is_kept_beside_another_one_in_exif() -> None:
    exif = Image.Exif()
    exif[Base.XResolution], exif[Base.YResolution], exif[Base.ResolutionUnit] = 72.0, 72.0, 2
    data = saved(photo(), "JPEG", dpi=(300, 300), exif=exif.tobytes())
    for format in ("png", "jpeg", "tiff"):
        assert round(float(opened(result(data, format)).info["dpi"][0])) == 300


# Texts of PNG


def png_with_texts() -> bytes:
    data = saved(photo(), "PNG")
    before = chunk(b"tEXt", b"parameters\0a lighthouse\nSteps: 20")
    before += chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"nodes": []}'))
    after = chunk(b"iTXt", b"Title\0\0\0\0\0" + "Größe ☀".encode())
    after += chunk(b"tEXt", b"Author\0A. Nobody")
    return data[:33] + before + data[33:-12] + after + data[-12:]


def test_texts_of_png_are_kept_beside_ours() -> None:
    data = result(png_with_texts(), "png")
    for _ in range(2):
        text = opened(data).text  # type: ignore[attr-defined]
        assert text["parameters"] == "a lighthouse\nSteps: 20"
        assert text["workflow"] == '{"nodes": []}'
        assert text["Title"] == "Größe ☀"
        assert text["Author"] == "A. Nobody"
        assert text["Software"] == "linearsr 0.1.0"
        # Twice in EXIF and twice in text, also after a second run.
        assert data.count(b"linearsr 0.1.0") == 4
        data = result(data, "png")


@pytest.mark.parametrize("format", ["jpeg", "webp", "tiff"])
def test_texts_of_png_go_to_exif_elsewhere(format: str) -> None:
    block = exif_block(result(png_with_texts(), format))
    first = tags_of(block)
    assert first[Base.Artist] == "A. Nobody"
    comment = tags_of(block, first[IFD.Exif])[Base.UserComment]
    codec = "utf-16-le" if format == "tiff" else "utf-16-be"
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode(codec).startswith("a lighthouse\nSteps: 20\n")


def test_compressed_text_cannot_fill_the_memory() -> None:
    data = saved(photo(), "PNG")
    bomb = chunk(b"zTXt", b"big\0\0" + zlib.compress(bytes(50_000_000)))
    assert files.read(data[:33] + bomb + data[33:]).texts == ()


# Files that were refused


def test_jpeg_without_its_end_marker_is_read_with_a_note() -> None:
    data = saved(photo(), "JPEG", quality=90)
    whole = files.read(data)
    assert whole.notes == ()
    for cut in (1, 2):
        picture = files.read(data[:-cut])
        assert picture.notes == ("the file lacks its end marker; the picture is whole",)
        assert (picture.pixels == whole.pixels).all()
    for cut in (20, 100, 300):
        with pytest.raises(InputError, match="damaged or truncated"):
            files.read(data[:-cut])


def test_jpeg_with_rubbish_between_its_parts_is_read_with_a_note() -> None:
    data = saved(photo(), "JPEG")
    picture = files.read(data[:20] + b"rubbish" + data[20:])
    assert len(picture.notes) == 1
    assert picture.notes[0].startswith("parts of the file may be damaged (")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_bmp_is_read(mode: str) -> None:
    image = photo(mode)
    picture = files.read(saved(image, "BMP"))
    assert picture.format == "bmp"
    np.testing.assert_array_equal(
        (picture.pixels * 255).round().permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB"))
    )
    format, sizes = files.measure(saved(image, "BMP"))
    assert (format, *sizes[0]) == ("bmp", 48, 32)
    assert files.result_format("bmp", None) == "png"
    with pytest.raises(InputError):
        files.read(saved(image, "BMP")[:200])
    with pytest.raises(NoPicture):
        files.read(b"BM is how this text begins, and it is long enough for a header")
    with pytest.raises(InputError, match="--max-pixels"):
        files.read(saved(image, "BMP"), max_pixels=100)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this PIL has no JPEG 2000")
def test_jpeg_2000_is_read() -> None:
    data = saved(photo(), "JPEG2000")
    assert files.read(data).pixels.shape == (3, 32, 48)
    format, sizes = files.measure(data)
    assert (format, *sizes[0]) == ("jp2", 48, 32)


def tiff_with(tag: int, value: int) -> bytes:
    data = bytearray(saved(photo(), "TIFF"))
    at = data.index(struct.pack("<HH", tag, 3))
    data[at + 8 : at + 12] = struct.pack("<I", value)
    return bytes(data)


def test_intact_files_of_other_kinds_are_not_called_damaged() -> None:
    for tag, value, kind in (
        (Base.Compression, 34887, "LERC compression"),
        (Base.Compression, 50002, "JPEG XL compression"),
        (Base.PhotometricInterpretation, 32845, "number 32845 colours"),
    ):
        with pytest.raises(InputError, match=f"holds {kind}.*convert it") as error:
            files.read(tiff_with(tag, value))
        assert "damaged" not in str(error.value)
    for data, kind in (
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\xff\x0a", "JPEG XL"),
        (b"8BPS", "Photo"),
    ):
        with pytest.raises(NoPicture, match=kind):
            files.read(data + bytes(40))


def test_lab_becomes_srgb() -> None:
    from PIL import ImageCms

    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = photo()
    converted = ImageCms.buildTransform(srgb, lab, "RGB", "LAB").apply(image)
    picture = files.read(saved(converted, "TIFF"))
    difference = (picture.pixels * 255).permute(1, 2, 0).numpy() - np.asarray(image, np.float32)
    assert np.abs(difference).mean() < 3
    assert picture.icc is None


@pytest.mark.skipif(not features.check("libtiff"), reason="this PIL has no libtiff")
def test_zstandard_tiff_is_read() -> None:
    try:
        data = saved(photo(), "TIFF", compression="zstd")
    except (OSError, ValueError, RuntimeError, KeyError):
        pytest.skip("this PIL writes no Zstandard")
    picture = files.read(data)
    np.testing.assert_array_equal(
        (picture.pixels * 255).round().permute(1, 2, 0).numpy(), np.asarray(photo())
    )
    format, sizes = files.measure(data)
    assert (format, *sizes[0]) == ("tiff", 48, 32)


@pytest.mark.parametrize("format", ["BMP", "JPEG2000"])
def test_formats_without_provenance_have_none(format: str) -> None:
    if format == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("this PIL has no JPEG 2000")
    assert files.read_provenance(saved(photo(), format)) is None


def zstd_tiff(bits: int, bands: int, *more: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF file of 8 x 8 pixels that libvips does not read."""
    samples = pa.compress(bytes(range(64)) * (bits // 8 * bands), codec="zstd", asbytes=True)
    short = struct.Struct("<H").pack
    at = 8 + len(samples) + len(samples) % 2
    layout = [
        (Base.ImageWidth, 3, 1, short(8)),
        (Base.ImageLength, 3, 1, short(8)),
        (Base.BitsPerSample, 3, bands, short(bits) * bands),
        (Base.Compression, 3, 1, short(50000)),
        (Base.PhotometricInterpretation, 3, 1, short(1 if bands == 1 else 2)),
        (Base.StripOffsets, 3, 1, short(8)),
        (Base.SamplesPerPixel, 3, 1, short(bands)),
        (Base.RowsPerStrip, 3, 1, short(8)),
        (Base.StripByteCounts, 3, 1, short(len(samples))),
    ]
    header = b"II*\0" + struct.pack("<I", at)
    return (header + samples).ljust(at, b"\0") + directory("<", at, sorted([*layout, *more]))


needs_zstd = pytest.mark.skipif(not features.check("libtiff"), reason="this PIL has no libtiff")


@needs_zstd
def test_a_print_resolution_that_is_no_number_is_dropped() -> None:
    words = [(tag, 2, 6, b"abcde\0") for tag in (Base.XResolution, Base.YResolution)]
    unit = (Base.ResolutionUnit, 3, 1, struct.pack("<H", 2))
    assert files.read(zstd_tiff(8, 1, *words, unit)).dpi is None


@needs_zstd
def test_colours_that_lose_bits_are_noted() -> None:
    picture = files.read(zstd_tiff(16, 3))
    assert (picture.bits, picture.notes) == (8, ("its 16 bits a channel are read as 8",))
    picture = files.read(zstd_tiff(16, 1))
    assert (picture.bits, picture.notes) == (16, ())
    assert files.read(zstd_tiff(8, 3)).notes == ()


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this PIL has no JPEG 2000")
def test_colours_of_jpeg_2000_that_lose_bits_are_noted() -> None:
    data = bytearray(saved(photo(), "JPEG2000", irreversible=True))
    assert files.read(bytes(data)).notes == ()
    depths = data.index(b"\xff\x4f\xff\x51") + 42
    data[depths : depths + 9 : 3] = bytes([15, 15, 15])
    assert files.read(bytes(data)).notes == ("its 16 bits a channel are read as 8",)


def raw_profile(kind: str, data: bytes) -> bytes:
    """A chunk of PNG in the way of ImageMagick."""
    digits = "\n".join(data.hex()[i : i + 72] for i in range(0, len(data.hex()), 72))
    text = f"\n{kind}\n{len(data):8}\n{digits}\n".encode()
    return chunk(b"zTXt", b"Raw profile type " + kind.encode() + b"\0\0" + zlib.compress(text))


@pytest.mark.parametrize("start", [b"", b"Photoshop 3.0\0"])
@pytest.mark.parametrize("kinds", [("exif", "iptc", "xmp"), ("APP1", "8bim", "xmp")])
def test_metadata_in_texts_of_imagemagick_is_kept(
    kinds: tuple[str, str, str], start: bytes
) -> None:
    resource = start + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC
    pieces = (camera_exif(), resource, XMP)
    chunks = b"".join(map(raw_profile, kinds, pieces))
    data = saved(photo(), "PNG")
    picture = files.read(data[:33] + chunks + data[33:])
    assert picture.texts == ()
    assert picture.iptc == IPTC
    assert picture.xmp == XMP
    assert picture.exif is not None
    assert b"Acme" in picture.exif
    broken = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nno digits")
    broken += chunk(b"tEXt", b"Raw profile type iptc\0")
    assert files.read(data[:33] + broken + data[33:]).exif is None


def test_texts_that_are_left_out_count_as_well() -> None:
    data = saved(photo(), "PNG")
    bomb = chunk(b"zTXt", b"big\0\0" + zlib.compress(bytes(2**20 + 10)))
    last = chunk(b"tEXt", b"Title\0a lake")
    assert files.read(data[:33] + bomb * 5 + last + data[33:]).texts == (("Title", "a lake"),)
    assert files.read(data[:33] + bomb * 10 + last + data[33:]).texts == ()
    empty = chunk(b"tEXt", b"k\0") * 20_000
    assert len(files.read(data[:33] + empty + data[33:]).texts) < 10_000


def test_metadata_that_is_left_out_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = files.read(saved(photo(), "JPEG", exif=camera_exif()))
    assert files.encode_with_notes(picture, "jpeg")[1] == ()
    tags = exif.parse(picture.exif)
    assert tags is not None
    tags.root[Base.DocumentName] = Value(2, bytes(70_000))
    long = replace(
        picture,
        xmp=b"<x>" + b" " * 70_000 + b"</x>",
        iptc=b"\x1c\x02\x78\x75\x30" + b"a" * 30_000 + b"\x1c\x02\x78\x9c\x40" + b"a" * 40_000,
        exif=exif.HEADER + tags.tobytes(),
        icc=adobe_profile(grey=False),
    )
    data, notes = files.encode_with_notes(long, "jpeg")
    assert notes == ("left out, because jpeg allows 64 kB: XMP, IPTC, the largest tags of EXIF",)
    assert files.read(data).xmp is None
    for format in ("png", "webp", "tiff"):
        assert files.encode_with_notes(long, format)[1] == ()

    def refuse(image: Any, quality: int) -> bytes:
        if "icc-profile-data" in image.get_fields():
            raise pyvips.Error("no")
        return bytes(image.pngsave_buffer())

    monkeypatch.setitem(files._SAVERS, "png", refuse)
    assert files.encode_with_notes(long, "png")[1] == (
        "left out, because it cannot be written as png: the colour profile",
    )
