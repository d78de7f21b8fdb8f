"""Reads and edits EXIF, the tags a camera writes, and keeps in it how a picture was made.

It knows neither pixels nor libvips: bytes in, bytes out, through PIL's table of tags. Metadata is
worth less than the picture, so broken EXIF is dropped and never an error. PIL raises most kinds of
exception on it, hence the broad `except` clauses here and nowhere else.
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
"""What EXIF bytes start with here, as in JPEG; some formats leave it out."""

# Older PIL follows every offset a tag claims. A hostile file can point thousands of tags at one
# large block, so the sum of what is read is bounded.
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


# PIL warns once for each broken tag, which in a mangled file means thousands of lines. A filter for
# the time of one call would not be safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class _BoundedReader(io.BytesIO):
    """Gives a limited number of bytes in all, however often the reader seeks back."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _MAX_READ

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._left -= len(data)
        if self._left < 0:
            # Not an OSError: PIL takes that as the end of the file and goes on with the next tag.
            raise ValueError("the EXIF directory refers to too much data")
        return data


def _parse(data: bytes) -> Exif:
    """The tags of EXIF bytes, or of the first page of a TIFF file, which starts alike."""
    exif = Exif()
    exif.load_from_fp(_BoundedReader(data.removeprefix(HEADER)))
    return exif


def descriptive_exif(data: bytes) -> bytes | None:
    """EXIF with the tags of a TIFF file that describe the photograph; None if none or broken."""
    try:
        exif = _parse(data)
        for tag in exif.keys() - _DESCRIPTIVE_TAGS:
            del exif[tag]
        return exif.tobytes() if len(exif) else None
    except Exception:
        return None


def pil_exif(image: Image) -> tuple[bytes | None, int]:
    """The EXIF of a loaded PIL image, and the orientation it asks for: None and 1 if broken."""
    try:
        exif = image.getexif()
        data = exif.tobytes() if len(exif) else None
        orientation = int(exif.get(Base.Orientation, 1))
    except Exception:
        return None, 1
    # In a TIFF file the tags that lay out the file are among them.
    return (descriptive_exif(data) if data and image.format == "TIFF" else data), orientation


def upright_exif(data: bytes | None) -> bytes | None:
    """EXIF with HEADER and an orientation of 1, else unchanged; None if broken."""
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
    """A TIFF file with the tags of `data` in its directory; unchanged if they are broken.

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
    """The print resolution in EXIF; 72 dots per inch where it has none to believe."""
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
    """EXIF that also says how the picture was made; the rest of it is lost if broken.

    Sets Software, and puts a line of JSON at the end of UserComment. What the user wrote there, or
    in ImageDescription, stays; the line of an earlier run is replaced.
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
    """What `with_provenance` put into EXIF, or into a TIFF file; None where there is no record."""
    try:
        lines = _comment(_parse(data or b"")).splitlines()
    except Exception:
        return None
    return _record(lines)


def record_line(provenance: Mapping[str, str]) -> str:
    """The line of JSON that stands for the provenance."""
    return json.dumps({"linearsr": dict(provenance)})


def _record(lines: list[str]) -> dict[str, str] | None:
    """The record in the last of these lines, if that is one of ours."""
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
    # The code for other text than ASCII has no agreed byte order; "undefined" has none to mistake.
    code = b"ASCII\0\0\0" if text.isascii() else bytes(8)
    exif[IFD.Exif] = {**_group(exif, IFD.Exif), Base.UserComment: code + text.encode()}


def _group(exif: Exif, tag: int) -> dict[int, Any]:
    """The tags of a directory within EXIF, to be put into another one."""
    tags = dict(exif.get_ifd(tag))
    # Not a value but an offset into the old block.
    tags.pop(IFD.Interop, None)
    return tags


def _comment(exif: Exif) -> str:
    """The text of UserComment, whose first 8 bytes name its encoding."""
    raw = exif.get_ifd(IFD.Exif).get(Base.UserComment, b"")
    if not isinstance(raw, bytes):
        return ""
    utf16 = "utf-16-le" if exif.endian == "<" else "utf-16-be"
    encoding = utf16 if raw.startswith(b"UNICODE") else "utf-8"
    return raw[8:].decode(encoding, "replace").strip("\0 ")
