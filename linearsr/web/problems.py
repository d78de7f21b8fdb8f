"""Turn every error into `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from linearsr.errors import InputError, LinearSRError, NoPicture, OptionError, TooLarge, one_line
from linearsr.pipeline.memory import OutOfMemory
from linearsr.web.service import Full, NotReady, TookTooLong

MEDIA_TYPE = "application/problem+json"
# The first kind that fits counts; an error of no kind is the server's fault.
STATUS: tuple[tuple[type[LinearSRError], HTTPStatus], ...] = (
    (NoPicture, HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
    (TooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (InputError, HTTPStatus.BAD_REQUEST),
    (OptionError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (Full, HTTPStatus.TOO_MANY_REQUESTS),
    (NotReady, HTTPStatus.SERVICE_UNAVAILABLE),
    (OutOfMemory, HTTPStatus.SERVICE_UNAVAILABLE),
    (TookTooLong, HTTPStatus.GATEWAY_TIMEOUT),
)
# Other servers log this status too for a client that has disconnected; nobody receives it.
CLIENT_CLOSED_REQUEST = 499


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


def _response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(problem.text(), problem.status, headers, MEDIA_TYPE)


def handle_problems(app: FastAPI) -> None:
    """Make `app` answer every error with a problem."""

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return _response(_problem(error.status_code, error.detail), error.headers)

    @app.exception_handler(LinearSRError)
    @app.exception_handler(Exception)
    async def other_error(_: Request, error: Exception) -> Response:
        headers = {"Retry-After": str(error.seconds)} if isinstance(error, Full) else None
        return _response(problem(error), headers)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
