"""Pages of other sites, and foreign names for loopback."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from linearsr.distributed.serve.config import ServeConfig
from linearsr.web.api import create_app, digest
from linearsr.web.service import Limits
from tests.helpers.forms import detail
from tests.helpers.local_service import Local

EVIL, FRIEND, OWN = "http://evil.example", "https://friend.example", "http://testserver"


def answer_to(service: Local, png: bytes, headers: dict[str, str], **settings: object) -> int:
    client = TestClient(create_app(service, Limits(), **settings))  # type: ignore[arg-type]
    files, data = {"image": ("x.png", png)}, {"steps": "1"}
    answer = client.post("/v1/upscale", files=files, data=data, headers=headers)
    if answer.status_code == 403:
        assert "another site" in detail(answer, 403)
    return answer.status_code


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": OWN, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}, 200),
        ({"Origin": EVIL}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://testserver:81"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_page_of_another_site_is_refused_unless_it_is_listed(
    service: Local, png: bytes, headers: dict[str, str], status: int
) -> None:
    assert answer_to(service, png, headers, cors_origins=[FRIEND]) == status


def test_page_of_another_site_that_knows_the_token_is_let_in(service: Local, png: bytes) -> None:
    headers = {"Origin": EVIL, "Authorization": "Bearer sesame"}
    assert answer_to(service, png, headers, token=digest("sesame")) == 200
    assert answer_to(service, png, {"Origin": EVIL}, token=digest("sesame")) == 401
    assert answer_to(service, png, {"Origin": EVIL}, cors_origins=["*"]) == 200


def test_reading_is_free_for_pages_of_other_sites(service: Local) -> None:
    client = TestClient(create_app(service, Limits()))
    assert client.get("/v1/models", headers={"Origin": EVIL}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 400),
        ("localhost.evil.example", 400),
        ("", 400),
    ],
)
def test_other_names_than_the_endpoints_own_are_refused(
    service: Local, host: str, status: int
) -> None:
    names = ("127.0.0.1", "localhost", "::1")
    client = TestClient(create_app(service, Limits(), allowed_hosts=names))
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == status
    if status == 400:
        assert "none of 127.0.0.1, localhost, ::1" in detail(answer, 400)


def test_allowed_hosts_are_compared_in_lower_case_and_have_no_port() -> None:
    config = ServeConfig(allowed_hosts=("Example.ORG", "[::1]"))
    assert config.allowed_hosts == ("example.org", "::1")
    for wrong in ("example.org:8000", "https://example.org", "[::1]:80", "a b"):
        with pytest.raises(ValueError, match="leave out the scheme and the port"):
            ServeConfig(allowed_hosts=(wrong,))
