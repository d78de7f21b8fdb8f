"""The headers of every answer for browsers, and a form that is compressed."""

from __future__ import annotations

import gzip

import pytest
from starlette.testclient import TestClient

from linearsr.web.api import create_app
from linearsr.web.service import Limits
from tests.helpers.forms import END, FORM, detail, part
from tests.helpers.local_service import Local


@pytest.fixture
def client(service: Local) -> TestClient:
    return TestClient(create_app(service, Limits()))


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/page/script.js", "/v1/models", "/healthz", "/openapi.json", "/none"]
)
def test_every_answer_forbids_guessing_types_and_foreign_scripts(
    client: TestClient, path: str
) -> None:
    headers = client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert ("unsafe-inline" in headers["Content-Security-Policy"]) == (path == "/docs")


def test_documentation_below_a_prefix_may_run_its_script(service: Local) -> None:
    client = TestClient(create_app(service, Limits()), root_path="/upscaler")
    policy = client.get("/docs").headers["Content-Security-Policy"]
    assert "script-src 'self' 'unsafe-inline'" in policy


def test_compressed_form_is_refused(client: TestClient, png: bytes) -> None:
    body = gzip.compress(part("image", png, "x.png") + END)
    headers = {**FORM, "Content-Encoding": "gzip"}
    answer = client.post("/v1/upscale", content=body, headers=headers)
    assert "without a Content-Encoding" in detail(answer, 415)
