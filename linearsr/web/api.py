"""The HTTP API: its routes and responses. The form's fields are in upload.py.

    POST /v1/upscale   returns a picture, or server-sent events: progress, then the picture
    GET  /v1/models    returns the model and the limits
    GET  /healthz      returns 200 when every part is ready
    GET  /             returns the page; /docs describes the API

The work itself is done by a `linearsr.web.service.Service`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from python_multipart.multipart import parse_options_header
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linearsr import __version__
from linearsr.imaging.files import WRITE_SUFFIXES, result_name
from linearsr.web.problems import MEDIA_TYPE, Problem, handle_problems, problem
from linearsr.web.service import Events, Limits, Progress, Result, Service, TookTooLong
from linearsr.web.upload import Upload, receive

PAGE = Path(__file__).parent / "page"
EVENTS = "text/event-stream"
ABOUT = """Super-resolution: send a picture and receive it larger.

Errors are problems (RFC 9457). With `Accept: text/event-stream`, the response is a stream:
`progress` events (expert, step, steps, percent) when an expert begins or ends, then `result` (image
in base64, media_type, filename, width, height, model, seed, steps, scale, timing in milliseconds,
notes)
or `error` (a problem). Closing the connection cancels the request."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
READABLE = ("png", "jpeg", "webp", "tiff", "avif", "gif", "bmp", "jp2")
SUFFIXES = {format: suffix for suffix, format in reversed(WRITE_SUFFIXES.items())}

Value = TypeVar("Value")


def _documented(status: int, description: str, *headers: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI document's entry for a problem with this status."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    required = {name: {"schema": {"type": "string"}, "required": True} for name in headers}
    return {status: {"description": description, "content": content, "headers": required}}


NOT_READY = _documented(503, "the server is not ready, or out of memory")
UNAUTHORISED = _documented(401, "the bearer token is missing or wrong", "WWW-Authenticate")
PROBLEMS = {
    **_documented(400, "the form or the picture cannot be decoded"),
    **_documented(413, "too many bytes, or too many pixels in the picture or its result"),
    **_documented(415, "the body is not a form, or its image not a picture"),
    **_documented(422, "a field is unknown or out of its range"),
    **_documented(429, "the server is busy", "Retry-After"),
    **NOT_READY,
    **_documented(504, "the request took too long"),
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the picture, or a stream of events",
        "content": {**{f"image/{format}": {} for format in SUFFIXES}, EVENTS: {}},
        "headers": {
            name: {"schema": {"type": "string"}, "description": f"{text}; absent from a stream"}
            for name, text in {
                "Server-Timing": "milliseconds spent in each part",
                "X-LinearSR-Model": "name of the model",
                "X-LinearSR-Seed": "seed of the noise; the same seed gives the same pixels",
                "X-LinearSR-Steps": "number of steps taken",
                "X-LinearSR-Scale": "scale at which the network worked; other sizes are resampled",
                "X-LinearSR-Notes": "what was left out or may be damaged, such as further pages",
                "Content-Disposition": "suggested file name",
            }.items()
        },
    }
}
FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"$ref": "#/components/schemas/Upload"},
            "encoding": {"image": {"contentType": ", ".join(f"image/{kind}" for kind in READABLE)}},
        }
    },
}


class Served(BaseModel):
    """The models, the limits, and whether uploads need a token."""

    object: str = "list"
    data: list[dict[str, Any]]
    limits: Limits
    token: bool = Field(description="whether uploads need a bearer token")


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def create_app(service: Service, limits: Limits, token: str | None = None) -> FastAPI:
    """Return the application. With `token`, uploads need it as a bearer token."""
    # FastAPIOffline serves the scripts of /docs itself; FastAPI would load them from a CDN.
    app = FastAPIOffline(title="LinearSR", version=__version__, description=ABOUT, redoc_url=None)
    app.openapi = partial(_document, app.openapi)  # type: ignore[method-assign]
    app.state.service, app.state.limits, app.state.token = service, limits, token
    handle_problems(app)
    app.add_middleware(_HeadAsGet)
    if token:
        app.include_router(uploads, dependencies=[Depends(_check_token)], responses=UNAUTHORISED)
    else:
        app.include_router(uploads)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _document(generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document with the schemas that no handler names."""
    document = generate()
    for model in (Problem, Upload):
        document["components"]["schemas"][model.__name__] = model.model_json_schema()
    return document


class _HeadAsGet:
    """Answers HEAD with the headers of GET and no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_headers(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, send_headers)
        else:
            await self.app(scope, receive, send)


uploads = APIRouter()
router = APIRouter()


async def _check_token(bearer: Bearer, request: Request) -> None:
    token, needed = bearer.credentials if bearer else "", request.app.state.token
    # Starlette decodes headers as Latin-1.
    if needed and not secrets.compare_digest(token.encode("latin-1"), needed.encode()):
        challenge = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "send the right bearer token", headers=challenge)


@uploads.post(
    "/v1/upscale",
    response_class=Response,
    responses={**PICTURE, **PROBLEMS},
    openapi_extra={"requestBody": FORM},
)
async def upscale(request: Request) -> Response:
    """Upscale one picture. The same picture, options and seed give the same pixels."""
    state = request.app.state
    deadline = anyio.current_time() + state.limits.seconds
    # The form is read here: FastAPI would read all of it before it checks the token.
    upload = receive(request, state.limits, state.service.models()[0])
    checked, name = await _before(deadline, upload)
    stream = _accepts_events(request.headers.get("Accept", ""))
    events = _in_time(state.service.upscale(replace(checked, progress=stream)), deadline)
    if stream:
        # A failure before the first event still gets its own status.
        return _Stream(await _while_connected(request, anext(events)), events, name)
    return _response(await _while_connected(request, _result(events)), name)


@router.get("/v1/models")
async def models(request: Request) -> Served:
    """Return the models, the limits, and whether uploads need a token."""
    state = request.app.state
    token = state.token is not None
    models = [m.model_dump() | {"id": m.name, "object": "model"} for m in state.service.models()]
    return Served(data=models, limits=state.limits, token=token)


@router.get("/v1/estimate", include_in_schema=False)
async def estimate(
    request: Request, width: int, height: int, scale: float = 4, steps: int = 2, detail: float = 1
) -> dict[str, Any]:
    """Return how long a picture will take. For development: replaced by the endpoint's."""
    seconds = 30e-6 * width * height * (steps if detail else 1)
    limit = request.app.state.limits.seconds
    detail_ = (
        "" if seconds <= limit else f"it would take {seconds:.0f} s, and the limit is {limit:.0f} s"
    )
    return {
        "seconds": seconds,
        "width": round(width * scale),
        "height": round(height * scale),
        "fits": not detail_,
        "detail": detail_,
    }


@router.get("/healthz", responses=NOT_READY)
async def healthz(request: Request) -> dict[str, str]:
    """Return 200 when every expert has loaded and answers."""
    await request.app.state.service.ready()
    return {"status": "ready"}


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(PAGE / "index.html", headers=HEADERS)


def _accepts_events(accept: str) -> bool:
    """Return whether an Accept header names the stream of events, with a quality above 0."""
    for part in accept.split(","):
        media_type, parameters = parse_options_header(part)
        if media_type == EVENTS.encode():
            quality = parameters.get(b"q", b"1").strip()
            return quality.strip(b"0.") != b""
    return False


async def _before(deadline: float, work: Awaitable[Value]) -> Value:
    """Await `work`. Raises TookTooLong after the deadline."""
    with anyio.CancelScope(deadline=deadline):
        return await work
    raise TookTooLong("the request took too long; send a smaller picture or use fewer steps")


async def _in_time(events: Events, deadline: float) -> Events:
    """Yield the events up to the result. Raises TookTooLong after the deadline.

    The service is closed before the result is yielded: a client that reads slowly holds no slot.
    """
    async with aclosing(events):
        while not isinstance(event := await _before(deadline, anext(events)), Result):
            yield event
    yield event


async def _while_connected(request: Request, work: Awaitable[Value]) -> Value:
    """Await `work`; cancel it and raise ClientDisconnect if the client disconnects."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


async def _result(events: Events) -> Result:
    *_, last = [event async for event in events]
    assert isinstance(last, Result)
    return last


class _Stream(EventSourceResponse):
    """Server-sent events; an error is the last one. A closed connection cancels the request."""

    def __init__(self, first: Progress | Result, rest: Events, name: str) -> None:
        super().__init__(_sse(first, rest, name))
        self.rest = rest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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
        progress = {**vars(event), "percent": event.percent}
        return {"event": "progress", "data": json.dumps(progress)}
    result = {
        **vars(event),
        "image": base64.b64encode(event.image).decode(),
        "media_type": f"image/{event.format}",
        "filename": _file_name(name, event),
    }
    return {"event": "result", "data": json.dumps(result)}


def _file_name(uploaded: str, result: Result) -> str:
    name = PurePosixPath(uploaded.replace("\\", "/")).name or "picture"
    stem = result_name(PurePosixPath(name), None).stem
    # Drop control characters, lone surrogates, and marks that change the direction of text.
    stem = "".join(filter(str.isprintable, stem))[:100] or "picture"
    return f"{stem}-{result.width}x{result.height}{SUFFIXES[result.format]}"


def _response(result: Result, name: str) -> Response:
    timing = ", ".join(f"{part};dur={ms:.1f}" for part, ms in result.timing.items())
    file_name = quote(_file_name(name, result), safe="")
    headers = {
        "X-LinearSR-Model": quote(result.model),
        "X-LinearSR-Seed": str(result.seed),
        "X-LinearSR-Steps": str(result.steps),
        "X-LinearSR-Scale": f"{result.scale:.4g}",
        "X-Content-Type-Options": "nosniff",
        "Server-Timing": timing,
        "Content-Disposition": f"inline; filename*=UTF-8''{file_name}",
    }
    if result.notes:
        headers["X-LinearSR-Notes"] = quote("; ".join(result.notes), safe=" ;,:()/'")
    return Response(result.image, media_type=f"image/{result.format}", headers=headers)
