"""The server behaves as its OpenAPI document says; Schemathesis sends valid and invalid data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from linearsr import Upscaler, weights
from linearsr.config import ModelConfig
from linearsr.web.api import create_app, digest
from linearsr.web.service import JobLimits, Limits
from tests.helpers.experts import random_experts
from tests.helpers.local_service import Local, StoreOfTheServer, served

# A result can be too large although each field is in its range, and a model or a job unknown; a
# schema cannot express that.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "404", "413"]
negative_data_rejection.expected-statuses = ["400", "413", "415", "422"]
"""


@pytest.fixture(scope="module")
def tagged(tagged_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    """Return a model that takes tags, so that every field may be sent."""
    folder = tmp_path_factory.mktemp("tagged")
    experts = [model.state_dict() for model in random_experts(tagged_config, 4)]
    weights.save(folder, tagged_config, experts, {}, dtype=torch.float32)
    return Upscaler.load(folder, "cpu")


TOKENS = [None, pytest.param("a-token", marks=pytest.mark.thorough)]


@pytest.mark.parametrize("token", TOKENS, ids=["open", "token"])
def test_server_behaves_as_its_openapi_document_says(
    tagged: Upscaler, tmp_path: Path, token: str | None
) -> None:
    """Schemathesis checks statuses, headers, schemas, the token, and what data is accepted."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    run = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = ["--checks=all", "--max-examples=50", "--seed=1", "--generation-database=none"]
    header = ["--header", f"Authorization: Bearer {token}"] if token else []
    hooks = {
        "SCHEMATHESIS_HOOKS": "tests.helpers.schemathesis_hooks",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    jobs = StoreOfTheServer(Local(tagged), JobLimits(), tmp_path / "jobs")
    with served(Local(tagged), Limits(output_pixels=10_000), token, jobs) as url:
        done = subprocess.run(
            [*run, f"{url}/openapi.json", *options, *header],
            env={**os.environ, **hooks},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Operations:       11 selected / 11 total" in done.stdout


def document(upscaler: Upscaler, token: str | None = None) -> dict[str, Any]:
    client = TestClient(create_app(Local(upscaler), Limits(), digest(token)))
    return client.get("/openapi.json").json()


def test_openapi_document_lists_problems_and_security(small: Upscaler) -> None:
    operation = document(small)["paths"]["/v1/upscale"]["post"]
    problems = {"400", "413", "415", "422", "429", "503", "504"}
    assert operation["responses"].keys() == {"200", "202", *problems}
    for status in problems:
        (kind, content), *others = operation["responses"][status]["content"].items()
        assert kind == "application/problem+json" and not others
        assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
    assert operation["responses"]["429"]["headers"]["Retry-After"]["required"]
    assert "text/event-stream" in operation["responses"]["200"]["content"]
    assert "security" not in operation
    guarded = document(small, "a-token")
    operation = guarded["paths"]["/v1/upscale"]["post"]
    assert operation["responses"].keys() == {"200", "202", "401", *problems}
    assert operation["security"] == [{"HTTPBearer": []}]
    assert guarded["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "security" not in guarded["paths"]["/v1/models"]["get"]


def test_docs_page_loads_nothing_from_other_hosts(small: Upscaler) -> None:
    client = TestClient(create_app(Local(small), Limits()))
    answer = client.get("/docs")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "/openapi.json" in answer.text and "LinearSR" in answer.text
    assert "https:" not in answer.text
    scripts = re.findall(r"(?:src|href)=\"([^\"]+)\"", answer.text)
    assert len(scripts) >= 2
    assert {client.get(script).status_code for script in scripts} == {200}
