"""From the bytes of a picture file to the bytes of an upscaled one.

    read -> with_tags -> upscale -> describe -> encode

`upscale_encoded` is the whole way: the command and the dataset job use it. The endpoint runs its
stages on different replicas, so it uses the two ends, `read_tagged` and `encode_result`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from linearsr.config import FileOptions, Options
from linearsr.errors import OutputError
from linearsr.imaging.files import (
    Picture,
    check_fits,
    encode_with_notes,
    join_pages,
    read,
    result_format,
)
from linearsr.pipeline.notes import notes_of, notes_of_pages
from linearsr.pipeline.sizes import output_size
from linearsr.pipeline.upscaler import OnProgress, Progress, Upscaler

OnStage = Callable[[str, Picture], None]
# The largest TIFF file, whose offsets have 32 bits, less some room for its directories.
TIFF_BYTES = 2**32 - 2**24


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
    progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> Encoded:
    """Upscale a picture file, or its bytes, and encode the result with its provenance.

    All pages of a TIFF file are upscaled if the result is one; other formats get the first, and
    the result's `notes` say so.

    format: png, jpeg, webp or tiff; by default `files.format`, else the format of the source if it
    can be written. name: what errors call the picture. progress: see `Upscaler.upscale`; its
    fraction is that of all pages.
    on_stage: called with "upscale" and the picture that was read, then "encode" and the result; for
    each page.
    Raises InputError, OptionError, OutOfMemory, TooLarge or OutputError. A page that cannot be read
    and a result that is too large for its format are found before the model's first step, and a
    file of several pages that would become too large as soon as that is clear.
    """
    picture = read(source, max_pixels=files.max_pixels, name=name)
    target = format or result_format(picture.format, files.format)
    pages = result_pages(picture, target)
    begin = partial(_begin, options=options, format=target, on_stage=on_stage)

    def upscale(picture: Picture, progress: OnProgress | None = progress) -> Encoded:
        begin("upscale", picture)
        tagged = upscaler.with_tags(picture, options)
        result = upscaler.upscale_tagged(picture, tagged, progress)
        begin("encode", result)
        return encode_result(upscaler, result, tagged, files, format)

    if pages == 1:
        return upscale(picture)
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    # Read once, since the file may change meanwhile.
    data = source if isinstance(source, bytes) else Path(source).read_bytes()

    def read_page(page: int) -> Picture:
        return read(data, max_pixels=files.max_pixels, name=f"page {page + 1} of {name}", page=page)

    further = range(1, pages)
    sizes = [_result_size(p, options) for p in (picture, *map(read_page, further))]
    encoded = [upscale(picture, _page_progress(progress, sizes, 0))]
    for page in further:
        _check_joined(encoded, sizes)
        encoded.append(upscale(read_page(page), _page_progress(progress, sizes, page)))
    _check_joined(encoded, sizes)
    data = join_pages([page.data for page in encoded])
    return encoded[0]._replace(data=data, notes=notes_of_pages([page.notes for page in encoded]))


def _page_progress(
    progress: OnProgress | None, sizes: list[tuple[int, int]], page: int
) -> OnProgress | None:
    """Return a function that reports the progress of one page as that of all of them."""
    if progress is None:
        return None
    areas = [math.prod(size) for size in sizes]
    before, area, total = sum(areas[:page]), areas[page], sum(areas)

    def report(page: Progress) -> None:
        progress(page._replace(fraction=(before + area * page.fraction) / total))

    return report


def result_pages(picture: Picture, format: str) -> int:
    """Return how many pages of a picture's file a result of this format holds."""
    return picture.pages if format == "tiff" else 1


def _result_size(picture: Picture, options: Options) -> tuple[int, int]:
    height, width = picture.pixels.shape[-2:]
    return output_size(height, width, options)


def _begin(
    stage: str, picture: Picture, *, options: Options, format: str, on_stage: OnStage | None
) -> None:
    """Check before the first step that the format can hold the result, and call `on_stage`."""
    if stage == "upscale":
        height, width = _result_size(picture, options)
        check_fits(width, height, format)
    if on_stage:
        on_stage(stage, picture)


def _check_joined(encoded: list[Encoded], sizes: list[tuple[int, int]]) -> None:
    """Raise OutputError if the pages cannot be one file. sizes: those of all pages of the result.

    Pages differ in how well they can be compressed, so an estimate must be far too large to count.
    """
    written = sum(len(page.data) for page in encoded)
    share = sum(map(math.prod, sizes[: len(encoded)])) / sum(map(math.prod, sizes))
    if written > TIFF_BYTES or written / share > 2 * TIFF_BYTES:
        raise OutputError(
            f"the {len(sizes)} pages would need about {written / share / 2**30:.1f} GiB, and a "
            "TIFF file holds 4; split the file, or choose a smaller scale or another format"
        )


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

    page: number of the page of a TIFF file. The other parameters are those of `upscale_encoded` and
    `linearsr.imaging.files.read`; the tagger counts as the stage "upscale".
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
    return Encoded(data, format, width, height, (*notes_of(result), *lost))
