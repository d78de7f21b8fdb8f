"""Convert picture files to tensors and back, with their depth, alpha, profile and EXIF.

This file knows nothing of super-resolution: no model, no scale, no resampling. libvips decodes and
encodes. Only loaders on an allow-list are called, chosen by the first bytes of the file, so that a
name like `photo.png` cannot reach an SVG or CSV parser. EXIF has its own module, because libvips
neither reads it from TIFF nor writes it there.

Known limits: colour spaces that only PNG or AVIF tags describe (gAMA, cICP) are ignored; XMP and
IPTC are dropped; EXIF tags unknown to libexif are lost in JPEG, PNG and WebP; WebP has no grey, so
a grey picture comes back from it as colour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Final, TypeVar

import numpy as np
import PIL.Image
import pyvips  # type: ignore[import-untyped]
import torch

from linearsr.errors import InputError, NoPicture, OptionError, OutputError, TooLarge
from linearsr.imaging.exif import (
    descriptive_exif,
    find_provenance,
    pil_exif,
    pixels_per_mm,
    record_line,
    tiff_with_exif,
    upright_exif,
    with_provenance,
)
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
READ_SUFFIXES: Final = (*WRITE_SUFFIXES, ".avif", ".gif")
# Suffixes that a result's name replaces by another one. Its name keeps any other suffix.
RESULT_SUFFIXES: Final = {
    **dict.fromkeys((".avif", ".gif", ".apng", ".bmp", ".dib"), ".png"),
    **dict.fromkeys((".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo"), ".jpg"),
    **dict.fromkeys((".jpg_large", ".jpg-large", ".jpeg_large"), ".jpg"),
}

Name = TypeVar("Name", bound=PurePath)

_SIXTEEN_BIT_FORMATS: Final = ("png", "tiff")
# JPEG itself allows 65535 pixels; its usual library stops here.
_LONGEST_SIDE: Final = {"jpeg": 65500, "webp": 16383}

# A file never needs more bytes than this for each pixel, plus some for metadata.
_MAX_BYTES_PER_PIXEL: Final = 16
_ROOM_FOR_METADATA: Final = 64 * 2**20

_LUMA: Final = (0.299, 0.587, 0.114)

# libvips quotes a broken file in its messages, and pyvips fails on those that are not UTF-8.
_VIPS_ERRORS: Final = (pyvips.Error, UnicodeDecodeError)

# Pictures do not repeat within a run, so libvips' cache of operations would only hold memory.
pyvips.cache_set_max(0)


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
    """The format of the file: png, jpeg, webp, tiff, avif or gif."""


# Reading


def read(
    source: str | Path | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, name: str | None = None
) -> Picture:
    """Decode the first page or frame of a picture file, or of its bytes, and turn it upright.

    Formats are PNG, JPEG, WebP, TIFF, AVIF and GIF with 8 or 16 bits: grey, palette, RGB, or CMYK,
    which is converted to sRGB, with or without alpha. Metadata that cannot be read is dropped.
    name: the picture's name in errors, by default its path.

    Raises InputError for any other format, for a damaged or truncated file, and, before decoding,
    for more than `max_pixels` pixels.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _file_bytes(Path(source), name, max_pixels)
    format = _sniff(data, name)
    with _as_input_error(name):
        image = _LOADERS[format](data, access="sequential", fail_on="error")
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise TooLarge(
                f"{name}: {image.width}x{image.height} is {pixels} pixels, more than the limit of "
                f"{max_pixels}; raise --max-pixels to allow it."
            )
        exif = descriptive_exif(data) if format == "tiff" else _blob(image, "exif-data")
        return _decode(image, exif, format, name)


def measure(data: bytes) -> tuple[str, int, int]:
    """Return the format, width and height of an upright picture from its header alone.

    Raises InputError for bytes that are not a picture.
    """
    name = "the picture"
    format = _sniff(data, name)
    with _as_input_error(name):
        image = _LOADERS[format](data, access="sequential", fail_on="error")
        if "orientation" in image.get_fields() and image.get("orientation") >= 5:
            return format, image.height, image.width
        return format, image.width, image.height


def _file_bytes(path: Path, name: str, max_pixels: int) -> bytes:
    try:
        if not path.is_file():
            # A folder, a pipe or a device; stat() says whether it is there at all.
            path.stat()
            raise InputError(f"{name}: not a regular file; give the path of a picture.")
        if path.stat().st_size > max_pixels * _MAX_BYTES_PER_PIXEL + _ROOM_FOR_METADATA:
            raise TooLarge(
                f"{name}: too large a file for {max_pixels} pixels; raise --max-pixels to allow it."
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
    raise NoPicture(
        f"{name}: not a picture this program reads; give PNG, JPEG, WebP, TIFF, AVIF or GIF."
    )


def sniff(data: bytes) -> str | None:
    """Return the format that the first bytes of a file show, or None if it is not read."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return None


_LOADERS: Final[dict[str, Callable[..., Any]]] = {
    "png": pyvips.Image.pngload_buffer,
    "jpeg": pyvips.Image.jpegload_buffer,
    "webp": pyvips.Image.webpload_buffer,
    "tiff": pyvips.Image.tiffload_buffer,
    "avif": pyvips.Image.heifload_buffer,
    "gif": pyvips.Image.gifload_buffer,
}


def _decode(image: pyvips.Image, exif: bytes | None, format: str, name: str) -> Picture:
    """Decode a libvips image, which is lazy until now, into a Picture."""
    if image.format not in ("uchar", "ushort"):
        raise InputError(
            f"{name}: holds {image.format} samples; convert it to 8 or 16 bits a channel."
        )
    bits = 16 if image.format == "ushort" else 8
    icc = _blob(image, "icc-profile-data")
    if image.interpretation == "cmyk":
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=bits)
        icc = None
    grey = image.interpretation in ("b-w", "grey16")
    colours = 1 if grey else 3
    if not grey and image.interpretation not in ("srgb", "rgb", "rgb16"):
        raise InputError(f"{name}: holds {image.interpretation} colours; convert it to RGB.")
    if not colours <= image.bands <= colours + 1:
        raise InputError(f"{name}: has {image.bands} channels; convert it to RGB or RGBA.")
    if "orientation" in image.get_fields() and image.get("orientation") != 1:
        # Turning needs the rows in another order than the decoder delivers them.
        image = image.copy_memory().autorot()
    array = image.numpy().reshape(image.height, image.width, image.bands)
    samples = torch.from_numpy(array).permute(2, 0, 1)
    pixels = _unit_range(samples[:colours], 3)
    alpha = _unit_range(samples[colours:], 1) if image.bands > colours else None
    profile = icc if _fits(icc, grey) else None
    return Picture(pixels, alpha, bits, grey, profile, upright_exif(exif), format)


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


@contextlib.contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    try:
        yield
    except _VIPS_ERRORS as error:
        reason = _reason(error)
        raise InputError(f"{name}: damaged or truncated ({reason}); get the file again.") from error


def _reason(error: pyvips.Error | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
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
    if format not in _SAVERS:
        raise OptionError(f"Format {format!r} is unknown; choose from {', '.join(_SAVERS)}.")
    if not 1 <= quality <= 100:
        raise OptionError(f"Quality {quality} is out of range; give 1 to 100.")
    height, width = picture.pixels.shape[-2:]
    check_fits(width, height, format)
    exif = with_provenance(picture.exif, provenance) if provenance else picture.exif
    image = _vips_image(_quantised(picture, format))
    per_mm = pixels_per_mm(exif)
    image = image.copy(xres=per_mm, yres=per_mm)
    data = _save(image, format, quality, _metadata(picture, format, exif, provenance or {}))
    return tiff_with_exif(data, exif) if format == "tiff" and exif else data


def _save(
    image: pyvips.Image, format: str, quality: int, fields: Mapping[str, bytes | str]
) -> bytes:
    """Encode with these metadata fields, or with fewer if libvips refuses them."""
    profile = {key: value for key, value in fields.items() if key == "icc-profile-data"}
    for attempt in (fields, profile, {}):
        labelled = image.copy()
        for field, value in attempt.items():
            is_text = isinstance(value, str)
            kind = pyvips.GValue.gstr_type if is_text else pyvips.GValue.blob_type
            labelled.set_type(kind, field, value)
        try:
            return bytes(_SAVERS[format](labelled, quality))
        except _VIPS_ERRORS as error:
            reason = _reason(error)
    raise OutputError(f"the picture cannot be encoded as {format} ({reason}).")


def _save_webp(image: pyvips.Image, quality: int) -> Any:
    if quality < 100:
        return image.webpsave_buffer(Q=quality)
    # For lossless files, Q is the effort, 75 by default. "exact" keeps colours of clear pixels.
    return image.webpsave_buffer(Q=75, lossless=True, exact=True)


_SAVERS: Final[dict[str, Callable[[pyvips.Image, int], Any]]] = {
    "png": lambda image, _: image.pngsave_buffer(),
    "jpeg": lambda image, quality: image.jpegsave_buffer(Q=quality, optimize_coding=True),
    "webp": _save_webp,
    "tiff": lambda image, _: image.tiffsave_buffer(compression="deflate", predictor="horizontal"),
}


def _metadata(
    picture: Picture, format: str, exif: bytes | None, provenance: Mapping[str, str]
) -> dict[str, bytes | str]:
    """Return the libvips metadata fields to write. TIFF gets its EXIF afterwards."""
    fields: dict[str, bytes | str] = {}
    if picture.icc and _fits(picture.icc, _is_grey(picture, format)):
        fields["icc-profile-data"] = picture.icc
    if exif and format != "tiff":
        fields["exif-data"] = exif
    if format == "png" and provenance:
        fields["png-comment-0-Software"] = provenance.get("software", "linearsr")
        fields["png-comment-1-Comment"] = record_line(provenance)
    return fields


def _is_grey(picture: Picture, format: str) -> bool:
    return picture.grey and format != "webp"


def check_fits(width: int, height: int, format: str) -> None:
    """Raise OutputError if a side has more pixels than the format allows."""
    limit = _LONGEST_SIDE.get(format, max(height, width))
    if max(height, width) > limit:
        raise OutputError(
            f"{width}x{height} is too large for {format}, which ends at {limit} pixels a side; "
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
    name = "the PIL image"
    try:
        image.load()
        lazy = _vips_image(_pil_samples(image), cmyk=image.mode == "CMYK")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name}: cannot be used ({error}); open or convert it again.") from error
    exif, orientation = pil_exif(image)
    lazy.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    if icc := image.info.get("icc_profile"):
        lazy.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
    format = (image.format or "").lower()
    with _as_input_error(name):
        return _decode(lazy, exif, format if format in _LOADERS else "png", name)


def _pil_samples(image: PIL.Image.Image) -> np.ndarray:
    """Return the samples of a loaded image, (H, W, bands)."""
    if image.mode in ("I", "F"):
        raise InputError(f"the PIL image: mode {image.mode} has no fixed range; convert it to RGB.")
    if image.mode.startswith("I;16"):
        # Some of these modes are big-endian.
        return np.asarray(image).astype(np.uint16)[..., None]
    if image.mode == "1":
        image = image.convert("L")
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
    if picture.exif:
        image.info["exif"] = picture.exif
    return image
