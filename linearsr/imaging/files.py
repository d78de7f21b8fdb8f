"""Convert picture files to tensors and back, with their depth, alpha, colour space and metadata.

This file knows nothing of super-resolution: no model, no scale, no resampling. libvips decodes and
encodes; PIL decodes the few kinds that libvips does not. Only loaders on an allow-list are called,
chosen by the first bytes of the file, so that a name like `photo.png` cannot reach an SVG or CSV
parser.

    exif.py, tiff.py    EXIF, and the pages of TIFF       colour_tags.py   profiles from tags
    xmp.py              XMP and IPTC                      containers.py    metadata in other files

Every format carries the profile, EXIF, XMP and the print resolution. PNG and WebP have no IPTC, so
its fields become XMP there. Text chunks of PNG stay in PNG; other formats get those that EXIF has a
place for.

Known limits: JPEG drops IPTC of more than 64 kB, and the largest EXIF tags beyond that, with a
note; colours with 16 bits that only PIL reads become 8 bits, with a note; WebP has no grey, so a
grey picture comes back from it as colour; AVIF whose colour space only its AV1 stream tells is
taken for sRGB.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, Final, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageCms
import torch
from PIL.ExifTags import Base

from linearsr.errors import InputError, NoPicture, OptionError, OutputError, TooLarge
from linearsr.imaging.colour_tags import adobe_profile, tagged_profile
from linearsr.imaging.containers import (
    MAX_EXIF,
    Marks,
    Metadata,
    embed,
    iptc_records,
    read_marks,
    too_long,
)
from linearsr.imaging.exif import (
    descriptive_exif,
    find_provenance,
    for_tiff,
    is_adobe_rgb,
    is_record,
    orientation,
    pil_exif,
    plausible_dpi,
    record_line,
    resolution,
    result_tags,
    srgb_exif,
    upright_exif,
)
from linearsr.imaging.tiff import Page, Tags, join_tiff, tiff_pages, with_first
from linearsr.imaging.vips import pyvips
from linearsr.imaging.xmp import joined, result_xmp
from linearsr.storage import atomic

DEFAULT_MAX_PIXELS: Final = 100_000_000

# The suffixes of files to write, and the formats that they stand for.
WRITE_SUFFIXES: Final = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
READ_SUFFIXES: Final = (*WRITE_SUFFIXES, ".avif", ".gif", ".bmp", ".jp2")
# Suffixes that a result's name replaces by another one. Its name keeps any other suffix.
RESULT_SUFFIXES: Final = {
    **dict.fromkeys((".avif", ".gif", ".apng", ".bmp", ".dib", ".jp2"), ".png"),
    **dict.fromkeys((".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo"), ".jpg"),
    **dict.fromkeys((".jpg_large", ".jpg-large", ".jpeg_large"), ".jpg"),
}

Name = TypeVar("Name", bound=PurePath)

_SIXTEEN_BIT_FORMATS: Final = ("png", "tiff")
_IPTC_FORMATS: Final = ("jpeg", "tiff")
# JPEG itself allows 65535 pixels; its usual library stops here.
_LONGEST_SIDE: Final = {"jpeg": 65500, "webp": 16383}

# A file never needs more bytes than this for each pixel, plus some for metadata.
_MAX_BYTES_PER_PIXEL: Final = 16
_ROOM_FOR_METADATA: Final = 64 * 2**20

_DEFAULT_DPI: Final = 72.0
_MM_PER_INCH: Final = 25.4

_LUMA: Final = (0.299, 0.587, 0.114)

# libvips quotes a broken file in its messages, and pyvips fails on those that are not UTF-8.
_VIPS_ERRORS: Final = (pyvips.Error, UnicodeDecodeError)

# Pictures do not repeat within a run, so libvips' cache of operations would only hold memory.
pyvips.cache_set_max(0)

# PIL warns once for each broken tag, which in a mangled file means thousands of lines, and of sizes
# that our own limit allows. A filter around each call would not be safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright, in the colour space of its file.

    `pixels` and `alpha` are not copied: treat them as read-only or replace them with
    `dataclasses.replace`.
    """

    pixels: torch.Tensor
    """float32 (3, H, W) in [0, 1]: RGB as encoded (gamma), in the colour space of `icc`."""

    alpha: torch.Tensor | None = None
    """float32 (1, H, W) in [0, 1], not premultiplied."""

    bits: int = 8
    """8 or 16, the depth of the samples in the file."""

    grey: bool = False
    """Whether the file had one colour channel; it is written with one if the format allows it."""

    icc: bytes | None = None
    """The colour profile of the file: an RGB one, or a grey one if `grey` is set."""

    exif: bytes | None = None
    """EXIF starting with `Exif\\0\\0`; its orientation is 1, as it has been applied."""

    format: str = "png"
    """The format of the file: png, jpeg, webp, tiff, avif, gif, bmp or jp2."""

    xmp: bytes | None = None
    """XMP as in the file."""

    iptc: bytes | None = None
    """IPTC's records (IIM), without the header of Photoshop."""

    texts: tuple[tuple[str, str], ...] = ()
    """Keywords and texts of a PNG file; the comments of a JPEG or GIF file."""

    dpi: tuple[float, float] | None = None
    """The print resolution across and down, if the file has one outside EXIF."""

    pages: int = 1
    """The number of pages of a TIFF file, of which this is one."""

    notes: tuple[str, ...] = ()
    """Notes for a user about the file: parts that were left out, or may be damaged."""


# Reading


def read(
    source: str | Path | bytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    name: str | None = None,
    page: int = 0,
) -> Picture:
    """Decode a page or the first frame of a picture file, or of its bytes, and turn it upright.

    Formats are PNG, JPEG, WebP, TIFF, AVIF, GIF, BMP and JPEG 2000 with 8 or 16 bits: grey,
    palette, RGB, or CMYK and Lab, which are converted to sRGB, with or without alpha. Metadata that
    cannot be read is dropped. A thumbnail that comes before its photograph is not a page.
    name: the picture's name in errors, by default its path. page: the page of a TIFF file, from 0.

    Raises InputError for any other format, for HDR, for a raw photograph, for a damaged or
    truncated file, and, before decoding, for more than `max_pixels` pixels.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _file_bytes(Path(source), name, max_pixels)
    file = _opened(data, name, max_pixels, page)
    if file.format in _PIL_FORMATS:
        return _read_by_pil(file)
    if file.format == "jpeg":
        return _read_jpeg(file)
    try:
        return _read(file)
    except _VIPS_ERRORS as error:
        if unusual := _unusual(file.page):
            return _read_by_pil(file, unusual)
        raise _input_error(name, error) from error


def measure(data: bytes) -> tuple[str, list[tuple[int, int]]]:
    """Return the format, and the width and height of each upright page, from headers alone.

    Formats other than TIFF have one page.

    Raises InputError for bytes that are not a picture.
    """
    name = "the picture"
    file = _opened(data, name)
    if file.format in _PIL_FORMATS:
        width, height = _open_by_pil(file).size
        is_turned = orientation(file.marks().profiles.get("exif")) >= 5
        return file.format, [(height, width) if is_turned else (width, height)]
    try:
        image, _ = _with_exif(_open(file), file, file.marks())
    except _VIPS_ERRORS as error:
        if not file.page or not _unusual(file.page):
            raise _input_error(name, error) from error
        return file.format, [*file.sizes]
    width, height = image.width, image.height
    if "orientation" in image.get_fields() and image.get("orientation") >= 5:
        width, height = height, width
    return file.format, [(width, height), *file.sizes[1:]]


@dataclass(frozen=True)
class _File:
    """A picture file to read. `page` and `sizes` (of all pages) are those of TIFF.

    notes: go to the picture.
    """

    data: bytes
    format: str
    name: str
    max_pixels: int
    page: Page | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pages(self) -> int:
        """Return the number of pages; 1 for formats that have none."""
        return max(1, len(self.sizes))

    def marks(self) -> Marks:
        """Return the properties of the file, or of its TIFF page, that libvips does not report."""
        return read_marks(self.data, self.format, self.page.tags if self.page else None)

    def exif(self) -> bytes | None:
        """Return the EXIF of a TIFF page."""
        # The tags of the photograph are in the first directory, also if that has the thumbnail.
        at = None if self.pages == 1 or self.page is None else self.page.at
        return descriptive_exif(self.data, at)


def _opened(data: bytes, name: str, max_pixels: int = DEFAULT_MAX_PIXELS, page: int = 0) -> _File:
    """Return a file with one of its pages, if it is a TIFF file.

    A page is the largest picture of a directory of the chain and its SubIFDs; one of a thumbnail
    alone is none. Raises InputError for a raw photograph, and NoPicture for no picture.
    """
    file = _File(data, _sniff(data, name), name, max_pixels)
    if file.format != "tiff":
        return file
    found, readable = tiff_pages(data)
    if other_kind(data) == RAW or any(map(_is_raw, found)):
        raise InputError(
            f"{name}: a raw photograph, which is not read; develop it to TIFF or JPEG first."
        )
    if not found:
        return file
    whole = (page for page in found if page.is_whole)
    chain = [
        max(pages, key=lambda page: page.pixels)
        for _, pages in groupby(whole, key=lambda page: page.number)
    ] or found[:1]
    file = replace(
        file, page=chain[min(page, len(chain) - 1)], sizes=tuple(map(_upright_size, chain))
    )
    if readable is None:
        return file
    return replace(file, data=readable, notes=("its further pages cannot be read",))


def _is_raw(page: Page) -> bool:
    """Return whether a directory of TIFF holds the samples of a camera's sensor."""
    return (
        page.value(Base.PhotometricInterpretation) in _RAW
        or page.value(Base.Compression) in _RAW_COMPRESSIONS
    )


def _upright_size(page: Page) -> tuple[int, int]:
    """Return the width and height of a page of TIFF once it is turned upright."""
    width, height = page.value(Base.ImageWidth), page.value(Base.ImageLength)
    return (height, width) if page.value(Base.Orientation) >= 5 else (width, height)


def _unusual(page: Page | None) -> str:
    """Return what a page of TIFF holds that libvips may not read; empty if nothing."""
    if page is None:
        return ""
    compression = page.value(Base.Compression)
    if compression not in _COMPRESSIONS:
        return f"{_COMPRESSION_NAMES.get(compression, f'number {compression}')} compression"
    kind = page.value(Base.PhotometricInterpretation)
    if kind not in range(7):
        return f"{'CIELAB' if kind in (8, 9, 10) else f'number {kind}'} colours"
    bits = page.value(Base.BitsPerSample)
    return "" if bits in (0, 1, 2, 4, 8, 16, 32, 64) else f"{bits} bit samples"


def _open(file: _File, fail_on: str = "error") -> pyvips.Image:
    """Return the lazy image of a file. Raises what libvips raises."""
    options: dict[str, Any] = {}
    if file.page:
        options["page"] = file.page.number
        if file.page.sub is not None:
            options["subifd"] = file.page.sub
    return _LOADERS[file.format](file.data, access="sequential", fail_on=fail_on, **options)


def _read(file: _File, fail_on: str = "error") -> Picture:
    image = _open(file, fail_on)
    _check_size(image.width, image.height, file.name, file.max_pixels)
    marks = file.marks()
    image, exif = _with_exif(image, file, marks)
    if "n-pages" in image.get_fields() and file.page is None:
        marks.frames = max(marks.frames, image.get("n-pages"))
    across, down = (round(per_mm * _MM_PER_INCH, 2) for per_mm in (image.xres, image.yres))
    # libvips' default is one pixel in a millimetre.
    if marks.dpi is None and not marks.unitless and (image.xres, image.yres) != (1, 1):
        marks.dpi = plausible_dpi(across, down)
    if marks.frames > 1:
        parts = "pictures" if file.format == "jpeg" else "frames"
        marks.notes.append(f"only the first of {marks.frames} {parts}")
    picture = _decode(image, exif, file.format, file.name, marks)
    return replace(picture, pages=file.pages, notes=(*file.notes, *picture.notes))


def _with_exif(image: pyvips.Image, file: _File, marks: Marks) -> tuple[pyvips.Image, bytes | None]:
    """Return an image with the orientation of EXIF that libvips does not find, and the EXIF."""
    exif = file.exif() if file.page else _blob(image, "exif-data")
    turned = marks.orientation
    if exif is None and (exif := marks.profiles.get("exif")):
        turned = orientation(exif)
    if turned in range(1, 9):
        image = image.copy()
        image.set_type(pyvips.GValue.gint_type, "orientation", turned)
    return image, exif


def _read_jpeg(file: _File) -> Picture:
    """Read a JPEG file, with a note if its decoder warns, or if only its end marker is missing."""
    attempts = [(file, "warning"), (file, "error")]
    if not file.data.endswith(_END_OF_JPEG):
        # The decoder warns if it reaches the added marker too early.
        attempts.append((replace(file, data=file.data + _END_OF_JPEG), "warning"))
    notes: tuple[str, ...] = ()
    failures = []
    for attempt, fail_on in attempts:
        try:
            picture = _read(attempt, fail_on)
            return replace(picture, notes=(*picture.notes, *notes))
        except _VIPS_ERRORS as error:
            failures.append(error)
            reason = _reason(error)
            notes = (f"parts of the file may be damaged ({reason})",)
            if len(failures) == 2:
                notes = ("the file lacks its end marker; the picture is whole",)
    raise _input_error(file.name, failures[1]) from failures[1]


def _open_by_pil(file: _File) -> PIL.Image.Image:
    """Open a file with PIL, which decodes nothing yet."""
    try:
        kind = _PIL_FORMATS.get(file.format, file.format.upper())
        data = with_first(file.data, file.page.at) if file.page else file.data
        return PIL.Image.open(io.BytesIO(data), formats=[kind])
    except PIL.Image.DecompressionBombError as error:
        pixels = re.search("[0-9]+", str(error))
        raise TooLarge(
            f"{file.name}: {pixels[0] if pixels else 'its'} pixels are more than the limit of "
            f"{min(file.max_pixels, 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0))}; "
            "raise --max-pixels to allow it, or convert it to PNG."
        ) from error
    except Exception as error:  # PIL raises almost any kind of exception for a broken file
        raise InputError(f"{file.name}: damaged or truncated ({error}).") from error


def _read_by_pil(file: _File, unusual: str = "") -> Picture:
    """Read a file that libvips does not. unusual: what the file holds, for the error."""
    try:
        image = _open_by_pil(file)
        _check_size(*image.size, file.name, file.max_pixels)
        marks = file.marks()
        if Base.Orientation in getattr(image, "tag_v2", {}):
            marks.orientation = None  # PIL turns such a picture itself
        picture = _from_pil(image, file.name, marks)
        if file.page:
            picture = replace(picture, exif=upright_exif(file.exif()))
        notes = (*file.notes, *picture.notes)
        if picture.bits == 8 and (bits := _bits(file)) > 8:
            notes = (*notes, f"its {bits} bits a channel are read as 8")
        return replace(picture, format=file.format, pages=file.pages, notes=notes)
    except TooLarge:
        raise
    except InputError as error:
        if not unusual:
            raise
        raise InputError(
            f"{file.name}: holds {unusual}, which cannot be read here; convert it to TIFF with "
            "deflate compression, or to PNG."
        ) from error


def _bits(file: _File) -> int:
    """Return the depth of the samples in a file that PIL reads, whose colours have 8 bits then."""
    if file.page:
        return file.page.value(Base.BitsPerSample)
    size = file.data.find(_JP2_SIZE) if file.format == "jp2" else -1
    return (file.data[size + 42] & 0x7F) + 1 if size >= 0 else 8


def _file_bytes(path: Path, name: str, max_pixels: int) -> bytes:
    try:
        if not path.is_file():
            # A folder, a pipe or a device; stat() says whether it is there at all.
            path.stat()
            raise InputError(f"{name}: not a regular file; give the path of a picture.")
        size = path.stat().st_size
        if size > max_pixels * _MAX_BYTES_PER_PIXEL + _ROOM_FOR_METADATA:
            raise TooLarge(
                f"{name}: {size} bytes are more than a picture of {max_pixels} pixels can need; "
                "raise --max-pixels to allow it."
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name}: cannot be read ({reason}); check the path.") from error


def _sniff(data: bytes, name: str) -> str:
    """Return the format that the first bytes show; the file's name proves nothing."""
    if not data:
        raise NoPicture(f"{name}: the file is empty; get it again.")
    if format := sniff(data):
        return format
    kind = other_kind(data)
    raise NoPicture(
        f"{name}: {f'{kind}, which is ' if kind else ''}not a picture this program reads; give "
        "PNG, JPEG, WebP, TIFF, AVIF, GIF, BMP or JPEG 2000."
    )


def other_kind(data: bytes) -> str:
    """Return the name in OTHERS that the first bytes show; empty if none."""
    return next((kind for kind, at, marks in OTHERS if data.startswith(marks, at)), "")


def sniff(data: bytes) -> str | None:
    """Return the format that the first bytes of a file show, or None if it is not read."""
    for format, at, marks in _MARKS:
        if data.startswith(marks, at) and data.startswith(_FIRST.get(format, b"")):
            return format
    return "avif" if _is_avif_by_another_brand(data) else None


def _is_avif_by_another_brand(data: bytes) -> bool:
    """Return whether a file of another brand of HEIF lists AVIF among the compatible ones."""
    if not data.startswith(b"ftyp", 4):
        return False
    compatible = data[16 : min(int.from_bytes(data[:4], "big"), 1024)]
    return any(compatible[at : at + 4] in (b"avif", b"avis") for at in range(0, len(compatible), 4))


_MARKS: Final = (
    ("png", 0, (b"\x89PNG\r\n\x1a\n",)),
    ("jpeg", 0, (b"\xff\xd8\xff",)),
    ("webp", 8, (b"WEBP",)),
    ("tiff", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("avif", 4, (b"ftypavif", b"ftypavis")),
    ("gif", 0, (b"GIF87a", b"GIF89a")),
    # "BM" alone may begin a text; the size of the second header makes it sure.
    ("bmp", 14, tuple(bytes([size, 0, 0, 0]) for size in (12, 16, 40, 52, 56, 64, 108, 124))),
    ("jp2", 0, (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")),
)
_FIRST: Final = {"webp": b"RIFF", "bmp": b"BM"}

# Formats that PIL reads, with its names for them.
_PIL_FORMATS: Final = {"bmp": "BMP", "jp2": "JPEG2000"}
# The start of JPEG 2000's codestream, with the marker of the sizes.
_JP2_SIZE: Final = b"\xff\x4f\xff\x51"
_END_OF_JPEG: Final = b"\xff\xd9"
# Common formats that are not read: name, and the bytes at an offset.
RAW: Final = "a raw photograph"
OTHERS: Final = (
    ("HEIC", 4, (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")),
    ("JPEG XL", 0, (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    ("JPEG XR", 0, (b"II\xbc\x01",)),
    ("Photoshop", 0, (b"8BPS",)),
    ("GIMP", 0, (b"gimp xcf",)),
    ("OpenEXR", 0, (b"\x76\x2f\x31\x01",)),
    ("Radiance", 0, (b"#?RADIANCE", b"#?RGBE")),
    ("DDS", 0, (b"DDS |",)),
    ("QOI", 0, (b"qoif",)),
    ("farbfeld", 0, (b"farbfeld",)),
    ("icon", 0, (b"\0\0\1\0",)),
    ("JNG", 0, (b"\x8bJNG\r\n\x1a\n",)),
    ("MNG", 0, (b"\x8aMNG\r\n\x1a\n",)),
    (RAW, 0, (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")),
    (RAW, 0, (b"IIIIwaR", b"MMMMRaw")),  # Phase One's IIQ
    (RAW, 0, (b"II*\0\x10\0\0\0CR\2\0",)),  # Canon's CR2, which begins like TIFF
    (RAW, 4, (b"ftypcrx",)),
    (RAW, 6, (b"HEAPCCDR",)),
)
# Photometric interpretations of raw photographs: a colour filter array, and linear raw.
_RAW: Final = (32803, 34892)
# Compressions of Kodak, Sony, Epson, Samsung, Nikon and Pentax.
_RAW_COMPRESSIONS: Final = (262, 32767, 32769, 32770, 32772, 34713, 65000, 65535)
# Compressions of TIFF that libvips reads.
_COMPRESSIONS: Final = (0, 1, 2, 3, 4, 5, 7, 8, 32773, 32946)
_COMPRESSION_NAMES: Final = {
    6: "old JPEG",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
}

_LOADERS: Final[dict[str, Callable[..., Any]]] = {
    "png": pyvips.Image.pngload_buffer,
    "jpeg": pyvips.Image.jpegload_buffer,
    "webp": pyvips.Image.webpload_buffer,
    "tiff": pyvips.Image.tiffload_buffer,
    "avif": pyvips.Image.heifload_buffer,
    "gif": pyvips.Image.gifload_buffer,
}


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    pixels = width * height
    if pixels > max_pixels:
        raise TooLarge(
            f"{name}: {width}x{height} is {pixels} pixels, more than the limit of "
            f"{max_pixels}; raise --max-pixels to allow it."
        )


def _decode(
    image: pyvips.Image, exif: bytes | None, format: str, name: str, marks: Marks
) -> Picture:
    """Decode a libvips image, which is lazy until now, into a Picture."""
    xmp, is_cut = joined(_blob(image, "xmp-data") or marks.profiles.get("xmp"), marks.extension)
    marks.notes += ["a part of its XMP cannot be read and is left out"] if is_cut else []
    iptc = iptc_records(marks.profiles.get("iptc") or _blob(image, "iptc-data"))
    icc = _blob(image, "icc-profile-data") or marks.profiles.get("icc")
    exif = upright_exif(exif)
    if image.interpretation in _CONVERTED:
        image, icc, exif = _as_srgb(image), None, srgb_exif(exif)
    if image.format not in ("uchar", "ushort"):
        raise InputError(
            f"{name}: holds {image.format} samples; convert it to 8 or 16 bits a channel."
        )
    grey = image.interpretation in ("b-w", "grey16")
    colours = 1 if grey else 3
    if not grey and image.interpretation not in ("srgb", "rgb", "rgb16"):
        raise InputError(f"{name}: holds {image.interpretation} colours; convert it to RGB.")
    if not colours <= image.bands <= colours + 1:
        raise InputError(f"{name}: has {image.bands} channels; convert it to RGB or RGBA.")
    marks.notes += [_NO_FIT] if icc and not _fits(icc, grey) else []
    profile = tagged_profile(marks, icc if _fits(icc, grey) else None, grey=grey, name=name)
    if profile is None and is_adobe_rgb(exif):
        profile = adobe_profile(grey=grey)
    samples = _samples(_upright(image))
    pixels = _unit_range(samples[:colours], 3)
    alpha = _unit_range(samples[colours:], 1) if image.bands > colours else None
    if marks.cicp and not marks.cicp.full:
        pixels.mul_(255).sub_(16).div_(219).clamp_(0, 1)
    if marks.premultiplied and alpha is not None:
        pixels.div_(alpha.clamp_min(1e-4)).clamp_(0, 1)
    return Picture(
        pixels=pixels,
        alpha=alpha,
        bits=16 if image.format == "ushort" else 8,
        grey=grey,
        icc=profile,
        exif=exif,
        format=format,
        xmp=xmp,
        iptc=iptc,
        texts=tuple(marks.texts),
        dpi=marks.dpi,
        notes=tuple(marks.notes),
    )


def _as_srgb(image: pyvips.Image) -> pyvips.Image:
    """Convert an image of one of the kinds in _CONVERTED."""
    if image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        return image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
    return image.colourspace("srgb" if image.interpretation == "labq" else "rgb16")


_NO_FIT: Final = "its colour profile is broken or of another kind of colour, and is left out"
_CONVERTED: Final = ("cmyk", "lab", "labs", "labq")


def _upright(image: pyvips.Image) -> pyvips.Image:
    if "orientation" not in image.get_fields() or image.get("orientation") == 1:
        return image
    # Turning needs the rows in another order than the decoder delivers them.
    return image.copy_memory().autorot()


def _samples(image: pyvips.Image) -> torch.Tensor:
    """Return the integer samples (bands, H, W), a view of (H, W, bands)."""
    array = image.numpy().reshape(image.height, image.width, image.bands)
    return torch.from_numpy(array).permute(2, 0, 1)


def _unit_range(samples: torch.Tensor, channels: int) -> torch.Tensor:
    _, height, width = samples.shape
    # Copied straight into the final layout, without a second float copy.
    plane = torch.empty(channels, height, width).copy_(samples)
    return plane.div_(torch.iinfo(samples.dtype).max)


def _blob(image: pyvips.Image, field: str) -> bytes | None:
    return bytes(image.get(field)) if field in image.get_fields() else None


def _fits(icc: bytes | None, grey: bool) -> bool:
    """Return whether the signatures in the header are those of a grey or an RGB profile."""
    kind = b"GRAY" if grey else b"RGB "
    return icc is not None and len(icc) > 128 and icc[36:40] == b"acsp" and icc[16:20] == kind


def _input_error(name: str, error: Exception) -> InputError:
    reason = _reason(error)
    if re.search(r"unsupported|not supported|not configured|not implemented", reason, re.I):
        return InputError(f"{name}: of a kind that cannot be read here ({reason}); convert it.")
    return InputError(f"{name}: damaged or truncated ({reason}); get the file again.")


def _reason(error: Exception) -> str:
    if not isinstance(error, pyvips.Error):
        # pyvips leaves the message in place and would fail on it again.
        pyvips.vips_lib.vips_error_clear()
        return "no readable reason given"
    lines = [line.strip() for line in error.detail.splitlines() if line.strip()]
    # The first lines may be other attempts of the decoder.
    return lines[-1] if lines else "unknown cause"


def read_provenance(source: str | Path | bytes) -> dict[str, str] | None:
    """Return the provenance that `encode` wrote into a picture, without decoding the pixels.

    The result is None if there is no such record, no file, or no picture.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        format = _sniff(data, "")
        if format in _PIL_FORMATS:
            return None
        # A TIFF file is itself a directory of EXIF tags.
        exif = data if format == "tiff" else _blob(_LOADERS[format](data), "exif-data")
    except (OSError, ValueError, InputError, pyvips.Error):
        return None
    return find_provenance(exif)


# Writing


def encode(
    picture: Picture, format: str, *, quality: int = 95, provenance: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a picture file in `format`: png, jpeg, webp or tiff.

    PNG and TIFF keep 16 bits, other formats are rounded to 8. JPEG shows alpha over white. Values
    outside [0, 1] are clamped. Metadata that cannot be written is dropped.

    quality: 1 to 100, for JPEG and WebP; 100 makes WebP lossless.
    provenance: how the picture was made. Its "software" becomes the Software tag, and
        `read_provenance` returns all of it.

    Raises OptionError for another format or quality, and OutputError for a picture that is not
    finite or is too large for the format.
    """
    return encode_with_notes(picture, format, quality=quality, provenance=provenance)[0]


def encode_with_notes(
    picture: Picture, format: str, *, quality: int = 95, provenance: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[str, ...]]:
    """Return what `encode` does, and what a user must know of metadata that was left out."""
    if format not in _SAVERS:
        raise OptionError(f"Format {format!r} is unknown; choose from {', '.join(_SAVERS)}.")
    if not 1 <= quality <= 100:
        raise OptionError(f"Quality {quality} is out of range; give 1 to 100.")
    height, width = picture.pixels.shape[-2:]
    check_fits(width, height, format)
    if format == "webp" and picture.grey and picture.icc:
        picture = _grey_as_srgb(picture)
    dpi = picture.dpi or resolution(picture.exif) or (_DEFAULT_DPI, _DEFAULT_DPI)
    image = _vips_image(_quantised(picture, format))
    image = image.copy(xres=dpi[0] / _MM_PER_INCH, yres=dpi[1] / _MM_PER_INCH)
    icc = picture.icc if _fits(picture.icc, _is_grey(picture, format)) else None
    # Texts that the format has a place for.
    held = {"jpeg": ("Comment",), "png": [key for key, _ in picture.texts]}.get(format, ())
    tags = result_tags(
        picture.exif,
        width=width,
        height=height,
        dpi=dpi,
        texts=dict(text for text in reversed(picture.texts) if text[0] not in held),
        provenance=provenance or {},
        profile=icc is not None,
    )
    metadata = Metadata(
        xmp=result_xmp(picture.xmp, None if format in _IPTC_FORMATS else picture.iptc),
        iptc=picture.iptc,
        texts=_texts(picture, provenance or {}),
        dpi=dpi,
    )
    tags = tags or Tags()
    count = tags.count()
    if tags.root and format != "tiff":
        metadata.exif = tags.tobytes(MAX_EXIF if format == "jpeg" else None)
    lost = too_long(format, metadata)
    lost += ["the largest tags of EXIF"] if tags.count() < count else []
    notes = [f"left out, because {format} allows 64 kB: {', '.join(lost)}"] if lost else []
    data, refused = _save(image, format, quality, _fields(icc, format, metadata))
    if refused:
        notes.append(f"left out, because it cannot be written as {format}: {', '.join(refused)}")
    if format == "tiff":
        return join_tiff([(data, for_tiff(tags, picture.iptc))]), tuple(notes)
    return embed(data, format, metadata), tuple(notes)


def join_pages(pages: Sequence[bytes]) -> bytes:
    """Return one TIFF file of several that `encode` returned."""
    return join_tiff([(page, None) for page in pages]) if len(pages) > 1 else pages[0]


def _texts(picture: Picture, provenance: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the texts for PNG: our own, and those of the picture but for an earlier record."""
    ours = []
    if provenance:
        software = provenance.get("software", "linearsr")
        ours = [("Software", software), ("Comment", record_line(provenance))]
    theirs = (
        (key, text)
        for key, text in picture.texts
        if not (key == "Comment" and is_record(text))
        and not (key == "Software" and text.startswith("linearsr"))
    )
    return (*ours, *theirs)


def _grey_as_srgb(picture: Picture) -> Picture:
    """Return a grey picture in sRGB; unchanged if its profile cannot be used."""
    grey = (_on_cpu(picture.pixels[0]).clamp(0, 1) * 65535).round_().to(torch.int32).numpy()
    image = _with_fields(
        _vips_image(grey.astype(np.uint16)[..., None]), {"icc-profile-data": picture.icc or b""}
    )
    try:
        colours = image.icc_transform("srgb", embedded=True, depth=16)
        pixels = _unit_range(_samples(colours)[:3], 3)
    except _VIPS_ERRORS:
        return picture
    return replace(picture, pixels=pixels, grey=False, icc=None, exif=srgb_exif(picture.exif))


def _save(
    image: pyvips.Image, format: str, quality: int, fields: Mapping[str, bytes]
) -> tuple[bytes, list[str]]:
    """Encode with these metadata fields, or with none and their names if libvips refuses them."""
    for attempt in (fields, {}):
        try:
            data = bytes(_SAVERS[format](_with_fields(image, attempt), quality))
        except _VIPS_ERRORS as error:
            reason = _reason(error)
        else:
            return data, [_FIELD_NAMES[field] for field in fields if field not in attempt]
    raise OutputError(f"the picture cannot be encoded as {format} ({reason}).")


_FIELD_NAMES: Final = {
    "icc-profile-data": "the colour profile",
    "xmp-data": "XMP",
    "exif-data": "EXIF",
}


def _save_webp(image: pyvips.Image, quality: int) -> Any:
    keep = "icc:exif:xmp" if "exif-data" in image.get_fields() else "icc:xmp"
    if quality < 100:
        return image.webpsave_buffer(Q=quality, keep=keep)
    # For lossless files, Q is the effort, 75 by default. "exact" keeps colours of clear pixels.
    return image.webpsave_buffer(Q=75, lossless=True, exact=True, keep=keep)


def _save_tiff(image: pyvips.Image, _: int) -> Any:
    return image.tiffsave_buffer(
        compression="deflate", predictor="horizontal", resunit="inch", keep="icc:xmp"
    )


_SAVERS: Final[dict[str, Callable[[pyvips.Image, int], Any]]] = {
    "png": lambda image, _: image.pngsave_buffer(keep="icc"),
    "jpeg": lambda image, quality: image.jpegsave_buffer(
        Q=quality, optimize_coding=True, keep="icc"
    ),
    "webp": _save_webp,
    "tiff": _save_tiff,
}


def _with_fields(image: pyvips.Image, fields: Mapping[str, bytes]) -> pyvips.Image:
    image = image.copy()
    for field, value in fields.items():
        image.set_type(pyvips.GValue.blob_type, field, value)
    return image


def _fields(icc: bytes | None, format: str, metadata: Metadata) -> dict[str, bytes]:
    """Return the metadata that libvips writes; `embed` and `join_tiff` write the rest."""
    fields = {"icc-profile-data": icc}
    if format in ("tiff", "webp"):
        fields["xmp-data"] = metadata.xmp
    if format == "webp":
        fields["exif-data"] = metadata.exif
    return {field: value for field, value in fields.items() if value}


def _is_grey(picture: Picture, format: str) -> bool:
    return picture.grey and format != "webp"


def check_fits(width: int, height: int, format: str) -> None:
    """Raise OutputError if a side has more pixels than the format allows."""
    limit = _LONGEST_SIDE.get(format, max(height, width))
    if max(height, width) > limit:
        raise OutputError(
            f"{width}x{height} is too large for {format}, whose limit is {limit} pixels a side; "
            "write PNG or TIFF instead."
        )


def _quantised(picture: Picture, format: str) -> np.ndarray:
    """Return the samples to write, (H, W, bands) of 8 or 16 bits, rounded to nearest."""
    deep = picture.bits == 16 and format in _SIXTEEN_BIT_FORMATS
    colours = 1 if _is_grey(picture, format) else 3
    bands = colours + (picture.alpha is not None and format != "jpeg")
    height, width = picture.pixels.shape[-2:]
    samples = np.empty((height, width, bands), np.uint16 if deep else np.uint8)
    top = np.iinfo(samples.dtype).max
    # One plane at a time, so that there is no second float copy of the picture.
    for band, plane in enumerate(_planes(picture, format)):
        if not bool(torch.isfinite(plane).all()):
            raise OutputError("the picture has values that are not finite numbers.")
        rounded = (plane * top).round_().clamp_(0, top)
        torch.from_numpy(samples)[..., band].copy_(rounded)
    return samples


def _vips_image(samples: np.ndarray, *, cmyk: bool = False) -> pyvips.Image:
    """Return a libvips image of (H, W, bands) samples of 8 or 16 bits."""
    height, width, bands = samples.shape
    samples = np.ascontiguousarray(samples)
    deep = samples.dtype == np.uint16
    kind = ("grey16" if deep else "b-w") if bands < 3 else ("rgb16" if deep else "srgb")
    image = pyvips.Image.new_from_memory(
        samples, width, height, bands, "ushort" if deep else "uchar"
    )
    return image.copy(interpretation="cmyk" if cmyk else kind)


def _planes(picture: Picture, format: str) -> Iterator[torch.Tensor]:
    """Yield the (H, W) float planes to write, colours first."""
    colours: Iterable[torch.Tensor] = map(_on_cpu, picture.pixels)
    if _is_grey(picture, format):
        red, green, blue = colours
        colours = [red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]]
    if picture.alpha is None:
        yield from colours
        return
    alpha = _on_cpu(picture.alpha[0]).clamp(0, 1)
    if format == "jpeg":
        yield from (1 - alpha * (1 - plane) for plane in colours)
    else:
        yield from colours
        yield alpha


def _on_cpu(plane: torch.Tensor) -> torch.Tensor:
    return plane.detach().to("cpu", torch.float32)


def write(
    picture: Picture,
    path: str | Path,
    *,
    quality: int = 95,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a picture file in the format of its suffix, replacing any old file.

    The file appears complete or not at all. For the other arguments see `encode`. Raises
    OutputError for an unknown suffix, or if the file cannot be written.
    """
    path = Path(path)
    format = WRITE_SUFFIXES.get(path.suffix.lower())
    if format is None:
        known = " ".join(WRITE_SUFFIXES)
        raise OutputError(f"{path}: no picture format has this suffix; use one of {known}.")
    try:
        data = encode(picture, format, quality=quality, provenance=provenance)
    except OutputError as error:
        raise OutputError(f"{path}: {error}") from error
    write_encoded(path, data)


def write_encoded(path: Path, data: bytes) -> None:
    """Write the bytes of a picture file, which appears complete or not at all.

    Raises OutputError if it cannot be written.
    """
    try:
        atomic.write(path, data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{path}: cannot be written ({reason}); check the folder, its permissions and free "
            "space."
        ) from error


def result_name(source: Name, format: str | None) -> Name:
    """Return the name of a result: the source's name with a suffix that can be written.

    A name without a picture's suffix, such as "Mt. Everest", stays whole and gets another one.
    format: a suffix of WRITE_SUFFIXES without its dot; None keeps the source's if possible.
    """
    suffix = source.suffix.lower()
    if suffix in WRITE_SUFFIXES:
        return source.with_suffix(f".{format}") if format else source
    if suffix in RESULT_SUFFIXES:
        return source.with_suffix(f".{format}" if format else RESULT_SUFFIXES[suffix])
    return source.with_name(f"{source.name}.{format or 'png'}")


def result_format(source: str, format: str | None) -> str:
    """Return the format of a result, for `encode`: the source's, if that can be written.

    format: overrides the source's, as for `result_name`.
    """
    return WRITE_SUFFIXES.get(f".{format or source}", "png")


# PIL


def from_pil(image: PIL.Image.Image) -> Picture:
    """Convert a PIL image with 8 bit samples, or with 16 bit grey, to a Picture.

    Any such mode will do that PIL can convert to RGB. Raises InputError for other modes, and for a
    file that PIL has opened but cannot decode.
    """
    return _from_pil(image, "the PIL image", Marks())


def _from_pil(image: PIL.Image.Image, name: str, marks: Marks) -> Picture:
    try:
        image.load()
        lazy = _vips_image(_pil_samples(image), cmyk=image.mode == "CMYK")
    except InputError:
        raise
    except Exception as error:  # PIL raises almost any kind of exception for a broken file
        raise InputError(f"{name}: cannot be used ({error}); open or convert it again.") from error
    exif, turned = pil_exif(image)
    turned = turned if marks.orientation is None else marks.orientation
    if exif is None and (exif := marks.profiles.get("exif")):
        turned = orientation(exif)
    lazy.set_type(pyvips.GValue.gint_type, "orientation", turned)
    info = image.info
    if (icc := info.get("icc_profile")) and image.mode != "LAB":
        lazy.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
    if isinstance(xmp := info.get("xmp"), bytes):
        lazy.set_type(pyvips.GValue.blob_type, "xmp-data", xmp)
    marks.srgb |= "srgb" in info
    marks.chromaticities = marks.chromaticities or info.get("chromaticity")
    marks.gamma = 1 / info["gamma"] if info.get("gamma") else marks.gamma
    marks.texts += [(key, str(text)) for key, text in getattr(image, "text", {}).items()]
    with contextlib.suppress(TypeError, ValueError):  # a tag may hold anything
        across, down = map(float, info.get("dpi", ()))
        marks.dpi = plausible_dpi(across, down)
    format = (image.format or "").lower()
    try:
        return _decode(lazy, exif, format if format in _LOADERS else "png", name, marks)
    except _VIPS_ERRORS as error:
        raise _input_error(name, error) from error


def _pil_samples(image: PIL.Image.Image) -> np.ndarray:
    """Return the samples of a loaded image, (H, W, bands)."""
    if image.mode in ("I", "F"):
        raise InputError(f"the PIL image: mode {image.mode} has no fixed range; convert it to RGB.")
    if image.mode.startswith("I;16"):
        # Some of these modes are big-endian.
        return np.asarray(image).astype(np.uint16)[..., None]
    if image.mode == "1":
        image = image.convert("L")
    if image.mode == "LAB":
        lab, srgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
        transform = PIL.ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        image = transform.apply(image)
    if image.mode == "L" and image.has_transparency_data:
        image = image.convert("LA")
    elif image.mode not in ("L", "LA", "CMYK"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    samples = np.asarray(image)
    return samples if samples.ndim == 3 else samples[..., None]


def to_pil(picture: Picture) -> PIL.Image.Image:
    """Convert to a PIL image with the profile and EXIF in its `info`.

    Its mode is L, LA, RGB or RGBA with 8 bits, or I;16 for 16 bit grey without alpha: PIL has no 16
    bit colour.
    """
    if not picture.grey or picture.alpha is not None:
        picture = replace(picture, bits=8)
    samples = _quantised(picture, "png")
    image = PIL.Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    if _fits(picture.icc, picture.grey):
        image.info["icc_profile"] = picture.icc
    for key, value in (("exif", picture.exif), ("xmp", picture.xmp), ("dpi", picture.dpi)):
        if value:
            image.info[key] = value
    return image
