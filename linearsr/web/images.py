"""Routes that clients of OpenAI's API know: pictures in OpenAI's image object.

POST /v1/images/upscale, /v1/images/upscales   the form of /v1/upscale, and OpenAI's fields
POST /v1/images/edits                          the same for `client.images.edit(...)`
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from typing_extensions import Self

from linearsr.config import Format, ModelConfig
from linearsr.errors import OptionError
from linearsr.web.responses import picture_response, result_headers
from linearsr.web.running import accept, result_of, while_connected
from linearsr.web.service import Result, UnknownModel
from linearsr.web.upload import MAX_SIDE, Absent, Upload

Quality = Annotated[int, Field(ge=1, le=100)]


class ImageUpload(Upload):
    """The form of /v1/upscale, and the fields of OpenAI's API that have a meaning here."""

    model: str | Absent = None
    """Name of the model; see /v1/models."""
    n: int = Field(default=1, ge=1, le=1)
    """Number of pictures, which is 1."""
    response_format: Literal["b64_json", "bytes"] = "b64_json"
    """b64_json for OpenAI's image object, bytes for the picture itself."""
    output_format: Format | Absent = None
    """OpenAI's name of `format`."""
    output_compression: Quality | Absent = None
    """OpenAI's name of `quality`."""
    quality: Quality | Literal["auto", "standard", "hd", "low", "medium", "high"] = 95  # type: ignore[assignment]
    """Quality of JPEG and WebP; OpenAI's words change nothing."""
    user: str = Field(default="", max_length=1000)
    """A name of the user, which is ignored."""

    @classmethod
    def parse(cls, values: Iterable[tuple[str, Any]]) -> Self:
        """Return the fields of a form. OpenAI's client sends a list of pictures as "image[]"."""
        return super().parse(("image" if k == "image[]" else k, v) for k, v in values)

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of /v1/upscale. Raises UnknownModel."""
        if self.model not in (None, model.name):
            raise UnknownModel(f"model: {self.model} is not served here; use {model.name}")
        fields = super().fields(model)
        if not isinstance(self.quality, int):
            fields["quality"] = 95
        if self.output_format:
            fields["format"] = self.output_format
        if self.output_compression:
            fields["quality"] = self.output_compression
        return fields


class ImageEdit(ImageUpload):
    """The form of OpenAI's image edits, which upscales here."""

    prompt: str = Field(default="", max_length=1000)
    """Objects in the picture, such as "cat, grass", for a model that takes tags; ignored by others.
    """
    size: str = Field(default="auto", pattern="^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")
    """Size of the result as WIDTHxHEIGHT in pixels; auto follows `scale`."""

    def fields(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of /v1/upscale. Raises UnknownModel."""
        fields = super().fields(model)
        if self.prompt and not self.tags and model.tags is not None:
            fields["tags"] = self.prompt
        if self.size != "auto":
            fields["width"], fields["height"] = map(int, self.size.split("x"))
            if max(fields["width"], fields["height"]) > MAX_SIDE:
                raise OptionError(f"size: must be at most {MAX_SIDE} in each direction")
        return fields


class Image(BaseModel):
    """A picture in OpenAI's image object."""

    b64_json: str


class Images(BaseModel):
    """OpenAI's image object."""

    created: int
    data: list[Image]
    output_format: str
    size: str

    @classmethod
    def of(cls, result: Result) -> Self:
        """Return the object of one result."""
        return cls(
            created=int(time.time()),
            data=[Image(b64_json=base64.b64encode(result.image).decode())],
            output_format=result.format,
            size=f"{result.width}x{result.height}",
        )


async def upscale_image(request: Request, kind: type[ImageUpload]) -> Response:
    """Upscale the picture of a form; return OpenAI's image object or the picture."""
    received, events = await accept(request, kind)
    result = await while_connected(request, result_of(events))
    if received.form.response_format == "bytes":
        return picture_response(result, received.name)
    return JSONResponse(Images.of(result).model_dump(), headers=result_headers(result))
