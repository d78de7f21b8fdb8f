"""Read and edit EXIF, the tags that a camera writes, and record in it how a picture was made.

Bytes go in and bytes come out, through PIL's table of tags; no pixels, no libvips. Metadata matters
less than the picture, so broken EXIF is dropped and never an error. PIL raises almost any kind of
exception for it, hence the broad `except` clauses in this file.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any, Final

from PIL.ExifTags import IFD, Base
from PIL.Image import Exif, Image

HEADER: Final = b"Exif\0\0"
"""The first bytes of EXIF, as in JPEG; some formats leave them out."""

# Older PIL follows every offset that a tag contains. A hostile file can point thousands of tags at
# one large block, so the total number of bytes read is limited.
_MAX_READ: Final = 8 * 2**20

_DEFAULT_DPI: Final = 72.0
_MAX_DPI: Final = 1_000_000.0
_MM_PER_INCH: Final = 25.4

# The tags of a TIFF directory that describe the photograph and not the layout of the file.
_DESCRIPTIVE_TAGS: Final[frozenset[int]] = frozenset(
    {
        Base.ImageDescription,
        Base.Make,
        Base.Model,
        Base.XResolution,
        Base.YResolution,
        Base.ResolutionUnit,
        Base.Software,
        Base.DateTime,
        Base.Artist,
        Base.Copyright,
        IFD.Exif,
        IFD.GPSInfo,
    }
)


# PIL warns once for each broken tag, which in a mangled file means thousands of lines. A filter
# around each call would not be safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class _BoundedReader(io.BytesIO):
    """A file of which only a limited number of bytes can be read, however often it is rewound."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _MAX_READ

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._left -= len(data)
        if self._left < 0:
            # Not an OSError: PIL takes that for the end of the file and reads the next tag.
            raise ValueError("the EXIF directory refers to too much data")
        return data


def _parse(data: bytes) -> Exif:
    """Parse the tags of EXIF bytes, or of a TIFF file's first page, which begins the same way."""
    exif = Exif()
    exif.load_from_fp(_BoundedReader(data.removeprefix(HEADER)))
    return exif


def descriptive_exif(data: bytes) -> bytes | None:
    """Return those tags of a TIFF file that describe the photograph; None if none or broken."""
    try:
        exif = _parse(data)
        for tag in exif.keys() - _DESCRIPTIVE_TAGS:
            del exif[tag]
        return exif.tobytes() if len(exif) else None
    except Exception:
        return None


def pil_exif(image: Image) -> tuple[bytes | None, int]:
    """Return the EXIF and orientation of a loaded PIL image; None and 1 without usable EXIF."""
    try:
        exif = image.getexif()
        data = exif.tobytes() if len(exif) else None
        orientation = int(exif.get(Base.Orientation, 1))
    except Exception:
        return None, 1
    # In a TIFF file, the tags for the layout of the file are among them.
    return (descriptive_exif(data) if data and image.format == "TIFF" else data), orientation


def upright_exif(data: bytes | None) -> bytes | None:
    """Return EXIF with HEADER and an orientation of 1, otherwise unchanged; None if broken."""
    if data is None:
        return None
    data = HEADER + data.removeprefix(HEADER)
    try:
        exif = _parse(data)
        if exif.get(Base.Orientation, 1) == 1:
            return data
        exif[Base.Orientation] = 1
        return exif.tobytes()
    except Exception:
        return None


def tiff_with_exif(tiff: bytes, data: bytes) -> bytes:
    """Return a TIFF file with the tags of `data` in its directory; unchanged if they are broken.

    PIL counts the offsets of the strips from the end of the directory it writes. Put a new
    directory in front of the whole old file and they point where they should; the old header and
    directory stay behind as a few unused bytes.
    """
    try:
        exif, directory = _parse(data), _parse(tiff)
        for tag in exif.keys() & _DESCRIPTIVE_TAGS:
            directory[tag] = exif[tag]
        for group in exif.keys() & {IFD.Exif, IFD.GPSInfo}:
            directory[group] = _group(exif, group)
        return directory.tobytes().removeprefix(HEADER) + tiff
    except Exception:
        return tiff


def pixels_per_mm(data: bytes | None) -> float:
    """Return the print resolution in EXIF, or 72 dots per inch if it has no plausible one."""
    resolution, unit = _DEFAULT_DPI, None
    try:
        exif = _parse(data or b"")
        resolution, unit = float(exif[Base.XResolution]), exif.get(Base.ResolutionUnit)
    except Exception:
        pass
    if not 1 <= resolution <= _MAX_DPI:
        resolution = _DEFAULT_DPI
    return resolution / (10 if unit == 3 else _MM_PER_INCH)


def with_provenance(data: bytes | None, provenance: Mapping[str, str]) -> bytes:
    """Return EXIF that also records how the picture was made; broken EXIF is replaced.

    This sets Software, and puts a line of JSON at the end of UserComment. The user's own text there
    and in ImageDescription stays; the line of an earlier run is replaced.
    """
    try:
        exif = _parse(data or b"")
        _add(exif, provenance)
        return exif.tobytes()
    except Exception:
        exif = Exif()
        _add(exif, provenance)
        return exif.tobytes()


def find_provenance(data: bytes | None) -> dict[str, str] | None:
    """Return the record of `with_provenance` in EXIF or a TIFF file, or None without one."""
    try:
        lines = _comment(_parse(data or b"")).splitlines()
    except Exception:
        return None
    return _record(lines)


def record_line(provenance: Mapping[str, str]) -> str:
    """Return the provenance as a line of JSON."""
    return json.dumps({"linearsr": dict(provenance)})


def _record(lines: list[str]) -> dict[str, str] | None:
    """Return the record in the last line, or None if that is not one of ours."""
    try:
        record = json.loads(lines[-1])["linearsr"]
        return {str(key): str(value) for key, value in record.items()}
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return None


def _add(exif: Exif, provenance: Mapping[str, str]) -> None:
    if "software" in provenance:
        exif[Base.Software] = provenance["software"]
    lines = _comment(exif).splitlines()
    if _record(lines) is not None:
        lines.pop()
    text = "\n".join([*lines, record_line(provenance)])
    # EXIF's code for Unicode has no agreed byte order, so UTF-8 goes under "undefined".
    code = b"ASCII\0\0\0" if text.isascii() else bytes(8)
    exif[IFD.Exif] = {**_group(exif, IFD.Exif), Base.UserComment: code + text.encode()}


def _group(exif: Exif, tag: int) -> dict[int, Any]:
    """Return the tags of a directory within EXIF, for use in another EXIF."""
    tags = dict(exif.get_ifd(tag))
    # This is not a value but an offset into the old block.
    tags.pop(IFD.Interop, None)
    return tags


def _comment(exif: Exif) -> str:
    """Return the text of UserComment, whose first 8 bytes name its encoding."""
    raw = exif.get_ifd(IFD.Exif).get(Base.UserComment, b"")
    if not isinstance(raw, bytes):
        return ""
    utf16 = "utf-16-le" if exif.endian == "<" else "utf-16-be"
    encoding = utf16 if raw.startswith(b"UNICODE") else "utf-8"
    return raw[8:].decode(encoding, "replace").strip("\0 ")
