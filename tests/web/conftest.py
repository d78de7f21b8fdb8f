"""Fixtures for tests of the HTTP API: a tiny model, a client, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from linearsr import Upscaler
from linearsr.web.api import create_app
from linearsr.web.service import Limits
from tests.helpers.forms import saved
from tests.helpers.local_service import Local


@pytest.fixture(scope="session")
def small(small_bundle: Path) -> Upscaler:
    return Upscaler.load(small_bundle, "cpu")


@pytest.fixture
def service(small: Upscaler) -> Local:
    return Local(small)


@pytest.fixture
def client(service: Local) -> Iterator[TestClient]:
    """Yield a client without a socket; it returns a 500 like any other response."""
    with TestClient(create_app(service, Limits()), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return Image.effect_mandelbrot((12, 9), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="session")
def png(image: Image.Image) -> bytes:
    return saved(image, "png")
