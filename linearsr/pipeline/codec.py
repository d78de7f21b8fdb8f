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
from linearsr.imaging.files import (
    Picture,
    check_fits,
    encode_with_notes,
    join_pages,
    read,
    result_format,
)
from linearsr.pipeline.sizes import output_size
from linearsr.pipeline.upscaler import Progress, Upscaler

OnStage = Callable[[str, Picture], None]


class Encoded(NamedTuple):
    """An upscaled picture as the bytes of a file; `format` is png, jpeg, webp or tiff.

    notes: what a user must know about the file that was read (see `Picture.notes`), and about
    metadata that the result lacks.
    """

    data: bytes
    format: str
    width: int
    height: int
    notes: tuple[str, ...] = ()


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

    All pages of a TIFF file are upscaled if the result is one; other formats get the first, and
    the result's `notes` say so.

    format: png, jpeg, webp or tiff; by default `files.format`, else the format of the source if it
    can be written. name: what errors call the picture. progress: see `Upscaler.upscale`.
    on_stage: called with "upscale" and the picture that was read, then "encode" and the result; for
    each page.
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

    def upscale(page: int) -> tuple[int, Encoded]:
        picture, tagged = read_tagged(upscaler, source, options, files, name, begin, page)
        result = upscaler.upscale_tagged(picture, tagged, progress)
        begin("encode", result)
        return picture.pages, encode_result(upscaler, result, tagged, files, format)

    pages, first = upscale(0)
    if pages == 1 or first.format != "tiff":
        return first
    encoded = [first, *(upscale(page)[1] for page in range(1, pages))]
    notes = dict.fromkeys(note for page in encoded for note in page.notes if note != _pages(pages))
    return first._replace(data=join_pages([page.data for page in encoded]), notes=tuple(notes))


def read_tagged(
    upscaler: Upscaler,
    source: str | Path | bytes,
    options: Options,
    files: FileOptions,
    name: str | None = None,
    on_stage: OnStage | None = None,
    page: int = 0,
) -> tuple[Picture, Options]:
    """Return the decoded picture, and the options with the tags that guide it.

    The parameters are those of `upscale_encoded` and `linearsr.imaging.files.read`; the tagger
    counts as the stage "upscale".
    """
    picture = read(source, max_pixels=files.max_pixels, name=name, page=page)
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
    """Encode an upscaled picture with its provenance; `options` are those of `read_tagged`.

    If the file that was read has several pages, a note says that the result has one.
    """
    format = format or result_format(result.format, files.format)
    provenance = upscaler.describe(options)
    data, lost = encode_with_notes(result, format, quality=files.quality, provenance=provenance)
    height, width = result.pixels.shape[-2:]
    notes = result.notes if result.pages == 1 else (*result.notes, _pages(result.pages))
    return Encoded(data, format, width, height, (*notes, *lost))


def _pages(pages: int) -> str:
    return f"only the first of {pages} pages"
