"""Every error as `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from linearsr.errors import InputError, LinearSRError, NoPicture, OptionError, TooLarge
from linearsr.upscaler import OutOfMemory
from linearsr.web.service import Full, NotReady

MEDIA_TYPE = "application/problem+json"
# The first kind that fits; what is not ours is the server's fault.
STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NoPicture, 415),
    (TooLarge, 413),
    (InputError, 400),
    (OptionError, 422),
    (Full, 429),
    (NotReady, 503),
    (OutOfMemory, 503),
    (TimeoutError, 504),
)


class Problem(BaseModel):
    """An error for machines (type, status) and people (title, detail)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def problem(error: Exception) -> Problem:
    """What is told of an error; nothing of the inside of one that is not ours."""
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    known = isinstance(error, LinearSRError) or status != 500
    return _problem(status, str(error) if known else "the server failed; its log says more")


def _problem(status: int, detail: str) -> Problem:
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)


def _response(told: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(told.model_dump(), told.status, headers, MEDIA_TYPE)


def handle_problems(app: FastAPI) -> None:
    """Answer every error of `app` with a problem."""

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers) if error.headers else None
        return _response(_problem(error.status_code, str(error.detail)), headers)

    @app.exception_handler(RequestValidationError)
    async def of_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        told = (f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors())
        return _response(_problem(422, "; ".join(told)))

    @app.exception_handler(LinearSRError)
    @app.exception_handler(TimeoutError)
    @app.exception_handler(Exception)
    async def of_work(_: Request, error: Exception) -> JSONResponse:
        told = problem(error)
        if told.status == 500:
            logging.getLogger(__name__).error("request failed", exc_info=error)
        headers = {"Retry-After": str(error.seconds)} if isinstance(error, Full) else None
        return _response(told, headers)
