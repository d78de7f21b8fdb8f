"""The HTTP interface: uploads into requests, results into responses, errors into problems.

    POST /v1/upscale   a picture back, or server-sent events with progress and then the picture
    GET  /v1/models    what is served, and within which limits
    GET  /healthz      200 when every part is ready
    GET  /             the page;  /docs  the same in OpenAPI

Knows nothing of who does the work: that is a `linearsr.web.service.Service`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
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
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from linearsr import __version__
from linearsr.imaging.files import WRITE_SUFFIXES
from linearsr.web.problems import MEDIA_TYPE, Problem, handle_problems, problem
from linearsr.web.service import Events, Limits, ModelInfo, Progress, Result, Service, TookTooLong
from linearsr.web.upload import Upload, receive

PAGE = Path(__file__).parent / "page"
EVENTS = "text/event-stream"
ABOUT = """Super-resolution: a picture in, the same picture larger out.

Errors are problems (RFC 9457). With `Accept: text/event-stream` an upload is answered by events:
`progress` (expert, step, steps, percent) as the work goes on, then `result` (image in base64,
media_type, filename, width, height, model, seed, steps, scale, timing in milliseconds) or `error`
(a problem). Who closes the connection gives the work up."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
READ = ("png", "jpeg", "webp", "tiff", "avif", "gif")
SUFFIXES = {format: suffix for suffix, format in reversed(WRITE_SUFFIXES.items())}

Value = TypeVar("Value")


def _told_of(status: int, description: str, *headers: str) -> dict[int | str, dict[str, Any]]:
    """A problem, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    told = {name: {"schema": {"type": "string"}, "required": True} for name in headers}
    return {status: {"description": description, "content": content, "headers": told}}


NOT_READY = _told_of(503, "not ready, or out of memory")
REFUSED = _told_of(401, "the bearer token is missing or wrong", "WWW-Authenticate")
PROBLEMS = {
    **_told_of(400, "the form or the picture cannot be decoded"),
    **_told_of(413, "too many bytes, or pixels of the picture or of the result"),
    **_told_of(415, "not a form, or not a picture"),
    **_told_of(422, "a field is out of its range"),
    **_told_of(429, "no room now", "Retry-After"),
    **NOT_READY,
    **_told_of(504, "it took too long"),
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the picture, or events",
        "content": {**{f"image/{format}": {} for format in SUFFIXES}, EVENTS: {}},
        "headers": {
            name: {"schema": {"type": "string"}, "description": f"{told}; not of events"}
            for name, told in {
                "Server-Timing": "milliseconds of each part",
                "X-LinearSR-Model": "its name",
                "X-LinearSR-Seed": "the same gives the same pixels",
                "X-LinearSR-Steps": "as taken",
                "X-LinearSR-Scale": "at which the network worked; other sizes are resampled",
                "Content-Disposition": "a name for the file",
            }.items()
        },
    }
}
FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"$ref": "#/components/schemas/Upload"},
            "encoding": {"image": {"contentType": ", ".join(f"image/{kind}" for kind in READ)}},
        }
    },
}


class Served(BaseModel):
    """What is served."""

    models: list[ModelInfo]
    limits: Limits
    token: bool = Field(description="whether a bearer token is wanted")


@dataclass(frozen=True)
class _State:
    """What the handlers work with."""

    service: Service
    limits: Limits
    token: str | None


def _state(request: Request) -> _State:
    state: _State = request.app.state.linearsr
    return state


State = Annotated[_State, Depends(_state)]
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def create_app(service: Service, limits: Limits, token: str | None = None) -> FastAPI:
    """The application. With `token`, uploads ask for it as bearer."""
    # Its /docs come from here too, and not from a host of their scripts.
    app = FastAPIOffline(title="LinearSR", version=__version__, description=ABOUT, redoc_url=None)
    app.openapi = partial(_document, app.openapi)  # type: ignore[method-assign]
    app.state.linearsr = _State(service, limits, token)
    handle_problems(app)
    if token:
        app.include_router(uploads, dependencies=[Depends(_authorised)], responses=REFUSED)
    else:
        app.include_router(uploads)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _document(found: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """With the schemas that are not FastAPI's to find."""
    document = found()
    for model in (Problem, Upload):
        document["components"]["schemas"][model.__name__] = model.model_json_schema()
    return document


uploads = APIRouter()
router = APIRouter()


async def _authorised(bearer: Bearer, state: State) -> None:
    given = bearer.credentials if bearer else ""
    # Starlette reads the bytes of headers as Latin-1.
    if state.token and not secrets.compare_digest(given.encode("latin-1"), state.token.encode()):
        challenge = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "give the right bearer token", headers=challenge)


@uploads.post(
    "/v1/upscale",
    response_class=Response,
    responses={**PICTURE, **PROBLEMS},
    openapi_extra={"requestBody": FORM},
)
async def upscale(request: Request, state: State) -> Response:
    """Upscale one picture. The same picture, options and seed give the same pixels."""
    deadline = anyio.current_time() + state.limits.seconds
    # The form is read here and not by FastAPI, which would take all of it in before the token.
    taken = receive(request, state.limits, state.service.models()[0])
    work, name = await _before(deadline, taken)
    listens = EVENTS in request.headers.get("Accept", "")
    events = _in_time(state.service.upscale(replace(work, progress=listens)), deadline)
    if listens:
        # What is wrong with a request is known by its first event: that has a status still.
        return _Stream(await _unless_gone(request, anext(events)), events, name)
    return _response(await _unless_gone(request, _result(events)), name)


@router.get("/v1/models")
async def models(state: State) -> Served:
    """Models, limits, and whether a token is wanted."""
    token = state.token is not None
    return Served(models=state.service.models(), limits=state.limits, token=token)


@router.get("/healthz", responses=NOT_READY)
async def healthz(state: State) -> dict[str, str]:
    """Whether every expert has loaded and answers."""
    await state.service.ready()
    return {"status": "ready"}


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(PAGE / "index.html", headers=HEADERS)


async def _before(deadline: float, work: Awaitable[Value]) -> Value:
    """What `work` gives. Raises TookTooLong."""
    with anyio.CancelScope(deadline=deadline):
        return await work
    raise TookTooLong("it took too long; send a smaller picture or ask for fewer steps")


async def _in_time(events: Events, deadline: float) -> Events:
    """The events up to the result. Raises TookTooLong.

    The work has ended when the result is given: who takes it slowly holds no place.
    """
    async with aclosing(events):
        while not isinstance(event := await _before(deadline, anext(events)), Result):
            yield event
    yield event


async def _unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """What `work` gives; it is given up when the client goes. Raises ClientDisconnect."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watching.done():
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


async def _result(events: Events) -> Result:
    *_, last = [event async for event in events]
    assert isinstance(last, Result)
    return last


class _Stream(EventSourceResponse):
    """Server-sent events; an error is the last one. The work ends with the connection."""

    def __init__(self, first: Progress | Result, rest: Events, name: str) -> None:
        super().__init__(_told(first, rest, name))
        self.rest = rest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self.rest):
            await super().__call__(scope, receive, send)


async def _told(first: Progress | Result, rest: Events, name: str) -> AsyncIterator[dict[str, str]]:
    yield _event(first, name)
    try:
        async for event in rest:
            yield _event(event, name)
    except Exception as error:
        yield {"event": "error", "data": problem(error).text()}


def _event(event: Progress | Result, name: str) -> dict[str, str]:
    if isinstance(event, Progress):
        told = {**vars(event), "percent": event.percent}
        return {"event": "progress", "data": json.dumps(told)}
    result = {
        **vars(event),
        "image": base64.b64encode(event.image).decode(),
        "media_type": f"image/{event.format}",
        "filename": _file_name(name, event),
    }
    return {"event": "result", "data": json.dumps(result)}


def _file_name(uploaded: str, result: Result) -> str:
    stem = PurePosixPath(uploaded.replace("\\", "/")).stem
    # Neither control characters, nor halves of characters, nor those that turn the writing around.
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
    return Response(result.image, media_type=f"image/{result.format}", headers=headers)
