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
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from linearsr import __version__
from linearsr.config import FileOptions, Options
from linearsr.errors import OptionError, TooLarge
from linearsr.imaging.files import WRITE_SUFFIXES
from linearsr.web.problems import MEDIA_TYPE, Problem, handle_problems, problem
from linearsr.web.service import Events, Limits, ModelInfo, Progress, Result, Service
from linearsr.web.service import Request as Work

PAGE = Path(__file__).parent / "page"
EVENTS = "text/event-stream"
# Form fields and boundaries beside the picture.
ROOM_FOR_FIELDS = 65_536
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
SUFFIXES = {format: suffix for suffix, format in reversed(WRITE_SUFFIXES.items())}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": told}
    for status, told in {
        400: "the upload cannot be decoded",
        401: "the bearer token is missing or wrong",
        413: "too many bytes or pixels",
        415: "not a picture",
        422: "a field is out of its range",
        429: "no room now; see Retry-After",
        503: "not ready",
        504: "it took too long",
    }.items()
}


class Upload(BaseModel):
    """The form: a picture and the options of the command line."""

    model_config = ConfigDict(extra="forbid")

    image: UploadFile = Field(description="PNG, JPEG, WebP, TIFF, AVIF or GIF")
    scale: int = Field(default=4, ge=2, le=4)
    width: int | None = Field(default=None, ge=1, le=65535, description="instead of scale")
    height: int | None = Field(default=None, ge=1, le=65535, description="instead of scale")
    steps: int | None = Field(default=None, ge=1, le=50, description="1 is closest to the truth")
    seed: int = Field(default=0, ge=0, lt=2**63)
    tags: str = Field(default="", max_length=1000, description='"cat, grass", or auto')
    tile: str = Field(default="auto", description="auto, off, or input pixels", max_length=10)
    colour_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    format: Literal["png", "jpg", "webp", "tif"] | None = Field(
        default=None, description="that of the upload where it can be written"
    )
    quality: int = Field(default=95, ge=1, le=100, description="of JPEG and WebP")

    def work(self, data: bytes, limits: Limits) -> Work:
        """The request. Raises OptionError."""
        fields = self.model_dump(exclude={"image"})
        if self.tile.isdecimal():
            fields["tile"] = int(self.tile)
        if (self.steps or 1) > limits.steps:
            raise OptionError(f"steps: at most {limits.steps} here (got {self.steps})")
        files = {name: fields.pop(name) for name in ("format", "quality")}
        return Work(
            data,
            Options.parse(**fields),
            FileOptions.parse(**files, max_pixels=limits.pixels),
        )


class Served(BaseModel):
    """What is served."""

    models: list[ModelInfo]
    limits: Limits
    token: bool = Field(description="whether a bearer token is wanted")


class _LimitBody:
    """ASGI middleware: no more bytes are taken in than an upload may have, whatever it claims."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Any) -> None:
        taken = 0

        async def limited() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise HTTPException(413, f"the upload is larger than {self.most} bytes")
            return message

        await self.app(scope, limited, send)


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


def create_app(service: Service, limits: Limits, token: str | None = None) -> FastAPI:
    """The application. With `token`, uploads ask for it as bearer."""
    app = FastAPI(title="LinearSR", version=__version__, description=__doc__)
    app.state.linearsr = _State(service, limits, token)
    app.add_middleware(_LimitBody, most=limits.bytes + ROOM_FOR_FIELDS)
    handle_problems(app)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


router = APIRouter()


async def _authorised(request: Request, state: State) -> None:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if state.token and not secrets.compare_digest(given.encode(), state.token.encode()):
        challenge = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "a bearer token is needed", headers=challenge)


async def _claim(request: Request, state: State) -> None:
    """Refuse by what the upload says of itself, before it is read."""
    claimed = request.headers.get("Content-Length", "0")
    if claimed.isdecimal() and int(claimed) > state.limits.bytes + ROOM_FOR_FIELDS:
        raise TooLarge(f"the upload has {claimed} bytes; the limit is {state.limits.bytes}")


@router.post(
    "/v1/upscale",
    dependencies=[Depends(_authorised), Depends(_claim)],
    response_class=Response,
    responses={
        200: {
            "description": "the picture, or with `Accept: text/event-stream` the events "
            "progress, then result or error",
            "content": {"image/*": {}, EVENTS: {}},
        },
        **_PROBLEMS,
    },
)
async def upscale(request: Request, form: Annotated[Upload, Form()], state: State) -> Response:
    """Upscale one picture. The same picture, options and seed give the same pixels."""
    data, limits = await form.image.read(), state.limits
    if len(data) > limits.bytes:
        raise TooLarge(f"the picture has {len(data)} bytes; the limit is {limits.bytes}")
    events = _in_time(state.service.upscale(form.work(data, limits)), limits.seconds)
    name = form.image.filename or "picture"
    if EVENTS in request.headers.get("Accept", ""):
        # What is wrong with a request is known by its first event: that has a status still.
        first = await anext(events)
        return EventSourceResponse(_told(first, events, name))
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                return _response(event, name)
    raise RuntimeError("the service ended without a result")


@router.get("/v1/models")
async def models(state: State) -> Served:
    """Models, limits, and whether a token is wanted."""
    token = state.token is not None
    return Served(models=state.service.models(), limits=state.limits, token=token)


@router.get("/healthz", responses={503: _PROBLEMS[503]})
async def healthz(state: State) -> dict[str, str]:
    """Whether every expert has loaded and answers."""
    await state.service.ready()
    return {"status": "ready"}


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(PAGE / "index.html", headers=HEADERS)


async def _in_time(events: Events, seconds: float) -> Events:
    """The events, until the time is up. Raises TimeoutError."""
    end = time.monotonic() + seconds
    async with aclosing(events):
        while True:
            try:
                yield await asyncio.wait_for(anext(events), end - time.monotonic())
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                raise TimeoutError(f"it took more than {seconds:g} s; use fewer steps") from None


async def _told(first: Progress | Result, rest: Events, name: str) -> AsyncIterator[dict[str, str]]:
    """Server-sent events; an error is the last one."""
    try:
        yield _event(first, name)
        async with aclosing(rest):
            async for event in rest:
                yield _event(event, name)
    except Exception as error:
        yield {"event": "error", "data": problem(error).model_dump_json()}


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
    stem = PurePosixPath(uploaded.replace("\\", "/")).stem or "picture"
    return f"{stem[:100]}-{result.width}x{result.height}{SUFFIXES[result.format]}"


def _response(result: Result, name: str) -> Response:
    timing = ", ".join(f"{part};dur={ms:.1f}" for part, ms in result.timing.items())
    headers = {
        "X-LinearSR-Model": result.model,
        "X-LinearSR-Seed": str(result.seed),
        "X-LinearSR-Steps": str(result.steps),
        "Server-Timing": timing,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(_file_name(name, result))}",
    }
    return Response(result.image, media_type=f"image/{result.format}", headers=headers)
