"""Fixtures of the tests of the HTTP API, for attacks on it."""

from tests.web.conftest import image, png, service, small

__all__ = ["image", "png", "service", "small"]
