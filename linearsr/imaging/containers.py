"""Find and place metadata in picture files, without decoding or changing the picture.

    PNG    a list of chunks            JPEG       a list of segments
    WebP   a list of RIFF chunks       AVIF, JP2  boxes within boxes
    GIF    a list of blocks            BMP, TIFF  a header

libvips reads EXIF, XMP and IPTC well, but it writes them through libexif, which drops tags, gives
WebP the header of JPEG, and leaves out the density of JPEG. So it writes none of them, and they are
placed here.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from PIL.ExifTags import Base

from linearsr.imaging import tiff
from linearsr.imaging.exif import is_record, plausible_dpi
from linearsr.imaging.tiff import Tags, Value
from linearsr.imaging.xmp import extended

_PNG_START: Final = 8
_XMP_KEY: Final = "XML:com.adobe.xmp"
_RAW_KEY: Final = "Raw profile type "
_XMP_HEADER: Final = b"http://ns.adobe.com/xap/1.0/\0"
_IPTC_HEADER: Final = b"Photoshop 3.0\0"
_IPTC_RESOURCE: Final = b"8BIM\x04\x04"
# The white point of sRGB and most other spaces, as CIE xy.
D65: Final = (0.3127, 0.329)
# Photometric interpretations whose colours become sRGB: CMYK, and those of CIELAB.
_OTHER_COLOURS: Final = (5, 8, 9, 10)
_EXTENSION_HEADER: Final = b"http://ns.adobe.com/xmp/extension/\0"
_MPF_HEADER: Final = b"MPF\0"
_MP_ENTRIES: Final = 0xB002
_THUMBNAIL: Final = 1
# The longest payload of a JPEG segment, and of its EXIF without the header.
_MAX_SEGMENT: Final = 65533
MAX_EXIF: Final = _MAX_SEGMENT - 6
_MAX_PART: Final = 65_000
_END_OF_JPEG: Final = b"\xff\xd9"
# Text chunks may be compressed, so a small file can hold a large text.
_MAX_TEXT: Final = 2**20
_MAX_TEXTS: Final = 2**23
# Each text costs this much of that room beside its length.
_TEXT_COST: Final = 2**10
_LONG_TEXTS: Final = "texts of more than 1 MB, or 8 MB together, are left out"

_CONTAINERS: Final = (
    *(b"meta", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco"),
    b"jp2h",
)
# The names of JPEG 2000's boxes for metadata.
_BOX_NAMES: Final = {
    bytes.fromhex("be7acfcb97a942e89c71999491e3afac"): "xmp",
    bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38"): "iptc",
    b"JpgTiffExif->JP2": "exif",
}


@dataclass
class Metadata:
    """The metadata of a result, for `embed`."""

    exif: bytes | None = None
    """EXIF without its header."""
    xmp: bytes | None = None
    iptc: bytes | None = None
    """IPTC's records (IIM), without the header of Photoshop."""
    texts: tuple[tuple[str, str], ...] = ()
    """Keywords and texts, for PNG."""
    dpi: tuple[float, float] = (72.0, 72.0)


class Cicp(NamedTuple):
    """Code points for colour (ITU-T H.273): primaries, transfer, matrix, and full range or not."""

    primaries: int
    transfer: int
    matrix: int
    full: int


@dataclass
class Marks:
    """Properties in the file that libvips does not report."""

    cicp: Cicp | None = None
    cicp_first: bool = False
    """Whether `cicp` counts more than a profile."""
    srgb: bool = False
    gamma: float | None = None
    """The exponent that PNG's gAMA gives to decoded samples."""
    chromaticities: tuple[float, ...] | None = None
    """x and y of white, red, green and blue, as in PNG's cHRM."""
    curve: tuple[float, ...] = ()
    """The light of each sample, from 0 to 65535, as in TIFF's TransferFunction."""
    texts: list[tuple[str, str]] = field(default_factory=list)
    profiles: dict[str, bytes] = field(default_factory=dict)
    """EXIF, XMP, IPTC and the colour profile ("icc")."""
    extension: dict[bytes, list[tuple[int, bytes]]] = field(default_factory=dict)
    """The offsets and parts of XMP that JPEG has in further segments, by the name of the whole."""
    dpi: tuple[float, float] | None = None
    """The density of JFIF."""
    unitless: bool = False
    """Whether the print resolution has no unit, so that it is only the shape of a pixel."""
    orientation: int | None = None
    """The orientation of a page of TIFF."""
    frames: int = 1
    premultiplied: bool = False
    notes: list[str] = field(default_factory=list)
    """Notes for a user about parts that are left out, or may be damaged."""


def read_marks(data: bytes, format: str, tags: Tags | None = None) -> Marks:
    """Return the properties of a file that libvips does not report; broken parts are left out.

    tags: those of the page of a TIFF file.
    """
    marks = Marks()
    if tags is not None:
        _read_tiff(tags, marks)
    elif reader := _READERS.get(format):
        reader(data, marks)
    return marks


def embed(data: bytes, format: str, metadata: Metadata) -> bytes:
    """Return a file that `linearsr.imaging.files` encoded, with metadata that its format can hold.

    A TIFF file is returned unchanged: see `linearsr.imaging.tiff.join_tiff`.
    """
    if format == "png":
        return _embed_png(data, metadata)
    if format == "jpeg":
        return _embed_jpeg(data, metadata)
    return _embed_webp(data, metadata) if format == "webp" else data


# PNG


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the body of each chunk whose checksum is right."""
    at = _PNG_START
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        if kind != b"IDAT":
            body = data[at + 8 : at + 8 + size]
            if data[at + 8 + size : at + 12 + size] == struct.pack(">I", zlib.crc32(kind + body)):
                yield kind, body
        at += 12 + size


def _read_png(data: bytes, marks: Marks) -> None:
    room = _MAX_TEXTS
    for kind, body in _chunks(data):
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            _mark(marks, kind, body)
        elif room > 0:
            text = _text(kind, body)
            room -= _TEXT_COST + (len(text[1]) if text else _MAX_TEXT)
            if text and len(text[1]) < _MAX_TEXT:
                _keep_text(marks, *text)
            elif text:
                marks.notes = [_LONG_TEXTS]
        else:
            marks.notes = [_LONG_TEXTS]


def _mark(marks: Marks, kind: bytes, body: bytes) -> None:
    if kind == b"cICP" and len(body) == 4 and not body[2]:
        marks.cicp, marks.cicp_first = Cicp(*body), True
    elif kind == b"sRGB":
        marks.srgb = True
    elif kind == b"gAMA" and len(body) == 4 and any(body):
        marks.gamma = 100_000 / int.from_bytes(body, "big")
    elif kind == b"cHRM" and len(body) == 32:
        marks.chromaticities = tuple(n / 100_000 for n in struct.unpack(">8i", body))
    elif kind == b"acTL" and len(body) == 8:
        marks.frames = int.from_bytes(body[:4], "big")
    elif kind == b"pHYs":
        marks.unitless = body[8:] == b"\0"
    elif kind == b"eXIf":
        marks.profiles["exif"] = body


def _text(kind: bytes, body: bytes) -> tuple[str, str] | None:
    """Return the keyword and the text of a chunk, of _MAX_TEXT at most; None if broken."""
    keyword, _, text = body.partition(b"\0")
    key, codec, compressed = keyword.decode("latin-1"), "latin-1", kind == b"zTXt"
    if key == _XMP_KEY:
        codec = "utf-8"
    if kind == b"iTXt":
        codec, compressed = "utf-8", text[:1] == b"\1"
        # Two flags, and then a language and a translated keyword.
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif compressed:
        text = text[1:]
    with contextlib.suppress(zlib.error, UnicodeDecodeError):
        if compressed:
            text = zlib.decompressobj().decompress(text, _MAX_TEXT)
        return key, text[:_MAX_TEXT].decode(codec)
    return None


def _keep_text(marks: Marks, key: str, text: str) -> None:
    if key.startswith(_RAW_KEY):
        # An empty line, a name, the length, and the bytes in hexadecimal digits.
        with contextlib.suppress(ValueError, IndexError):
            _keep_profile(marks, key[len(_RAW_KEY) :], bytes.fromhex(text.split("\n", 3)[3]))
    elif key == _XMP_KEY:
        _keep_profile(marks, "xmp", text.encode())
    elif key:
        marks.texts.append((key, text))


def _keep_profile(marks: Marks, kind: str, data: bytes) -> None:
    """Keep metadata under its right name; APP1 is what JPEG calls both EXIF and XMP."""
    if data.startswith(_XMP_HEADER):
        kind, data = "xmp", data.removeprefix(_XMP_HEADER)
    kind = {"APP1": "exif", "8bim": "iptc", "icm": "icc"}.get(kind, kind)
    marks.profiles.setdefault(kind, data)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _text_chunk(key: str, text: str) -> bytes:
    keyword = key.encode("latin-1", "replace") + b"\0"
    try:
        return _chunk(b"tEXt", keyword + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", keyword + bytes(4) + text.encode("utf-8", "replace"))


def _embed_png(data: bytes, metadata: Metadata) -> bytes:
    header = _PNG_START + 25
    added = [_chunk(b"eXIf", metadata.exif)] if metadata.exif else []
    if metadata.xmp:
        added.append(_chunk(b"iTXt", _XMP_KEY.encode() + bytes(5) + metadata.xmp))
    added += [_text_chunk(key, text) for key, text in metadata.texts]
    return b"".join([data[:header], *added, data[header:]])


# JPEG


def _read_jpeg(data: bytes, marks: Marks) -> None:
    photoshop = bytearray()
    end = 0
    for marker, start, end in _headers(data):
        body = data[start:end]
        if marker == 0xE2 and body.startswith(_MPF_HEADER):
            marks.frames = _count_pictures(data, start + len(_MPF_HEADER), end)
        elif marker == 0xED and body.startswith(_IPTC_HEADER):
            photoshop += body.removeprefix(_IPTC_HEADER)
        else:
            _mark_segment(marks, marker, body)
    if iptc := iptc_records(bytes(photoshop)):
        marks.profiles["iptc"] = iptc
    if data.rfind(_END_OF_JPEG) < end:
        marks.notes.append("the file lacks its end marker; parts of the picture may be damaged")


def _mark_segment(marks: Marks, marker: int, body: bytes) -> None:
    if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 12:
        unit, across, down = struct.unpack_from(">BHH", body, 7)
        scale = {1: 1.0, 2: 2.54}.get(unit, 0.0)
        marks.dpi = plausible_dpi(across * scale, down * scale)
    elif marker == 0xE1 and body.startswith(_EXTENSION_HEADER) and len(body) >= 75:
        (offset,) = struct.unpack_from(">I", body, 71)
        marks.extension.setdefault(body[35:67], []).append((offset, body[75:]))
    elif marker == 0xFE:
        marks.texts.append(("Comment", _words(body)))


def _headers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, start and end of each segment of JPEG up to that of the first scan."""
    at = data.find(b"\xff", 2)
    while 0 <= at < len(data) - 4:
        marker = data[at + 1]
        if marker in (0, 0xFF):  # rubbish, or a byte that fills
            at = data.find(b"\xff", at + 1)
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        if marker == 0xDA:
            return
        at = data.find(b"\xff", end)


def _count_pictures(data: bytes, start: int, end: int) -> int:
    """Return the number of pictures that CIPA's multi-picture format lists, without thumbnails."""
    tags = tiff.parse(data[start:end])
    entries = tags.root.get(_MP_ENTRIES) if tags else None
    if tags is None or not isinstance(entries, Value):
        return 1
    count = 1
    for at in range(0, len(entries.data) - 15, 16):
        kind, _, offset = struct.unpack_from(f"{tags.order}III", entries.data, at)
        is_there = offset and data.startswith(b"\xff\xd8", start + offset)
        count += bool(is_there and kind >> 16 & 0xFF != _THUMBNAIL)
    return count


def _words(body: bytes) -> str:
    """Return a comment, which is UTF-8 if it can be."""
    try:
        return body.decode().rstrip("\0")
    except UnicodeDecodeError:
        return body.decode("latin-1").rstrip("\0")


def _embed_jpeg(data: bytes, metadata: Metadata) -> bytes:
    added = (
        struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
        for _, marker, body in _segments(metadata)
        if len(body) <= _MAX_SEGMENT
    )
    return b"".join([data[:2], *added, data[2:]])


def too_long(format: str, metadata: Metadata) -> list[str]:
    """Return the names of the metadata that `embed` leaves out because it is too long."""
    segments = _segments(metadata) if format == "jpeg" else []
    return [name for name, _, body in segments if len(body) > _MAX_SEGMENT]


def _segments(metadata: Metadata) -> list[tuple[str, int, bytes]]:
    """Return the name, marker and body of the segments of JPEG for metadata."""
    across, down = (min(65535, max(1, round(dots))) for dots in metadata.dpi)
    jfif = b"JFIF\0" + struct.pack(">HBHHH", 0x101, 1, across, down, 0)
    segments = [("print resolution", 0xE0, jfif)]
    if metadata.exif:
        segments.append(("EXIF", 0xE1, b"Exif\0\0" + metadata.exif))
    if metadata.xmp:
        xmp, guid, rest = extended(metadata.xmp, _MAX_SEGMENT - len(_XMP_HEADER))
        segments.append(("XMP", 0xE1, _XMP_HEADER + xmp))
        for at in range(0, len(rest), _MAX_PART):
            begin = _EXTENSION_HEADER + guid + struct.pack(">II", len(rest), at)
            segments.append(("XMP", 0xE1, begin + rest[at : at + _MAX_PART]))
    if metadata.iptc:
        resource = _IPTC_RESOURCE + struct.pack(">HI", 0, len(metadata.iptc)) + metadata.iptc
        body = _IPTC_HEADER + resource + bytes(len(resource) % 2)
        segments.append(("IPTC", 0xED, body))
    comments = (text for key, text in metadata.texts if key == "Comment" and not is_record(text))
    return [*segments, *(("a comment", 0xFE, text.encode()) for text in comments)]


def iptc_records(data: bytes | None) -> bytes | None:
    """Return IPTC's records from an APP13 segment of JPEG, or from a tag of TIFF."""
    data = (data or b"").removeprefix(_IPTC_HEADER)
    if data.startswith(b"8BIM"):
        data = _iptc_resource(data)
    end = 0
    while data[end : end + 1] == b"\x1c" and end + 5 <= len(data):
        end += 5 + int.from_bytes(data[end + 3 : end + 5], "big")
    return data[:end] or None  # without padding


def _iptc_resource(data: bytes) -> bytes:
    at = 0
    while data[at : at + 4] == b"8BIM" and at + 12 <= len(data):
        # A name follows, whose length counts its own byte and is made even, and then the size.
        start = at + 6 + (data[at + 6] + 2) // 2 * 2
        size = int.from_bytes(data[start : start + 4], "big")
        if data[at : at + 6] == _IPTC_RESOURCE and size:
            return data[start + 4 : start + 4 + size]
        at = start + 4 + size + size % 2
    return b""


# WebP


def _embed_webp(data: bytes, metadata: Metadata) -> bytes:
    """Replace the EXIF and XMP that libvips wrote, which set the flags in the header."""
    bodies = {b"EXIF": metadata.exif, b"XMP ": metadata.xmp}
    parts = [data[:12]]
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        body = bodies.get(kind) or body
        parts.append(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2))
        at += 8 + size + size % 2
    whole = b"".join(parts)
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]


# AVIF and JPEG 2000


def _boxes(data: bytes, at: int, stop: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of the contents of each box, and of the boxes in it."""
    while at + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1 and start + 8 <= stop:
            (size,) = struct.unpack_from(">Q", data, start)
            start += 8
        end = at + size if size else stop
        if end < start or end > stop:
            return
        yield kind, start, end
        if kind in _CONTAINERS and depth < len(_CONTAINERS):
            yield from _boxes(data, start + 4 * (kind == b"meta"), end, depth + 1)
        at = end


def _read_avif(data: bytes, marks: Marks) -> None:
    for kind, start, end in _boxes(data, 0, len(data)):
        body = data[start : min(end, start + 4096)]
        if kind == b"colr" and body[:4] == b"nclx" and len(body) >= 11 and not marks.cicp:
            primaries, transfer = struct.unpack_from(">HH", body, 4)
            # libheif has undone the matrix and the range.
            marks.cicp = Cicp(primaries, transfer, 0, 1)
        elif kind == b"iref":
            marks.premultiplied = any(k == b"prem" for k, _, _ in _boxes(data, start + 4, end))
        elif kind == b"stsz" and len(body) >= 12:
            marks.frames = max(marks.frames, int.from_bytes(body[8:12], "big"))


def _read_jp2(data: bytes, marks: Marks) -> None:
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"colr" and data[start : start + 1] in (b"\2", b"\3"):  # an ICC profile
            _keep_profile(marks, "icc", data[start + 3 : end])
        elif kind == b"uuid" and (name := _BOX_NAMES.get(data[start : start + 16])):
            _keep_profile(marks, name, data[start + 16 : end])


# GIF


def _read_gif(data: bytes, marks: Marks) -> None:
    at = 13 + _palette_size(data[10:11])
    while at + 2 < len(data) and data[at] in b"!,":
        if data[at] == 0x2C:
            at += 11 + _palette_size(data[at + 9 : at + 10])  # and the size of the codes
            _, at = _blocks(data, at)
            continue
        label, start = data[at + 1], at + 2
        body, at = _blocks(data, start)
        if label == 0xFE:
            marks.texts.append(("Comment", _words(body)))
        elif body.startswith(b"ICCRGBG1012"):
            _keep_profile(marks, "icc", body[11:])
        elif body.startswith(b"XMP DataXMP"):
            # Not in blocks, but before 258 bytes that lead any reader of blocks to their end.
            _keep_profile(marks, "xmp", data[start + 12 : at - 258])


def _palette_size(flags: bytes) -> int:
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _blocks(data: bytes, at: int) -> tuple[bytes, int]:
    """Return the contents of the blocks from here on, and the place after the last one."""
    parts = []
    while at < len(data) and data[at]:
        parts.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return b"".join(parts), at + 1


# BMP and TIFF


def _read_bmp(data: bytes, marks: Marks) -> None:
    size = int.from_bytes(data[14:18], "little")
    if size < 108 or len(data) < 14 + size:
        return
    if data[70:74] == b"DEBM" and size >= 124:
        offset, length = struct.unpack_from("<II", data, 126)
        _keep_profile(marks, "icc", data[14 + offset : 14 + offset + length])
    elif data[70:74] == bytes(4):
        points = struct.unpack_from("<9i", data, 74)
        gammas = struct.unpack_from("<3I", data, 110)
        sums = [sum(points[at : at + 3]) for at in (0, 3, 6)]
        if all(sums) and all(gammas):
            # The white is nowhere in the file; browsers take that of sRGB.
            xy = (points[at] / sums[at // 3] for at in (0, 1, 3, 4, 6, 7))
            marks.chromaticities = (*D65, *xy)
            marks.gamma = sum(gammas) / 3 / 65536


def _read_tiff(tags: Tags, marks: Marks) -> None:
    marks.unitless = tags.number(Base.ResolutionUnit) == 1
    marks.orientation = int(tags.number(Base.Orientation) or 1)
    for kind, tag in (("xmp", Base.XMLPacket), ("icc", Base.InterColorProfile)):
        if isinstance(value := tags.root.get(tag), Value):
            marks.profiles[kind] = value.data
    if iptc := _tiff_iptc(tags):
        marks.profiles["iptc"] = iptc
    if tags.number(Base.PhotometricInterpretation) in _OTHER_COLOURS:
        return
    points = tags.numbers(tags.root.get(Base.PrimaryChromaticities))
    white = tags.numbers(tags.root.get(Base.WhitePoint)) or [*D65]
    if len(points) == 6 and len(white) == 2:
        marks.chromaticities = (*white, *points)
    curve = tags.numbers(tags.root.get(Base.TransferFunction))
    first = curve[: len(curve) // 3] if len(curve) % 3 == 0 else curve  # of red, green and blue
    if curve in (first, first * 3):
        marks.curve = tuple(first)
    else:
        marks.notes.append("its transfer functions differ between colours and are left out")


def _tiff_iptc(tags: Tags) -> bytes | None:
    """Return IPTC's records from their own tag, in either order of bytes, or from Photoshop's."""
    value = tags.root.get(tiff.IPTC, Value(tiff.UNDEFINED, b""))
    swapped = Tags(tags.order, {tiff.IPTC: value}).ordered("<" if tags.order == ">" else ">")
    for found in (value, swapped.root[tiff.IPTC], tags.root.get(tiff.PHOTOSHOP)):
        if isinstance(found, Value) and (iptc := iptc_records(found.data)):
            return iptc
    return None


_READERS: Final = {
    "png": _read_png,
    "jpeg": _read_jpeg,
    "avif": _read_avif,
    "jp2": _read_jp2,
    "gif": _read_gif,
    "bmp": _read_bmp,
}
