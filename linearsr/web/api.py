"""The HTTP API: its routes. The form's fields are in upload.py, OpenAI's routes in images.py.

    POST /v1/upscale          returns a picture, or server-sent events: progress, then the picture;
                              with "Prefer: respond-async" a job that goes on by itself
    GET  /v1/jobs/ID          returns the state of a job; /content returns its picture
    DELETE /v1/jobs/ID        cancels a job
    POST /v1/images/upscale   returns OpenAI's image object; so do /upscales and /edits
    GET  /v1/models           returns the model and the limits
    GET  /v1/estimate         returns how long a picture would take
    GET  /healthz             returns 200 when every part is ready
    GET  /                    returns the page; /docs describes the API

The work itself is done by a `linearsr.web.service.Service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from python_multipart.multipart import parse_options_header
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linearsr import __version__
from linearsr.config import ModelConfig
from linearsr.web.estimate import Estimate, Measured, Question, estimate
from linearsr.web.images import ImageEdit, Images, ImageUpload, upscale_image
from linearsr.web.jobs import ASK_AGAIN, JobFailed, Jobs, JobState, new_id
from linearsr.web.problems import (
    MEDIA_TYPE,
    OpenAIProblem,
    Problem,
    handle_problems,
    problem_response,
)
from linearsr.web.responses import (
    EVENTS,
    HEADERS,
    SUFFIXES,
    Stream,
    accepts_events,
    picture_response,
)
from linearsr.web.running import accept, receive_in_time, result_of, while_connected
from linearsr.web.same_site import SameSite
from linearsr.web.service import Limits, ModelInfo, Service, UnknownModel, model_info
from linearsr.web.upload import Upload

PAGE = Path(__file__).parent / "page"
ABOUT = """Super-resolution: send a picture and receive it larger.

Errors are problems (RFC 9457), and below /v1/images/ OpenAI's error object.

With `Accept: text/event-stream`, the response to an upload is a stream: `progress` events (expert,
step, steps, percent) when an expert begins or ends and between its tiles, then `result` (image in
base64, media_type, filename, width, height, model, seed, steps, scale, timing in milliseconds,
notes) or `error` (a problem). Closing the connection cancels the request.

With `Prefer: respond-async` (RFC 7240), the response to an upload is 202 and the address of a job,
which goes on without a connection."""
# Headers of every answer: browsers guess no types, and run no scripts but the endpoint's own.
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# /docs needs the script that FastAPI writes into it.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
READABLE = ("png", "jpeg", "webp", "tiff", "avif", "gif", "bmp", "jp2")
# The headers that pages of other origins may send and read.
REQUEST_HEADERS = ("Authorization", "Content-Type", "Prefer", "X-Request-Id")
RESPONSE_HEADERS = (*HEADERS, "Location", "Preference-Applied", "Retry-After", "X-Request-Id")


def _documented(
    status: int, description: str, *headers: str, schema: str = "Problem"
) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI document's entry for an error with this status."""
    kind = MEDIA_TYPE if schema == "Problem" else "application/json"
    content = {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    required = {name: {"schema": {"type": "string"}, "required": True} for name in headers}
    return {status: {"description": description, "content": content, "headers": required}}


def _refusals(schema: str, field: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the errors with which an upload can be refused.

    schema: the name of the schema of their bodies. field: the status for a wrong field.
    """
    document = partial(_documented, schema=schema)
    return {
        **document(400, "the form or the picture cannot be decoded"),
        **document(413, "too many bytes, or too many pixels in the picture or its result"),
        **document(415, "the body is not a form, or its image not a picture"),
        **document(field, "a field is unknown or out of its range"),
        **document(429, "the server is busy", "Retry-After"),
        **document(503, "the server is not ready, or out of memory"),
        **document(504, "the request took too long"),
    }


NOT_READY = _documented(503, "the server is not ready")
WRONG_FIELD = _documented(422, "a field is unknown or out of its range")
NO_JOB = _documented(404, "there is no such job, or it has expired")
_PICTURE: dict[str, dict[str, Any]] = {f"image/{format}": {} for format in SUFFIXES}
_DESCRIPTION = {
    name: {"schema": {"type": "string"}, "description": f"{text}; absent from a stream"}
    for name, text in HEADERS.items()
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "the picture", "content": _PICTURE, "headers": _DESCRIPTION}
}
PICTURE_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the picture, or a stream of events",
        "content": {**_PICTURE, EVENTS: {}},
        "headers": _DESCRIPTION,
    },
    202: {
        "description": "the job that was begun, if the client prefers not to wait",
        "model": JobState,
        "headers": {
            "Location": {"schema": {"type": "string"}, "description": "address of the job"},
            "Preference-Applied": {"schema": {"type": "string"}, "description": "respond-async"},
        },
    },
}
IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's image object, or the picture",
        "model": Images,
        "content": _PICTURE,
        "headers": _DESCRIPTION,
    },
    **_documented(404, "the model is not served here", schema="OpenAIProblem"),
    **_refusals("OpenAIProblem", 400),
}


def _form(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI document's entry for a form."""
    image = {"contentType": ", ".join(f"image/{kind}" for kind in READABLE)}
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    form = {"schema": schema, "encoding": {"image": image}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form}}}


def _parameters(kind: type[BaseModel]) -> list[dict[str, Any]]:
    """Return the OpenAPI document's entry for the parameters of a query."""
    schema = kind.model_json_schema()
    required = schema["required"]
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


class ListedModel(ModelInfo):
    """A model in OpenAI's list, with its capabilities."""

    id: str
    """Name of the model."""
    object: Literal["model"] = "model"
    created: int
    """When this part of the endpoint started, in seconds since 1970."""
    owned_by: Literal["linearsr"] = "linearsr"


class Served(BaseModel):
    """The models as OpenAI lists them, the limits, and whether uploads need a token."""

    object: Literal["list"] = "list"
    data: list[ListedModel]
    limits: Limits
    token: bool = Field(description="whether uploads need a bearer token")


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def create_app(
    service: Service,
    limits: Limits,
    token: str | None = None,
    *,
    jobs: Jobs | None = None,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    warm_up: bool = False,
) -> FastAPI:
    """Return the application.

    token: digest of the bearer token that uploads need (see `digest`), if they need one. jobs:
    keeps the jobs of clients that do not wait; without it they wait. cors_origins: the other
    origins whose pages may use the API, "*" for all. allowed_hosts: the names of this endpoint in
    the Host header; empty or "*" for any. warm_up: whether to measure the speed at the start, and
    not when a client first asks for an estimate.
    """
    # FastAPIOffline serves the scripts of /docs itself; FastAPI would load them from a CDN.
    app = FastAPIOffline(
        title="LinearSR",
        version=__version__,
        description=ABOUT,
        redoc_url=None,
        lifespan=_warmed_up if warm_up else None,
    )
    app.openapi = partial(_document, app.openapi)  # type: ignore[method-assign]
    state = app.state
    state.service, state.limits, state.token, state.jobs = Measured(service), limits, token, jobs
    state.created = int(time.time())
    handle_problems(app)
    app.add_middleware(_HeadAsGet)
    app.add_middleware(_SafeHeaders)
    app.add_middleware(SameSite, open=token is None, origins=cors_origins, hosts=allowed_hosts)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=REQUEST_HEADERS,
            expose_headers=RESPONSE_HEADERS,
        )
    guarded = [(uploads, "Problem"), (images, "OpenAIProblem")]
    if jobs:
        guarded.append((job_routes, "Problem"))
    for routes, schema in guarded:
        if token:
            refusal = _unauthorised(schema)
            app.include_router(routes, dependencies=[Depends(_check_token)], responses=refusal)
        else:
            app.include_router(routes)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def digest(token: str | None) -> str | None:
    """Return the SHA-256 digest of a token in hexadecimal, or None for no token."""
    return hashlib.sha256(token.encode()).hexdigest() if token else None


def _unauthorised(schema: str) -> dict[int | str, dict[str, Any]]:
    text = "the bearer token is missing or wrong"
    return _documented(401, text, "WWW-Authenticate", schema=schema)


@contextlib.asynccontextmanager
async def _warmed_up(app: FastAPI) -> AsyncIterator[None]:
    warming = asyncio.create_task(app.state.service.warm_up())
    yield
    warming.cancel()


def _document(generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document with the schemas that no handler names."""
    document = generate()
    for model in (Problem, OpenAIProblem, Upload, ImageUpload, ImageEdit):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"].update(schema.pop("$defs", {}))
        document["components"]["schemas"][model.__name__] = schema
    return document


class _SafeHeaders:
    """Adds SAFE_HEADERS to the answers of the application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                if path.rstrip("/") == "/docs":
                    headers["Content-Security-Policy"] = DOCS_POLICY
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_more if scope["type"] == "http" else send)


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
images = APIRouter(prefix="/v1/images")
job_routes = APIRouter(prefix="/v1/jobs")
router = APIRouter()


async def _check_token(bearer: Bearer, request: Request) -> None:
    # Starlette decodes headers as Latin-1.
    token = bearer.credentials.encode("latin-1") if bearer else b""
    if not secrets.compare_digest(hashlib.sha256(token).hexdigest(), request.app.state.token):
        challenge = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "send the right bearer token", headers=challenge)


@uploads.post(
    "/v1/upscale",
    response_class=Response,
    responses={**PICTURE_OR_EVENTS, **_refusals("Problem", 422)},
    openapi_extra=_form(Upload),
)
async def upscale(request: Request) -> Response:
    """Upscale one picture. The same picture, options and seed give the same pixels."""
    if request.app.state.jobs and _prefers_async(request.headers.getlist("Prefer")):
        return await _begin_job(request)
    stream = accepts_events(request.headers.get("Accept", ""))
    received, events = await accept(request, Upload, progress=stream)
    if stream:
        # A failure before the first event still gets its own status.
        return Stream(await while_connected(request, anext(events)), events, received.name)
    return picture_response(await while_connected(request, result_of(events)), received.name)


async def _begin_job(request: Request) -> Response:
    state = request.app.state
    received, _ = await receive_in_time(request, Upload)
    job = await state.jobs.submit(new_id(), received.request, received.name, state.token or "")
    address = request.app.url_path_for("get_job", id=job.id)
    headers = {"Location": str(address), "Preference-Applied": "respond-async"}
    return Response(job.model_dump_json(), 202, headers, "application/json")


def _prefers_async(headers: Sequence[str]) -> bool:
    """Return whether one of these Prefer headers has `respond-async`."""
    preferences = ",".join(headers).split(",")
    names = (parse_options_header(preference)[0].lower() for preference in preferences)
    return b"respond-async" in names


@job_routes.get("/{id}", responses=NO_JOB)
async def get_job(id: str, request: Request, response: Response) -> JobState:
    """Return the state of a job. It has a picture when its status is "succeeded"."""
    state = request.app.state
    job: JobState = await state.jobs.get(id, state.token or "")
    if job.expires is None:
        response.headers["Retry-After"] = str(ASK_AGAIN)
    return job


@job_routes.get(
    "/{id}/content",
    response_class=Response,
    responses={
        **PICTURE,
        **NO_JOB,
        **_documented(409, "the job has not finished", "Retry-After"),
        **_documented(413, "the job failed: too large"),
        **_documented(500, "the job failed"),
        **NOT_READY,
    },
)
async def get_content(id: str, request: Request) -> Response:
    """Return the picture of a job, as /v1/upscale would; a job that failed returns its problem."""
    state = request.app.state
    try:
        result, name = await state.jobs.content(id, state.token or "")
    except JobFailed as error:
        return problem_response(error.problem)
    return picture_response(result, name)


@job_routes.api_route("/{id}", methods=["OPTIONS", "PATCH", "POST", "PUT"], include_in_schema=False)
async def refuse_method(id: str) -> None:  # noqa: ARG001
    """Refuse other methods; by itself, the router would list only those of the first route."""
    raise HTTPException(405, headers={"Allow": "DELETE, GET"})


@job_routes.delete("/{id}", status_code=204, responses=NO_JOB)
async def delete_job(id: str, request: Request) -> None:
    """Cancel a job if it has not finished, and delete its picture and its result."""
    await request.app.state.jobs.delete(id, request.app.state.token or "")


@images.post(
    "/upscale", response_class=Response, responses=IMAGES, openapi_extra=_form(ImageUpload)
)
@images.post(
    "/upscales", response_class=Response, responses=IMAGES, openapi_extra=_form(ImageUpload)
)
async def upscale_images(request: Request) -> Response:
    """Upscale one picture, and return OpenAI's image object."""
    return await upscale_image(request, ImageUpload)


@images.post("/edits", response_class=Response, responses=IMAGES, openapi_extra=_form(ImageEdit))
async def edit_images(request: Request) -> Response:
    """Upscale one picture for a client of OpenAI's image edits."""
    return await upscale_image(request, ImageEdit)


@router.get("/v1/models")
async def models(request: Request) -> Served:
    """Return the models as OpenAI lists them, the limits, and whether uploads need a token."""
    state = request.app.state
    data = [_listed(config, state.created) for config in state.service.models()]
    return Served(data=data, limits=state.limits, token=state.token is not None)


@router.get("/v1/models/{id}", responses=_documented(404, "the model is not served here"))
async def get_model(id: str, request: Request) -> ListedModel:
    """Return one model."""
    state = request.app.state
    for config in state.service.models():
        if config.name == id:
            return _listed(config, state.created)
    raise UnknownModel(f"model: {id} is not served here; see /v1/models")


def _listed(config: ModelConfig, created: int) -> ListedModel:
    return ListedModel(id=config.name, created=created, **model_info(config).model_dump())


@router.get(
    "/v1/estimate",
    responses={**WRONG_FIELD, **NOT_READY},
    openapi_extra={"parameters": _parameters(Question)},
)
async def get_estimate(request: Request) -> Estimate:
    """Return how long a picture would take here, and whether the limits admit it."""
    state = request.app.state
    question = Question.parse(request.query_params.multi_items())
    return await estimate(question, state.service, state.limits)


@router.get("/healthz", responses=NOT_READY)
async def healthz(request: Request) -> dict[str, str]:
    """Return 200 when every expert has loaded and answers."""
    await request.app.state.service.ready()
    return {"status": "ready"}


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page."""
    return FileResponse(PAGE / "index.html")
