"""Turn every error into `application/problem+json` (RFC 9457), or into OpenAI's error object.

OpenAI's object is for the routes below /v1/images/, whose clients expect it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from linearsr.errors import InputError, LinearSRError, NoPicture, OptionError, TooLarge, one_line
from linearsr.pipeline.memory import OutOfMemory
from linearsr.web.service import (
    Full,
    NotFinished,
    NotReady,
    TookTooLong,
    UnknownJob,
    UnknownModel,
)

MEDIA_TYPE = "application/problem+json"
# The first kind that fits counts; an error of no kind is the server's fault.
STATUS: tuple[tuple[type[LinearSRError], HTTPStatus], ...] = (
    (NoPicture, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    (TooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (InputError, HTTPStatus.BAD_REQUEST),
    (UnknownModel, HTTPStatus.NOT_FOUND),
    (UnknownJob, HTTPStatus.NOT_FOUND),
    (NotFinished, HTTPStatus.CONFLICT),
    (OptionError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (Full, HTTPStatus.TOO_MANY_REQUESTS),
    (NotReady, HTTPStatus.SERVICE_UNAVAILABLE),
    (OutOfMemory, HTTPStatus.SERVICE_UNAVAILABLE),
    (TookTooLong, HTTPStatus.GATEWAY_TIMEOUT),
)
# Other servers log this status too for a client that has disconnected; nobody receives it.
CLIENT_CLOSED_REQUEST = 499
# The routes whose errors are OpenAI's object.
OPENAI_PATHS = "/v1/images/"


class Problem(BaseModel):
    """An error, for programs (type, status) and for people (title, detail)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str

    def text(self) -> str:
        """Return JSON in ASCII, which can be sent whatever characters the detail quotes."""
        return json.dumps(self.model_dump())


def problem(error: Exception) -> Problem:
    """Return the problem that a client sees: no internals of an error that it cannot fix."""
    for kind, status in STATUS:
        if isinstance(error, kind):
            return _problem(status, one_line(error))
    logging.getLogger(__name__).error("request failed", exc_info=error)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return _problem(status, "the server failed; see its log")


def _problem(status: int, detail: str) -> Problem:
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)


class OpenAIError(BaseModel):
    """An error as OpenAI's API sends it."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = None
    """The field that is wrong."""
    code: str | None = None


class OpenAIProblem(BaseModel):
    """The body of an error of the routes below /v1/images/."""

    error: OpenAIError


CODES = {
    HTTPStatus.UNAUTHORIZED: "invalid_api_key",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_exceeded",
}


def _openai(problem: Problem) -> OpenAIProblem:
    status, field = HTTPStatus(problem.status), re.match(r"(\w+): ", problem.detail)
    param = field[1] if field and status < HTTPStatus.INTERNAL_SERVER_ERROR else None
    code = "model_not_found" if (status, param) == (404, "model") else CODES.get(status)
    kind: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    error = OpenAIError(message=problem.detail, type=kind, param=param, code=code)
    return OpenAIProblem(error=error)


def error_response(
    path: str, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the response to a request for `path` that is refused with this status."""
    return _response(path, _problem(status, detail), headers)


def _response(path: str, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    if not path.startswith(OPENAI_PATHS):
        return problem_response(problem, headers)
    status = problem.status
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:  # OpenAI's status for a wrong field
        status = HTTPStatus.BAD_REQUEST
    text = json.dumps(_openai(problem).model_dump())
    return Response(text, status, headers, "application/json")


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response to a request that failed."""
    return Response(problem.text(), problem.status, headers, MEDIA_TYPE)


def handle_problems(app: FastAPI) -> None:
    """Make `app` answer every error with a problem, or with OpenAI's object."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(request.url.path, error.status_code, error.detail, error.headers)

    @app.exception_handler(LinearSRError)
    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> Response:
        headers = None
        if isinstance(error, (Full, NotFinished)):
            headers = {"Retry-After": str(error.seconds)}
        return _response(request.url.path, problem(error), headers)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
