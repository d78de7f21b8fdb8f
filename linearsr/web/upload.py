"""From an HTTP form to a request; what can be refused before any work is refused here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request

from linearsr.config import FileOptions, Options, Solver
from linearsr.errors import OptionError, OutputError, TooLarge
from linearsr.imaging.files import check_fits, measure, result_format
from linearsr.pipeline.sizes import output_size
from linearsr.web.service import Limits, ModelInfo
from linearsr.web.service import Request as Work

# Form fields and boundaries beside the picture.
ROOM_FOR_FIELDS = 65_536
LONGEST_FIELD = 8_192
# Forms have no null: what is not given is left out.
Absent: TypeAlias = SkipJsonSchema[None]
Side: TypeAlias = Annotated[int, Field(ge=1, le=65535)]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=50)]


def _no_text(value: object) -> object:
    if isinstance(value, str):
        raise PydanticCustomError("file", "Send the picture as a file, with a file name")
    return value


class Upload(BaseModel):
    """The form: a picture and the options of the command line."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[UploadFile, BeforeValidator(_no_text)] = Field(
        description="PNG, JPEG, WebP, TIFF, AVIF or GIF", json_schema_extra={"minLength": 1}
    )
    scale: float = Field(default=4, ge=1, le=4, description="1 repairs without enlarging")
    width: Side | Absent = Field(default=None, description="instead of scale")
    height: Side | Absent = Field(default=None, description="instead of scale")
    steps: Steps | Absent = Field(default=None, description="1 is closest to the truth")
    detail: float = Field(default=1, ge=0, le=1, description="0 is the picture of steps=1")
    solver: Solver | Absent = Field(
        default=None, description="dpm and adams come further in as many steps"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    tags: str = Field(default="", max_length=1000, description='"cat, grass", or auto')
    tile: Literal["auto", "off"] | Annotated[int, Field(ge=16, le=65535)] = Field(
        default="auto", description="auto, off, or input pixels"
    )
    colour_fix: Literal["wavelet", "adain", "none"] = "wavelet"
    format: Literal["png", "jpg", "webp", "tif"] | Absent = Field(
        default=None, description="that of the upload where it can be written"
    )
    quality: int = Field(default=95, ge=1, le=100, description="of JPEG and WebP")

    @classmethod
    def of(cls, form: FormData) -> Upload:
        """A form's fields; those left empty count as not given. Raises OptionError."""
        names = [name for name, _ in form.multi_items()]
        if twice := [name for name in form if names.count(name) > 1]:
            raise OptionError(f"{twice[0]}: given more than once")
        try:
            return cls.model_validate({name: value for name, value in form.items() if value != ""})
        except ValidationError as error:
            # A name that is no Unicode is nowhere.
            # What may be left out "should be None" too, which a form cannot say.
            told = [e for e in error.errors() if e["type"] != "none_required"]
            wrong = (f"{(*e['loc'], 'a field')[0]}: {e['msg']}" for e in told)
            raise OptionError("; ".join(wrong)) from None

    def work(self, data: bytes, max_pixels: int) -> Work:
        """The request. Raises OptionError."""
        fields = self.model_dump(exclude={"image"})
        files = {name: fields.pop(name) for name in ("format", "quality")}
        return Work(
            data, Options.parse(**fields), FileOptions.parse(**files, max_pixels=max_pixels)
        )


async def receive(request: Request, limits: Limits, model: ModelInfo) -> tuple[Work, str]:
    """The request that an upload asks for, checked, and the name of its picture.

    Raises InputError, OptionError, HTTPException, or ClientDisconnect.
    """
    form = await _form(request, limits.bytes)
    try:
        upload = Upload.of(form)
        size = upload.image.size or 0
        if size > limits.bytes:
            raise TooLarge(f"the picture has {size} bytes, more than the {limits.bytes} allowed")
        work = upload.work(await upload.image.read(), limits.pixels)
    finally:
        await form.close()
    await run_in_threadpool(_check, work, limits, model)
    return work, upload.image.filename or ""


async def _form(request: Request, most: int) -> FormData:
    """The form, of which no more is taken in than an upload may have, whatever it says of itself.

    A large claim, or another kind of body, is refused before anything is read.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise HTTPException(415, "send the picture and its options as multipart/form-data")
    claimed = request.headers.get("Content-Length", "")
    if claimed.isdecimal() and float(claimed) > most + ROOM_FOR_FIELDS:
        raise TooLarge(f"the upload has {claimed} bytes, more than the {most} allowed")
    limited = Request(request.scope, _limited(request.receive, most))
    fields = {"max_files": 1, "max_fields": len(Upload.model_fields)}
    try:
        return await limited.form(**fields, max_part_size=LONGEST_FIELD)
    except ValueError as error:
        # Of a character set that is named and then not kept to.
        raise HTTPException(400, "the form cannot be decoded; send it as UTF-8") from error


def _limited(receive: Callable[[], Awaitable[Any]], most: int) -> Callable[[], Awaitable[Any]]:
    """An ASGI `receive` that raises TooLarge when an upload goes on for longer than it may."""
    left = most + ROOM_FOR_FIELDS

    async def limited() -> Any:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise TooLarge(f"the upload has more than the {most} bytes allowed")
        return message

    return limited


def _check(work: Work, limits: Limits, model: ModelInfo) -> None:
    """Refuse what the limits or the model do not allow, by the header of the picture alone."""
    steps = work.options.steps or model.steps
    if steps > limits.steps:
        raise OptionError(f"steps: at most {limits.steps} here, not {steps}")
    if work.options.tags and not model.tags:
        raise OptionError(f"tags: {model.name} was trained without; leave them out")
    format, width, height = measure(work.data)
    _check_pixels("the picture", width, height, limits.pixels)
    tile = _tile(work.options, max(width, height))
    if tile > limits.tile:
        raise OptionError(f"tile: at most {limits.tile} here, not {tile}; auto suits any picture")
    height, width = output_size(height, width, work.options)
    _check_pixels("the result", width, height, limits.output_pixels)
    try:
        check_fits(width, height, result_format(format, work.files.format))
    except OutputError as error:
        raise OptionError(f"format: {error}") from None


def _tile(options: Options, longest: int) -> int:
    """The side of the tiles that are asked for, 0 where the model may choose."""
    if options.tile == "auto":
        return 0
    return longest if options.tile == "off" else min(longest, options.tile)


def _check_pixels(what: str, width: int, height: int, most: int) -> None:
    if width * height > most:
        raise TooLarge(f"{what} has {width}x{height} pixels, more than the {most} allowed")
