"""From the bytes of a picture file to the bytes of an upscaled one.

    read -> with_tags -> upscale -> describe -> encode

`upscale_encoded` is the whole way: the command and the dataset job use it. The endpoint runs its
stages on different replicas, so it uses the two ends, `read_tagged` and `encode_result`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from linearsr.config import FileOptions, Options
from linearsr.imaging.files import Picture, check_fits, encode, read, result_format
from linearsr.pipeline.sizes import output_size
from linearsr.pipeline.upscaler import Progress, Upscaler

OnStage = Callable[[str, Picture], None]


class Encoded(NamedTuple):
    """An upscaled picture as the bytes of a file; `format` is png, jpeg, webp or tiff."""

    data: bytes
    format: str
    width: int
    height: int


def upscale_encoded(
    upscaler: Upscaler,
    source: str | Path | bytes,
    options: Options,
    files: FileOptions,
    *,
    format: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    on_stage: OnStage | None = None,
) -> Encoded:
    """Upscale a picture file, or its bytes, and encode the result with its provenance.

    format: png, jpeg, webp or tiff; by default `files.format`, else the format of the source if it
    can be written. name: what errors call the picture. progress: see `Upscaler.upscale`.
    on_stage: called with "upscale" and the picture that was read, then "encode" and the result.
    Raises InputError, OptionError, OutOfMemory, TooLarge or OutputError; a result that is too large
    for its format is refused before the model's first step.
    """

    def begin(stage: str, picture: Picture) -> None:
        if stage == "upscale":
            height, width = picture.pixels.shape[-2:]
            height, width = output_size(height, width, options)
            check_fits(width, height, format or result_format(picture.format, files.format))
        if on_stage:
            on_stage(stage, picture)

    picture, options = read_tagged(upscaler, source, options, files, name, begin)
    result = upscaler.upscale_tagged(picture, options, progress)
    begin("encode", result)
    return encode_result(upscaler, result, options, files, format)


def read_tagged(
    upscaler: Upscaler,
    source: str | Path | bytes,
    options: Options,
    files: FileOptions,
    name: str | None = None,
    on_stage: OnStage | None = None,
) -> tuple[Picture, Options]:
    """Return the decoded picture, and the options with the tags that guide it.

    The parameters are those of `upscale_encoded`; the tagger counts as the stage "upscale".
    """
    picture = read(source, max_pixels=files.max_pixels, name=name)
    if on_stage:
        on_stage("upscale", picture)
    return picture, upscaler.with_tags(picture, options)


def encode_result(
    upscaler: Upscaler,
    result: Picture,
    options: Options,
    files: FileOptions,
    format: str | None = None,
) -> Encoded:
    """Encode an upscaled picture with its provenance; `options` are those of `read_tagged`."""
    format = format or result_format(result.format, files.format)
    provenance = upscaler.describe(options)
    data = encode(result, format, quality=files.quality, provenance=provenance)
    height, width = result.pixels.shape[-2:]
    return Encoded(data, format, width, height)
