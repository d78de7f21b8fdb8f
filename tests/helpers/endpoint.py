"""Clients of an endpoint: requests, and the pixels that each of them must get."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from linearsr.config import Options
from linearsr.distributed.serve import ServeConfig
from linearsr.imaging.files import encode
from linearsr.imaging.files import read as read_picture
from linearsr.pipeline.upscaler import Upscaler

AT_ONCE = 16
# While replicas start: more requests would leave a machine of two cores no time for the starts.
AT_ONCE_IN_STARTS = 4
SIZES = ((32, 24), (24, 40), (40, 40))
# The bound on a line of a stream; lines with a picture are the longest.
LINE = 2**22


class Endpoint(NamedTuple):
    """The address of an endpoint, and its config."""

    url: str
    config: ServeConfig


class Case(NamedTuple):
    """A request, and the pixels of its result."""

    picture: bytes
    options: dict[str, float | str]
    pixels: NDArray[np.int16]


def answered_by(model: Path) -> list[Case]:
    """Return twelve cases of three sizes and various options, upscaled in this process."""
    upscaler = Upscaler.load(model, "cpu")
    cases = []
    for number in range(12):
        picture = photograph(number, *SIZES[number % len(SIZES)])
        solver = ("euler", "dpm", "adams")[number // 4]
        options = {"seed": number, "steps": 4 + number % 2, "solver": solver}
        options |= {"scale": (4, 1.5)[number % 2], "detail": (1, 0.5)[number // 2 % 2]}
        result = upscaler.upscale(read_picture(picture), Options.parse(**options))
        cases.append(Case(picture, options, pixels_of(encode(result, "png"))))
    return cases


def photograph(number: int, width: int, height: int) -> bytes:
    """Return a detail of a photograph, as PNG."""
    photo = Image.fromarray(np.asarray(skimage.data.astronaut()))
    left, top = 200 + 10 * number, 40 + 5 * number
    file = io.BytesIO()
    photo.crop((left, top, left + width, top + height)).save(file, "PNG")
    return file.getvalue()


def pixels_of(image: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(image))).astype(np.int16)


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


async def ask(session: aiohttp.ClientSession, endpoint: Endpoint, case: Case) -> Answer:
    form = form_of(case.picture, **case.options)
    async with session.post(f"{endpoint.url}/v1/upscale", data=form) as response:
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, await response.read(), headers)


def form_of(picture: bytes, **options: float | str) -> aiohttp.FormData:
    form = aiohttp.FormData({name: str(value) for name, value in options.items()})
    form.add_field("image", picture, filename="photo.png")
    return form


def image_of(event: bytes) -> bytes:
    """Return the picture in the line of a result."""
    return base64.b64decode(json.loads(event.removeprefix(b"data: "))["image"])


def in_session(work: Callable[[aiohttp.ClientSession], Awaitable[list[Answer]]]) -> list[Answer]:
    async def run() -> list[Answer]:
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, read_bufsize=LINE
        ) as session:
            return await work(session)

    return asyncio.run(run())


async def crowd(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    cases: list[Case],
    count: int,
    at_once: int = AT_ONCE,
) -> list[Answer]:
    """Send `count` requests, `at_once` of them at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> Answer:
        async with places:
            return await ask(session, endpoint, cases[number % len(cases)])

    return list(await asyncio.gather(*map(one, range(count))))


def check(answers: list[Answer], cases: list[Case]) -> None:
    """Assert that each answer has its own picture. In a batch, the order of additions varies."""
    for number, answer in enumerate(answers):
        assert answer.status == 200, answer.body
        difference = pixels_of(answer.body) - cases[number % len(cases)].pixels
        assert np.abs(difference).max() <= 1
