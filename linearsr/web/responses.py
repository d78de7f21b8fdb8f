"""Responses with a result: a picture, or a stream of server-sent events."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from fastapi import Response
from python_multipart.multipart import parse_options_header
from sse_starlette import EventSourceResponse

from linearsr.imaging.files import WRITE_SUFFIXES, result_name
from linearsr.web.problems import problem
from linearsr.web.service import Events, Progress, Result

EVENTS = "text/event-stream"
SUFFIXES = {format: suffix for suffix, format in reversed(WRITE_SUFFIXES.items())}
# The headers that describe a result, for the API's document and for pages of other origins.
HEADERS = {
    "Server-Timing": "milliseconds spent in each part",
    "X-LinearSR-Model": "name of the model",
    "X-LinearSR-Seed": "seed of the noise; the same seed gives the same pixels",
    "X-LinearSR-Steps": "number of steps taken",
    "X-LinearSR-Scale": "scale at which the network worked; other sizes are resampled",
    "X-LinearSR-Notes": "what was left out or may be damaged, such as further pages",
    "Content-Disposition": "suggested file name",
}


def accepts_events(accept: str) -> bool:
    """Return whether an Accept header names the stream of events, with a quality above 0."""
    for part in accept.split(","):
        media_type, parameters = parse_options_header(part)
        if media_type == EVENTS.encode():
            quality = parameters.get(b"q", b"1").strip()
            return quality.strip(b"0.") != b""
    return False


def picture_response(result: Result, name: str) -> Response:
    """Return the picture as the body. name: file name of the upload."""
    headers = {**result_headers(result), "X-Content-Type-Options": "nosniff"}
    file = quote(file_name(name, result), safe="")
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{file}"
    return Response(result.image, media_type=f"image/{result.format}", headers=headers)


def result_headers(result: Result) -> dict[str, str]:
    """Return the headers that say how a result was made."""
    headers = {
        "X-LinearSR-Model": quote(result.model),
        "X-LinearSR-Seed": str(result.seed),
        "X-LinearSR-Steps": str(result.steps),
        "X-LinearSR-Scale": f"{result.scale:.4g}",
        "Server-Timing": ", ".join(f"{part};dur={ms:.1f}" for part, ms in result.timing.items()),
    }
    if result.notes:
        headers["X-LinearSR-Notes"] = quote("; ".join(result.notes), safe=" ;,:()/'")
    return headers


def file_name(uploaded: str, result: Result) -> str:
    """Return a file name for the result of an upload with this name."""
    name = PurePosixPath(uploaded.replace("\\", "/")).name or "picture"
    stem = result_name(PurePosixPath(name), None).stem
    # Drop control characters, lone surrogates, and marks that change the direction of text.
    stem = "".join(filter(str.isprintable, stem))[:100] or "picture"
    return f"{stem}-{result.width}x{result.height}{SUFFIXES[result.format]}"


class Stream(EventSourceResponse):
    """Server-sent events; an error is the last one. A closed connection cancels the request."""

    def __init__(self, first: Progress | Result, rest: Events, name: str) -> None:
        super().__init__(_sse(first, rest, name))
        self.rest = rest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events, and close their generator whatever happens."""
        async with aclosing(self.rest):
            await super().__call__(scope, receive, send)


async def _sse(first: Progress | Result, rest: Events, name: str) -> AsyncIterator[dict[str, str]]:
    yield _event(first, name)
    try:
        async for event in rest:
            yield _event(event, name)
    except Exception as error:
        yield {"event": "error", "data": problem(error).text()}


def _event(event: Progress | Result, name: str) -> dict[str, str]:
    if isinstance(event, Progress):
        return {"event": "progress", "data": json.dumps(event.public())}
    result = {
        **vars(event),
        "image": base64.b64encode(event.image).decode(),
        "media_type": f"image/{event.format}",
        "filename": file_name(name, event),
    }
    return {"event": "result", "data": json.dumps(result)}
