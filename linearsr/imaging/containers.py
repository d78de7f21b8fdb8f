"""Find and place metadata in picture files, without decoding or changing the picture.

    PNG    a list of chunks            JPEG   a list of segments
    WebP   a list of RIFF chunks       AVIF   boxes within boxes

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

from linearsr.imaging.exif import plausible_dpi

_PNG_START: Final = 8
_XMP_KEY: Final = "XML:com.adobe.xmp"
_RAW_KEY: Final = "Raw profile type "
_XMP_HEADER: Final = b"http://ns.adobe.com/xap/1.0/\0"
_IPTC_HEADER: Final = b"Photoshop 3.0\0"
_IPTC_RESOURCE: Final = b"8BIM\x04\x04"
# The longest payload of a JPEG segment, and of its EXIF without the header.
_MAX_SEGMENT: Final = 65533
MAX_EXIF: Final = _MAX_SEGMENT - 6
# Text chunks may be compressed, so a small file can hold a large text.
_MAX_TEXT: Final = 2**20
_MAX_TEXTS: Final = 2**23
# Each text costs this much of that room beside its length.
_TEXT_COST: Final = 2**10

_CONTAINERS: Final = (b"meta", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"iprp", b"ipco")


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
    texts: list[tuple[str, str]] = field(default_factory=list)
    profiles: dict[str, bytes] = field(default_factory=dict)
    """EXIF, XMP and IPTC from texts of PNG, as ImageMagick writes them."""
    dpi: tuple[float, float] | None = None
    """The density of JFIF."""
    frames: int = 1
    premultiplied: bool = False


def read_marks(data: bytes, format: str) -> Marks:
    """Return what a PNG, JPEG or AVIF file says about itself; broken parts are left out."""
    marks = Marks()
    reader = {"png": _read_png, "jpeg": _read_jpeg, "avif": _read_avif}.get(format)
    if reader:
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


def _text(kind: bytes, body: bytes) -> tuple[str, str] | None:
    """Return the keyword and the text of a chunk, of _MAX_TEXT at most; None if broken, or XMP."""
    keyword, _, text = body.partition(b"\0")
    key, codec, compressed = keyword.decode("latin-1"), "latin-1", kind == b"zTXt"
    if key == _XMP_KEY:
        return None
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
    elif key:
        marks.texts.append((key, text))


def _keep_profile(marks: Marks, kind: str, data: bytes) -> None:
    """Keep metadata under its right name; APP1 is what JPEG calls both EXIF and XMP."""
    if data.startswith(_XMP_HEADER):
        kind, data = "xmp", data.removeprefix(_XMP_HEADER)
    kind = {"APP1": "exif", "8bim": "iptc"}.get(kind, kind)
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
    if data[6:11] == b"JFIF\0" and len(data) > 18:
        unit, across, down = struct.unpack_from(">BHH", data, 13)
        scale = {1: 1.0, 2: 2.54}.get(unit)
        if scale:
            marks.dpi = plausible_dpi(across * scale, down * scale)


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
        segments.append(("XMP", 0xE1, _XMP_HEADER + metadata.xmp))
    if metadata.iptc:
        resource = _IPTC_RESOURCE + struct.pack(">HI", 0, len(metadata.iptc)) + metadata.iptc
        body = _IPTC_HEADER + resource + bytes(len(resource) % 2)
        segments.append(("IPTC", 0xED, body))
    return segments


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
        if data[at : at + 6] == _IPTC_RESOURCE:
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


# AVIF


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
