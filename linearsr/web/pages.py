"""The pages of a TIFF file as one request: they are upscaled in turn, and the results joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from linearsr.imaging.files import join_pages
from linearsr.pipeline.notes import notes_of_pages
from linearsr.web.service import Events, Result


async def upscale_pages(pages: int, upscale: Callable[[int], Events]) -> Events:
    """Yield the progress over all pages, then their results as one.

    upscale: returns the events of the page of a number from 0.
    """
    results: list[Result] = []
    for page in range(pages):
        async with aclosing(upscale(page)) as events:
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
