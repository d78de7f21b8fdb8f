"""Read and edit EXIF, the tags that a camera writes, and record in it how a picture was made.

Bytes go in and bytes come out; no pixels, no libvips. Metadata matters less than the picture, so
broken EXIF is dropped and never an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from PIL.ExifTags import IFD, Base, Interop
from PIL.Image import Image

from linearsr.imaging import tiff
from linearsr.imaging.tiff import ASCII, LONG, RATIONAL, SHORT, UNDEFINED, Tags, Value

HEADER: Final = b"Exif\0\0"
"""The first bytes of EXIF in JPEG; other formats leave them out."""

_MAX_DPI: Final = 1_000_000.0
_CM_PER_INCH: Final = 2.54

# The tags of a TIFF directory that describe the photograph and not the layout of the file.
_DESCRIPTIVE_TAGS: Final[frozenset[int]] = frozenset(
    {
        Base.DocumentName,
        Base.ImageDescription,
        Base.Make,
        Base.Model,
        Base.PageName,
        Base.XResolution,
        Base.YResolution,
        Base.ResolutionUnit,
        Base.Software,
        Base.DateTime,
        Base.Artist,
        Base.HostComputer,
        Base.Rating,
        Base.RatingPercent,
        Base.Copyright,
        Base.XPTitle,
        Base.XPComment,
        Base.XPAuthor,
        Base.XPKeywords,
        Base.XPSubject,
        IFD.Exif,
        IFD.GPSInfo,
    }
)
# libvips writes these into a TIFF directory, from the resolution that the picture has.
_RESOLUTION_TAGS: Final = (Base.XResolution, Base.YResolution, Base.ResolutionUnit)
# Sizes of the old picture; EXIF in a thumbnail's file also has those of the photograph.
_OLD_SIZES: Final = (Base.ImageWidth, Base.ImageLength)
_RELATED_SIZES: Final = (Interop.RelatedImageWidth, Interop.RelatedImageHeight)
# TIFF has tags of its own for these, and no Interop.
_NOT_IN_TIFF: Final = (
    Base.ComponentsConfiguration,
    Base.ExifImageWidth,
    Base.ExifImageHeight,
    IFD.Interop,
)

_SRGB_SPACE, _ADOBE_SPACE, _OTHER_SPACE = 1, 2, 65535
_ADOBE_FILE: Final = b"R03"

# The first 8 bytes of UserComment, and the codec that they stand for.
_JIS, _UNICODE, _PLAIN, _UNDEFINED_CODE = b"JIS\0\0\0\0\0", b"UNICODE\0", b"ASCII\0\0\0", bytes(8)


def parse(data: bytes | None) -> Tags | None:
    """Return the tags of EXIF with or without HEADER, or of a TIFF file; None if broken."""
    return tiff.parse(data.removeprefix(HEADER)) if data else None


def descriptive_exif(data: bytes, at: int | None = None) -> bytes | None:
    """Return those tags of a TIFF page that describe the photograph; None if none or broken.

    at: the offset of the page's directory, by default the first one's.
    """
    tags = tiff.parse(data.removeprefix(HEADER), at)
    described = _only(tags, _DESCRIPTIVE_TAGS) if tags else Tags()
    return HEADER + described.tobytes() if described.root else None


def for_tiff(tags: Tags, iptc: bytes | None = None) -> Tags:
    """Return those tags that belong into a little-endian TIFF page that has a resolution.

    iptc: IPTC's records, which are a tag there.
    """
    code, codec, text = _comment(tags)
    tags = _only(tags, _DESCRIPTIVE_TAGS - set(_RESOLUTION_TAGS)).ordered("<")
    exif = tags.group(IFD.Exif)
    for tag in _NOT_IN_TIFF:
        exif.pop(tag, None)
    if codec == "utf-16-be":
        exif[Base.UserComment] = Value(UNDEFINED, code + text.encode("utf-16-le", "replace"))
    if iptc:
        tags.root[tiff.IPTC] = Value(LONG, iptc + bytes(-len(iptc) % 4))
    return tags


def _only(tags: Tags, wanted: frozenset[int]) -> Tags:
    return Tags(tags.order, {tag: tags.root[tag] for tag in tags.root.keys() & wanted})


def pil_exif(image: Image) -> tuple[bytes | None, int]:
    """Return the EXIF and orientation of a loaded PIL image; None and 1 without usable EXIF."""
    # PIL raises almost any kind of exception for broken EXIF.
    try:
        exif = image.getexif()
        data = exif.tobytes() if len(exif) else None
        orientation = int(exif.get(Base.Orientation, 1))
    except Exception:
        return None, 1
    if image.format == "TIFF":  # the tags for the layout of the file are among them
        return (descriptive_exif(data) if data else None), orientation
    # PIL forgets the types of values, so its own bytes are the last resort.
    original = image.info.get("exif")
    return (original if isinstance(original, bytes) else data), orientation


def upright_exif(data: bytes | None) -> bytes | None:
    """Return EXIF with HEADER and an orientation of 1, otherwise unchanged; None if broken."""
    if data is None or (tags := parse(data)) is None:
        return None
    if Base.Orientation not in tags.root or tags.number(Base.Orientation) == 1:
        return HEADER + data.removeprefix(HEADER)
    tags.root[Base.Orientation] = tags.pack(SHORT, 1)
    return HEADER + tags.tobytes()


def orientation(data: bytes | None) -> int:
    """Return the orientation in EXIF, from 1 to 8; 1 without a valid one."""
    tags = parse(data)
    number = tags.number(Base.Orientation) if tags else None
    return int(number) if number and 1 <= number <= 8 else 1


def resolution(data: bytes | None) -> tuple[float, float] | None:
    """Return the print resolution in EXIF in dots per inch, if it has a plausible one."""
    if (tags := parse(data)) is None:
        return None
    unit = tags.number(Base.ResolutionUnit)
    scale = {1: 0.0, 3: _CM_PER_INCH}.get(int(unit or 2), 1.0)
    across = (tags.number(Base.XResolution) or 0.0) * scale
    down = (tags.number(Base.YResolution) or 0.0) * scale or across
    return plausible_dpi(across, down)


def plausible_dpi(across: float, down: float) -> tuple[float, float] | None:
    """Return a print resolution in dots per inch, or None if it cannot be one.

    Many programs write 1 if they know of none.
    """
    return (across, down) if all(1 < dots <= _MAX_DPI for dots in (across, down)) else None


def is_adobe_rgb(data: bytes | None) -> bool:
    """Return whether EXIF says Adobe RGB: an option file of DCF, or the colour space 2."""
    if (tags := parse(data)) is None:
        return False
    space = tags.number(Base.ColorSpace, IFD.Exif)
    index = tags.group(IFD.Exif, IFD.Interop).get(Interop.InteropIndex)
    is_option = isinstance(index, Value) and index.data.startswith(_ADOBE_FILE)
    return space == _ADOBE_SPACE or (is_option and space in (None, _OTHER_SPACE))


def srgb_exif(data: bytes | None) -> bytes | None:
    """Return EXIF that says sRGB, for pixels that were converted; None stays None."""
    if (tags := parse(data)) is None:
        return data
    exif = tags.root.get(IFD.Exif)
    if isinstance(exif, dict):
        exif[Base.ColorSpace] = tags.pack(SHORT, _SRGB_SPACE)
        exif.pop(IFD.Interop, None)
    return HEADER + tags.tobytes()


def result_tags(
    data: bytes | None,
    *,
    width: int,
    height: int,
    dpi: tuple[float, float],
    texts: Mapping[str, str],
    provenance: Mapping[str, str],
    profile: bool,
) -> Tags | None:
    """Return the tags to write into a result; None if there is nothing to say.

    The sizes are those of the result and the thumbnail is gone. Provenance sets Software, and puts
    a line of JSON at the end of UserComment: the user's own text there stays, and the line of an
    earlier run is replaced. Broken EXIF is replaced.

    texts: text chunks of a PNG file, for other formats. profile: whether the file has one.
    """
    tags = parse(data) or Tags(">")  # the order in which PIL's tools expect Unicode
    for size in _OLD_SIZES:
        tags.root.pop(size, None)
    for related in _RELATED_SIZES:
        tags.group(IFD.Exif, IFD.Interop).pop(related, None)
    _add_texts(tags, texts)
    if provenance:
        _add_provenance(tags, provenance)
    if not tags.root:
        return None
    _add_required(tags, width, height, dpi, profile)
    return tags


def _add_required(
    tags: Tags, width: int, height: int, dpi: tuple[float, float], profile: bool
) -> None:
    """Add the tags that EXIF must have, and set the sizes."""
    across, down = (tags.pack(RATIONAL, round(dots * 1000), 1000) for dots in dpi)
    if not tags.root.keys() & set(_RESOLUTION_TAGS):
        tags.root[Base.XResolution], tags.root[Base.YResolution] = across, down
        tags.root[Base.ResolutionUnit] = tags.pack(SHORT, 2)
    tags.root.setdefault(Base.YCbCrPositioning, tags.pack(SHORT, 1))
    exif = tags.child(IFD.Exif)
    exif.setdefault(Base.ExifVersion, Value(UNDEFINED, b"0232"))
    exif.setdefault(Base.ComponentsConfiguration, Value(UNDEFINED, b"\1\2\3\0"))
    exif.setdefault(Base.FlashPixVersion, Value(UNDEFINED, b"0100"))
    exif.setdefault(Base.ColorSpace, tags.pack(SHORT, _OTHER_SPACE if profile else _SRGB_SPACE))
    exif[Base.ExifImageWidth] = tags.pack(LONG, width)
    exif[Base.ExifImageHeight] = tags.pack(LONG, height)


def _add_texts(tags: Tags, texts: Mapping[str, str]) -> None:
    """Put those texts of a PNG file into EXIF that it has a place for."""
    for key, tag in (
        ("Title", Base.ImageDescription),
        ("Description", Base.ImageDescription),
        ("Author", Base.Artist),
        ("Copyright", Base.Copyright),
    ):
        if key in texts:
            tags.root.setdefault(tag, Value(ASCII, texts[key].encode() + b"\0"))
    # Stable Diffusion's tools look for "parameters" there.
    if text := texts.get("parameters") or texts.get("Comment"):
        comment = _UNICODE + text.encode("utf-16-be", "replace")
        tags.child(IFD.Exif).setdefault(Base.UserComment, Value(UNDEFINED, comment))


def _add_provenance(tags: Tags, provenance: Mapping[str, str]) -> None:
    if "software" in provenance:
        software = provenance["software"].encode() + b"\0"
        tags.root[Base.Software] = Value(ASCII, software)
    code, codec, text = _comment(tags)
    lines, _ = _split_record(text)
    text = "\n".join([*lines, record_line(provenance)])
    if code in (_PLAIN, _UNDEFINED_CODE):
        code = _PLAIN if text.isascii() else _UNDEFINED_CODE
    comment = code + text.encode(codec, "replace")
    tags.child(IFD.Exif)[Base.UserComment] = Value(UNDEFINED, comment)


def find_provenance(data: bytes | None) -> dict[str, str] | None:
    """Return the record of `result_tags` in EXIF or a TIFF file, or None if there is none."""
    tags = parse(data)
    return _split_record(_comment(tags)[2])[1] if tags else None


def record_line(provenance: Mapping[str, str]) -> str:
    """Return the provenance as a line of JSON."""
    return json.dumps({"linearsr": dict(provenance)})


def is_record(text: str) -> bool:
    """Return whether the text is a line of `record_line`."""
    return _record(text) is not None


def _split_record(comment: str) -> tuple[list[str], dict[str, str] | None]:
    """Return the lines of a comment before our record, and the record in its last line, if any."""
    *lines, last = comment.rstrip("\n").split("\n")
    record = _record(last)
    if record is None:
        lines = comment.split("\n") if comment else []
    return lines, record


def _record(line: str) -> dict[str, str] | None:
    """Return the record in a line, or None if that is not one of ours."""
    try:
        record = json.loads(line)["linearsr"]
        return {str(key): str(value) for key, value in record.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None


def _comment(tags: Tags) -> tuple[bytes, str, str]:
    """Return the code of UserComment, the codec that it stands for, and the text."""
    value = tags.group(IFD.Exif).get(Base.UserComment)
    raw = value.data if isinstance(value, Value) else b""
    code, body = raw[:8].ljust(8, b"\0"), raw[8:]
    if code == _UNICODE:
        # The order of bytes is agreed nowhere. Most text has Latin letters, with a zero each.
        big, little = body[::2].count(0), body[1::2].count(0)
        is_big = big > little if big != little else tags.order == ">"
        codec = "utf-16-be" if is_big else "utf-16-le"
        return code, codec, body.decode(codec, "replace").strip("\0 \ufeff")
    code = code if code in (_JIS, _PLAIN) else _UNDEFINED_CODE
    codec = "iso2022_jp" if code == _JIS else "utf-8"
    try:
        return code, codec, body.decode(codec).strip("\0 ")
    except UnicodeDecodeError:
        # Every byte is a letter of Latin-1, so text in an unknown code stays as it is.
        return code, "latin-1", body.decode("latin-1").strip("\0 ")
