"""Turn an HTTP form into a request, and refuse early whatever cannot be done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from typing_extensions import NamedTuple, Self

from linearsr.config import FileOptions, Format, ModelConfig, Options, Solver
from linearsr.errors import OptionError, OutputError, TooLarge
from linearsr.imaging.files import check_fits, measure, result_format
from linearsr.pipeline.sizes import output_size
from linearsr.web.service import Limits, UpscaleRequest
from linearsr.web.words import plain_words

# Bytes for fields and boundaries, in addition to the picture.
FORM_OVERHEAD = 65_536
MAX_FIELD_BYTES = 8_192
# The scales that messages advise.
SCALES = (4.0, 3.0, 2.0, 1.5, 1.0)
# Forms have no null: a field without a value is left out.
Absent: TypeAlias = SkipJsonSchema[None]
MAX_SIDE = 65535
Side: TypeAlias = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=50)]


def _check_is_file(value: object) -> object:
    if isinstance(value, str):
        raise PydanticCustomError("file", "send the picture as a file, with a file name")
    return value


class Fields(BaseModel):
    """The options of a form or a query that do not depend on a picture."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    scale: float = Field(default=4, ge=1, le=4)
    """How many times larger the result is; 1 repairs without enlarging."""
    steps: Steps | Absent = None
    """Number of steps: 1 is closest to the truth, more are sharper but invent texture."""
    detail: float = Field(default=1, ge=0, le=1)
    """How much of the detail added after the first step is kept; 0 equals steps=1."""
    solver: Solver | Absent = None
    """Solver of the steps; dpm and adams are more accurate than euler with as many."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the noise; the same seed gives the same pixels."""
    tags: str = Field(default="", max_length=1000)
    """Objects in the picture, such as "cat, grass"; "auto" detects them."""
    tile: Literal["auto", "off"] | Annotated[int, Field(ge=16, le=65535)] = "auto"
    """Side of a tile in input pixels; auto chooses one, off uses no tiles."""
    colour_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    """How the result gets the colours of the picture."""
    format: Format | Absent = None
    """File format of the result; by default that of the upload, or PNG for formats that cannot be
    written."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of JPEG and WebP."""

    @classmethod
    def parse(cls, values: Iterable[tuple[str, Any]]) -> Self:
        """Return the fields of a form or a query; empty ones count as absent.

        Raises OptionError, which names every wrong field.
        """
        values = list(values)
        names = [name for name, _ in values]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise OptionError(f"{repeated[0]}: sent more than once; send it once")
        try:
            return cls.model_validate({name: value for name, value in values if value != ""})
        except ValidationError as error:
            wrong = plain_words(error, cls.model_fields)
            raise OptionError("; ".join(f"{name}: {words}" for name, words in wrong)) from None

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of Options and FileOptions. Raises OptionError."""
        if self.tags and model.tags is None:
            raise OptionError(f"tags: {model.name} was trained without tags; leave them out")
        return self.model_dump(include={*Options.model_fields, *FileOptions.model_fields})

    def parsed(self, model: ModelConfig, max_pixels: int) -> tuple[Options, FileOptions]:
        """Return how the picture is upscaled, and how files are read and written.

        Raises OptionError for what the model cannot do.
        """
        fields = self.fields(model)
        files = {name: fields.pop(name) for name in ("format", "quality")}
        return Options.parse(**fields), FileOptions.parse(**files, max_pixels=max_pixels)


class Upload(Fields):
    """The form: a picture, and the same options as on the command line."""

    image: Annotated[UploadFile, BeforeValidator(_check_is_file)] = Field(
        json_schema_extra={"minLength": 1}
    )
    """The picture: PNG, JPEG, WebP, TIFF, AVIF, GIF, BMP or JPEG 2000."""
    width: Side | Absent = None
    """Width of the result in pixels, instead of a scale; unless the height is given too, it follows
    from the aspect ratio."""
    height: Side | Absent = None
    """Height of the result in pixels, instead of a scale; unless the width is given too, it follows
    from the aspect ratio."""


Form = TypeVar("Form", bound=Upload)


class Received(NamedTuple, Generic[Form]):
    """A checked upload: its form, its request, and the picture's file name."""

    form: Form
    request: UpscaleRequest
    name: str


async def receive(
    request: Request, limits: Limits, model: ModelConfig, kind: type[Form]
) -> Received[Form]:
    """Receive an upload with the fields of `kind` and check it.

    Raises InputError, OptionError, HTTPException, or ClientDisconnect.
    """
    form = await _form(request, limits.bytes, kind)
    try:
        upload = kind.parse(form.multi_items())
        check_bytes(upload.image.size or 0, limits)
        data = await upload.image.read()
    finally:
        await form.close()
    checked = UpscaleRequest(data, *upload.parsed(model, limits.pixels))
    pages = await run_in_threadpool(_check, checked, limits, model)
    return Received(upload, replace(checked, pages=tuple(pages)), upload.image.filename or "")


async def _form(request: Request, max_bytes: int, kind: type[Upload]) -> FormData:
    """Read the form, but never more bytes than the limit, whatever its Content-Length says.

    A body of another type, or one that claims to be too long, is refused before it is read.
    """
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise HTTPException(415, "send the picture and its options as multipart/form-data")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise HTTPException(415, "send the form as it is, without a Content-Encoding")
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and float(length) > max_bytes + FORM_OVERHEAD:
        raise TooLarge(f"the upload has {length} bytes, more than the limit of {max_bytes}")
    limited = Request(request.scope, _limited(request.receive, max_bytes))
    form = _Form(
        request.headers,
        limited.stream(),
        max_files=1,
        max_fields=len(kind.model_fields),
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        return await form.parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from error
    except ValueError as error:
        # The form names a character set and then does not use it.
        raise HTTPException(400, "the form cannot be decoded; send it as UTF-8") from error


class _Form(MultiPartParser):
    """Refuses a form without its last boundary; Starlette would drop the field before it."""

    ended = False

    def on_end(self) -> None:
        """Note that the last boundary has come."""
        self.ended = True

    async def parse(self) -> FormData:
        """Return the form. Raises MultiPartException."""
        form = await super().parse()
        if not self.ended:
            await form.close()
            raise MultiPartException("the form ends before its last boundary; send all of it")
        return form


def _limited(receive: Callable[[], Awaitable[Any]], max_bytes: int) -> Callable[[], Awaitable[Any]]:
    """Return an ASGI `receive` that raises TooLarge once the upload exceeds the limit."""
    left = max_bytes + FORM_OVERHEAD

    async def limited() -> Any:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise TooLarge(f"the upload is larger than the limit of {max_bytes} bytes")
        return message

    return limited


def _check(
    request: UpscaleRequest, limits: Limits, model: ModelConfig
) -> Sequence[tuple[int, int]]:
    """Refuse what the limits or the model do not allow; of the picture, only its header is read.

    Returns width and height of the pages that the result holds.
    """
    check_steps(request.options, limits, model)
    format, pages = measure(request.data)
    target = result_format(format, request.files.format)
    pages = pages if target == "tiff" else pages[:1]
    check_pages(pages, request.options, limits)
    check_format(pages[0], request.options, target)
    return pages


def check_bytes(size: int, limits: Limits) -> None:
    """Raise TooLarge if an upload of `size` bytes is over the limit."""
    if size > limits.bytes:
        raise TooLarge(f"the picture has {size} bytes, more than the limit of {limits.bytes}")


def check_steps(options: Options, limits: Limits, model: ModelConfig) -> None:
    """Raise OptionError for more steps than the limits allow."""
    steps = options.steps or model.sampling.steps
    if steps > limits.steps:
        raise OptionError(f"steps: {steps} is more than the limit of {limits.steps}")


def check_pages(pages: Sequence[tuple[int, int]], options: Options, limits: Limits) -> None:
    """Raise TooLarge or OptionError if the limits do not allow pages of these widths and heights.

    The message says what the limits would allow.
    """
    _check_pixels("the picture", pages, limits.pixels, "crop it or make it smaller")
    tile = _tile(options, max(pages[0]))
    if tile > limits.tile:
        raise OptionError(f"tile: {tile} is more than the limit of {limits.tile}; use auto")
    results = _results(pages, options)
    fitting = (
        s for s in SCALES if _total(_results(pages, _scaled(options, s))) <= limits.output_pixels
    )
    scale = next(fitting, None)
    advice = f"use scale {scale:g}" if scale else "crop the picture or make it smaller"
    _check_pixels("the result", results, limits.output_pixels, advice)


def check_format(page: tuple[int, int], options: Options, format: str) -> None:
    """Raise OptionError if a format cannot hold the result of a page of this width and height."""
    try:
        check_fits(*_results([page], options)[0], format)
    except OutputError as error:
        raise OptionError(f"format: {error}") from None


def _scaled(options: Options, scale: float) -> Options:
    return options.model_copy(update={"scale": scale, "width": None, "height": None})


def _results(pages: Sequence[tuple[int, int]], options: Options) -> list[tuple[int, int]]:
    """Return the width and the height of the result of each page."""
    return [output_size(height, width, options)[::-1] for width, height in pages]


def _total(pages: Sequence[tuple[int, int]]) -> int:
    return sum(width * height for width, height in pages)


def _tile(options: Options, longest: int) -> int:
    """Return the side of the requested tiles, or 0 if the model may choose it."""
    if options.tile == "auto":
        return 0
    return longest if options.tile == "off" else min(longest, options.tile)


def _check_pixels(
    name: str, pages: Sequence[tuple[int, int]], max_pixels: int, advice: str
) -> None:
    """Raise TooLarge if pages of these widths and heights have too many pixels in all."""
    total = _total(pages)
    if total > max_pixels:
        has = "{}x{} pixels".format(*pages[0])
        if len(pages) > 1:
            has = f"{total} pixels on {len(pages)} pages"
        raise TooLarge(f"{name} has {has}, more than the limit of {max_pixels}; {advice}")
