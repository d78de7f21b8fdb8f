"""The routes of OpenAI's API, called by OpenAI's own client."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai import HttpxBinaryResponseContent, OpenAI
from PIL import Image
from starlette.testclient import TestClient

from linearsr import Upscaler, weights
from linearsr.config import FileOptions, ModelConfig, Options
from linearsr.pipeline.codec import upscale_encoded
from linearsr.web.api import create_app
from linearsr.web.service import Limits
from tests.helpers.experts import random_experts
from tests.helpers.forms import detail
from tests.helpers.local_service import Local, served


@pytest.fixture(scope="module")
def url(small: Upscaler) -> Iterator[str]:
    with served(Local(small), token="sesame") as url:
        yield url


@pytest.fixture(scope="module")
def openai_client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)


def picture_of(response: Any) -> bytes:
    (image,) = response.data
    assert response.created > 1_600_000_000
    return base64.b64decode(image.b64_json)


def expected(small: Upscaler, png: bytes, **options: Any) -> bytes:
    return upscale_encoded(small, png, Options.parse(**options), FileOptions()).data


def test_edit_of_the_openai_client_has_the_bytes_of_the_command(
    openai_client: OpenAI, small: Upscaler, png: bytes
) -> None:
    answer = openai_client.images.edit(
        image=("photo.png", png), prompt="a cat", model="small", extra_body={"steps": 1, "seed": 3}
    )
    assert picture_of(answer) == expected(small, png, steps=1, seed=3)
    assert (answer.output_format, answer.size) == ("png", "48x36")


def test_edit_takes_size_format_and_compression(
    openai_client: OpenAI, small: Upscaler, png: bytes
) -> None:
    for size, pixels in (("auto", (48, 36)), ("30x20", (30, 20))):
        answer = openai_client.images.edit(
            image=[("photo.png", png)],
            prompt="",
            size=size,  # type: ignore[arg-type]
            quality="high",
            output_format="jpeg",
            output_compression=60,
            n=1,
            extra_body={"steps": 1},
        )
        picture = Image.open(io.BytesIO(picture_of(answer)))
        assert (picture.format, picture.size) == ("JPEG", pixels)
    options, files = Options(width=30, height=20, steps=1), FileOptions(format="jpg", quality=60)
    assert picture_of(answer) == upscale_encoded(small, png, options, files).data


@pytest.mark.parametrize("route", ["upscale", "upscales"])
def test_upscale_returns_the_image_object_or_the_picture(
    url: str, openai_client: OpenAI, small: Upscaler, png: bytes, route: str
) -> None:
    body = {"model": "small", "scale": "2", "steps": "1"}
    files: Any = {"image": ("photo.png", png)}
    answer = openai_client.post(
        f"/images/{route}",
        cast_to=openai.types.ImagesResponse,
        body=body,
        files=files,
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )
    assert picture_of(answer) == expected(small, png, scale=2, steps=1)
    raw = openai_client.post(
        f"/images/{route}",
        cast_to=HttpxBinaryResponseContent,
        body={**body, "response_format": "bytes"},
        files=files,
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )
    assert raw.content == expected(small, png, scale=2, steps=1)
    assert raw.response.headers["X-LinearSR-Model"] == "small"


def test_models_of_the_openai_client_have_our_capabilities(openai_client: OpenAI) -> None:
    (model,) = openai_client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("small", "model", "linearsr")
    assert model.experts == ["structure", "refinement", "texture", "polish"]  # type: ignore[attr-defined]
    assert openai_client.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("dall-e-2")


def edit(client: OpenAI, png: bytes, **fields: Any) -> Any:
    fields = {"image": ("photo.png", png), "prompt": "", "extra_body": {"steps": 1}, **fields}
    return client.images.edit(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "param", "message"),
    [
        ({"model": "dall-e-2"}, openai.NotFoundError, "model", "model: dall-e-2 is not served"),
        ({"size": "big"}, openai.BadRequestError, "size", "size: must look like"),
        ({"size": "99999x1"}, openai.BadRequestError, "size", "size: must be at most 65535"),
        ({"n": 2}, openai.BadRequestError, "n", "n: must be at most 1"),
        ({"response_format": "url"}, openai.BadRequestError, "response_format", "'b64_json' or"),
        ({"extra_body": {"steps": 99}}, openai.BadRequestError, "steps", "must be at most 50"),
        ({"background": "opaque"}, openai.BadRequestError, "background", "is not known"),
        ({"image": ("x.png", b"no")}, openai.APIStatusError, None, "give PNG, JPEG"),
    ],
)
def test_error_is_openais_object(
    openai_client: OpenAI,
    png: bytes,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str | None,
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        edit(openai_client, png, **fields)
    body: Any = caught.value.body
    assert body.keys() == {"message", "type", "param", "code"}
    assert message in body["message"]
    assert (body["type"], body["param"]) == ("invalid_request_error", param)
    assert body["code"] == ("model_not_found" if param == "model" else None)


def test_wrong_token_is_an_authentication_error(url: str, png: bytes) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        edit(client, png)
    assert caught.value.body["code"] == "invalid_api_key"  # type: ignore[index]


def test_busy_server_is_a_rate_limit_error(small: Upscaler, png: bytes) -> None:
    with served(Local(small, slots=0)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            edit(client, png)
    assert caught.value.response.headers["Retry-After"] == "2"
    assert caught.value.body["type"] == "rate_limit_error"  # type: ignore[index]


def test_errors_elsewhere_are_problems(small: Upscaler, png: bytes) -> None:
    client = TestClient(create_app(Local(small), Limits()), raise_server_exceptions=False)
    form: Any = {"files": {"image": ("x.png", png)}, "data": {"steps": "0"}}
    assert "steps" in detail(client.post("/v1/upscale", **form), 422)
    assert client.post("/v1/images/edits", **form).json().keys() == {"error"}
    assert client.post("/v1/images/nothing").json()["error"]["type"] == "invalid_request_error"


def test_prompt_is_read_as_tags_by_a_model_that_has_them(
    tagged_config: ModelConfig, tmp_path: Any, png: bytes
) -> None:
    experts = [model.state_dict() for model in random_experts(tagged_config, 4)]
    weights.save(tmp_path / "tagged", tagged_config, experts, {}, dtype=torch.float32)
    tagged = Upscaler.load(tmp_path / "tagged", "cpu")
    client = TestClient(create_app(Local(tagged), Limits()))

    def ask(route: str, **data: str) -> bytes:
        form: Any = {"files": {"image": ("x.png", png)}, "data": {"steps": "1", **data}}
        answer = client.post(route, **form)
        assert answer.status_code == 200, answer.text
        if route == "/v1/upscale":
            return bytes(answer.content)
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    with_tags = ask("/v1/upscale", tags="cat, grass")
    assert ask("/v1/images/edits", prompt="cat, grass") == with_tags
    assert ask("/v1/images/edits", prompt="cat", tags="cat, grass") == with_tags
    assert ask("/v1/images/edits", prompt="dog") != with_tags
