"""The pages of a TIFF file as one request: they are upscaled in turn, and the results joined."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from linearsr.config import FileOptions, Options
from linearsr.imaging.files import Picture, join_pages, result_format
from linearsr.pipeline.codec import result_pages
from linearsr.pipeline.notes import notes_of_pages
from linearsr.web.service import Events, Result


async def upscale_pages(
    files: FileOptions,
    read: Callable[[int], Awaitable[tuple[Picture, Options]]],
    upscale: Callable[[Picture, Options, float], Events],
) -> Events:
    """Yield the progress over all pages that the result holds, then their results as one.

    read: returns the page of a number from 0, and the options for it. upscale: returns the events
    of a page; its last argument is the `time.perf_counter` at which the page began to be read.
    """
    start = time.perf_counter()
    picture, options = await read(0)
    pages = result_pages(picture, result_format(picture.format, files.format))
    results: list[Result] = []
    for page in range(pages):
        if page:
            start = time.perf_counter()
            picture, options = await read(page)
        async with aclosing(upscale(picture, options, start)) as events:
            async for event in events:
                if isinstance(event, Result):
                    results.append(event)
                else:
                    step = page * event.steps + event.step
                    yield replace(event, step=step, steps=pages * event.steps)
    yield _joined(results)


def _joined(results: Sequence[Result]) -> Result:
    """Return one result of all pages, with the size of the first one and the sum of the times."""
    if len(results) == 1:
        return results[0]
    timing: Counter[str] = Counter()
    for result in results:
        timing.update(result.timing)
    return replace(
        results[0],
        image=join_pages([result.image for result in results]),
        timing=dict(timing),
        notes=notes_of_pages([result.notes for result in results]),
    )
