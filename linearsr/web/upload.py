"""Turn an HTTP form into a request, and refuse early whatever cannot be done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from linearsr.config import FileOptions, Format, Options, Solver
from linearsr.errors import OptionError, OutputError, TooLarge
from linearsr.imaging.files import check_fits, measure, result_format
from linearsr.pipeline.sizes import output_size
from linearsr.web.service import Limits, ModelInfo, UpscaleRequest

# Bytes for fields and boundaries, in addition to the picture.
FORM_OVERHEAD = 65_536
MAX_FIELD_BYTES = 8_192
# Forms have no null: a field without a value is left out.
Absent: TypeAlias = SkipJsonSchema[None]
Side: TypeAlias = Annotated[int, Field(ge=1, le=65535)]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=50)]


def _check_is_file(value: object) -> object:
    if isinstance(value, str):
        raise PydanticCustomError("file", "send the picture as a file, with a file name")
    return value


class Upload(BaseModel):
    """The form: a picture, and the same options as on the command line."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    image: Annotated[UploadFile, BeforeValidator(_check_is_file)] = Field(
        json_schema_extra={"minLength": 1}
    )
    """The picture: PNG, JPEG, WebP, TIFF, AVIF, GIF or BMP."""
    scale: float = Field(default=4, ge=1, le=4)
    """How many times larger the result is; 1 repairs without enlarging."""
    width: Side | Absent = None
    """Width of the result in pixels, instead of a scale; unless the height is given too, it follows
    from the aspect ratio."""
    height: Side | Absent = None
    """Height of the result in pixels, instead of a scale; unless the width is given too, it follows
    from the aspect ratio."""
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
    def from_form(cls, form: FormData) -> Upload:
        """Return the fields of a form; empty ones count as absent. Raises OptionError."""
        names = [name for name, _ in form.multi_items()]
        if repeated := [name for name in form if names.count(name) > 1]:
            raise OptionError(f"{repeated[0]}: sent more than once; send it once")
        try:
            return cls.model_validate({name: value for name, value in form.items() if value != ""})
        except ValidationError as error:
            # Pydantic adds that an optional field "should be None", which a form cannot express. A
            # field whose name is not Unicode has no location.
            errors = [e for e in error.errors() if e["type"] != "none_required"]
            messages = (f"{(*e['loc'], 'a field')[0]}: {e['msg']}" for e in errors)
            raise OptionError("; ".join(messages)) from None

    def request(self, data: bytes, max_pixels: int) -> UpscaleRequest:
        """Return the request for a picture of these bytes. Raises OptionError."""
        fields = self.model_dump(exclude={"image"})
        files = {name: fields.pop(name) for name in ("format", "quality")}
        return UpscaleRequest(
            data, Options.parse(**fields), FileOptions.parse(**files, max_pixels=max_pixels)
        )


async def receive(request: Request, limits: Limits, model: ModelInfo) -> tuple[UpscaleRequest, str]:
    """Receive an upload and check it; return its request and the picture's file name.

    Raises InputError, OptionError, HTTPException, or ClientDisconnect.
    """
    form = await _form(request, limits.bytes)
    try:
        upload = Upload.from_form(form)
        size = upload.image.size or 0
        if size > limits.bytes:
            raise TooLarge(f"the picture has {size} bytes, more than the limit of {limits.bytes}")
        checked = upload.request(await upload.image.read(), limits.pixels)
    finally:
        await form.close()
    await run_in_threadpool(_check, checked, limits, model)
    return checked, upload.image.filename or ""


async def _form(request: Request, max_bytes: int) -> FormData:
    """Read the form, but never more bytes than the limit, whatever its Content-Length says.

    A body of another type, or one that claims to be too long, is refused before it is read.
    """
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise HTTPException(415, "send the picture and its options as multipart/form-data")
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and float(length) > max_bytes + FORM_OVERHEAD:
        raise TooLarge(f"the upload has {length} bytes, more than the limit of {max_bytes}")
    limited = Request(request.scope, _limited(request.receive, max_bytes))
    form = _Form(
        request.headers,
        limited.stream(),
        max_files=1,
        max_fields=len(Upload.model_fields),
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


def _check(request: UpscaleRequest, limits: Limits, model: ModelInfo) -> None:
    """Refuse what the limits or the model do not allow; of the picture, only its header is read."""
    steps = request.options.steps or model.steps
    if steps > limits.steps:
        raise OptionError(f"steps: {steps} is more than the limit of {limits.steps}")
    if request.options.tags and not model.tags:
        raise OptionError(f"tags: {model.name} was trained without tags; leave them out")
    format, pages = measure(request.data)
    target = result_format(format, request.files.format)
    pages = pages if target == "tiff" else pages[:1]
    _check_pixels("the picture", pages, limits.pixels)
    tile = _tile(request.options, max(pages[0]))
    if tile > limits.tile:
        raise OptionError(f"tile: {tile} is more than the limit of {limits.tile}; use auto")
    results = [output_size(height, width, request.options)[::-1] for width, height in pages]
    _check_pixels("the result", results, limits.output_pixels)
    try:
        check_fits(*results[0], target)
    except OutputError as error:
        raise OptionError(f"format: {error}") from None


def _tile(options: Options, longest: int) -> int:
    """Return the side of the requested tiles, or 0 if the model may choose it."""
    if options.tile == "auto":
        return 0
    return longest if options.tile == "off" else min(longest, options.tile)


def _check_pixels(name: str, pages: Sequence[tuple[int, int]], max_pixels: int) -> None:
    """Raise TooLarge if pages of these widths and heights have too many pixels in all."""
    total = sum(width * height for width, height in pages)
    if total > max_pixels:
        has = "{}x{} pixels".format(*pages[0])
        if len(pages) > 1:
            has = f"{total} pixels on {len(pages)} pages"
        raise TooLarge(f"{name} has {has}, more than the limit of {max_pixels}")
